"""What the slots learned: where attention goes, which tokens a slot is like, what closing does."""

import csv
import math
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import assert_refused, projected, random_model, random_rows, write_table

from minigpt import GPTConfig
from minigpt.attention import PackedBatch
from minigpt.backends import attend
from minigpt.generate import Prompt, generate
from prefix.banks import Banks
from prefix.data.splits import split_of
from prefix.evaluation import attention_maps
from prefix.evaluation.attention_maps import without
from prefix.evaluation.metrics import METRICS
from prefix.init import from_text, random_banks
from prefix.run import DEMO, DEMO_CORPUS, DEMO_PREFIX
from prefix.translation import translate

CONFIG = GPTConfig(vocab_size=50, n_positions=32, n_embd=24, n_layer=3, n_head=2)
MASKS = [1, 1, 1, 3, 3, 2, 0]  # of the banks a, b, c
pytestmark = pytest.mark.usefixtures("workplace")


@pytest.fixture
def model():
    return random_model(CONFIG, std=0.5)


@pytest.fixture
def banks(model):
    return random_banks(CONFIG, ["a", "b", "c"], prefix_len=4, seed=int(torch.randint(1000, ())))


@pytest.fixture
def ids():
    return torch.randperm(50)[: len(MASKS)]


def test_the_mass_is_what_the_softmax_written_out_gives(model, banks, ids):
    packed, banks.position_offset = PackedBatch([len(ids)], torch.tensor(MASKS)), 3
    layers = projected(model, lambda: model.hidden(ids, packed, banks.slots(), 3)).double()
    mass = attention_maps.attention_mass(model, banks, ids, packed)
    assert mass.shape == (3, 2, len(ids), 4)
    for i, qkv in enumerate(layers):
        q, k, _ = qkv.unbind(1)
        for head in range(2):
            for t, mask in enumerate(MASKS):
                exp = lambda keys: float((keys.detach().double() @ q[t, head] / math.sqrt(12)).exp().sum())
                expected = [exp(banks.key[bank][i, head]) if mask >> bank & 1 else 0.0 for bank in range(3)]
                expected = torch.tensor([*expected, exp(k[: t + 1, head])])
                expected /= expected.sum()
                assert (mass[i, head, t][expected == 0] == 0).all()  # of closed banks
                torch.testing.assert_close(mass[i, head, t], expected, atol=1e-5, rtol=1e-4)


def test_the_tables_are_means_over_the_tokens_at_which_a_bank_is_open_and_over_heads():
    seen = torch.tensor([[True, False, False], [True, True, False], [True, False, False]])
    mass = torch.tensor([[[[0.2, 0.0, 0.0, 0.8], [0.4, 0.1, 0.0, 0.5], [0.6, 0.0, 0.0, 0.4]]]])
    mass = torch.cat([mass, torch.tensor([0.0, 0.0, 0.0, 1.0]).expand(1, 1, 3, 4)], dim=1)  # one layer, two heads
    tables = attention_maps.Attention(["x", "y", "z"], ["a", "b", "c"], seen, mass).tables()
    assert [title[:6] for title, _ in tables] == ["bank a", "bank b", "token "]
    assert [[" ".join(row) for row in rows] for _, rows in tables] == [
        ["layer h0 h1 mean", "0 40.0 0.0 20.0"],
        ["layer h0 h1 mean", "0 10.0 0.0 5.0"],
        ["token a b text", "x 10.0 0.0 90.0", "y 20.0 5.0 75.0", "z 30.0 0.0 70.0"],
    ]


def test_slots_read_off_a_text_are_nearest_to_that_texts_own_tokens(model):
    ids = torch.randperm(50)[:12]
    banks = from_text(model, {"a": ids[:5].tolist()}, prefix_len=5)
    found = attention_maps.nearest_tokens(model, banks, ids, PackedBatch([5, 7]), n=3)
    assert len(found) == 3
    for cosine, tokens in found:
        assert tokens[:, 0].tolist() == ids[:5].tolist()
        torch.testing.assert_close(cosine[:, 0], torch.ones(5))
        assert (cosine[:, 1:] < 0.999).all() and (cosine.diff(dim=1) <= 0).all()


