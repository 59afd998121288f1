"""Mixed precision: the frozen weights in 16 bits, slots and their optimizer in 32, and the same training curve."""

import math

import pytest
import torch
from conftest import one_step, same, slots_of

from minigpt import GPT
from prefix.data import corpus as data
from prefix.init import random_banks
from prefix.run import DEMO_CORPUS

STEPS = 4  # a CPU without these types emulates them


@pytest.fixture
def demo_trainer(trainer, tokenizer, tmp_path):
    """A function: dtype -> a Trainer on the demo checkpoint and corpus."""

    def build(dtype):
        model, corpus = GPT.from_pretrained("demo", dtype=dtype), data.load([DEMO_CORPUS], None, tokenizer, 300, home=tmp_path)
        banks = random_banks(model.config, corpus.columns, 5, seed=1)
        return trainer(model=model, corpus=corpus, banks=banks, steps=STEPS, batch_size=6)

    return build


def curve(trainer):
    return torch.tensor([one_step(trainer)["loss"] for _ in range(STEPS)])


def test_the_training_curve_in_16_bits_stays_on_that_of_float32(demo_trainer):
    exact = curve(demo_trainer(torch.float32))
    for dtype, bound in ((torch.bfloat16, 0.02), (torch.float16, 0.005)):
        t = demo_trainer(dtype)
        assert ((curve(t) - exact).abs() / exact).max() < bound
        assert {p.dtype for p in t.model.parameters()} == {dtype}
        moments = [s for state in t.optimizer.state.values() for s in (state["exp_avg"], state["exp_avg_sq"])]
        assert {x.dtype for x in [*t.banks.parameters(), *moments]} == {torch.float32}


def test_a_float16_step_that_overflows_is_skipped_and_counted_and_the_scale_halved_and_saved(demo_trainer):
    t = demo_trainer(torch.float16)
    t.scaler.load_state_dict(t.scaler.state_dict() | {"scale": 2.0**40})
    before = slots_of(t)
    assert not math.isfinite(one_step(t)["grad_norm"])
    assert same(slots_of(t), before)
    assert (t.progress.skipped, t.scaler.get_scale()) == (1, 2.0**39)
    (t.out / "metrics.jsonl").touch()
    t.save()
    resumed, other = demo_trainer(torch.float16), demo_trainer(torch.float32)
    resumed.resume()
    other.resume()
    assert resumed.scaler.get_scale() == 2.0**39 and other.scaler.get_scale() == 1
