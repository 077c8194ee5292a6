"""Registration with RobustBench: the names that RobustBench asks for, and no other."""

from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from nrat_scale.core.errors import UserError
from nrat_scale.loading.robustbench import register_robustbench
from tests.support.small_releases import same_logits, write_release


def test_only_what_robustbench_asks_for_is_registered(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other data sets and threat models are refused; a relative folder still loads after a change of directory."""
    for dataset, threat_model in (
        ("cifar-10", "Linf"),
        ("mnist", "Linf"),
        ("cifar10", "linf"),
        ("cifar10", "corruptions_3d"),
    ):
        with pytest.raises(UserError, match="would never ask for it"):
            register_robustbench("user/repo", "Nobody", dataset, threat_model)
    write_release(tmp_path / "r", model)
    monkeypatch.chdir(tmp_path)
    name = register_robustbench("r", "Relative-Folder")
    assert name == register_robustbench(tmp_path / "r", "relative_folder") == "relative_folder_cifar10_linf"
    monkeypatch.chdir("/")
    ask = partial(
        timm.create_model, name, num_classes=10, pretrained=True, checkpoint_path=""
    )  # as RobustBench calls it
    assert same_logits(ask().eval(), model)
    with pytest.raises(UserError, match="takes no in_chans"):
        ask(in_chans=3)
    features = ask(num_classes=0, drop_rate=0.0)  # as for every model of timm
    assert features.num_classes == 0 and features(torch.rand(2, 1, 8, 8)).shape == (2, 8)
    with pytest.raises(UserError, match="has 10 classes, not 3"):
        ask(num_classes=3)