def test_a_token_counts_once_where_it_is_nearest(model, banks):
    ids = torch.tensor([7, 8, 7, 9, 7])
    for cosine, tokens in attention_maps.nearest_tokens(model, banks, ids, PackedBatch([5]), n=3):
        assert all(sorted(row) == [7, 8, 9] for row in tokens.tolist())
    alone = attention_maps.nearest_tokens(model, banks, ids[2:], PackedBatch([3]), n=1)
    assert all(set(tokens.flatten().tolist()) <= {7, 9} for _, tokens in alone)


def test_what_all_keys_have_in_common_does_not_change_the_nearest_tokens(model, banks, ids):
    look = lambda: [cosine for cosine, _ in attention_maps.nearest_tokens(model, banks, ids, PackedBatch([7]), n=3)]
    before, common = look(), torch.randn(3, 2, 1, 12)
    for i, block in enumerate(model.h):
        block.attn.c_attn.bias[24:48] += common[i].flatten()
    for key in banks.key:
        key.data += common
    torch.testing.assert_close(look(), before, atol=1e-4, rtol=1e-3)


def looked(run, *options):
    code, out, err = run(attention_maps, DEMO, *options)
    assert code == 0, err
    return out


def test_the_command_shows_and_draws_the_mass_of_the_sentence_and_of_its_translation(run, demo):
    pytest.importorskip("matplotlib")
    out = looked(run, "Il pleut.", "--nearest", 0, "--out", "picture.svg")
    attention = attention_maps.look_at(*demo, "Il pleut.", ("fr", "en"))
    sep, tables = attention.tokens.index("\\n"), attention.tables()
    assert attention.seen.tolist() == [[i >= sep, True] for i in range(len(attention.tokens))]
    assert len(attention.tokens) > sep + 2 and out.startswith("fr -> en: Il")  # there is a translation
    for title, lines in tables:
        shown = out.split(title + "\n")[1].splitlines()
        assert [line.split() for line in shown[: len(lines)]] == lines
    drawn = Path("picture.svg").read_text(encoding="utf-8")  # matplotlib writes each text as a comment by its shape
    assert drawn.count("<!-- ") == sum(len(lines) * len(lines[0]) for _, lines in tables)


def test_of_a_sentence_longer_than_the_context_the_beginning_is_looked_at(demo):
    attention = attention_maps.look_at(*demo, "mot " * 500, ("fr", "en"), "word")
    assert len(attention.tokens) == demo[0].config.n_positions


