"""The collapse guard: what it counts over a window of steps, and its settings."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nrat_scale.collapse import Guard, GuardSpec, catastrophic_epochs, near_chance
from nrat_scale.core.errors import UserError


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=50))
def test_windows_count_predictions(pairs: list[tuple[int, int]]) -> None:
    """Share of the most frequent class, accuracy and mean gradient norm, and an empty window afterwards."""
    guard = Guard(GuardSpec(), 4, torch.device("cpu"))
    predicted, labels = (torch.tensor(column) for column in zip(*pairs, strict=True))
    guard.record(torch.nn.functional.one_hot(predicted, 4).float(), labels)
    guard.record_step(torch.tensor(2.0))
    guard.record_step(torch.tensor(4.0))
    window = guard.close(guard.sums, 7)
    assert window.top_share == pytest.approx(max(torch.bincount(predicted)) / len(pairs))
    assert window.accuracy == pytest.approx(sum(p == y for p, y in pairs) / len(pairs))
    assert window.grad_norm == pytest.approx(3.0)
    assert not guard.sums.any()


@pytest.mark.parametrize(("key", "value"), [("action", "stopp"), ("window", 0), ("top_share", 1.5), ("lr_factor", 0)])
def test_wrong_settings_are_refused(key: str, value: object) -> None:
    """The message names the key."""
    with pytest.raises(UserError, match=f"guard.{key}"):
        GuardSpec(**{key: value})


def windows(guard: Guard, *bad: bool) -> list[bool]:
    """Whether the guard sees a collapse after each of these windows of ten steps."""
    seen, step = [], guard.healthy_step
    for one_class in bad:
        step += 10
        predicted = torch.zeros(40, dtype=torch.int64) if one_class else torch.arange(40) % 4
        guard.record(torch.nn.functional.one_hot(predicted, 4).float(), torch.arange(40) % 4)
        guard.record_step(torch.tensor(1.0))
        guard.close(guard.sums, step)
        seen.append(guard.collapsed)
    return seen


def test_one_bad_window_is_a_collapse_but_not_of_an_untrained_network() -> None:
    """With patience 1 a collapse is seen in the window in which it happens; an untrained network has three windows to learn."""
    assert windows(Guard(GuardSpec(patience=1), 4, torch.device("cpu")), True, True, False, False, True) == [
        False, False, False, False, True,
    ]  # fmt: skip
    assert windows(Guard(GuardSpec(patience=1), 4, torch.device("cpu")), True, True, True) == [False, False, True]
    assert windows(Guard(GuardSpec(patience=2), 4, torch.device("cpu")), False, True, True) == [False, False, True]
    assert windows(Guard(GuardSpec(), 4, torch.device("cpu")), False, True, True, True) == [False, False, False, True]


def test_a_good_model_of_unbalanced_data_has_not_collapsed() -> None:
    """With two classes, 95 % of the images in one, a model that is right for all names that class for 95 % of them."""
    guard = Guard(GuardSpec(patience=1), 2, torch.device("cpu"))
    y = (torch.arange(100) < 5).long()
    for right in (True, True, False):
        predicted = y if right else torch.zeros_like(y)
        labels = y if right else torch.arange(100) % 2
        guard.record(torch.nn.functional.one_hot(predicted, 2).float(), labels)
        guard.record_step(torch.tensor(1.0))
        guard.close(guard.sums, 10)
        assert guard.collapsed != right
    assert [round(near_chance(count), 4) for count in (2, 3, 5, 10, 100)] == [0.625, 0.5, 0.4, 0.2, 0.02]


@pytest.mark.parametrize(
    ("fitted", "held", "found"),
    [(0.9, 0.0, [2]), (0.3, 0.05, [2]), (0.29, 0.0, []), (0.9, 0.06, []), (None, 0.0, []), (0.9, None, [])],
)
def test_catastrophic_overfitting(fitted: float | None, held: float | None, found: list[int]) -> None:
    """Robust to the attack of training, broken by that of validation, in the same epoch."""
    rows = [
        {"kind": "train", "epoch": 1, "robust_accuracy": 0.9},
        {"kind": "train", "epoch": 2, "robust_accuracy": fitted},
        {"kind": "validation", "epoch": 2, "robust": {"accuracy": held}},
        {"kind": "partial", "epoch": 3, "robust_accuracy": 0.9},
        {"kind": "validation", "epoch": 3, "robust": None},
    ]
    assert catastrophic_epochs(rows) == found
