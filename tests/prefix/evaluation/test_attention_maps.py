"""Looking at what the slots learned."""

import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from conftest import random_model

from minigpt import GPT, GPTConfig, Tokenizer
from minigpt.attention import PackedBatch
from prefix.banks import Banks
from prefix.evaluation import attention_maps
from prefix.init import from_text, random_banks
from prefix.run import DEMO, DEMO_PREFIX

ROOT = Path(__file__).parents[3]
SIZES = dict(vocab_size=50, n_positions=32, n_embd=24, n_layer=3, n_head=2)
OPENED = [1, 1, 1, 3, 3, 2, 0]  # of the banks a, b, c


@pytest.fixture
def model():
    return random_model(GPTConfig(**SIZES), std=0.5)


@pytest.fixture
def banks(model):
    return random_banks(model.config, ["a", "b", "c"], prefix_len=4, seed=int(torch.randint(1000, ())))


@pytest.fixture
def ids():
    return torch.randperm(50)[: len(OPENED)]


def recorded(model, compute):
    """What each layer's c_attn gives while compute() runs."""
    seen = []
    hooks = [block.attn.c_attn.register_forward_hook(lambda *call: seen.append(call[-1].detach())) for block in model.h]
    compute()
    for hook in hooks:
        hook.remove()
    return seen


def test_the_mass_is_what_the_softmax_written_out_gives(model, banks, ids):
    packed = PackedBatch([len(ids)], torch.tensor(OPENED))
    activations = recorded(model, lambda: model.hidden(ids, packed, banks.slots()))
    mass = attention_maps.attention_mass(model, banks, ids, OPENED)
    assert mass.shape == (3, 2, len(ids), 4)
    for i, qkv in enumerate(activations):
        q, k, _ = qkv.double().view(len(ids), 3, 2, 12).unbind(1)
        for head in range(2):
            for t, mask in enumerate(OPENED):
                exp = lambda keys: float((keys.detach().double() @ q[t, head] / math.sqrt(12)).exp().sum())
                expected = [exp(banks.key[bank][i, head]) if mask >> bank & 1 else 0.0 for bank in range(3)]
                expected = torch.tensor([*expected, exp(k[: t + 1, head])])
                expected /= expected.sum()
                torch.testing.assert_close(mass[i, head, t], expected, atol=1e-5, rtol=1e-4)


def test_what_is_looked_at_is_what_the_model_computes(model, banks, ids):
    packed = PackedBatch([len(ids)], torch.tensor(OPENED))
    own = recorded(model, lambda: model.hidden(ids, packed, banks.slots()))
    looked_at = recorded(model, lambda: attention_maps.attention_mass(model, banks, ids, OPENED))
    torch.testing.assert_close(looked_at, own, atol=1e-4, rtol=1e-4)


def test_the_mass_of_a_token_sums_to_one_and_closed_banks_have_exactly_none(model, banks, ids):
    mass = attention_maps.attention_mass(model, banks, ids, OPENED)
    torch.testing.assert_close(mass.sum(dim=-1), torch.ones(3, 2, len(ids)))
    open_ = torch.tensor([[mask >> bank & 1 for bank in range(3)] for mask in OPENED]).bool()
    assert (mass[..., :3][:, :, open_] > 0).all() and (mass[..., :3][:, :, ~open_] == 0).all()


def test_means_are_over_the_tokens_at_which_a_bank_is_open():
    seen = torch.tensor([[True, False], [True, True], [True, False]])
    mass = torch.tensor([[[[0.2, 0.0, 0.8], [0.4, 0.1, 0.5], [0.6, 0.0, 0.4]]]])  # one layer, one head
    attention = attention_maps.Attention(["x", "y", "z"], ["a", "b"], seen, mass)
    torch.testing.assert_close(attention.by_head(0), torch.tensor([[0.4]]))
    torch.testing.assert_close(attention.by_head(1), torch.tensor([[0.1]]))
    torch.testing.assert_close(attention.by_token(0), torch.tensor([[0.2, 0.4, 0.6]]))
    torch.testing.assert_close(attention.by_token(1), torch.tensor([[0.1]]))
    assert [panel.columns for panel in attention_maps.panels(attention)] == [["head 0"], ["x", "y", "z"], ["head 0"], ["y"]]


