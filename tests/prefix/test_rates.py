"""Several learning rates at once: the best after a tenth of the steps goes on, as if it had been the only one."""

import math

import pytest
from conftest import metrics, same, saved_prefix, slots_of

from minigpt import UserError
from prefix.init import random_banks
from prefix.rates import trial_steps, try_rates
from prefix.reparam import TrainableBanks
from prefix.trainer import Settings, Trainer

LOSSES = {1e-4: math.nan, 0.1: 3.0, 0.2: 2.0, 0.3: 2.5}  # of each rate, after its trial


def test_the_best_rate_goes_on_exactly_as_a_run_with_that_rate_alone(model, corpus, trainer, tmp_path, capsys, monkeypatch):
    def make_trainer(rate, out):
        banks = TrainableBanks(random_banks(model.config, ["en", "fr"], 3, seed=5))
        return trainer(out, banks=banks, corpus=corpus, lr=rate, steps=24, eval_every=7)

    (tmp_path / "run").mkdir()
    monkeypatch.setattr(Trainer, "validation_loss", lambda trainer, base=False: LOSSES[trainer.settings.lr])
    best, alone = try_rates([*LOSSES], make_trainer, tmp_path / "run"), make_trainer(0.2, tmp_path / "alone")
    said = capsys.readouterr().err
    assert all(f"--lr {rate}: validation loss {loss:.4f} after 20 of 24 steps" in said for rate, loss in LOSSES.items())
    assert "Going on with --lr 0.2" in said and best.progress.step == 20
    assert alone.run() and best.run()
    assert same(slots_of(best), slots_of(alone)) and same(saved_prefix(best), saved_prefix(alone))
    assert metrics(best.out) == metrics(alone.out)


def test_trials_that_are_done_cannot_be_shorter_afterwards(trainer, corpus, tmp_path):
    def make_trainer(rate, out):
        return trainer(out, corpus=corpus, lr=rate, steps=steps)

    for steps in (40, 400):
        try_rates([0.1, 0.1000001], make_trainer, tmp_path)
    steps = 300
    with pytest.raises(UserError, match="lr-0.1: 40 steps were tried already"):
        try_rates([0.1, 0.1000001], make_trainer, tmp_path)


@pytest.mark.parametrize("steps, warmup, length", [(300, 15, 30), (40, 2, 20), (300, 40, 80), (3, 0, 3), (100, 99, 100)])
def test_a_trial_is_a_tenth_of_the_steps_but_long_enough_to_tell(steps, warmup, length):
    assert trial_steps(Settings(steps, [0.1, 0.3], warmup=warmup)) == length
