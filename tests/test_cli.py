"""What a newcomer and a careless user meet: the run directory and how a run goes on, and mistakes in any command."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CONTEXT, TRAIN, assert_refused, content_of_all, random_rows, write_table

import evaluate
import train
import translate
from minigpt import GPT
from prefix import cli

pytestmark = pytest.mark.usefixtures("workplace")


@pytest.fixture
def on(place):
    """The options of a small training run."""
    return ["--model", place / "base", "--data", place / "en-fr.csv", *TRAIN]


def test_training_leaves_a_run_directory_and_says_what_to_do_next(run, place, on):
    Path("base").symlink_to(place / "base")
    code, out, err = run(train, *on, "--model", "base", "--out", "my first run")
    assert (code, out) == (0, "")
    assert set(os.listdir("my first run")) == {"prefix.safetensors", "last", "metrics.jsonl", "config.json"}
    last = err.splitlines()[-1]
    share = 768 / sum(p.numel() for p in GPT.from_pretrained(place / "base").parameters())
    assert f"Trained 768 parameters ({share:.2%} of the model) in " in last and "my first run/prefix.safetensors" in last
    assert last.endswith("Try: python evaluate.py --prefix 'my first run'")
    config = json.loads(Path("my first run/config.json").read_text())  # the command with its defaults filled in
    assert config["model"] == str(place / "base") and config["data"] == [str(place / "en-fr.csv")]
    assert (config["columns"], config["prefix_len"], config["max_tokens"]) == (["en", "fr"], 3, 384)
    assert {"steps": 3, "batch_size": 4, "warmup": 0, "eval_every": 1, "seed": 0}.items() <= config["settings"].items()


def test_a_directory_that_is_not_empty_is_refused_and_stays_as_it_is(run, on):
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    assert_refused(run(train, *on, "--out", "mine"), "--out mine", "not empty", "--resume mine")
    assert [path.read_text() for path in Path("mine").iterdir()] == ["years of work"]


@pytest.mark.parametrize("mistake, words", [
    (["--prefix-len", "0"], ["--prefix-len", "'0'", "from 1 to 4,096"]),
    (["--steps", "0"], ["--steps", "'0'", "1 or more"]),
    (["--batch-size", "9" * 9], ["--batch-size", "from 1 to"]),
    (["--lr", "nan"], ["--lr", "'nan'", "above 0"]),
    (["--lr", "0"], ["--lr", "'0'", "above 0"]),
    (["--seed", "9" * 30], ["--seed", "whole number"]),
    (["--batch", "4"], ["unrecognized arguments: --batch"]),
    (["--data", "nothing.csv"], ["nothing.csv", "No such file"]),
    (["--columns", "en", "de"], ["no column 'de'", "'en', 'fr'"]),
    (["--pairs", "en-fr"], ["--pairs", "'en-fr' is not a pair SOURCE:TARGET"]),
    (["--model", "gpt9"], ["--model gpt9", "gpt2-xl"]),
    (["--max-tokens", "3"], ["no row that can be used", "(over 3 tokens)"]),
    (["--device", "cuda"], ["--device cuda", "--device cpu"]),
    (["--train-banks", "en", "--reparam"], ["--reparam moves all banks"]),
    (["--out", "/dev/null/new"], ["error: /dev/null/new: Not a directory\n"]),
    (["--train-banks", "en"], ["--train-banks leaves fr untrained"]),
], ids=lambda value: " ".join(value)[:30])  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2_and_leaves_no_run_directory(run, on, mistake, words):
    assert_refused(run(train, *on, "--out", "new", *mistake), *words)
    assert not Path("new").exists()


def test_several_rates_without_validation_pairs_are_one_line_and_leave_no_run_directory(run, on):
    table = write_table("few.csv", [("en", "fr"), *random_rows("train", 5)])
    assert_refused(run(train, *on, "--data", table, "--lr", 0.1, 0.3, "--out", "new"), "validation pairs", "give one --lr")
    assert not Path("new").exists()


def test_pairs_longer_than_the_context_are_left_out_and_counted(run, on):
    long = [[f"{'word ' * 200}{i}", "mot"] for i in range(3)]
    table = write_table("long.csv", [("en", "fr"), *random_rows("train", 5), *long])
    code, _, err = run(train, *on, "--data", table, "--dry-run")
    assert code == 0 and f"3 rows skipped: too long (over {CONTEXT} tokens) (first at line 7)" in err


def test_a_run_may_not_go_on_otherwise_than_it_began(run, place):
    shutil.copytree(place / "run", "run")
    before = content_of_all("run")
    assert_refused(run(train, "--resume", "run", "--lr", "1", "--seed", 0), "--lr, --seed cannot be new")
    assert_refused(run(train, "--resume", "run", "--steps", 2), "3 steps are done already", "--steps 2")
    told = "run is finished, all 3 steps are done; to go on: python train.py --resume run --steps N\n"
    assert run(train, "--resume", "run") == (0, "", told) and content_of_all("run") == before


# All commands


@pytest.mark.parametrize("script", [train, translate, evaluate], ids=lambda script: script.__name__)
def test_every_option_has_a_text_with_its_default(script, monkeypatch):
    found = []
    monkeypatch.setattr(cli.Parser, "parse_args", lambda parser: found.append(parser) or sys.exit())
    with pytest.raises(SystemExit):
        script.parse_arguments()
    for action in found[0]._actions[1:]:  # without --help
        default = action.default
        told = f"({default}" if isinstance(default, (int, str)) and default is not False else "("
        assert told in action.help or (script is evaluate and not default), action.dest


@pytest.mark.parametrize("script", ["train", "translate", "evaluate"])
def test_ctrl_c_while_torch_is_imported_is_quiet(script, write):
    fake = write("torch.py", "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    line = [sys.executable, Path(train.__file__).with_name(f"{script}.py")]
    done = subprocess.run(line, capture_output=True, env=os.environ | {"PYTHONPATH": str(fake.parent)}, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")  # a shell calls it 130


def test_ctrl_c_in_a_command_is_one_word(run, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    monkeypatch.setattr(translate, "main", lambda: os.kill(os.getpid(), signal.SIGINT))
    try:
        assert run(translate) == (130, "", "stopped\n")
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("error", [
    OSError(28, "No space left on device"), MemoryError(), torch.OutOfMemoryError("CUDA out of memory.\nOf"),
], ids=repr)  # fmt: skip
def test_a_full_disk_and_too_little_memory_are_one_line(run, on, monkeypatch, error):
    monkeypatch.setattr("prefix.init.random_banks", lambda *_: (_ for _ in ()).throw(error))
    result = run(train, *on, "--init", "random", "--out", "new")
    assert_refused(result, str(error).split("\n")[0] or "out of memory")
    assert not Path("new").exists()


def test_a_bug_is_not_taken_for_a_users_mistake(run, monkeypatch):
    monkeypatch.setattr(train, "main", lambda: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        run(train)
