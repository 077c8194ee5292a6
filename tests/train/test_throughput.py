"""Operations of a step: torch's formulas for one forward, times the forwards of a step."""

import pytest
import timm

from nrat_scale.train.throughput import forward_flops, peak_tflops


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
