"""Data parallel training: any number of processes, on any number of machines, train as one does."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import metrics

import evaluate
import train
import translate
from minigpt import UserError
from prefix import distributed

ROOT = Path(__file__).parents[2]
OPTIONS = "--prefix-len 2 --batch-size 7 --micro-batch-tokens 200 --lr 0.1 --steps 4 --eval-every 2 --device cpu"

PROGRAM = """
import contextlib, os, signal, sys, torch
sys.path.insert(0, sys.argv.pop(1))
import train
from prefix import distributed
from prefix.trainer import Trainer

torch.set_num_threads(1)
distributed.start()
distributed.start = distributed.finish = lambda *_: None  # both runs are in this group
assert distributed.all_gather([i * i for i in distributed.shard(list(range(11)))]) == [i * i for i in range(11)]
loss, failed = Trainer.loss, []


def loss_in_little_memory(trainer, *batch):
    if distributed.rank() == 1 and not failed:
        failed.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")
    if distributed.rank() == 1 and trainer.progress.step == len(failed) == 1:
        failed.append(2)
        os.kill(os.getpid(), signal.SIGINT)
    return loss(trainer, *batch)


Trainer.loss = loss_in_little_memory
with contextlib.suppress(SystemExit):
    train.main()
sys.argv[1:] = ["--resume", "run"]
train.main()
"""


def test_processes_on_machines_without_a_common_disk_train_as_one_and_go_on_as_one(run, workplace, place, tmp_path):
    """Three, so that their shares differ in size. One of them runs out of memory, and in step 2 gets a signal."""
    options = [*OPTIONS.split(), "--model", place / "base", "--data", place / "en-fr.csv", "--out"]
    assert run(train, *options, "alone")[0] == 0
    Path("program.py").write_text(PROGRAM)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": found.getsockname()[1], "WORLD_SIZE": 3}

    def process(rank, local_rank, machine):
        Path(machine).mkdir(exist_ok=True)
        mine = {"RANK": rank, "LOCAL_RANK": local_rank, "MINIGPT_HOME": tmp_path / machine / "home", "GLOO_SOCKET_IFNAME": "lo"}
        environment = os.environ | {name: str(value) for name, value in (group | mine).items()}
        words = list(map(str, [sys.executable, "../program.py", ROOT, *options, "run"]))
        return subprocess.Popen(words, cwd=machine, env=environment, stderr=subprocess.PIPE, text=True)

    processes = [process(0, 0, "first"), process(1, 1, "first"), process(2, 0, "second")]
    said = [one.communicate(timeout=300)[1] for one in processes]
    assert [one.returncode for one in processes] == [0, 0, 0], said
    assert "out of memory" in said[1] and "stopped after step 2" in said[0]
    assert "Trained" in said[0] and "Trained" not in said[1] + said[2]
    assert [path.name for path in Path("second").iterdir()] == ["home"]  # its own token cache, and nothing else
    ours, theirs = (sum(metrics(out), []) for out in ("first/run", "alone"))
    assert len(ours) == len(theirs) == 6  # four steps, two validations
    for one, other in zip(ours, theirs):
        assert one == pytest.approx(other, rel=1e-4)


# The environment


TORCHRUN = {"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "1", "MASTER_ADDR": "localhost"}


@pytest.mark.parametrize("change, message", [
    ({"WORLD_SIZE": ""}, "WORLD_SIZE is set, but: invalid literal .*torchrun"),
    ({"WORLD_SIZE": "two"}, "'two'"),
    ({"RANK": ""}, "RANK expected"),
    ({"MASTER_ADDR": ""}, "MASTER_ADDR expected"),
    ({"LOCAL_WORLD_SIZE": "4"}, "4 processes on a machine with 2 GPUs: give torchrun --nproc_per_node=2"),
])  # fmt: skip
def test_an_environment_that_is_not_torchruns_or_has_too_few_gpus_is_one_line(monkeypatch, change, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "LOCAL_WORLD_SIZE" in change)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in (TORCHRUN | change).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        distributed.start()


def test_who_waits_for_other_processes_says_so_and_ctrl_c_ends_it(monkeypatch, capsys):
    monkeypatch.setattr(distributed, "PATIENCE", 0.01)
    before = signal.getsignal(signal.SIGINT)
    with distributed.waiting("Waiting for the others"):
        time.sleep(0.1)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert capsys.readouterr().err == "Waiting for the others\n" and signal.getsignal(signal.SIGINT) == before
    with distributed.waiting("Waiting for the others"):
        pass
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_each_process_takes_the_gpu_of_its_local_number_and_nccl_for_it(monkeypatch):
    for name, value in (TORCHRUN | {"RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    devices, backends = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda backend, **_: backends.append(backend))
    distributed.start()
    assert (devices, backends) == ([1], ["cpu:gloo,cuda:nccl"])


COMMANDS = {
    "train": (train, "--steps 1 --batch-size 2 --prefix-len 2 --model {0}/base --data {0}/en-fr.csv --out run"),
    "train, dry": (train, "--steps 1 --batch-size 2 --prefix-len 2 --model {0}/base --data {0}/en-fr.csv --dry-run"),
    "translate": (translate, "--prefix {0}/run --max-new-tokens 2 word"),
    "evaluate": (evaluate, "--prefix {0}/run --limit 1 --draws 0 --max-new-tokens 2"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_went_well_has_left_the_group(run, workplace, place, command):
    """NCCL ends cleanly only so. (Here: a group of one, over gloo.)"""
    script, words = COMMANDS[command]
    distributed.dist.init_process_group("gloo", store=distributed.dist.HashStore(), rank=0, world_size=1)
    try:
        code, _, err = run(script, *words.format(place).split(), "--device", "cpu")
        assert code == 0, err
        assert not distributed.dist.is_initialized()
    finally:
        distributed.finish()
