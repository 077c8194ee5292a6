"""What an audit says beside its numbers."""

import pytest

from nrat_scale.audit.text import notes


@pytest.mark.parametrize(("bounds", "said"), [([-0.03, -0.005], True), ([-0.03, 0.005], False), ([0.01, 0.03], False)])
def test_an_estimate_below_zero_is_explained(bounds, said):
    """A rate that is negative beyond chance shows that the hold-out does not fit; it is not reported as clean labels."""
    rate = sum(bounds) / 2
    corrected = {"identified": True, "rate": max(rate, 0.0), "unclipped": rate, "unclipped_interval": bounds}
    found = notes({"corrected": corrected, "shift": None})
    assert any("the hold-out is not of the same kind" in note for note in found) is said
