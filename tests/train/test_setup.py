"""Starting a run: settings that do not fit the launch are refused before anything is written."""

from pathlib import Path

import pytest

from nrat_scale.core.errors import UserError
from nrat_scale.data.training_data import TrainingData
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


def test_a_batch_above_the_data_is_refused(recipe_path: Path, tmp_path: Path) -> None:
    """It would repeat images: the message has both numbers and the largest batch; a run that has begun goes on."""
    run = f"run_dir={tmp_path / 'run'}"
    alone = ["data.generated.shards=null", "train.max_steps=1", run]
    one = r"data\.batch_size 512 every batch has 512 real .* only 100 to train on besides the 20 .* data\.batch_size=100 or less"
    with pytest.raises(UserError, match=one):
        train(load_recipe(recipe_path, [*alone, "data.batch_size=512"]))
    shares = ["data.generated.fraction=0.5", "data.validation.source=generated", "data.validation.size=10", run]
    with pytest.raises(UserError, match=r"data\.batch_size=16[01] or less"):
        train(load_recipe(recipe_path, [*shares, "data.batch_size=300"]))
    assert not (tmp_path / "run").exists()
    train(load_recipe(recipe_path, [*alone, "data.batch_size=100"]))


def test_a_begun_run_with_a_large_batch_goes_on(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older versions began such runs."""
    overrides = ["data.generated.shards=null", "data.batch_size=200", f"run_dir={tmp_path / 'run'}"]
    with monkeypatch.context() as older:
        older.setattr(TrainingData, "check_batch_size", lambda data: None)
        train(load_recipe(recipe_path, [*overrides, "train.max_steps=1"]))
    train(load_recipe(recipe_path, [*overrides, "train.max_steps=2"]))