def test_a_sequence_longer_than_the_context_is_refused(model, banks):
    with pytest.raises(ValueError, match="33 positions are more than this model's context of 32"):
        attention_maps.attention_mass(model, banks, torch.zeros(33, dtype=torch.int64), [1] * 33)


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


def test_what_all_keys_share_changes_neither_the_mass_nor_the_nearest_tokens(model, banks, ids):
    attn_fn = lambda: (
        attention_maps.attention_mass(model, banks, ids, OPENED),
        attention_maps.nearest_tokens(model, banks, ids, PackedBatch([7]), n=3),
    )
    before = attn_fn()
    shared = torch.randn(3, 2, 1, 12)
    for i, block in enumerate(model.h):
        block.attn.c_attn.bias[24:48] += shared[i].flatten()
    for key in banks.key:
        key.data += shared
    after = attn_fn()
    torch.testing.assert_close(after[0], before[0], atol=1e-4, rtol=1e-3)
    for (cosine, _), (cosine_before, _) in zip(after[1], before[1]):
        torch.testing.assert_close(cosine, cosine_before, atol=1e-4, rtol=1e-3)


# The command


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGPT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def looked(run, *options):
    code, out, err = run(attention_maps, DEMO, *options)
    assert code == 0, err
    return out


def test_the_command_shows_the_mass_of_the_sentence_and_of_its_translation(run):
    out = looked(run, "Il pleut & vente.", "--nearest", 0)
    model, tokenizer = GPT.from_pretrained("demo"), Tokenizer.from_pretrained("demo")
    banks = Banks.load(DEMO_PREFIX, model)
    attention = attention_maps.look_at(model, tokenizer, banks, "Il pleut & vente.", "fr", "en")
    sep = attention.tokens.index("\\n")
    assert attention.seen.tolist() == [[i >= sep, True] for i in range(len(attention.tokens))]
    assert len(attention.tokens) > sep + 2  # there is a translation
    heads, tokens = out.split("token by token")
    for bank in (0, 1):
        for row in attention.by_head(bank):
            assert "".join(f"{100 * x:5.0f}" for x in row) in heads
    rows = tokens.splitlines()[-len(attention.tokens) :]
    for token, row, mass in zip(attention.tokens, rows, attention.mass.mean(dim=(0, 1)), strict=True):
        shares = [0.0 if share == "-" else float(share) for share in row.rsplit(maxsplit=3)[1:]]
        assert row.strip().startswith(token) and shares == pytest.approx((100 * mass).tolist(), abs=0.051)
        assert sum(shares) == pytest.approx(100, abs=0.2)


def test_the_direction_is_what_the_options_say(run):
    out = looked(run, "It rains.", "--from", "en", "--to", "fr", "--nearest", 0)
    assert out.splitlines()[0].replace(" ", "").startswith("en->fr:It␣rains.\\nIl␣pleut")


def test_each_slot_of_each_bank_has_its_nearest_tokens_in_every_layer(run):
    out = looked(run, "Il pleut.", "--nearest", 2)
    listed = out.split("nearest token keys")[1]
    assert [f"bank {bank}, slot {slot}\n" in listed for bank in ("en", "fr") for slot in range(10)] == [True] * 20
    assert listed.count("  layer ") == 20 * 6
    line = listed.splitlines()[2].split()
    assert line[:2] == ["layer", "0"] and -1 <= float(line[5]) <= float(line[3]) <= 1


