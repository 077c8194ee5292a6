"""The threat that an evaluation measures."""

import pytest

from nrat_scale.attacks import ThreatSpec
from nrat_scale.core.errors import UserError
from nrat_scale.evaluate.request import request_threat

TRAINED = ThreatSpec(eps=0.2, step=0.075, num_steps=5)


def test_a_step_follows_another_radius():
    """A recipe's step of 0.075 in a ball of radius 0.01 would jump from corner to corner."""
    assert request_threat("run", TRAINED, None, None, None).step == 0.075
    assert request_threat("run", TRAINED, None, 0.2, None).step == 0.075
    assert request_threat("run", TRAINED, None, 0.01, None).step == 0.0025
    assert request_threat("run", TRAINED, None, 0.01, 0.005).step == 0.005


@pytest.mark.parametrize("trained", [None, TRAINED])
@pytest.mark.parametrize(("step", "words"), [(0.0, "stay at their start"), (0.11, "such as 0.0125")])
def test_a_step_that_makes_attacks_weak_is_refused(trained, step, words):
    """Such a step gave a number near the natural accuracy without a word."""
    with pytest.raises(UserError, match=words):
        request_threat("run", trained, None, 0.05, step)
