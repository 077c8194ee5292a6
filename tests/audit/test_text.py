"""What an audit says beside its numbers."""

import pytest

from nrat_scale.audit.text import audit_text, notes


@pytest.mark.parametrize(("bounds", "said"), [([-0.03, -0.005], True), ([-0.03, 0.005], False), ([0.01, 0.03], False)])
def test_an_estimate_below_zero_is_explained(bounds, said):
    """A rate that is negative beyond chance shows that the hold-out does not fit; it is not reported as clean labels."""
    rate = sum(bounds) / 2
    corrected = {"identified": True, "rate": max(rate, 0.0), "unclipped": rate, "unclipped_interval": bounds}
    found = notes({"corrected": corrected, "shift": None})
    assert any("the hold-out is not of the same kind" in note for note in found) is said


def test_class_names_do_not_control_the_terminal():
    """Class names came from a file: control characters are printed as `?`."""
    data = {"shards": "x", "num_images": 4, "class_names": ["a\x1b[31m", "b"]}
    estimate = {"rate": 0.1, "unclipped": 0.1, "interval": [0.0, 0.2]}
    content = {"data": data, "corrected": None, "plain": estimate, "suspects": {"count": 0}, "injected": None}
    content |= {"measured_truth": None, "overlapping": [{"classes": [0, 1], "share": 0.1}], "notes": []}
    assert "a?[31m and b" in audit_text(content)
