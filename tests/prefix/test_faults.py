"""What comes from outside while a run goes on: kill -9, signals, a full disk, a second run, a directory that is gone.

The commands run in processes of their own: forks of one that has imported everything, which saves two seconds each."""

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
from safetensors import safe_open

import train
from minigpt import UserError
from minigpt.files import locked
from prefix.state import METRICS
from prefix.trainer import Trainer

pytestmark = pytest.mark.usefixtures("workplace")
ROOT = Path(__file__).parents[2]
STEPS = 12
SECONDS = 0.1  # about what they take
OPTIONS = f"--steps {STEPS} --batch-size 4 --prefix-len 3 --eval-every 3 --save-every 2 --device cpu --dtype float32"

SERVER = """
import itertools, json, os, pkgutil, resource, signal, sys, traceback
sys.path.insert(0, {root!r})
import torch
import evaluate, train
from prefix import cli, trainer

torch.set_num_threads(1)
sys.modules["matplotlib"] = None  # the picture of the loss takes longer than these runs
p = torch.nn.Parameter(torch.zeros(1))  # what torch imports late is imported now, once for all
p.sum().backward()
torch.optim.AdamW([p]).step()


def call(name, then):
    owner, _, name = name.rpartition(".")
    owner = pkgutil.resolve_name(owner)
    work, count = getattr(owner, name), itertools.count(1)
    setattr(owner, name, lambda *arguments: then(work, arguments, next(count)))


def end_at(name, when, number):
    def deadly(work, arguments, n):
        if n == number and when == "before":
            os.kill(os.getpid(), job["signal"])
        result = work(*arguments)
        if n == number and when == "half":
            os.truncate(arguments[1], os.path.getsize(arguments[1]) // 2)
        if n == number:
            os.kill(os.getpid(), job["signal"])
        return result

    call(name, deadly)


def end_after(seconds):  # the first line; nothing handles this alarm: it ends the process at once, as kill -9 does
    clock = lambda work, arguments, n: (work(*arguments), n == 1 and signal.setitimer(signal.ITIMER_REAL, seconds))
    call("prefix.trainer.Trainer.log", clock)


def run():
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    out = os.open(job["out"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(out, 1), os.dup2(out, 2)
    script, *sys.argv = job["script"], job["script"] + ".py", *job["arguments"]
    if job["largest"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest"], job["largest"]))
    if job["at"]:
        end_at(*job["at"])
    if job["after"] is not None:
        end_after(job["after"])
    with cli.cli_errors():
        {{"train": train, "evaluate": evaluate}}[script].main()


for line in sys.stdin:
    job = json.loads(line)
    if not (child := os.fork()):
        code = 0
        try:
            run()
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def fork(place, tmp_path_factory):
    """A function: a script and its arguments -> (exit code, what it wrote). A code below 0 is the signal that ended it.

    at: (a function, "before", "after" or "half", the how manieth call): where it sends itself `signal`. after: the
    seconds after its first line of metrics when it is killed. largest: the bytes that a file may have."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MINIGPT_HOME": str(place / "home"), "CUDA_VISIBLE_DEVICES": ""}
    words, pipe = [sys.executable, "-c", SERVER.format(root=str(ROOT))], subprocess.PIPE
    out = tmp_path_factory.mktemp("out") / "out.txt"
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, env=environment, cwd=place) as server:

        def fork(script, *arguments, at=None, after=None, signal=9, largest=None):
            job = dict(script=script, arguments=[str(a) for a in arguments], out=str(out))
            server.stdin.write(json.dumps(job | dict(at=at, after=after, signal=signal, largest=largest)) + "\n")
            server.stdin.flush()
            return int(server.stdout.readline()), out.read_text()

        yield fork
        server.stdin.close()


@pytest.fixture(scope="module")
def begin(place):
    """A function: a directory -> the arguments of a run into it, or, if it was begun, those that go on with it."""

    def begin(out):
        if (out / "config.json").exists():
            return ["--resume", out]
        return ["--model", place / "base", "--data", place / "en-fr.csv", *OPTIONS.split(), "--out", out]

    return begin


@pytest.fixture(scope="module")
def whole(begin, fork, tmp_path_factory):
    """The directory of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    code, said = fork("train", *begin(out))
    assert code == 0, said
    return out


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run"


def content_of(path):
    """(metadata without the seconds, tensors) of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        metadata = {name: json.loads(text) for name, text in file.metadata().items() if name != "format"}
        metadata.get("progress", {}).pop("seconds", None)
        return metadata, {name: file.get_tensor(name) for name in file.keys()}