def test_without_matplotlib_the_text_is_there_and_one_notice(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = run(attention_maps, DEMO, "Bonjour", "--nearest", 0, "--out", "picture.png")
    assert (code, err.count("\n")) == (0, 1) and "pip install matplotlib" in err and out.startswith("fr -> en: ")


@pytest.mark.parametrize("options, words", [
    (["Bonjour", "--out", "picture.jpg"], "--out picture.jpg: not an .svg or .png"),
    (["Bonjour", "--out", "nowhere/picture.svg"], "--out nowhere/picture.svg"),
    (["Bonjour", "--from", "de"], "no bank 'de'"),
    (["\n "], "the sentence is empty"),
    (["mot " * 300], "leave no room"),
    (["Bonjour", "--data", "nothing.csv"], "nothing.csv: No such file"),
    (["Bonjour", "--ablate", "--nearest", 0, "--data", "train.csv"], "train.csv: no test sentences from fr to en"),
])  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(run, options, words):
    write_table("train.csv", [("en", "fr"), *random_rows("train", 2)])
    assert_refused(run(attention_maps, DEMO, *options), words)


def test_each_slot_has_its_nearest_tokens_in_every_layer_of_text_that_the_record_or_data_names(run, demo):
    banks = Banks.load(DEMO_PREFIX)
    banks.training_record = {}
    banks.save("silent.safetensors", demo[0])
    options = ["--model", "demo", "silent.safetensors", "Il pleut.", "--nearest", 2]
    code, out, err = run(attention_maps, *options)
    assert (code, out, err.count("\n")) == (2, "", 1) and "no one text that they were trained on: name some with --data" in err
    listed = run(attention_maps, *options, "--data", "demo")[1].split("nearest token keys")[1]
    assert [f"bank {bank}, slot {slot}\n" in listed for bank in ("en", "fr") for slot in range(10)] == [True] * 20
    assert listed.count("  layer ") == 20 * 6
    line = listed.splitlines()[2].split()
    assert line[:2] == ["layer", "0"] and -1 <= float(line[5]) <= float(line[3]) <= 1


def test_a_token_is_shown_without_control_characters(demo):
    _, tokenizer, _ = demo
    shown = "".join(attention_maps.label(tokenizer, i) for i in tokenizer.encode(" le\n\x1b\t\u202e"))
    assert shown.startswith("␣le\\n\\x1b\\t") and shown.isprintable()


def layer_by_layer(model, banks, ids, bank_mask, closed):
    """The logits of a model whose layer `closed` is given no slots."""
    packed, slots = PackedBatch([len(ids)], torch.tensor(bank_mask)), banks.slots().layers()
    attn_fn = lambda i, qkv: attend(qkv, 2, packed, None if i == closed else slots[i])
    return model.logits(model.blocks(model.embed(ids, packed.position), attn_fn))


@pytest.mark.parametrize("layer, backend", [(0, "auto"), (1, "plain"), (2, "auto")])
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
    assert not torch.allclose(expected, layer_by_layer(model, banks, ids, MASKS, None), atol=1e-3, rtol=0)


def test_a_closed_bank_is_one_that_is_never_opened_and_the_others_stay(model, banks, ids):
    ours = without(banks, bank="a").logits(model, ids[None], open=("a", "c"))
    assert torch.equal(ours, banks.logits(model, ids[None], open=("c",)))
    assert banks.mask(["a", "c"]) == 5  # the banks themselves are as they were


def test_closing_says_what_becomes_of_the_sentence_and_of_bleu(run, demo):
    pytest.importorskip("matplotlib")
    with open(DEMO_CORPUS, encoding="utf-8") as file:
        pairs = list(islice((row for row in csv.reader(file) if split_of(row[0]) == "test" and row[0] != "en"), 6))
    table, figures = write_table("held-out.csv", [["en", "fr"], *pairs]), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_maps.pictures, "save", lambda figure, path: figures.append((figure, path)))
        out = looked(run, "Il pleut.", "--nearest", 0, "--ablate", "--data", table, "--out", "bars.svg")
    ((figure, path),) = figures
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    title, _, *lines = out.split("what closing does: ")[1].splitlines()
    model, tokenizer, banks = demo
    closed = {"nothing": banks, "bank fr": without(banks, bank="fr"), "bank en": without(banks, bank="en")}
    closed |= {f"layer {i}": without(banks, layer=i) for i in range(6)}
    mass = attention_maps.look_at(model, tokenizer, banks, "Il pleut.", ("fr", "en")).mass
    scores = []
    for line, (name, part) in zip(lines, closed.items(), strict=True):
        texts = ["Il pleut.", *(fr for _, fr in pairs)]
        output, *outputs = (result.text for result in translate(model, tokenizer, part, texts, ("fr", "en")))
        scores.append(METRICS["bleu"](outputs, [[en] for en, _ in pairs]))
        share = [f"{100 * (1 - mass[int(name[-1]), ..., -1].mean()):.1f}"] if "layer" in name else []
        numbers = [f"{scores[-1]:.2f}", f"{scores[-1] - scores[0]:+.2f}", *share]
        assert line.split() == [*name.split(), *numbers, *output.split()]
    assert title.startswith("BLEU on 6 sentences") and len({*scores}) > 3
    assert heights == pytest.approx(scores, abs=0.005) and str(path) == "bars.svg"
