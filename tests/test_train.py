"""train.py as a whole: what it would take, and a bank learned beside others that stay."""

import itertools
import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_refused, metrics, random_rows, same, write_table
from safetensors.torch import load_file

import train
from minigpt import GPT
from prefix import distributed
from prefix.banks import Banks


@pytest.fixture(autouse=True)
def here(workplace, place, tmp_path):
    """The current folder: a checkpoint `base` and a table t.csv of English, French and German."""
    (tmp_path / "base").symlink_to(place / "base")
    (tmp_path / "t.csv").symlink_to(place / "en-fr-de.csv")


OPTIONS = "--model base --data t.csv --steps 3 --batch-size 4 --device cpu".split()


def test_german_is_added_to_a_trained_english_and_french_that_stay_bit_for_bit(run):
    assert run(train, *OPTIONS, "--prefix-len", 3, "--columns", "en", "fr", "--out", "two")[0] == 0
    more = ["--columns", "en", "fr", "de", "--from-prefix", "two", "--train-banks", "de", "--prefix-len", 4]
    said = run(train, *OPTIONS, *more, "--out", "three")[2]
    assert "/prefix.safetensors keep their 3 slots\n" in said
    assert "Training de on 48 examples" in said  # en -> fr and fr -> en have nothing to train
    model = GPT.from_pretrained("base")
    two, three = Banks.load("two", model), Banks.load("three", model)
    assert three.names == ["en", "fr", "de"] and three.prefix_len == [3, 3, 4]
    for before, after in zip(two.key_values(), three.key_values()):
        assert all(map(torch.equal, before, after))
    assert three.training_record["train_banks"] == ["de"]
    other = ["--data", write_table("other.csv", [("one", "two"), *random_rows("train", 4)]), "--columns", "one", "two"]
    assert_refused(run(train, *OPTIONS, *other, "--from-prefix", "two"), "prefix.safetensors has no bank of one, two, but en, fr")
    assert run(train, "--resume", "three", "--steps", 5)[0] == 0
    resumed = Banks.load("three", model)
    assert all(map(torch.equal, resumed.key_values()[0], two.key_values()[0]))
    assert not torch.equal(resumed.key[2], three.key[2])


def test_only_the_pairs_that_are_named_are_trained_and_both_files_say_so(run):
    code, _, said = run(train, *OPTIONS, "--pairs", "en:fr", "fr:de", "--out", "some", "--eval-every", 0)
    assert code == 0 and "Training en, fr, de on 24 examples" in said and "not validated" in said
    assert "on 24 examples" in run(train, *OPTIONS, "--pairs", "en:fr", "fr:de", "en:fr", "--out", "twice")[2]
    assert json.loads(Path("some/config.json").read_text())["pairs"] == ["en:fr", "fr:de"]
    assert Banks.load("some", GPT.from_pretrained("base")).training_record["pairs"] == ["en:fr", "fr:de"]


def test_a_dry_run_says_what_a_run_would_take_and_writes_no_run(run, monkeypatch):
    code, out, _ = run(train, *OPTIONS, "--dry-run", "--out", "new", "--steps", 1500)
    assert code == 0 and "Banks en, fr; directions en -> fr, fr -> en\n" in out
    assert "Rows: 19; examples: 24, and 4 to validate on\nA step: 4 examples, about" in out
    assert "micro-batches: 1\nSteps: 1,500; each example comes 250 times\n" in out
    assert "Memory: about" in out and "Time: about" in out
    assert sorted(path.name for path in Path().iterdir()) == ["base", "t.csv"]
    monkeypatch.setattr(distributed, "rank", lambda: 1)  # of several processes one prints
    assert run(train, *OPTIONS, "--dry-run") == (0, "", "")


def test_a_run_that_went_wrong_says_so_at_its_end_and_what_to_try(run, monkeypatch):
    """Without test sentences, evaluate.py is nothing to try."""
    monkeypatch.setattr(train.Trainer, "validation_loss", lambda trainer, base=False: 1.0 if base else 2.0)
    table = write_table("few.csv", [("fr", "eng"), *random_rows("train", 1), *random_rows("validation", 1)])
    said = run(train, *OPTIONS, "--data", table, "--prefix-len", 2, "--out", "wrong")[2]
    assert "on 2 examples" in said and said.endswith("Try: python translate.py --prefix wrong\n")
    assert said.count("Warning: ") == said.count("Try a third of --lr, or more --steps") == 1
    monkeypatch.setattr(train.Trainer, "validation_loss", lambda trainer, base=False: 2.0 if base else 1.0)
    said = run(train, *OPTIONS, "--data", table, "--prefix-len", 2, "--out", "far", "--lr", 100, "--warmup", 0)[2]
    assert "Warning: a slot moved by " in said and "Try a third of --lr" in said


