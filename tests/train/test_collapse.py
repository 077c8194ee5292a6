"""The collapse guard: training that really collapses is reported, stopped with advice, or rewound."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nrat_scale.checkpoint.folder import named_checkpoint
from nrat_scale.collapse import Guard, GuardSpec
from nrat_scale.core.errors import UserError
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.recipe import load_recipe
from nrat_scale.train.loop import train
from tests.support.runs import digest

# NCE+RCE with a rate that is far too large: within a few steps the model names one class for every image.
COLLAPSING = ["objective.name=nrat", "optim.lr=30", "optim.schedule=constant", "train.epochs=8", "ema.decay=0"]
WATCHING = ["guard.window=4", "guard.patience=2"]


def rows(run: Path) -> list[dict[str, Any]]:
    return RunFolder(run).read_metrics()


def test_a_collapse_is_reported_once(recipe_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By default the run continues, but prints what happened and what helps, and its metrics record it."""
    run = train(load_recipe(recipe_path, [*COLLAPSING, *WATCHING, f"run_dir={tmp_path / 'run'}"]))
    out = capsys.readouterr().out
    assert "the paper uses 0.1, and 0.05 or 0.01" in out
    reported = [row for row in rows(run) if row["kind"] == "guard"]
    assert {row["action"] for row in reported} == {"warn"}
    assert 1 <= out.count("Training has collapsed by step") == len(reported) < 32 / 4 - 1, (
        "once per collapse, not once per window"
    )
    last = [row for row in rows(run) if row["kind"] == "train"][-1]
    assert last["natural_accuracy"] < 0.2


def test_a_collapse_can_stop_the_run(recipe_path: Path, tmp_path: Path) -> None:
    """A night on rented GPUs is not spent on a model that names one class."""
    recipe = load_recipe(recipe_path, [*COLLAPSING, *WATCHING, "guard.action=stop", f"run_dir={tmp_path / 'run'}"])
    with pytest.raises(UserError, match=r"collapsed by step \d+: .* name one class.*Lower optim\.lr"):
        train(recipe)
    assert len([row for row in rows(tmp_path / "run") if row["kind"] == "train"]) < 10


# Learns within forty steps, and collapses under a rate of 3.
LEARNING = [
    "objective.name=pgd_at_apl", "optim.name=adamw", "threat.eps=0.02", "data.real.noise.kind=none", "data.real.noise.rate=0",
    "data.epoch_samples=128", "model.kwargs.width=8", "ema.decay=0", "guard.window=16", "guard.patience=4",
    "guard.top_share=0.6",  # of adversarial predictions, which the attack spreads
]  # fmt: skip


def test_the_guard_does_not_change_a_healthy_run(recipe_path: Path, tmp_path: Path) -> None:
    """With and without the guard, the metrics are the same."""
    off, on = (
        [
            *LEARNING,
            "train.epochs=10",
            "optim.schedule=constant",
            f"guard.action={action}",
            f"run_dir={tmp_path / action}",
        ]
        for action in ("none", "rewind")
    )
    first = train(load_recipe(recipe_path, off))
    assert rows(train(load_recipe(recipe_path, on))) == rows(first)


def test_a_collapse_can_be_rewound(recipe_path: Path, tmp_path: Path) -> None:
    """From the last good checkpoint with a smaller rate; later checkpoints are set aside, and an interruption after the rewind
    changes nothing."""
    # Right for the first ten epochs, far too large afterwards.
    rates = ["optim.lr=0.01", "optim.schedule=multistep", "optim.milestones=[10]", "optim.gamma=300"]
    overrides = [*LEARNING, *rates, "train.epochs=24", "guard.action=rewind", "guard.lr_factor=0.003", "train.keep=20"]
    run = train(load_recipe(recipe_path, [*overrides, f"run_dir={tmp_path / 'run'}"]))
    (row,) = [row for row in rows(run) if row["kind"] == "guard"]
    assert row["action"] == "rewind"
    rewound_to = row["rewound_to"]
    assert 40 < rewound_to <= 96 <= row["step"] - 32
    steps = [r["step"] for r in rows(run) if r["kind"] == "train"]
    assert steps == sorted(set(steps)), "no epoch is in the metrics twice"
    assert named_checkpoint(run, "last").state["guard"]["lr_scale"] == pytest.approx(0.003)
    assert list((run / "checkpoints").glob(".step-*.collapsed-*"))
    accuracy = [r["robust_accuracy"] for r in rows(run) if r["kind"] == "train"]
    assert accuracy[-1] > 0.2, "it continues to learn"
    other = [*overrides, f"run_dir={tmp_path / 'other'}"]
    for steps in (row["step"] - 3, rewound_to + 30):
        train(load_recipe(recipe_path, [*other, f"train.max_steps={steps}"]))
    again = train(load_recipe(recipe_path, other))
    assert rows(again) == rows(run)
    assert digest(again) == digest(run)


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


@pytest.mark.parametrize(("key", "value"), [("action", "'stopp'"), ("window", 0), ("top_share", 1.5), ("lr_factor", 0)])
def test_wrong_settings_are_refused(recipe_path: Path, key: str, value: object) -> None:
    """When the recipe is loaded."""
    with pytest.raises(UserError, match=f"guard.{key}"):
        load_recipe(recipe_path, [f"guard.{key}={value}"])
