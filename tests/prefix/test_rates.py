"""Several learning rates at once: how long each is tried. (tests/test_train.py: the best goes on as if it were alone.)"""

import pytest

from minigpt import UserError
from prefix.rates import trial_steps, try_rates
from prefix.trainer import Settings


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
    assert trial_steps(Settings(steps, lr=0.1, warmup=warmup)) == length
