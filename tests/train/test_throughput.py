"""Operations of a step: torch's formulas for one forward, times the forwards of a step."""

from pathlib import Path

import pytest
import timm

from nrat_scale.objectives import Objective, preset
from nrat_scale.recipe import load_recipe
from nrat_scale.train.throughput import forward_equivalents, forward_flops, peak_tflops


@pytest.mark.parametrize(
    ("name", "reuses", "expected"),
    [("nrat", False, 27), ("trades", False, 27), ("dm_at", True, 26), ("pgd_at", False, 23), ("natural", False, 3)],
)
def test_forwards_of_a_step(recipe_path: Path, name: str, reuses: bool, expected: int) -> None:
    """Ten attack steps of two passes each, natural logits if the attack needs them, three passes a training forward."""
    recipe = load_recipe(recipe_path, [f"objective.name={name}", "threat.num_steps=10"])
    assert forward_equivalents(recipe, Objective(preset(name), 10), reuses_natural=reuses) == expected


def test_operations_of_a_forward() -> None:
    """WRN-28-10 on 32 x 32 images: 5.2 billion multiply-adds, as published (10.5 GFLOP an image)."""
    model = timm.create_model("wrn28_10_silu")
    assert forward_flops(model, (32, 32, 3)) == pytest.approx(10.5e9, rel=0.02)
    assert model.training


def test_cards_are_found_by_their_names() -> None:
    """The names that the driver reports; an unknown card has no peak."""
    assert peak_tflops("NVIDIA H200") == peak_tflops("NVIDIA H100 80GB HBM3") == 989.4
    assert peak_tflops("NVIDIA H100 PCIe") == 756.0
    assert peak_tflops("NVIDIA A100-SXM4-80GB") == 312.0
    assert peak_tflops("Tesla K80") is None
