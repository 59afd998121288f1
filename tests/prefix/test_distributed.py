"""Data parallel training: any number of processes give the gradient of one."""

import csv
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

PROGRAM = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {root!r})
from minigpt import GPT, GPTConfig, Tokenizer
from prefix import distributed
from prefix.data import corpus as data
from prefix.banks import Banks
from prefix.trainer import Settings, Trainer
from prefix.init import random_banks

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
trainer = Trainer(model, tokenizer, banks, corpus, Settings(steps=5, lr=0.1, batch_size=7), out, 40)
loss = trainer.backward(trainer.prepare(0))
if {fail!r} and distributed.rank() == 1:
    raise SystemExit("rank 1 has had enough")
gradients = torch.cat([p.grad.flatten() for p in banks.parameters()])
validation = trainer.validation_loss()
results = distributed.all_gather([i * i for i in distributed.shard(list(range(11)))])
nll, calls = trainer.nll, []


def nll_in_little_memory(*arguments):
    calls.append(distributed.rank() == 1 and not calls)
    if calls[-1]:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return nll(*arguments)


trainer.nll = nll_in_little_memory
trainer.backward(trainer.prepare(0))
assert any(calls) == (distributed.rank() == 1)
repeated = torch.cat([p.grad.flatten() for p in banks.parameters()])
if distributed.rank() == 0:
    found = dict(loss=loss, gradients=gradients, repeated=repeated, validation=validation, results=results)
    torch.save(found, out / f"{{distributed.world_size()}}.pt")
distributed.finish()
"""


def run(folder, processes, fail=False):
    program = folder / "program.py"
    program.write_text(PROGRAM.format(root=str(ROOT), out=str(folder), fail=fail))
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, str(program)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A folder with the table pairs.csv."""
    folder = tmp_path_factory.mktemp("pairs")
    words = "le la chat chien maison mange dort dans avec et une petite grande the cat dog sleeps".split()
    sentence = lambda: " ".join(random.choices(words, k=random.randint(1, 9)))
    rows = [(sentence(), sentence()) for _ in range(800)]  # so many that each split has some
    with open(folder / "pairs.csv", "w", newline="") as file:
        csv.writer(file).writerows([("en", "fr"), *rows])
    return folder


@pytest.fixture(scope="module")
def found(pairs):
    """What one, two and three processes find on the same data: {processes: {name: what}}."""
    found = {}
    for processes in (1, 2, 3):
        done = run(pairs, processes)
        assert done.returncode == 0, done.stderr
        found[processes] = torch.load(pairs / f"{processes}.pt")
    return found


def test_two_and_three_processes_give_the_gradient_of_one_on_ragged_data(found):
    for processes in (2, 3):
        torch.testing.assert_close(found[processes]["loss"], found[1]["loss"], rtol=1e-6, atol=0)
        torch.testing.assert_close(found[processes]["gradients"], found[1]["gradients"], rtol=1e-6, atol=1e-9)
        assert found[processes]["validation"] == pytest.approx(found[1]["validation"], rel=1e-6)
        assert found[processes]["results"] == [i * i for i in range(11)]


def test_a_process_that_runs_out_of_memory_repeats_its_share_while_the_others_wait(found):
    for processes in (2, 3):
        torch.testing.assert_close(found[processes]["repeated"], found[1]["gradients"], rtol=1e-6, atol=1e-9)


def test_a_process_that_fails_ends_all_and_its_message_is_shown(pairs):
    done = run(pairs, 2, fail=True)
    assert done.returncode != 0
    assert "rank 1 has had enough" in done.stderr
