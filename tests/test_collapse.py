"""The collapse guard: what it counts over a window of steps, and its settings."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nrat_scale.collapse import Guard, GuardSpec
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