def saved_step(run):
    return content_of(run / "last" / "state.safetensors")[0]["progress"]["step"]


def lines_of(run):
    return [json.loads(line) | {"seconds": None} for line in (run / METRICS).read_text().splitlines()]


def all_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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


def assert_one_line(result, *words):
    """Exit code 2, and one line of error after the notices, which has these words."""
    code, said = result
    *notices, error = said.splitlines()
    assert code == 2 and error.startswith("error: ") and all(str(word) in error for word in words), said
    assert not any(line.startswith(("error", "Traceback")) for line in notices), said


# kill -9


def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(fork, begin, whole, tmp_path):
    runs, kills, progress = 0, 0, 0  # progress: the kills after which there was more to go on from than the start
    while kills < 6 or not progress:
        out = tmp_path / f"run{runs}"
        code, said = fork("train", *begin(out), after=random.uniform(0, SECONDS))
        assert code in (-signal.SIGALRM, 0), said
        assert_whole_files(out)
        if code == 0:  # it was faster: another one is begun
            assert_same_end(out, whole)
            runs += 1
        else:
            kills += 1
            progress += 0 < saved_step(out) < STEPS
        assert runs < 20 and kills < 50
    out = tmp_path / f"run{runs}"
    assert fork("train", *begin(out))[0] == 0
    assert_same_end(out, whole)


LINE, STATE, FLUSH = "prefix.trainer.Trainer.log", "prefix.state.save_file", "minigpt.files.flush"
MOMENTS = [(LINE, "after"), (FLUSH, "before"), ("os.replace", "after"), (STATE, "half"), ("os.replace", "before")]
MOMENTS += [("prefix.trainer.Trainer.keep_prefix", "after"), ("prefix.prefix_file.save_file", "half")]
MOMENTS += [("prefix.trainer.Trainer.save", "after")]


