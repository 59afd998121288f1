"""What comes from outside while a run goes on: kill -9, signals, a full disk, a second run, a directory that is gone."""

import itertools
import json
import multiprocessing
import os
import pkgutil
import random
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_refused, content_of_all, metrics
from safetensors import SafetensorError, safe_open

import train
from minigpt.files import locked
from prefix import cli, state
from prefix.state import METRICS
from prefix.trainer import Trainer

pytestmark = pytest.mark.usefixtures("workplace")
ROOT = Path(__file__).parents[2]
STEPS = 12
OPTIONS = f"--steps {STEPS} --batch-size 4 --prefix-len 3 --eval-every 3 --save-every 2 --device cpu --dtype float32"
torch.set_num_threads(1)
p = torch.nn.Parameter(torch.zeros(1))  # what torch imports late is imported now, once for all forks
p.sum().backward()
torch.optim.AdamW([p]).step()
LINE, STATE, FLUSH = "prefix.trainer.Trainer.log", "prefix.state.save_file", "minigpt.files.flush"


def train_until(arguments, home, said, moment):
    """train.py, in a process of its own, which writes to the file `said`. moment: None, or (a function, "before",
    "after" or in the middle of ("half") its call of that number, the signal that the process then gets)."""
    os.environ["MINIGPT_HOME"] = home
    for stream in (1, 2):
        os.dup2(os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    sys.modules["matplotlib"] = None
    sys.argv = ["train.py", *arguments]
    if moment:
        end_at(*moment)
    with cli.cli_errors():
        train.main()


def end_at(function, when, number, sign):
    owner, _, name = function.rpartition(".")
    owner, count = pkgutil.resolve_name(owner), itertools.count(1)
    work = getattr(owner, name)

    def deadly(*arguments):
        mine = next(count) == number
        if mine and when == "before":
            os.kill(os.getpid(), sign)
        result = work(*arguments)
        if mine and when == "half":
            os.truncate(arguments[1], os.path.getsize(arguments[1]) // 2)
        if mine:
            os.kill(os.getpid(), sign)
        return result

    setattr(owner, name, deadly)


@pytest.fixture(scope="module")
def fork(place, tmp_path_factory):
    """A function: the arguments of train.py, and a moment for train_until -> (exit code, what it wrote). A code below 0
    is the signal that ended it. All processes are forks of one that has imported this file."""
    context, said = multiprocessing.get_context("forkserver"), tmp_path_factory.mktemp("said") / "said.txt"
    context.set_forkserver_preload([__name__])

    def fork(arguments, moment=None):
        said.unlink(missing_ok=True)
        words = list(map(str, arguments)), str(place / "home"), str(said), moment
        process = context.Process(target=train_until, args=words)
        process.start()
        process.join()
        return process.exitcode, said.read_text()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        yield fork


@pytest.fixture(scope="module")
def begin(place):
    """A function: a directory -> the arguments of a run into it, or, if it was begun, those that go on with it."""

    first = ["--model", place / "base", "--data", place / "en-fr.csv", *OPTIONS.split(), "--out"]
    return lambda out: ["--resume", out] if (out / "config.json").exists() else [*first, out]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run"


@pytest.fixture(scope="module")
def whole(begin, fork, tmp_path_factory):
    """The directory of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    code, said = fork(begin(out))
    assert code == 0, said
    return out


def content_of(path):
    """(metadata without the seconds, tensors) of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        metadata = {name: json.loads(text) for name, text in file.metadata().items() if name != "format"}
        metadata.get("progress", {}).pop("seconds", None)
        return metadata, {name: file.get_tensor(name) for name in file.keys()}


def assert_same_end(run, whole):
    """All that two runs left is the same, bit for bit, but for the seconds."""
    assert metrics(run) == metrics(whole)
    assert (run / "config.json").read_text() == (whole / "config.json").read_text()
    for name in ("prefix.safetensors", "last/state.safetensors"):
        (metadata, tensors), (expected_metadata, expected) = (content_of(out / name) for out in (run, whole))
        assert metadata == expected_metadata and tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert not list(run.rglob(".*"))  # no temporary file is left


def assert_whole_files(run):
    """No file is half written under its own name."""
    for path in run.rglob("*.safetensors"):
        assert content_of(path)
    if (run / "config.json").exists():
        json.loads((run / "config.json").read_text())


MOMENTS = [(FLUSH, "before"), (STATE, "half"), (LINE, "after"), ("os.replace", "after"), ("os.replace", "before")]
MOMENTS += [("prefix.prefix_file.save_file", "half"), ("prefix.trainer.Trainer.save", "after")]


def test_a_run_killed_inside_its_saves_ends_as_if_it_had_not_been(fork, begin, whole, out):
    for i, moment in enumerate(MOMENTS):  # the first two before anything is saved
        code, said = fork(begin(out), (*moment, random.randint(1, 2) if i > 1 else 1, signal.SIGKILL))
        assert code == -signal.SIGKILL, (moment, said)
        assert_whole_files(out)
    assert fork(begin(out))[0] == 0
    assert_same_end(out, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_save_and_say_how_to_go_on(fork, begin, whole, out, number):
    code, said = fork(begin(out), (LINE, "after", 2, number))
    assert code == 128 + number
    stopped, to_do = said.splitlines()[-1].split("; to go on: python train.py ")
    assert stopped == "stopped after step 3"
    assert content_of(out / "last" / "state.safetensors")[0]["progress"]["step"] == 3
    assert fork(shlex.split(to_do))[0] == 0
    assert_same_end(out, whole)


def assert_ends_with_one_line(result, *words):
    """After notices."""
    code, out, said = result
    *notices, error = said.splitlines()
    assert_refused((code, out, f"{error}\n"), "error: ", *words)
    assert not any(line.startswith(("error", "Traceback")) for line in notices), said


def test_a_run_is_left_alone_by_a_second_one_that_goes_on_or_begins_there(run, begin, whole, out):
    beginning = begin(out)
    shutil.copytree(whole, out)
    before = content_of_all(out)
    with locked(out / METRICS):
        more = ["--resume", out, "--steps", STEPS + 1]
        assert_ends_with_one_line(run(train, *more), out, "another process is at work there")
    assert_ends_with_one_line(run(train, *beginning), out, "not empty")
    assert content_of_all(out) == before


def test_on_a_full_disk_a_run_ends_with_one_line_and_goes_on_when_there_is_room(run, begin, whole, out, monkeypatch):
    room, save_file = iter([True, True]), state.save_file

    def until_full(tensors, path, *more):
        save_file(tensors, path, *more)
        if not next(room, False):
            os.truncate(path, 100)
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(state, "save_file", until_full)
        told = ["state.safetensors: cannot be written: No space left on device", f"--resume {out}"]
        assert_ends_with_one_line(run(train, *begin(out)), *told)
    assert_whole_files(out)
    assert run(train, "--resume", out)[0] == 0
    assert_same_end(out, whole)


def test_a_run_whose_directory_is_deleted_ends_with_one_line_and_does_not_make_it_again(run, begin, out, monkeypatch):
    save = Trainer.save

    def deleted(trainer):
        shutil.rmtree(out)
        save(trainer)

    monkeypatch.setattr(Trainer, "save", deleted)
    assert_ends_with_one_line(run(train, *begin(out)), out, "No such file or directory")
    assert not out.exists()


def test_every_test_that_the_table_of_faults_names_is_there():
    table = (ROOT / "tests" / "FAULTS.md").read_text(encoding="utf-8")
    faults = [line for line in table.splitlines() if line.startswith("| ") and not line.startswith("| fault |")]
    named = [pair for line in faults for pair in re.findall(r"`(test_\w+\.py)::(test_\w+)`", line)]
    there = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    assert len(named) >= len(faults) > 80
    assert not [f"{file}::{test}" for file, test in named if f"\ndef {test}(" not in there.get(file, "")]