def test_of_several_rates_the_best_trains_as_if_alone_also_where_trials_and_choice_were_interrupted(run, monkeypatch):
    losses, steps, step = {1e-4: math.nan, 0.3: 2.5, 0.2: 2.0}, itertools.count(1), train.Trainer.optimizer_step
    monkeypatch.setattr(train.Trainer, "validation_loss", lambda trainer, base=False: losses[trainer.settings.lr])

    def signalled(trainer, batch):
        if next(steps) == 23:  # in the second trial
            os.kill(os.getpid(), signal.SIGINT)
        return step(trainer, batch)

    def killed(source, target, **options):
        shutil.copytree(source, target, **options)
        os.truncate(target / "last/state.safetensors", 1000)
        sys.exit(9)

    options = [*OPTIONS, "--steps", 21, "--prefix-len", 2, "--columns", "en", "fr", "--lr"]
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "optimizer_step", signalled)
        assert run(train, *options, *losses, "--out", "stopped")[0] == 130
        patch.setattr("prefix.rates.shutil", SimpleNamespace(copytree=killed, Error=shutil.Error))
        assert run(train, "--resume", "stopped")[0] == 9
    code, _, said = run(train, "--resume", "stopped")
    assert code == 0 and "Going on with --lr 0.2\n" in said
    assert all(f"--lr {rate:g}: validation loss {loss:.4f} after 20 of 21 steps\n" in said for rate, loss in losses.items())
    assert all(len(metrics(f"stopped/lr-{rate:g}")[0]) == 20 for rate in losses)
    assert json.loads(Path("stopped/config.json").read_text())["settings"]["lr"] == 0.2
    assert run(train, *options, 0.2, "--out", "alone")[0] == 0
    stopped, alone = (load_file(f"{name}/last/state.safetensors") for name in ("stopped", "alone"))
    assert same(stopped, alone) and metrics("stopped") == metrics("alone")
    stopped, alone = (Banks.load(name, GPT.from_pretrained("base")) for name in ("stopped", "alone"))
    assert stopped.training_record == alone.training_record
    assert all(map(torch.equal, stopped.parameters(), alone.parameters()))


def test_a_rate_whose_numbers_are_not_finite_is_left_out_and_one_is_needed_that_is(run, monkeypatch):
    loss = train.Trainer.loss
    monkeypatch.setattr(train.Trainer, "loss", lambda t, *batch: loss(t, *batch) * (math.nan if t.settings.lr > 9 else 1))
    options = [*OPTIONS, "--steps", 12, "--prefix-len", 2, "--columns", "en", "fr", "--lr"]
    code, _, said = run(train, *options, 10, 0.3, "--out", "one")
    assert code == 0 and "--lr 10.0: step 10: 10 steps in a row were not finite" in said and "Going on with --lr 0.3\n" in said
    code, _, said = run(train, *options, 10, 11, "--out", "none")
    assert code == 2 and said.endswith("error: none of these --lr gives finite numbers: try lower ones\n")


def test_trials_go_on_only_with_as_many_steps_and_a_signal_in_their_last_save_is_heard(run, monkeypatch):
    save = train.Trainer.save

    def signalled(trainer):
        save(trainer)
        if trainer.progress.step == 25:  # the end of a trial
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "save", signalled)
        options = ["--steps", 250, "--prefix-len", 2, "--columns", "en", "fr", "--lr", 0.1, 0.3]
        code, _, said = run(train, *OPTIONS, *options, "--out", "run")
        assert code == 130 and "stopped after step 25; to go on: python train.py --resume run" in said
    config = Path("run/config.json").read_bytes()
    code, _, said = run(train, "--resume", "run", "--steps", 100)
    assert code == 2 and "25 steps were tried already: --steps cannot be fewer now; to go on: " in said
    assert Path("run/config.json").read_bytes() == config
