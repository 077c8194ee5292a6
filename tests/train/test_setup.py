"""Starting a run: settings that do not fit the launch are refused before anything is written."""

from pathlib import Path

import pytest

from nrat_scale.core.errors import UserError
from nrat_scale.recipe import load_recipe
from nrat_scale.train.loop import train


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.bn=groups"], "go together"),
        (["model.bn_group_size=4"], "go together"),
        (["model.bn=groups", "model.bn_group_size=3"], "divide the 16 images"),
        (["model.bn=groups", "model.bn_group_size=8", "train.accumulate=4"], "divide the 4 images"),
        (["model.bn=sync"], "needs GPUs"),
        (["model.bn=grups"], "Did you mean 'groups'"),
        (["precision=fp16"], "GPU"),
    ],
)
def test_wrong_settings_are_refused(wide_path: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    """Settings that do not fit end in an error before anything is written."""
    with pytest.raises(UserError, match=message):
        train(load_recipe(wide_path, [*overrides, f"run_dir={tmp_path / 'run'}"]))
    assert not (tmp_path / "run").exists()
