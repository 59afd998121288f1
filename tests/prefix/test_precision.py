"""Mixed precision: the frozen weights in 16 bits, slots and their optimizer in 32, and the same training curve."""

import math

import pytest
import torch

from minigpt import GPT, Tokenizer
from prefix.data import corpus as data
from prefix.init import random_banks
from prefix.run import DEMO_CORPUS
from prefix.trainer import Settings, Trainer

STEPS = 12


@pytest.fixture
def trainer(tmp_path):
    """A function: dtype, the loss scale to start with -> a Trainer on the demo checkpoint and corpus."""

    def build(dtype, lr=0.05):
        model, tokenizer = GPT.from_pretrained("demo", dtype=dtype), Tokenizer.from_pretrained("demo")
        corpus = data.load([DEMO_CORPUS], None, tokenizer, limit=300, home=tmp_path)
        banks = random_banks(model.config, corpus.columns, 5, seed=1)
        settings = Settings(steps=STEPS, lr=lr, batch_size=12, warmup=2, seed=1)
        return Trainer(model, tokenizer, banks, corpus, settings, tmp_path)

    return build


def curve(trainer):
    return torch.tensor([trainer.optimizer_step()["loss"] for _ in range(STEPS)])


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.02), (torch.float16, 0.005)])
def test_the_training_curve_in_16_bits_stays_on_that_of_float32(trainer, dtype, bound):
    ours, exact = curve(trainer(dtype)), curve(trainer(torch.float32))
    assert ((ours - exact).abs() / exact).max() < bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frozen_weights_are_held_in_16_bits_and_slots_and_their_optimizer_in_32(trainer, dtype):
    t = trainer(dtype)
    t.optimizer_step()
    assert {p.dtype for p in t.model.parameters()} == {dtype}
    states = [s for state in t.optimizer.state.values() for s in (state["exp_avg"], state["exp_avg_sq"])]
    assert {x.dtype for x in [*t.banks.parameters(), *states]} == {torch.float32}


def test_a_float16_step_that_overflows_is_skipped_and_counted_and_the_scale_halved(trainer):
    t = trainer(torch.float16)
    t.scale = 2.0**40
    before = [p.detach().clone() for p in t.banks.parameters()]
    record = t.optimizer_step()
    assert not math.isfinite(record["grad_norm"])
    assert all(torch.equal(p, q) for p, q in zip(t.banks.parameters(), before))
    assert (t.skipped, t.scale) == (1, 2.0**39)


def test_the_loss_scale_changes_no_gradient(trainer):
    t = trainer(torch.float16)
    gradients = []
    for t.scale in (2.0, 2.0**6):
        t.backward(t.prepare(0))
        gradients.append(torch.cat([p.grad.flatten() for p in t.banks.parameters()]))
    assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[1].norm()
