"""What comes from outside while a run goes on: kill -9, signals, a full disk, a second run, a directory that is gone.

The commands run in processes of their own. They are forks of one that has imported everything, which saves two seconds
each. Such a process can be told to kill itself at a chosen point, such as the second time that it renames a file."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import random_rows, save_random_checkpoint, write_table
from safetensors import safe_open

import train
from minigpt import UserError
from minigpt.files import locked
from prefix import cli
from prefix.state import METRICS
from prefix.trainer import Trainer

ROOT = Path(__file__).parents[2]
STEPS = 12
SECONDS = 0.1  # about what they take
OPTIONS = f"--steps {STEPS} --batch-size 4 --prefix-len 3 --eval-every 3 --save-every 2 --device cpu --dtype float32"

FORKS = """
import itertools, json, os, resource, signal, sys, time, traceback
sys.path.insert(0, {root!r})
import torch
import evaluate, train
from minigpt import files
from prefix import cli, prefix_file, state, trainer

torch.set_num_threads(1)
sys.modules["matplotlib"] = None  # the picture of the loss takes longer than these runs
POINTS = {{
    "a state is half written": (state, "save_file", "half"),
    "a prefix is half written": (prefix_file, "save_file", "half"),
    "a file is not yet flushed": (files, "flush", "before"),
    "a file is flushed": (files, "flush", "after"),
    "a file is not yet renamed": (os, "replace", "before"),
    "a file is renamed": (os, "replace", "after"),
    "a line is written": (trainer.Trainer, "log", "after"),
    "a prefix is kept": (trainer.Trainer, "keep_prefix", "after"),
    "a state is saved": (trainer.Trainer, "save", "after"),
}}


p = torch.nn.Parameter(torch.zeros(1))  # what torch imports late is imported now, once for all
p.sum().backward()
torch.optim.AdamW([p]).step()


