"""What a newcomer and a careless user meet: the run directory and how a run goes on, and mistakes in any command."""

import json
import os
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import CONTEXT, TRAIN, assert_refused, random_rows, write_table

import evaluate
import minigpt
import train
import translate
from minigpt import GPT, checkpoint
from prefix import cli, distributed
from prefix import run as runs
from prefix.trainer import Trainer

pytestmark = pytest.mark.usefixtures("workplace")


@pytest.fixture
def on(place):
    """The options of a small training run."""
    return ["--model", place / "base", "--data", place / "en-fr.csv", *TRAIN]


def test_training_leaves_a_run_directory_and_says_what_to_do_next(run, place, on):
    code, out, err = run(train, *on, "--out", "my first run")
    assert (code, out) == (0, "")
    assert set(os.listdir("my first run")) == {"prefix.safetensors", "last", "metrics.jsonl", "config.json"}
    last = err.splitlines()[-1]
    share = 2 * 2 * 2 * 3 * 32 / sum(p.numel() for p in GPT.from_pretrained(place / "base").parameters())
    assert f"Trained {2 * 2 * 2 * 3 * 32:,} parameters ({share:.2%} of the model) in " in last
    assert "my first run/prefix.safetensors" in last
    _, to_try = last.split("Try: python translate.py ")
    code, out, _ = run(translate, *shlex.split(to_try))
    assert (code, out.count("\n")) == (0, 1)


@pytest.mark.parametrize("columns", [["fr", "en"], ["en", "de"], ["en", "de", "fr"]], ids="-".join)
def test_a_french_word_is_to_be_tried_only_where_french_would_be_read(run, place, columns):
    arguments = ["--model", place / "base", "--data", place / "en-fr-de.csv", "--columns", *columns, *TRAIN]
    code, _, err = run(train, *arguments, "--out", "my run")
    assert code == 0 and err.endswith("Try: python evaluate.py --prefix 'my run'\n")


def test_the_config_of_a_run_is_the_command_with_its_defaults_filled_in(place):
    config = json.loads((place / "run" / "config.json").read_text())
    assert config["model"] == str(place / "base") and config["data"] == [str(place / "en-fr.csv")]
    assert (config["columns"], config["prefix_len"], config["max_tokens"]) == (["en", "fr"], 3, 384)
    assert {"steps": 3, "batch_size": 4, "warmup": 0, "eval_every": 1, "seed": 0}.items() <= config["settings"].items()


def test_of_several_processes_the_first_alone_says_which_model_is_used(place, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "on_disk", lambda name: None)
    monkeypatch.setattr("sys.argv", ["train.py", "--data", str(place / "en-fr.csv")])
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        assert runs.resolve(train.parse_arguments())["model"] == "demo"
        assert capsys.readouterr().err.count("Using the small demo checkpoint") == (rank == 0)


def test_without_out_every_run_gets_a_directory_of_its_own_even_in_the_same_second(run, on, monkeypatch):
    times = iter(["now", "now", "now", "later"])
    monkeypatch.setattr("prefix.run.time.strftime", lambda _: next(times))
    assert [run(train, *on)[0] for _ in range(2)] == [0, 0]
    assert sorted(path.name for path in Path("runs").iterdir()) == ["later", "now"]


def test_a_directory_that_is_not_empty_is_refused_and_stays_as_it_is(run, on):
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    assert_refused(run(train, *on, "--out", "mine"), "--out mine", "not empty", "--resume mine")
    assert [path.read_text() for path in Path("mine").iterdir()] == ["years of work"]


@pytest.mark.parametrize(
    "mistake, words",
    [
        (["--prefix-len", "0"], ["--prefix-len", "'0'", "1 or more"]),
        (["--prefix-len", "9" * 13, "--init", "random"], ["--prefix-len", "too large: 65,536 at most"]),
        (["--batch-size", "9" * 9], ["--batch-size", "at most"]),
        (["--steps", "²"], ["--steps", "'²'"]),
        (["--lr", "nan"], ["--lr", "'nan'", "above 0"]),
        (["--seed", "9" * 30], ["--seed", "too large"]),
        (["--no-such-option"], ["unrecognized argument --no-such-option"]),
        (["more"], ["unrecognized argument more"]),
        (["--data", "nothing.csv"], ["nothing.csv", "no such file"]),
        (["--data", "."], ["not a regular file"]),
        (["--columns", "en", "de"], ["no column 'de'", "'en', 'fr'"]),
        (["--model", "gpt9"], ["--model gpt9", "gpt2-xl"]),
        (["--model", "."], ["config.json"]),
        (["--max-tokens", "3"], ["no row that can be used", "(over 3 tokens)"]),
        (["--resume", "nothing"], ["--resume"]),
        (["--save-every", "1m"], ["--save-every", "'1m'"]),
        (["--save-every", "0"], ["--save-every", "'0'"]),
        (["--device", "cuda"], ["--device cuda", "--device cpu"]),
        (["--device", "mps"], ["--device mps", "--device cpu"]),
    ],
    ids=lambda value: " ".join(value)[:30],
)
def test_a_mistake_is_one_line_and_exit_code_2_and_leaves_no_run_directory(run, on, monkeypatch, mistake, words):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert_refused(run(train, *on, "--out", "new", *mistake), *words)
    assert not Path("new").exists()


