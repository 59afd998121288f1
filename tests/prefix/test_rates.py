"""Several learning rates at once: the best after a tenth of the steps goes on, as if it had been the only one."""

import math

import pytest
from conftest import metrics, same, saved_prefix, slots_of, stop_after

from prefix.init import random_banks
from prefix.rates import trial_steps, try_rates
from prefix.reparam import TrainableBanks
from prefix.trainer import Settings, Trainer

RATES = [1e-4, 0.1]
STEPS, TRIAL = 24, 20


@pytest.fixture
def make_trainer(model, corpus, trainer, tmp_path):
    """A function: rate, directory -> a Trainer at the same start."""
    (tmp_path / "run").mkdir()

    def make_trainer(rate, out):
        banks = TrainableBanks(random_banks(model.config, ["en", "fr"], 3, seed=5))
        return trainer(out, banks=banks, corpus=corpus, lr=rate, steps=STEPS, eval_every=7)

    return make_trainer


def assert_as_alone(trainer, make_trainer, tmp_path):
    """This trainer ends as a run with its rate alone: slots, metrics, prefix file."""
    alone = make_trainer(trainer.settings.lr, tmp_path / "alone")
    assert alone.run() and trainer.run()
    assert same(slots_of(trainer), slots_of(alone)) and same(saved_prefix(trainer), saved_prefix(alone))
    assert metrics(trainer.out) == metrics(alone.out)


def test_the_best_rate_goes_on_exactly_as_a_run_with_that_rate_alone(make_trainer, tmp_path, capsys, monkeypatch):
    losses = {1e-4: math.nan, 0.1: 3.0, 0.2: 2.0, 0.3: 2.5}
    monkeypatch.setattr(Trainer, "validation_loss", lambda trainer, base=False: losses[trainer.settings.lr])
    trainer = try_rates([*losses], make_trainer, tmp_path / "run")
    said = capsys.readouterr().err
    assert all(f"--lr {rate:g}: validation loss {loss:.4f} after 20 of 24 steps" in said for rate, loss in losses.items())
    assert "Going on with --lr 0.2" in said and trainer.progress.step == TRIAL
    assert_as_alone(trainer, make_trainer, tmp_path)


@pytest.mark.parametrize("steps, warmup, length", [(300, 15, 30), (40, 2, 20), (300, 40, 80), (3, 0, 3), (100, 99, 100)])
def test_a_trial_is_a_tenth_of_the_steps_but_long_enough_to_tell(steps, warmup, length):
    assert trial_steps(Settings(steps, [0.1, 0.3], warmup=warmup)) == length


def test_a_signal_ends_a_trial_and_the_next_try_goes_on_there(make_trainer, tmp_path):
    out, made = tmp_path / "run", []

    def stopped_in_the_second(lr, out):
        made.append(make_trainer(lr, out))
        if len(made) == 2:
            stop_after(made[-1], 2)
        return made[-1]

    trainer = try_rates(RATES, stopped_in_the_second, out)
    assert trainer is made[1] and trainer.stopped and trainer.progress.step == 3
    assert_as_alone(try_rates(RATES, make_trainer, out), make_trainer, tmp_path)