def test_a_run_killed_inside_its_saves_ends_as_if_it_had_not_been(fork, begin, whole, out):
    for moment in MOMENTS:
        code, said = fork("train", *begin(out), at=(*moment, random.randint(1, 2)))
        assert code == -9, (moment, said)
        assert_whole_files(out)
    assert fork("train", *begin(out))[0] == 0
    assert_same_end(out, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_save_and_say_how_to_go_on(fork, begin, whole, out, number):
    code, said = fork("train", *begin(out), at=(LINE, "after", 2), signal=number)
    assert code == 128 + number
    stopped, to_do = said.splitlines()[-1].split("; to go on: python train.py ")
    assert stopped == "stopped after step 3" and saved_step(out) == 3
    assert fork("train", *shlex.split(to_do))[0] == 0
    assert_same_end(out, whole)


def test_a_run_killed_before_its_first_save_is_begun_again(fork, begin, whole, out):
    assert fork("train", *begin(out), at=(FLUSH, "before", 1))[0] == -9  # its config.json is not there yet
    assert fork("train", "--resume", out)[0] == 2
    assert fork("train", *begin(out), at=(STATE, "half", 1))[0] == -9
    assert fork("train", "--resume", out)[0] == 0
    assert_same_end(out, whole)


# Two runs


def test_a_run_is_left_alone_by_a_second_one_that_goes_on_or_begins_there(fork, begin, whole, out, tmp_path):
    beginning, new = begin(out), tmp_path / "new"
    assert fork("train", *beginning, at=(LINE, "after", 3))[0] == -9  # which held the lock, too
    new.mkdir()
    before = all_of(out)
    with locked(out / METRICS), locked(new / METRICS):
        for arguments in (["--resume", out], begin(new)):
            assert_one_line(fork("train", *arguments), arguments[-1], "another process is at work there")
    assert all_of(out) == before and all_of(new) == {new / METRICS: b""}
    assert_one_line(fork("train", *beginning), out, "not empty")
    assert fork("train", "--resume", out)[0] == 0
    assert_same_end(out, whole)


def test_a_run_holds_its_lock_from_before_it_writes_until_its_end(run, begin, out, monkeypatch):
    found = []

    def note(*_):
        with pytest.raises(UserError, match="another process"), locked(out / METRICS):
            pass
        found.append(1)

    for name in ("optimizer_step", "keep_prefix", "save"):
        watched = getattr(Trainer, name)
        monkeypatch.setattr(Trainer, name, lambda *a, watched=watched: (note(), watched(*a))[1])
    assert run(train, *begin(out))[0] == 0 and len(found) > STEPS
    with locked(out / METRICS):
        pass


# Where nothing can be written


def test_on_a_full_disk_a_run_ends_with_one_line_and_goes_on_when_there_is_room(fork, begin, whole, out):
    assert fork("train", *begin(out), at=(LINE, "after", 5))[0] == -9
    before = all_of(out)
    room = (out / "last" / "state.safetensors").stat().st_size - 1  # for all but the states
    told = ["state.safetensors: cannot be written", f"--resume {out}"]
    assert_one_line(fork("train", "--resume", out, largest=room), *told)
    after = all_of(out)
    assert all(after[path] == content for path, content in before.items() if path.name != METRICS)
    assert_whole_files(out)
    assert fork("train", "--resume", out)[0] == 0
    assert_same_end(out, whole)


def test_on_a_disk_without_room_for_a_line_of_metrics_a_run_ends_with_one_line(fork, begin, out):
    result = fork("train", *begin(out), "--steps", 400, largest=30_000)
    assert_one_line(result, f"{METRICS}: cannot be written")
    assert_whole_files(out)
    assert fork("train", "--resume", out)[0] == 0
    assert [line["step"] for line in lines_of(out) if "loss" in line] == list(range(1, 401))


@pytest.fixture
def mount(tmp_path):
    """A function: options of mount -> a folder on a disk of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], capture_output=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr}")
        return disk

    yield mount
    if disk.is_mount():
        subprocess.run(["umount", disk], check=True)


def assert_no_result(fork, prefix, disk, reason):
    evaluation = ["--prefix", prefix, "--split", "validation", "--draws", 0, "--json", disk / "result.json"]
    assert_one_line(fork("evaluate", *evaluation), f"result.json: cannot be written: {reason}")


def test_on_a_disk_of_64_kib_every_command_ends_with_one_line_and_harms_nothing(fork, begin, whole, mount):
    disk = mount("size=64k")
    (disk / "result.json").write_text("yesterday's")
    (disk / "thesis.txt").write_text("years of work" * 4000)
    before = all_of(disk)
    assert_one_line(fork("train", *begin(disk / "run")), "No space left on device", disk)
    assert before.items() <= all_of(disk).items()
    assert_whole_files(disk)
    with suppress(OSError):
        (disk / "filler").write_bytes(b"x" * 64 * 1024)
    before = all_of(disk)
    assert_no_result(fork, whole, disk, "No space left on device")
    assert all_of(disk) == before


def test_in_a_read_only_folder_every_command_ends_with_one_line(fork, begin, whole, mount):
    disk = mount("size=1m")
    shutil.copytree(whole, disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    for arguments in (begin(disk / "new"), ["--resume", disk / "run", "--steps", STEPS + 1]):
        assert_one_line(fork("train", *arguments), "Read-only file system", disk)
    assert_no_result(fork, disk / "run", disk, "Read-only file system")


@pytest.mark.parametrize("work", ["optimizer_step", "validate", "save"])
def test_a_run_whose_directory_is_deleted_ends_with_one_line_and_does_not_make_it_again(
    run, begin, out, monkeypatch, work
):
    watched = getattr(Trainer, work)

    def deleted(trainer, *arguments):
        if trainer.progress.step == 3:
            shutil.rmtree(out)
        return watched(trainer, *arguments)

    monkeypatch.setattr(Trainer, work, deleted)
    code, _, said = run(train, *begin(out), "--save-every", 1)
    assert code == 2 and said.splitlines()[-1].startswith(f"error: {out}")
    assert said.endswith("cannot be written: No such file or directory\n") and not out.exists()


# The table


def test_every_test_that_the_table_of_faults_names_is_there():
    table = (ROOT / "tests" / "FAULTS.md").read_text(encoding="utf-8")
    faults = [line for line in table.splitlines() if line.startswith("| ") and not line.startswith("| fault |")]
    named = [pair for line in faults for pair in re.findall(r"`(test_\w+\.py)::(test_\w+)`", line)]
    there = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    assert len(named) >= len(faults) > 100
    assert not [f"{file}::{test}" for file, test in named if f"\ndef {test}(" not in there.get(file, "")]