def test_without_training_pairs_there_is_one_line_and_no_run_directory(run, on):
    for split in ("validation", "test"):
        table = write_table("small.csv", [("en", "fr"), *random_rows(split, 2)])
        assert_refused(run(train, *on, "--data", table, "--out", "new"), "no training pair", "more data")
    assert not Path("new").exists()


def test_pairs_longer_than_the_context_are_left_out_and_counted(run, on):
    long = [[f"{'word ' * 200}{i}", "mot"] for i in range(3)]
    table = write_table("long.csv", [("en", "fr"), *random_rows("train", 5), *long])
    code, _, err = run(train, *on, "--data", table)
    assert code == 0 and f"3 rows skipped: too long (over {CONTEXT} tokens) (first at line 7)" in err


def test_columns_that_are_left_out_unasked_are_named(run, place, on):
    line = [*on, "--data", place / "en-fr-de.csv"]
    assert "Columns not used: de (--columns" in run(train, *line)[2]
    assert "not used" not in run(train, *line, "--columns", "en", "fr")[2]


# train.py --resume


def test_a_run_may_go_on_for_more_steps_but_not_otherwise_than_it_began(run, place):
    shutil.copytree(place / "run", "run")
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    assert_refused(run(train, "--resume", "run", "--lr", "1"), "--lr cannot be new")
    assert_refused(run(train, "--resume", "run", "--steps", 2), "3 steps are done already", "--steps 2")
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before
    assert run(train, "--resume", "run", "--steps", 5, "--save-every", "9s")[0] == 0
    assert json.loads(Path("run/config.json").read_text())["settings"]["save_every"] == "9s"
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4, 5]


def test_micro_batches_are_those_that_a_run_began_with_unless_told_otherwise(run, on, monkeypatch):
    found, work = [], Trainer.run
    monkeypatch.setattr(
        Trainer, "run", lambda trainer: (found.append(trainer.batches.micro_batch_tokens), work(trainer))[1]
    )
    for arguments in ([*on, "--out", "run", "--micro-batch-tokens", 50], ["--resume", "run"]):
        assert run(train, *arguments)[0] == 0
    assert run(train, "--resume", "run", "--steps", 5, "--micro-batch-tokens", 70)[0] == 0
    assert run(train, "--resume", "run")[0] == 0
    assert found == [50, 50, 70, 50]


@pytest.mark.parametrize("content", [None, "{", "[1]", "{}"])
def test_a_run_directory_without_a_sound_config_is_refused(run, content):
    Path("run").mkdir()
    if content:
        Path("run/config.json").write_text(content)
    assert_refused(run(train, "--resume", "run"), "run/config.json")


# All commands


@pytest.mark.parametrize("script", [train, translate, evaluate], ids=lambda script: script.__name__)
def test_every_option_has_a_text_with_its_default(script, monkeypatch):
    found = []
    monkeypatch.setattr(cli.Parser, "parse_args", lambda parser: found.append(parser) or sys.exit())
    with pytest.raises(SystemExit):
        script.parse_arguments()
    for action in found[0]._actions:
        default = action.default
        told = f"({default}" if isinstance(default, (int, str)) and default is not False else "("
        if action.dest not in ("help", "version") and (default or script is not evaluate):
            assert told in action.help, action.dest


@pytest.mark.parametrize("script", [train, translate, evaluate], ids=lambda script: script.__name__)
def test_the_version_is_the_projects_and_torchs(run, script):
    told = f"{minigpt.__version__}, torch {torch.__version__}\n"
    assert run(script, "--version") == (0, told, "")


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), MemoryError(), torch.OutOfMemoryError("CUDA out of memory.\nOf")],
    ids=repr,
)
def test_a_full_disk_and_too_little_memory_are_one_line(run, on, monkeypatch, error):
    monkeypatch.setattr("prefix.init.random_banks", lambda *_: (_ for _ in ()).throw(error))
    result = run(train, *on, "--init", "random", "--out", "new")
    assert_refused(result, str(error).split("\n")[0] or "out of memory")
    assert not Path("new").exists()


def test_too_little_main_memory_is_one_line(run, on, monkeypatch):
    monkeypatch.setattr("prefix.init.random_banks", lambda *_: torch.empty(1 << 50))
    assert_refused(run(train, *on, "--init", "random"), "allocate")


def test_a_bug_is_not_taken_for_a_users_mistake(run, monkeypatch):
    def fail():
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(train, "main", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run(train)
