"""Accuracy against eps and attack steps: what is measured, stored, used again and refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nrat_scale.attacks import ThreatSpec
from nrat_scale.core.errors import UserError
from nrat_scale.evaluate.api import evaluate
from nrat_scale.evaluate.curves import Curve, curve_points, parse_curve
from nrat_scale.evaluate.results import read_arrays

Measured = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("eps", "is not a number"),
        ("epsilon=1/255", "no known axis"),
        ("eps=1/255,,2/255", "is not a number"),
        ("eps=-1/255", "not negative"),
        ("steps=1.5", "whole numbers"),
        ("steps=nan", "is not a number"),
    ],
)
def test_curves_that_are_refused(text: str, message: str) -> None:
    """One sentence says what is expected."""
    with pytest.raises(UserError, match=message):
        parse_curve(text)


def test_points() -> None:
    """The step follows the radius, no radius and no step are natural images, and a value counts once."""
    threat = ThreatSpec(8 / 255, 2 / 255, 10)
    points = curve_points(parse_curve("eps=8/255,0,4/255,8/255"), threat)
    assert [(point.name, point.attack.name) for point in points] == [
        ("eps=0", "natural"),
        ("eps=4/255", "pgd20"),
        ("eps=8/255", "pgd20"),
    ]
    assert [point.threat.step for point in points] == pytest.approx([0, 1 / 255, 2 / 255])
    points = curve_points(Curve("steps", (0, 3)), threat)
    assert [(p.name, p.attack.name, p.threat) for p in points] == [
        ("steps=0", "natural", threat),
        ("steps=3", "pgd3", threat),
    ]
    with pytest.raises(UserError, match="Write 8/255"):
        curve_points(parse_curve("eps=8"), threat)


def test_a_curve_is_stored_apart(run: Path, measured: Measured, capsys: pytest.CaptureFixture[str]) -> None:
    """Points have keys, intervals and outcomes of their own; they change neither attacks nor the worst case."""
    attacks = measured("--checkpoint", "best", "--attacks", "natural,pgd3")["checkpoints"]["best"]
    options = ("--checkpoint", "best", "--images", "40")
    record = measured(*options, "--curve", "eps=0,0.05,0.15", "--curve", "steps=1,3")["checkpoints"]["best"]
    assert "eps=0.05" in capsys.readouterr().out
    assert {name: record[name] for name in ("attacks", "worst", "flags")} == {
        name: attacks[name] for name in ("attacks", "worst", "flags")
    }
    curves = record["curves"]
    assert list(curves) == ["eps=0", "eps=0.05", "eps=0.15", "steps=1", "steps=3"]
    assert {entry["n"] for entry in curves.values()} == {40} and {entry["seed"] for entry in curves.values()} == {0}
    assert all(entry["low"] <= entry["accuracy"] <= entry["high"] for entry in curves.values())
    assert curves["eps=0"]["accuracy"] >= curves["eps=0.05"]["accuracy"] >= curves["eps=0.15"]["accuracy"]
    assert (curves["eps=0.05"]["eps"], curves["eps=0.05"]["step"]) == (0.05, pytest.approx(0.04 / 3))
    arrays = read_arrays(run / "results.json")
    assert arrays["best/eps=0.05"][1].sum() == curves["eps=0.05"]["correct"]
    ids = [arrays[f"best/{name}"][0].tolist() for name in curves]
    assert all(one == ids[0] for one in ids), "all points are on the same images"


def test_points_are_used_again(run: Path, measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same point is not measured twice, one more point is; another choice of fewer images is refused."""
    options = ("--checkpoint", "best", "--images", "20", "--batch-size", "10")
    first = measured(*options, "--curve", "steps=1,2")["checkpoints"]["best"]["curves"]
    second = measured(*options, "--curve", "steps=1,2,4")["checkpoints"]["best"]["curves"]
    assert {name: second[name] for name in first} == first and set(second) == {"steps=1", "steps=2", "steps=4"}
    with pytest.raises(UserError, match="The results hold steps=1 with n 20"):
        measured("--checkpoint", "best", "--images", "10", "--batch-size", "10", "--curve", "steps=1")


def test_a_curve_attacks_the_model_itself(run: Path, measured: Measured) -> None:
    """With the images of another model a curve is refused."""
    with pytest.raises(UserError, match="do not go together"):
        measured("--checkpoint", "best", "--transfer-from", str(run), "--curve", "steps=1")


def test_a_curve_from_python(run: Path, measured: Measured) -> None:
    """As the command line: a curve alone runs no attack, and graphs of the device are refused for it too."""
    data = run.parent / "test"
    given = evaluate(run, data, curve=["steps=1", Curve("eps", (0.05,))], checkpoint="best", images=20, device="cpu")
    assert list(given.results["checkpoints"]["best"]["curves"]) == ["steps=1", "eps=0.05"] and not given.entries["best"]
    assert measured("--checkpoint", "best", "--images", "20", "--curve", "steps=1,2")["checkpoints"]["best"][
        "curves"
    ].keys() == {"steps=1", "eps=0.05", "steps=2"}
    with pytest.raises(UserError, match="--graphs needs a GPU"):
        evaluate(run, data, curve="steps=1", device="cpu", graphs=True)
