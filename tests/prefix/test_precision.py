"""Mixed precision: the frozen weights in 16 bits, slots and their optimizer in 32, and the same training curve."""

import math

import pytest
import torch
from conftest import one_step, same, slots_of

from minigpt import GPT
from prefix.batches import BatchLoader
from prefix.data import corpus as data
from prefix.init import random_banks
from prefix.run import DEMO_CORPUS
from prefix.trainer import Settings, Trainer

STEPS = 12


@pytest.fixture
def trainer(tmp_path, tokenizer):
    """A function: dtype -> a Trainer on the demo checkpoint and corpus."""

    def build(dtype):
        model = GPT.from_pretrained("demo", dtype=dtype)
        corpus = data.load([DEMO_CORPUS], None, tokenizer, limit=300, home=tmp_path)
        banks = random_banks(model.config, corpus.columns, 5, seed=1)
        settings = Settings(steps=STEPS, lr=0.05, batch_size=12, warmup=2, seed=1)
        return Trainer(model, banks, BatchLoader(corpus, tokenizer, settings, model.device), settings, tmp_path)

    return build


def curve(trainer):
    return torch.tensor([one_step(trainer)["loss"] for _ in range(STEPS)])


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.02), (torch.float16, 0.005)])
def test_the_training_curve_in_16_bits_stays_on_that_of_float32(trainer, dtype, bound):
    t = trainer(dtype)
    ours, exact = curve(t), curve(trainer(torch.float32))
    assert ((ours - exact).abs() / exact).max() < bound
    assert {p.dtype for p in t.model.parameters()} == {dtype}
    moments = [s for state in t.optimizer.state.values() for s in (state["exp_avg"], state["exp_avg_sq"])]
    assert {x.dtype for x in [*t.banks.parameters(), *moments]} == {torch.float32}


def test_a_float16_step_that_overflows_is_skipped_and_counted_and_the_scale_halved_and_saved(trainer):
    t = trainer(torch.float16)
    t.scaler.load_state_dict(t.scaler.state_dict() | {"scale": 2.0**40})
    before = slots_of(t)
    assert not math.isfinite(one_step(t)["grad_norm"])
    assert same(slots_of(t), before)
    assert (t.progress.skipped, t.scaler.get_scale()) == (1, 2.0**39)
    (t.out / "last").mkdir()
    (t.out / "metrics.jsonl").touch()
    t.save()
    resumed, other = trainer(torch.float16), trainer(torch.float32)
    resumed.resume()
    other.resume()
    assert resumed.scaler.get_scale() == 2.0**39 and other.scaler.get_scale() == 1
