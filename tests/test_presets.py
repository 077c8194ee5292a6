"""Objectives as data: names, constants, and what cannot be built."""

import dataclasses
import math

import pytest

from nrat_scale.core.errors import UserError
from nrat_scale.objectives import build
from nrat_scale.presets import FAMILIES, OBJECTIVES, ObjectiveSpec


@pytest.mark.parametrize("name", OBJECTIVES)
def test_presets_are_named_after_their_key_and_frozen(name):
    """A preset is an `ObjectiveSpec`; its constructor has checked family, loss, divergence and inner loss."""
    preset = OBJECTIVES[name]
    assert preset.name == name and preset.family in FAMILIES
    assert preset.init in ("normal", "uniform") and preset.bn in ("eval", "batch")
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset.lam = 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "nratt"}, "Did you mean 'nrat'"),
        ({"name": "no such thing"}, "Known: adr, dm_at, "),
        ({"name": "nrat", "inner": "symkl"}, "Did you mean 'sym_kl'"),
        ({"name": "pgd_at", "inner": "kl"}, "use ce"),
        ({"name": "natural", "inner": "lse"}, "use ce"),
        ({"name": "nrat", "smoothing": 1.0}, r"must be in \[0, 1\)"),
        ({"name": "nrat", "smoothing": -0.1}, r"must be in \[0, 1\)"),
        ({"name": "nrat", "smoothing": math.nan}, r"must be in \[0, 1\)"),
        ({"name": "nrat", "smoothing_mode": "plug"}, "Did you mean 'plugin'"),
        ({"name": "nrat", "smoothing": 0.1, "smoothing_mode": "off"}, "Choose mixed or plugin"),
        ({"name": "trades", "smoothing": 0.1, "smoothing_mode": "plugin"}, "use mixed"),
        ({"name": "nrat", "lam": -1.0}, "0 or more"),
        ({"name": "nrat", "lam": math.nan}, "0 or more"),
        ({"name": "nrat", "lam": math.inf}, "0 or more"),
        ({"name": "nrat", "a": -1.0}, "0 or more"),
        ({"name": "nrat", "b": math.nan}, "0 or more"),
        ({"name": "nrat", "loss": "nce_rec"}, "objective.loss is 'nce_rec'. Did you mean 'nce_rce'"),
        ({"name": "nrat", "divergence": "symkl"}, "objective.divergence is 'symkl'. Did you mean 'sym_kl'"),
        ({"name": "mart", "divergence": "kl"}, "the family 'mart' has none"),
        ({"name": "trades_ikl", "lam": 6.0}, "IKL has objective.ikl_alpha and objective.ikl_beta"),
        ({"name": "nrat_ikl", "lam": math.nan}, "Remove objective.lam"),
        ({"name": "trades", "divergence": "ikl", "lam": 2.0}, "Remove objective.lam"),
        ({"name": "trades", "ikl_alpha": 3.0}, "neither objective.divergence nor objective.inner is ikl"),
        ({"name": "trades_ikl", "ikl_alpha": -1.0}, "0 or more"),
        ({"name": "trades_ikl", "ikl_beta": math.inf}, "0 or more"),
        ({"name": "trades_ikl", "ikl_temperature": 0.0}, "greater than 0"),
        ({"name": "trades_ikl", "ikl_gamma": 1.5}, r"in \[0, 1\]"),
        ({"name": "pgd_at", "lam": 3.0}, "no second term that it would weight. Remove it"),
        ({"name": "natural", "lam": 6.0}, "no second term that it would weight. Remove it"),
        ({"name": "nrat", "loss": "nfl_rce", "b": 10.0}, "weight NCE\\+RCE and the loss is nfl_rce"),
        ({"name": "trades", "a": 2.0}, "weight NCE\\+RCE and the loss is ce"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    """Unknown names and impossible constants raise a sentence that names the way out."""
    with pytest.raises(UserError, match=message):
        build(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("x", "trade", "ce"), "objective.family is 'trade'. Did you mean 'trades'"),
        (("x", "at", "cee"), "objective.loss is 'cee'. Did you mean 'ce'"),
        (("x", "trades", "ce"), "objective.divergence is ''. Known: ikl, kl"),
        (("x", "at", "ce", "kl"), "objective.divergence is 'kl', but the family 'at' has none"),
    ],
)
def test_a_spec_checks_itself(arguments, message):
    """A new preset with a mistyped name fails when it is defined."""
    with pytest.raises(UserError, match=message):
        ObjectiveSpec(*arguments)


def test_constants_default_to_the_preset_and_can_be_replaced():
    """None means the preset's constant, and smoothing without a mode is `mixed`."""
    assert (build("dm_at").spec.lam, build("dm_at").spec.smoothing_mode) == (5.0, "mixed")
    spec = build("nrat", lam=3.0, smoothing=0.1, inner="sym_kl").spec
    assert (spec.lam, spec.smoothing, spec.smoothing_mode, spec.inner) == (3.0, 0.1, "mixed", "sym_kl")
    assert (build("nrat", lam=0.0).spec.lam, build("nrat").spec.smoothing_mode) == (0.0, "off")
