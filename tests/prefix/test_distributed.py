"""Data parallel training: any number of processes, on any number of machines, train as one does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import metrics

import evaluate
import train
import translate
from minigpt import UserError
from prefix import distributed
from prefix.trainer import Trainer

ROOT = Path(__file__).parents[2]
OPTIONS = "--prefix-len 2 --batch-size 7 --micro-batch-tokens 40 --lr 0.1 --steps 4 --save-every 2 --eval-every 2 --device cpu"

PROGRAM = """
import sys, torch
sys.path.insert(0, sys.argv.pop(1))
import train
from prefix import distributed
from prefix.trainer import Trainer

torch.set_num_threads(1)
distributed.start()
distributed.start = lambda device: None
assert distributed.all_gather([i * i for i in distributed.shard(list(range(11)))]) == [i * i for i in range(11)]
loss, failed = Trainer.loss, []


def loss_in_little_memory(*arguments):
    if distributed.rank() == 1 and not failed:
        failed.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")
    return loss(*arguments)


Trainer.loss = loss_in_little_memory
train.main()
"""


def assert_near(ours, theirs):
    """Two runs have the same metrics: four steps, two validations."""
    ours, theirs = (sum(metrics(out), []) for out in (ours, theirs))
    assert len(ours) == len(theirs) == 6
    for one, other in zip(ours, theirs):
        assert one == pytest.approx(other, rel=1e-4)


def test_three_processes_train_as_one_on_ragged_data_even_if_one_of_them_runs_out_of_memory(run, workplace, place):
    options = [*OPTIONS.split(), "--model", place / "base", "--data", place / "en-fr.csv", "--micro-batch-tokens", "200"]
    assert run(train, *options, "--out", "alone")[0] == 0
    Path("program.py").write_text(PROGRAM)
    words = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node=3 program.py".split(), ROOT]
    words = list(map(str, [*words, *options, "--out", "together"]))
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "out of memory" in done.stderr, done.stderr
    assert_near("together", "alone")


def test_two_machines_without_a_common_disk_go_on_with_a_run_that_one_of_them_has(run, place, tmp_path, monkeypatch):
    for machine in ("0", "1"):
        (tmp_path / machine).mkdir()
    monkeypatch.chdir(tmp_path / "0")
    monkeypatch.setenv("MINIGPT_HOME", str(tmp_path / "0" / "home"))
    options = [*OPTIONS.split(), "--model", place / "base", "--data", place / "en-fr.csv"]
    assert run(train, *options, "--out", "whole")[0] == 0
    step = Trainer.optimizer_step
    killed = lambda trainer, batch: step(trainer, batch) if trainer.progress.step < 2 else sys.exit(9)
    monkeypatch.setattr(Trainer, "optimizer_step", killed)
    assert run(train, *options, "--out", "run")[0] == 9
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]

    def agent(machine):
        words = f"-m torch.distributed.run --nnodes 2 --node_rank {machine} --nproc_per_node 1 --master_addr 127.0.0.1"
        words = [sys.executable, *f"{words} --master_port {port} {ROOT}/train.py --resume run".split()]
        home = {"MINIGPT_HOME": str(tmp_path / machine / "home"), "GLOO_SOCKET_IFNAME": "lo"}
        return subprocess.Popen(words, cwd=tmp_path / machine, env=os.environ | home, stderr=subprocess.PIPE, text=True)

    agents = [agent("0"), agent("1")]
    said = [one.communicate(timeout=300)[1] for one in agents]
    assert [one.returncode for one in agents] == [0, 0], said
    assert_near("run", "whole")
    assert [path.name for path in (tmp_path / "1").iterdir()] == ["home"]  # its own token cache, and nothing else
    assert "Trained" in said[0] and "Trained" not in said[1]


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
