"""Data parallel training: any number of processes, on any number of machines, give the gradient of one."""

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import random_text, write_table

import evaluate
import train
import translate
from minigpt import UserError
from prefix import distributed
from prefix.trainer import Trainer

ROOT = Path(__file__).parents[2]

PROGRAM = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {root!r})
from minigpt import GPT, GPTConfig, Tokenizer
from prefix import distributed
from prefix.data import corpus as data
from prefix.init import random_banks
from prefix.trainer import Settings, Trainer

torch.set_num_threads(1)
distributed.start()
torch.manual_seed(1)
model = GPT(GPTConfig(vocab_size=4096, n_positions=64, n_embd=32, n_layer=2, n_head=2)).double()
for p in model.parameters():
    torch.nn.init.normal_(p, std=0.1)
model.requires_grad_(False)
tokenizer = Tokenizer.from_pretrained("demo")
out = Path({out!r})
corpus = data.load([out / "pairs.csv"], None, tokenizer, max_tokens=60, home=out)
banks = random_banks(model.config, corpus.columns, 3).double()


def trained():
    settings = Settings(steps=5, lr=0.0, batch_size=7, clip=1e9)
    return Trainer(model, tokenizer, banks, corpus, settings, out, 40)


def step_of(trainer):
    found = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: found.append(torch.cat([p.grad.flatten() for p in banks.parameters()]))
    )
    return trainer.optimizer_step(trainer.batches.step(0))["loss"], found[0]


trainer = trained()
loss, gradients = step_of(trainer)
if {fail!r} and distributed.rank() == 1:
    raise SystemExit("rank 1 has had enough")
validation = trainer.validation_loss()
results = distributed.all_gather([i * i for i in distributed.shard(list(range(11)))])

trainer, failed = trained(), []
loss_of = trainer.loss


def loss_in_little_memory(*arguments):
    if distributed.rank() == 1 and not failed:
        failed.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")
    return loss_of(*arguments)


trainer.loss = loss_in_little_memory
trainer.batches.micro_batch_tokens = 200  # several pairs, so that it can be halved
_, repeated = step_of(trainer)
assert any(failed) == (distributed.rank() == 1)
if distributed.rank() == 0:
    found = dict(loss=loss, gradients=gradients, repeated=repeated, validation=validation, results=results)
    torch.save(found, out / f"{{distributed.world_size()}}.pt")
distributed.finish()
"""


def launch(folder, processes, fail=False):
    program = folder / "program.py"
    program.write_text(PROGRAM.format(root=str(ROOT), out=str(folder), fail=fail))
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return subprocess.run([sys.executable, *torchrun, program], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A folder with the table pairs.csv: so many pairs that each split has some."""
    folder = tmp_path_factory.mktemp("pairs")
    write_table(folder / "pairs.csv", [("en", "fr"), *([random_text(), random_text()] for _ in range(800))])
    return folder


def test_any_number_of_processes_gives_the_gradient_of_one_on_ragged_data_even_if_one_runs_out_of_memory(pairs):
    found = {}
    for processes in (1, 2, 3):
        done = launch(pairs, processes)
        assert done.returncode == 0, done.stderr
        found[processes] = torch.load(pairs / f"{processes}.pt")
    for processes in (2, 3):
        for name in ("gradients", "repeated"):
            torch.testing.assert_close(found[processes][name], found[1]["gradients"], rtol=1e-6, atol=1e-9)
        for name in ("loss", "validation"):
            assert found[processes][name] == pytest.approx(found[1][name], rel=1e-6)
        assert found[processes]["results"] == [i * i for i in range(11)]


def test_a_process_that_fails_ends_all_and_its_message_is_shown(pairs):
    done = launch(pairs, 2, fail=True)
    assert done.returncode != 0
    assert "rank 1 has had enough" in done.stderr


def test_two_machines_without_a_common_disk_go_on_with_a_run_that_one_of_them_has(run, place, tmp_path, monkeypatch):
    for machine in ("0", "1"):
        (tmp_path / machine).mkdir()
    monkeypatch.chdir(tmp_path / "0")
    monkeypatch.setenv("MINIGPT_HOME", str(tmp_path / "0" / "home"))
    options = (
        f"--prefix-len 2 --batch-size 4 --micro-batch-tokens 40 --lr 0.1 --steps 4 --save-every 2 --model {place}/base"
    )
    options = [*options.split(), "--data", place / "en-fr.csv"]
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
    lines = [Path(out, "metrics.jsonl").read_text().splitlines() for out in ("run", "whole")]
    losses, expected = ([x["loss"] for x in map(json.loads, one) if "loss" in x] for one in lines)
    assert losses == pytest.approx(expected, rel=1e-5) and len(losses) == 4
    assert [path.name for path in (tmp_path / "1").iterdir()] == ["home"]  # its own token cache, and nothing else
    assert "Trained" in said[0] and "Trained" not in said[1]


# The environment


TORCHRUN = dict(
    WORLD_SIZE="4", RANK="0", LOCAL_RANK="0", LOCAL_WORLD_SIZE="4", MASTER_PORT="1", MASTER_ADDR="localhost"
)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is '' in the environment, not a number.*torchrun"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two' in the environment, not a number"),
        ({"RANK": ""}, "RANK is '' in the environment"),
        ({"MASTER_PORT": ""}, "MASTER_PORT is ''"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({}, "4 processes on a machine with 2 GPUs: give torchrun --nproc_per_node=2"),
    ],
)
def test_an_environment_that_is_not_torchruns_or_has_too_few_gpus_is_one_line(monkeypatch, change, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in (TORCHRUN | change).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        distributed.start()


def test_a_process_that_waits_for_others_says_so(monkeypatch):
    said = threading.Event()
    monkeypatch.setattr(distributed, "SAY_AFTER", 0.0)
    monkeypatch.setattr("builtins.print", lambda text, **_: "is waiting for the others" in text and said.set())
    with distributed.waiting():
        assert said.wait(timeout=60)


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
