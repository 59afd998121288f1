"""Several learning rates at once: how long each is tried. (tests/test_train.py: the best goes on as if it were alone.)"""

import pytest

from prefix.rates import trial_steps
from prefix.trainer import Settings


@pytest.mark.parametrize("steps, warmup, length", [(300, 15, 30), (40, 2, 20), (300, 40, 80), (3, 0, 3), (100, 99, 100)])
def test_a_trial_is_a_tenth_of_the_steps_but_long_enough_to_tell(steps, warmup, length):
    assert trial_steps(Settings(steps, lr=0.1, warmup=warmup)) == length