def test_an_svg_has_every_number_and_takes_no_matplotlib(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    looked(run, "<b> & co", "--nearest", 0, "--out", "picture.svg")
    root = ElementTree.parse("picture.svg").getroot()
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    model, tokenizer = GPT.from_pretrained("demo"), Tokenizer.from_pretrained("demo")
    attention = attention_maps.look_at(model, tokenizer, Banks.load(DEMO_PREFIX, model), "<b> & co", "fr", "en")
    expected = []
    for panel in attention_maps.panels(attention):
        expected += [panel.title, *panel.columns]
        for name, row in zip(panel.rows, panel.values):
            expected += [name, *(f"{100 * x:.0f}" for x in row)]
    assert texts == expected and any("<" in text for text in texts) and any("&" in text for text in texts)


def test_a_png_is_a_picture(run):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    looked(run, "Il pleut.", "--nearest", 0, "--out", "picture.png")
    pixels = imread("picture.png")
    assert pixels.shape[0] > 400 and pixels.shape[1] > 300 and pixels.std() > 0.05


@pytest.mark.parametrize(
    "options, words",
    [
        (["Bonjour", "--out", "picture.jpg"], ["--out picture.jpg", ".svg"]),
        (["Bonjour", "--out", "nowhere/picture.svg"], ["--out nowhere/picture.svg"]),
        (["Bonjour", "--from", "de"], ["no bank 'de'"]),
        (["\n "], ["the sentence is empty"]),
        (["mot " * 300], ["leave no room"]),
        (["Bonjour", "--data", "nothing.csv"], ["nothing.csv: no such file"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(run, options, words):
    code, _, err = run(attention_maps, DEMO, *options)
    assert (code, err.count("\n")) == (2, 1), err
    assert all(word in err for word in words), err


@pytest.fixture
def silent(tmp_path):
    """A prefix file with the demo's banks, but no record of what they learned from."""
    model = GPT.from_pretrained("demo")
    banks = Banks.load(DEMO_PREFIX, model)
    banks.training_record = {}
    banks.save(tmp_path / "silent.safetensors", model)
    return tmp_path / "silent.safetensors"


def test_text_for_nearest_tokens_must_be_named_where_the_prefix_has_no_record_of_any(run, silent):
    options = ["--model", "demo", silent, "Il pleut."]
    code, out, err = run(attention_maps, *options)
    assert (code, out, err.count("\n")) == (2, "", 1) and "trained on: name the text with --data" in err
    code, out, err = run(attention_maps, *options, "--nearest", 0)
    assert code == 0 and "nearest token keys" not in out
    code, out, err = run(attention_maps, *options, "--data", "demo", "--nearest", 1)
    assert code == 0 and "nearest token keys" in out, err


def test_the_banks_of_each_of_several_files_have_the_nearest_tokens_that_they_have_alone(run, write):
    model, files = GPT.from_pretrained("demo"), ["en.safetensors", "de.safetensors"]
    for file, names, word in zip(files, (["en", "fr"], ["de", "es"]), ("cat", "Hund")):
        table = write(f"{names[0]}.csv", "\n".join([",".join(names), *(f"{word} {i},{word}" for i in range(9))]))
        banks = random_banks(model.config, names, prefix_len=2)
        banks.training_record = {"model": "demo", "data": [str(table)]}
        banks.save(file, model)

    def nearest(*files):
        code, out, err = run(attention_maps, *files, "Il pleut.", "--nearest", 3)
        assert code == 0, err
        return [part.strip() for part in out.split("nearest token keys")[1:]]

    (one,), (other,) = map(nearest, files)
    assert nearest(*files) == [one, other]


def test_a_png_without_matplotlib_is_refused_in_one_line(run, monkeypatch):
    monkeypatch.setattr(attention_maps.importlib.util, "find_spec", lambda name: None)
    code, out, err = run(attention_maps, DEMO, "Bonjour", "--out", "picture.png")
    assert (code, out, err.count("\n")) == (2, "", 1) and "pip install matplotlib" in err


def test_the_module_runs_by_its_name_and_hides_nothing_of_pythons():
    line = [sys.executable, "-m", "prefix.evaluation.attention_maps", str(DEMO), "Oui.", "--nearest", "0"]
    done = subprocess.run(line, capture_output=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0 and done.stdout.decode().startswith("fr -> en: "), done.stderr


def test_a_token_is_shown_without_what_does_not_print():
    tokenizer = Tokenizer.from_pretrained("demo")
    shown = [attention_maps.label(tokenizer, i) for i in tokenizer.encode(" le\n\x1b\t\u202e")]
    assert "".join(shown).startswith("␣le\\n\\x1b\\t") and all(char.isprintable() for text in shown for char in text)
