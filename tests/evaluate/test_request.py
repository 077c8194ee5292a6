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


@pytest.mark.parametrize("trained", [None, TRAINED])
def test_another_space_is_only_taken_when_asked_for(trained):
    """`--space` replaces the recipe's space and nothing else; l_2 has no such space."""
    usual = request_threat("run", trained, None, 0.2, 0.05)
    released = request_threat("run", trained, None, 0.2, 0.05, "released_code")
    assert (usual.space, released.space) == ("pixel", "released_code")
    assert (released.eps, released.step, released.norm) == (usual.eps, usual.step, usual.norm)
    with pytest.raises(UserError, match="released_code"):
        request_threat("run", trained, "l2", 0.2, 0.05, "released_code")