def end_at(point, number, with_signal):
    owner, name, when = POINTS[point]
    work, calls = getattr(owner, name), itertools.count(1)

    def deadly(*arguments):
        last = next(calls) == number
        if last and when == "before":
            os.kill(os.getpid(), with_signal)
        result = work(*arguments)
        if last and when == "half":
            os.truncate(arguments[1], os.path.getsize(arguments[1]) // 2)
        if last and when != "before":
            os.kill(os.getpid(), with_signal)
        return result

    setattr(owner, name, deadly)


def run(job, begun):
    with open(job["out"], "wb", buffering=0) as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    script, *sys.argv = job["script"], job["script"] + ".py", *job["arguments"]
    if job["largest"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest"], job["largest"]))
    if job["at"]:
        end_at(*job["at"], job["signal"])
    log = trainer.Trainer.log
    trainer.Trainer.log = lambda *arguments: (log(*arguments), os.write(begun, b"."))
    code = 0
    try:
        with cli.cli_errors():
            {{"train": train, "evaluate": evaluate}}[script].main()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


for line in sys.stdin:
    job = json.loads(line)
    line_is_written, begun = os.pipe()
    if not (child := os.fork()):
        run(job, begun)
    os.close(begun)
    if job["after"] is not None:
        os.read(line_is_written, 1)  # or the run is at its end
        time.sleep(job["after"])
        os.kill(child, job["signal"])
    os.close(line_is_written)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a checkpoint `base` and the table en-fr.csv."""
    place = tmp_path_factory.mktemp("faults")
    save_random_checkpoint(place / "base")
    write_table(place / "en-fr.csv", [("en", "fr"), *random_rows("train", 12), *random_rows("validation", 3)])
    return place


@pytest.fixture(scope="module")
def forks(place):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MINIGPT_HOME": str(place / "home"), "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, "-c", FORKS.format(root=str(ROOT))]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, env=environment, cwd=place) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def run(forks, tmp_path):
    """A function: a script and its arguments -> (exit code, what it wrote). A code below 0 is the signal that ended it.

    at: a point, and the how manieth time that it sends itself `signal` there. after: the seconds after its first line of metrics when
    it gets `signal`. largest: the bytes that a file may have."""

    def run(script, *arguments, at=None, after=None, signal=9, largest=None):
        out = tmp_path / "out.txt"
        job = dict(script=script, arguments=[str(a) for a in arguments], out=str(out))
        job |= dict(at=at, after=after, signal=signal, largest=largest)
        forks.stdin.write(json.dumps(job) + "\n")
        forks.stdin.flush()
        return int(forks.stdout.readline()), out.read_text()

    return run


@pytest.fixture
def run_here(monkeypatch, place):
    """A function: arguments of train.py -> its exit code. It runs in this process."""

    def run_here(*arguments):
        monkeypatch.setenv("MINIGPT_HOME", str(place / "home"))
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        try:
            with cli.cli_errors():
                train.main()
        except SystemExit as end:
            return end.code
        return 0

    return run_here


@pytest.fixture(scope="module")
def begin(place):
    """The arguments of a run into a directory."""
    return lambda out: ["--model", place / "base", "--data", place / "en-fr.csv", *OPTIONS.split(), "--out", out]


@pytest.fixture(scope="module")
def whole(place, begin, forks, tmp_path_factory):
    """The directory of a run that nothing disturbed."""
    out = place / "whole"
    job = dict(script="train", arguments=[str(a) for a in begin(out)], out=str(place / "out.txt"))
    job |= dict(at=None, after=None, signal=None, largest=None)
    forks.stdin.write(json.dumps(job) + "\n")
    forks.stdin.flush()
    assert forks.stdout.readline() == "0\n", (place / "out.txt").read_text()
    return out


def content_of(path):
    """(metadata without the seconds, tensors) of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        metadata = {name: json.loads(text) for name, text in file.metadata().items() if name != "format"}
        metadata.get("progress", {}).pop("seconds", None)
        return metadata, {name: file.get_tensor(name) for name in file.keys()}


def saved_step(run):
    return content_of(run / "last" / "state.safetensors")[0]["progress"]["step"]


def lines_of(run):
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def assert_same_end(run, whole):
    """All that two runs left is the same, bit for bit, but for the seconds."""
    assert lines_of(run) == lines_of(whole)
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


def begin_or_go_on(begin, out):
    return ["--resume", out] if (out / "config.json").exists() else begin(out)


# kill -9


def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(run, begin, whole, tmp_path):
    runs, kills, progress = 0, 0, 0  # progress: the kills after which there was more to go on from than the start
    while kills < 6 or not progress:
        out = tmp_path / f"run{runs}"
        code, said = run("train", *begin_or_go_on(begin, out), after=random.uniform(0, SECONDS))
        assert code in (-9, 0), said
        assert_whole_files(out)
        if code == 0:  # it was faster: another one is begun
            assert_same_end(out, whole)
            runs += 1
        else:
            kills += 1
            progress += 0 < saved_step(out) < STEPS
        assert runs < 20 and kills < 50
    out = tmp_path / f"run{runs}"
    assert run("train", *begin_or_go_on(begin, out))[0] == 0
    assert_same_end(out, whole)


def test_a_run_killed_inside_its_saves_ends_as_if_it_had_not_been(run, begin, whole, tmp_path):
    out = tmp_path / "run"
    points = ["a line is written", "a file is not yet flushed", "a file is renamed", "a state is half written"]
    points += ["a prefix is kept", "a file is not yet renamed", "a prefix is half written", "a state is saved"]
    for point in points:
        code, said = run("train", *begin_or_go_on(begin, out), at=(point, random.randint(1, 2)))
        assert code == -9, (point, said)
        assert_whole_files(out)
    assert run("train", *begin_or_go_on(begin, out))[0] == 0
    assert_same_end(out, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_save_and_say_how_to_go_on(run, begin, whole, tmp_path, number):
    out = tmp_path / "run"
    code, said = run("train", *begin(out), at=("a line is written", 2), signal=number)
    assert code == 128 + number
    stopped, to_do = said.splitlines()[-1].split("; to go on: python train.py ")
    assert stopped == "stopped after step 3" and saved_step(out) == 3
    assert run("train", *shlex.split(to_do))[0] == 0
    assert_same_end(out, whole)


def test_a_run_killed_before_its_first_save_is_begun_again(run, begin, whole, tmp_path):
    out = tmp_path / "run"
    assert run("train", *begin(out), at=("a file is not yet flushed", 1))[0] == -9  # its config.json is not there yet
    assert run("train", "--resume", out)[0] == 2
    assert run("train", *begin(out), at=("a state is half written", 1))[0] == -9
    assert run("train", "--resume", out)[0] == 0
    assert_same_end(out, whole)


def test_the_pace_of_saving_is_in_steps_or_seconds_and_may_be_new(run_here, begin, tmp_path):
    out = tmp_path / "run"
    for wrong in ("0", "1m", "-1s", "s", "1e3s"):
        assert run_here(*begin(out), "--save-every", wrong) == 2 and not out.exists()
    assert run_here(*begin(out), "--save-every", "9999s") == 0
    assert run_here("--resume", out, "--steps", STEPS + 5, "--save-every", 2) == 0
    assert json.loads((out / "config.json").read_text())["settings"]["save_every"] == 2


# Two runs


def one_line(result, *words):
    """Exit code 2, and one line of error after the notices, which has these words."""
    code, said = result
    notices, error = said.splitlines()[:-1], said.splitlines()[-1]
    assert code == 2 and error.startswith("error: ") and all(str(word) in error for word in words), said
    assert not any(line.startswith(("error", "Traceback")) for line in notices), said


def test_a_run_is_left_alone_by_a_second_one_that_goes_on_or_begins_there(run, begin, whole, tmp_path):
    out = tmp_path / "run"
    assert run("train", *begin(out), at=("a line is written", 3))[0] == -9  # which held the lock, too
    (tmp_path / "new").mkdir()
    before = all_of(out)
    with locked(out / METRICS), locked(tmp_path / "new" / METRICS):
        for arguments in (["--resume", out], begin(tmp_path / "new")):
            one_line(run("train", *arguments), arguments[-1], "another process is at work there")
    assert all_of(out) == before and not all_of(tmp_path / "new")[tmp_path / "new" / METRICS]
    one_line(run("train", *begin(out)), out, "not empty")
    assert run("train", "--resume", out)[0] == 0
    assert_same_end(out, whole)


def test_a_run_holds_its_lock_from_before_it_writes_until_its_end(run_here, begin, tmp_path, monkeypatch):
    out, found = tmp_path / "run", []

    def note(*_):
        with pytest.raises(UserError, match="another process"), locked(out / METRICS):
            pass
        found.append(sorted(path.name for path in out.iterdir()))

    for name in ("optimizer_step", "keep_prefix", "save"):
        watched = getattr(Trainer, name)
        monkeypatch.setattr(Trainer, name, lambda *a, watched=watched: (note(), watched(*a))[1])
    assert run_here(*begin(out)) == 0 and len(found) > STEPS
    with locked(out / METRICS):
        pass


# Where nothing can be written


def all_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_on_a_full_disk_a_run_ends_with_one_line_and_goes_on_when_there_is_room(run, begin, whole, tmp_path):
    out = tmp_path / "run"
    assert run("train", *begin(out), at=("a line is written", 5))[0] == -9
    before = all_of(out)
    room = (out / "last" / "state.safetensors").stat().st_size - 1  # for all but the states
    one_line(run("train", "--resume", out, largest=room), "state.safetensors: cannot be written", f"--resume {out}")
    after = all_of(out)
    assert all(after[path] == content for path, content in before.items() if path.name != METRICS)
    assert_whole_files(out)
    assert run("train", "--resume", out)[0] == 0
    assert_same_end(out, whole)


def test_on_a_disk_without_room_for_a_line_of_metrics_a_run_ends_with_one_line(run, begin, whole, tmp_path):
    out = tmp_path / "run"
    one_line(run("train", *begin(out), "--steps", 100, largest=12_000), f"{METRICS}: cannot be written")
    assert_whole_files(out)
    assert run("train", "--resume", out)[0] == 0
    assert [line["step"] for line in lines_of(out) if "loss" in line] == list(range(1, 101))


@pytest.fixture
def small_disk(tmp_path):
    """A function: options of mount -> a folder on a disk of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options="size=64k"):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip() or done.returncode}")
        return disk

    yield mount
    if disk.is_mount():
        subprocess.run(["umount", disk], check=True)


def test_on_a_disk_of_64_kib_every_command_ends_with_one_line_and_harms_nothing(run, begin, whole, small_disk, place):
    disk = small_disk()
    (disk / "result.json").write_text("yesterday's")
    (disk / "thesis.txt").write_text("years of work" * 4000)
    before = all_of(disk)
    one_line(run("train", *begin(disk / "run")), "No space left on device", disk)
    assert before.items() <= all_of(disk).items()
    assert_whole_files(disk)
    with suppress(OSError):
        (disk / "filler").write_bytes(b"x" * 64 * 1024)
    before = all_of(disk)
    evaluation = ["--prefix", whole, "--split", "validation", "--draws", 0, "--json", disk / "result.json"]
    one_line(run("evaluate", *evaluation), "result.json: cannot be written: No space left on device")
    assert all_of(disk) == before


def test_in_a_read_only_folder_every_command_ends_with_one_line(run, begin, whole, small_disk):
    disk = small_disk("size=1m")
    shutil.copytree(whole, disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    for arguments in (begin(disk / "new"), ["--resume", disk / "run", "--steps", STEPS + 1]):
        one_line(run("train", *arguments), "Read-only file system", disk)
    evaluation = ["--prefix", disk / "run", "--split", "validation", "--draws", 0, "--json", disk / "result.json"]
    one_line(run("evaluate", *evaluation), "result.json: cannot be written: Read-only file system")


@pytest.mark.parametrize("work", ["optimizer_step", "validate", "save"])
def test_a_run_whose_directory_is_deleted_ends_with_one_line_and_does_not_make_it_again(
    run_here, begin, tmp_path, monkeypatch, capsys, work
):
    out, watched = tmp_path / "run", getattr(Trainer, work)

    def deleted(trainer, *arguments):
        if trainer.progress.step == 3:
            shutil.rmtree(out)
        return watched(trainer, *arguments)

    monkeypatch.setattr(Trainer, work, deleted)
    assert run_here(*begin(out), "--save-every", 1) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {out}") and error.endswith("cannot be written: No such file or directory")
    assert not out.exists()


# The table


def test_every_test_that_the_table_of_faults_names_is_there():
    table = (ROOT / "tests" / "FAULTS.md").read_text(encoding="utf-8")
    faults = [line for line in table.splitlines() if line.startswith("| ") and not line.startswith("| fault |")]
    named = [re.search(r"\| `(test_\w+\.py)::(test_\w+)` \|$", line).groups() for line in faults]
    there = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    assert len(named) > 20
    assert not [f"{file}::{test}" for file, test in named if f"\ndef {test}(" not in there.get(file, "")]
