"""What the demo's pretraining reads, draws and writes, on a toy of a model."""

import json
import random

import pytest
import torch

from minigpt import GPT, GPTConfig, Tokenizer
from prefix.data.splits import split_of
from prefix.demo import documents, pretrain

WORDS = "chat chien loup ours lapin renard hibou cerf".split()


@pytest.fixture
def files(tmp_path):
    """A table of pairs and a list of sentences; some are held out by their own text, some by their translation's."""
    rows = [
        (f"The {a} {i} sees the {b}.", f"Le {a} {i} voit le {b}.") for i in range(40) for a, b in zip(WORDS, WORDS[1:])
    ]
    (tmp_path / "pairs.tsv").write_text("en\tfr\n" + "".join(f"{a}\t{b}\n" for a, b in rows))
    (tmp_path / "alone.txt").write_text("".join(f"{b}\n" for _, b in rows[::2]))
    return [f"{tmp_path}/pairs.tsv:1", f"{tmp_path}/alone.txt:0.5"]


def test_held_out_sentences_and_their_translations_are_in_no_source(files):
    sources, held_out = documents.read_sources(files)
    trained = {text for rows, _ in sources for row in rows for text in row}
    table = open(files[0][:-2]).read().splitlines()[1:]
    banned = {text for line in table for text in line.split("\t") if {*map(split_of, line.split("\t"))} != {"train"}}
    assert len(banned) > 20 and len(trained) > 400 and not trained & banned
    assert held_out and all(split_of(a) == "validation" for a, _ in held_out)


def test_documents_are_of_one_language_or_of_pairs_or_of_facts(files):
    sources, _ = documents.read_sources(files)
    alone = list(documents.draw_documents(sources, 50, 1.0, 0.0, random.Random(1)))
    assert all("Le" in text and "The" not in text for text in alone)
    pairs = list(documents.draw_documents(sources, 50, 0.0, 0.0, random.Random(1)))
    assert all(text.count("Le ") == text.count("The ") > 0 for text in pairs)
    assert {text.index("Le ") < text.index("The ") for text in pairs} == {True, False}  # both directions


def test_a_renamed_pair_has_the_same_new_names_on_both_sides():
    a, b = documents.rename("Tom met Mary in 1995.", "Tom a rencontré Mary en 1995.", random.Random(1))
    assert "Tom" not in a and "1995" not in a
    assert a.split(" met ")[0] == b.split(" a rencontré ")[0] and a.split(" in ")[1] == b.split(" en ")[1]


def test_each_token_is_to_predict_the_next_one_of_its_document(tokenizer):
    texts = ["Le chat.", "Le chat dort là-bas."]
    short, long = ([*tokenizer.encode(text), tokenizer.eot] for text in texts)
    ((ids, targets, lengths),) = pretrain.batches(texts[::-1], tokenizer)
    assert ids.tolist() == [*short, *long] and lengths == [len(short), len(long)]
    assert targets.tolist() == [*short[1:], -100, *long[1:], -100]


TOY = GPTConfig(300, n_positions=64, n_embd=32, n_layer=1, n_head=1)


def test_a_vocabulary_that_could_not_be_finished_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setattr(pretrain, "CONFIG", TOY)
    monkeypatch.setattr("minigpt.files.flush", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pretrain.build_vocabulary([("The cat.", "Le chat.")], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["merges.txt"]


@pytest.fixture
def toy(monkeypatch, files, tmp_path):
    """Run pretraining of a toy: toy(name, tokens) -> its folder."""
    monkeypatch.setattr(pretrain, "CONFIG", TOY)
    for name, value in dict(BATCH_TOKENS=256, BLOCK=40, LOG_EVERY=0).items():
        monkeypatch.setattr(pretrain, name, value)

    def run(name, tokens):
        options = ["--data", *files, "--out", str(tmp_path / name), "--tokens", str(tokens), "--device", "cpu"]
        monkeypatch.setattr("sys.argv", ["pretrain.py", *options])
        pretrain.main()
        return tmp_path / name

    return run


def test_documents_are_drawn_on_all_cpus_but_one_of_those_that_may_be_used(toy, monkeypatch):
    processes = []
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(pretrain, "DataLoader", lambda *_, num_workers, **__: processes.append(num_workers) or [])
    toy("run", 100)
    assert processes == [3]


@pytest.fixture
def killed(toy, monkeypatch):
    """A run of as many tokens that an error ends in a step, after the state of the one before was written."""

    def run(tokens):
        loss, left = pretrain.Pretraining.loss, iter(range(1, 32))
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(pretrain.Pretraining, "loss", lambda *inputs: loss(*inputs) if next(left, None) else 1 / 0)
            toy("killed", tokens)

    return run


def test_a_run_writes_a_checkpoint_that_loads_and_a_loss_that_falls_and_one_that_is_killed_goes_on_exactly(toy, killed):
    whole = toy("whole", 8000)
    lines = [json.loads(line) for line in open(whole / "log.jsonl")]
    assert lines[-1]["tokens"] >= 8000 and lines[-1]["val_loss"] < lines[0]["val_loss"] - 0.5
    model, tokenizer = GPT.from_pretrained(whole), Tokenizer.from_pretrained(whole)
    assert tokenizer.eot == 299 and model(torch.tensor([tokenizer.encode("Le chat")])).isfinite().all()
    killed(8000)
    folder = toy("killed", 8000)
    for name in ("model.safetensors", "vocab.json", "merges.txt"):
        assert (whole / name).read_bytes() == (folder / name).read_bytes()


def test_a_run_that_goes_on_with_fewer_tokens_cools_down(toy, killed, tmp_path):
    killed(60_000)
    state = torch.load(tmp_path / "killed/state.pt")
    assert state["at"]["step"] >= 3 and state["muon"]["param_groups"][0]["lr"] == pretrain.PEAK
    state = torch.load(toy("killed", 6000) / "state.pt")
    assert 6000 <= state["at"]["tokens"] < 6300 and 0 < state["muon"]["param_groups"][0]["lr"] < 0.2 * pretrain.PEAK
