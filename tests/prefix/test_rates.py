"""Several learning rates at once: the best after a tenth of the steps goes on, as if it had been the only one."""

import os

import pytest
from conftest import metrics, same, saved_prefix, slots_of, stop_after

from prefix.init import random_banks
from prefix.rates import trial_steps, try_rates
from prefix.reparam import TrainableBanks
from prefix.trainer import Settings

RATES = [1e-4, 0.1, 90.0]
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


def test_the_best_rate_goes_on_exactly_as_a_run_with_that_rate_alone(make_trainer, tmp_path, capsys):
    trainer = try_rates(RATES, make_trainer, tmp_path / "run")
    said, best = capsys.readouterr().err, trainer.settings.lr
    trials = [make_trainer(rate, tmp_path / f"by-hand-{rate}") for rate in RATES]
    assert all(trial.run(TRIAL) for trial in trials)
    losses = {rate: trial.validation_loss() for rate, trial in zip(RATES, trials)}
    assert best == min(losses, key=losses.get) and f"Going on with --lr {best:g}" in said
    for rate, loss in losses.items():
        assert f"--lr {rate:g}: validation loss {loss:.4f} after 20 of 24 steps" in said
    assert trainer.progress.step == TRIAL
    assert_as_alone(trainer, make_trainer, tmp_path)


@pytest.mark.parametrize("steps, warmup, length", [(300, 15, 30), (40, 2, 20), (300, 40, 80), (3, 0, 3), (100, 99, 100)])
def test_a_trial_is_a_tenth_of_the_steps_but_long_enough_to_tell(steps, warmup, length):
    assert trial_steps(Settings(steps, [0.1, 0.3], warmup=warmup)) == length


@pytest.mark.parametrize("rate, step", [(0, 1), (2, 2)])
def test_a_signal_ends_a_trial_and_the_next_try_goes_on_there(make_trainer, tmp_path, rate, step):
    out, made = tmp_path / "run", []

    def stopped_once(lr, out):
        made.append(make_trainer(lr, out))
        if len(made) == rate + 1:
            stop_after(made[-1], step)
        return made[-1]

    trainer = try_rates(RATES, stopped_once, out)
    assert trainer is made[rate] and trainer.stopped and trainer.progress.step == step + 1
    trainer = try_rates(RATES, make_trainer, out)
    assert_as_alone(trainer, make_trainer, tmp_path)


def test_a_choice_that_was_killed_while_its_files_were_copied_is_made_again(make_trainer, tmp_path):
    try_rates(RATES, make_trainer, tmp_path / "run")
    os.truncate(tmp_path / "run/last/state.safetensors", 1000)
    trainer = try_rates(RATES, make_trainer, tmp_path / "run")
    assert_as_alone(trainer, make_trainer, tmp_path)
