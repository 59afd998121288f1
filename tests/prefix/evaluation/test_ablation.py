"""Closing a bank or a layer's slots is what it says, and so is what it does to the output."""

import csv
from itertools import islice

import pytest
import torch
from conftest import random_model, write_table

from minigpt import GPT, GPTConfig, Tokenizer
from minigpt.attention import PackedBatch, attend
from minigpt.generate import Prompt, generate
from prefix.banks import Banks
from prefix.data.splits import split_of
from prefix.evaluation import attention_maps
from prefix.evaluation.ablation import Ablation, without
from prefix.evaluation.metrics import METRICS
from prefix.evaluation.pictures import draw_ablation
from prefix.init import random_banks
from prefix.run import DEMO, DEMO_CORPUS, DEMO_PREFIX
from prefix.translation import translate

CONFIG = GPTConfig(vocab_size=50, n_positions=32, n_embd=24, n_layer=3, n_head=2)
MASKS = [1, 1, 1, 3, 3, 2, 0]  # of the banks a, b, c


@pytest.fixture
def model():
    return random_model(CONFIG, std=0.5)


@pytest.fixture
def banks():
    return random_banks(CONFIG, ["a", "b", "c"], prefix_len=4)


@pytest.fixture
def ids():
    return torch.randperm(50)[: len(MASKS)]


def layer_by_layer(model, banks, ids, bank_mask, closed):
    """The logits of a model whose layer `closed` is given no slots."""
    packed, slots = PackedBatch([len(ids)], torch.tensor(bank_mask)), banks.slots().layers()
    attn_fn = lambda i, qkv: attend(qkv, 2, packed, None if i == closed else slots[i])
    return model.logits(model.blocks(model.embed(ids, packed.position), attn_fn))


@pytest.mark.parametrize("backend", ["auto", "plain"])
@pytest.mark.parametrize("layer", range(3))
def test_a_closed_layer_is_one_without_slots_in_a_forward_pass_and_in_decoding(model, banks, ids, layer, backend):
    model.attention, slots = backend, without(banks, layer=layer).slots()
    hidden = model.hidden(ids, PackedBatch([len(ids)], torch.tensor(MASKS)), slots)
    expected = layer_by_layer(model, banks, ids, MASKS, layer)
    torch.testing.assert_close(model.logits(hidden), expected, atol=1e-4, rtol=1e-4)
    prompt, tokens, masks = ids[:4].tolist(), ids[:4].tolist(), [2, 2, 2, 6]  # the first bank stays closed
    for _ in range(6):
        mask = masks + [6] * (len(tokens) - 4)
        tokens.append(int(layer_by_layer(model, banks, torch.tensor(tokens), mask, layer)[-1].argmax()))
    (found,) = generate(model, [Prompt(prompt, 6, masks)], [], slots)
    assert prompt + found.ids == tokens
    assert not torch.allclose(expected, layer_by_layer(model, banks, ids, MASKS, None), atol=1e-2)


def test_a_closed_bank_is_one_that_is_never_opened_and_the_others_stay(model, banks, ids):
    ours = without(banks, bank="a").logits(model, ids[None], open=("a", "c"))
    assert torch.equal(ours, banks.logits(model, ids[None], open=("c",)))
    assert banks.mask(["a", "c"]) == 5  # the banks themselves are as they were


@pytest.fixture
def held_out(tmp_path, monkeypatch):
    """A table of 6 test pairs of the sample corpus, in an empty folder."""
    monkeypatch.setenv("MINIGPT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    with open(DEMO_CORPUS, encoding="utf-8") as file:
        pairs = list(islice((row for row in csv.reader(file) if split_of(row[0]) == "test" and row[0] != "en"), 6))
    return write_table("held-out.csv", [["en", "fr"], *pairs]), pairs


def test_closing_says_what_becomes_of_the_sentence_and_of_bleu(run, held_out):
    table, pairs = held_out
    options = ["--nearest", 0, "--ablate", "--data", table, "--out", "bars.svg"]
    code, out, _ = run(attention_maps, DEMO, "Il pleut.", *options)
    assert code == 0
    head, *lines = out.split("what closing does: ")[1].splitlines()
    assert head.startswith("BLEU on 6 sentences")
    model, tokenizer = GPT.from_pretrained("demo"), Tokenizer.from_pretrained("demo")
    banks = Banks.load(DEMO_PREFIX, model)
    closed = {"nothing": banks, "bank fr": without(banks, bank="fr"), "bank en": without(banks, bank="en")}
    closed |= {f"layer {i}": without(banks, layer=i) for i in range(6)}
    mass = attention_maps.look_at(model, tokenizer, banks, "Il pleut.", ("fr", "en")).mass
    scores = []
    for line, (name, part) in zip(lines, closed.items(), strict=True):
        texts = ["Il pleut.", *(fr for _, fr in pairs)]
        output, *outputs = (result.text for result in translate(model, tokenizer, part, texts, "fr", "en"))
        scores.append(METRICS["bleu"](outputs, [en for en, _ in pairs]))
        numbers = [f"{scores[-1]:.2f}"] + [f"{scores[-1] - scores[0]:+.2f}"] * (name != "nothing")
        numbers += [f"{100 * (1 - mass[int(name[-1]), ..., -1].mean()):.1f}"] if "layer" in name else []
        assert line.split() == [*name.split(), *numbers, *output.split()]
    assert len({*scores}) > 3


def test_what_closing_does_is_a_bar_for_each(tmp_path):
    figure = pytest.importorskip("matplotlib.figure").Figure
    heights = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            figure,
            "savefig",
            lambda self, file, **_: heights.extend(bar.get_height() for bar in self.axes[0].patches) or file.touch(),
        )
        draw_ablation([Ablation("nothing", "", 30.0, 5), Ablation("layer 0", "", 12.5, 5)], tmp_path / "bars.png")
    assert heights == [30.0, 12.5]
