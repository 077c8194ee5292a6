"""The fault campaigns of whole runs, bounded: whatever strikes, the same command ends with the undisturbed run's bits."""

import pytest

from faults import CAMPAIGNS


@pytest.mark.parametrize(
    ("name", "trials", "lost_at_most"),
    [("runs", 4, 12), ("ranks", 1, 12), ("stopped", 1, 12), ("files", 1, 4), ("full-disk", 1, 0)],
)
def test_nothing_is_wrong_afterwards(name: str, trials: int, lost_at_most: int) -> None:
    """SIGKILL, SIGTERM, a lost or frozen rank, damaged files, no room: an epoch has 6 steps, and each is saved."""
    campaign, _ = CAMPAIGNS[name]
    row = campaign(trials)
    assert row.wrong == []
    assert row.lost_steps <= lost_at_most
