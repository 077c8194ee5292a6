"""The models that predict: those of the folds, or one that never saw the images."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from nrat_scale.audit.folds import Folds
from nrat_scale.core.errors import UserError
from nrat_scale.data.shards import ShardSet
from nrat_scale.evaluate.overlap import SEEN, training_overlap
from nrat_scale.evaluate.request import check_fits
from nrat_scale.evaluate.targets import Target, TargetOptions, find_targets
from nrat_scale.recipe import RecipeSpec
from nrat_scale.train import train


@dataclass(frozen=True)
class Predictors:
    """Models and what is known of each."""

    models: Sequence[nn.Module]  # on the device, in evaluation mode
    facts: list[dict[str, Any]]  # of each: sha256 of its weights, fold, step, ...

    @property
    def sha256(self) -> str:
        """Identifies all of them."""
        return hashlib.sha256("\n".join(fact["sha256"] for fact in self.facts).encode()).hexdigest()


def outside_model(
    what: str, shards: ShardSet, hold_out: ShardSet | None, device: torch.device, *, unseen: bool, checkpoint: str
) -> Predictors:
    """The run or release `what`, if it never saw the images of `shards` or of the hold-out.

    Args:
        unseen: the user says so, where no record does.
        checkpoint: of a run, `best` or `last`.

    Raises:
        UserError: there is no such model, it was trained or selected on these images, no record excludes that and `unseen` is
            not given, or it has other channels or classes.
    """
    (target,) = find_targets(what, TargetOptions(checkpoints=(checkpoint,))).targets
    _check_unseen(what, shards, unseen)
    if hold_out is not None:
        _check_hold_out_unseen(what, hold_out, unseen)
    return Predictors([_placed(target, shards, what, device)], [{**_facts(target), "model": what, "fold": None}])


def _check_unseen(what: str, shards: ShardSet, unseen: bool) -> None:
    found = training_overlap(what, shards)
    if found.verdict == SEEN:
        raise UserError(
            f"{what} {found.reason}: its probabilities would repeat the labels that it learnt. Give a model that never saw "
            "these images, or --folds 5."
        )
    if not found.is_unseen and not unseen:
        raise UserError(
            f"{what} {found.reason}. If it has never seen these images, say so with --unseen; if it has, use --folds 5."
        )


def _check_hold_out_unseen(what: str, hold_out: ShardSet, unseen: bool) -> None:
    """Refuse a hold-out that the model was trained on: its errors there are too few, and the corrected rate too high."""
    found = training_overlap(what, hold_out)
    where = f"--clean-holdout {hold_out.folder}"
    if found.verdict == SEEN:
        raise UserError(
            f"{where}: {what} {found.reason}, so that it makes fewer errors there than on the audited images. Give a hold-out "
            "that it never saw."
        )
    if not found.is_unseen and not unseen:
        raise UserError(
            f"{where}: {what} {found.reason}. If it has never seen the hold-out, say so with --unseen; if it has, give another."
        )


def fold_models(folder: Path, folds: Folds, recipe: RecipeSpec, device: torch.device) -> Predictors:
    """The last weights of each fold in `folder`, which `train_folds` has trained."""
    models, facts = [], []
    for number in range(folds.number):
        run = folder / f"fold-{number}"
        (target,) = find_targets(str(run), TargetOptions(checkpoints=("last",), trust_code=True)).targets
        models.append(_placed(target, folds.shards, str(run), device))
        facts.append({**_facts(target), "model": recipe.model.name, "fold": number})
    return Predictors(models, facts)


def train_folds(folder: Path, folds: Folds, recipe: RecipeSpec, excluded: Sequence[Path]) -> None:
    """Train each fold that is not complete, or resume it.

    Raises:
        UserError, FloatingPointError: as `train`.
    """
    for number, path in enumerate(excluded):
        run = folder / f"fold-{number}"
        if PartialState().is_main_process:
            print(f"fold {number + 1} of {folds.number}: {run}", flush=True)
        real = replace(recipe.data.real, exclude=str(path))
        spec = replace(recipe, data=replace(recipe.data, real=real), run_dir=str(run), name=run.name)
        training = train(spec)
        assert training.complete, "the recipe has no train.max_steps"


def _placed(target: Target, shards: ShardSet, what: str, device: torch.device) -> nn.Module:
    check_fits(target.model, shards, what)
    return target.model.to(device).eval()


def _facts(target: Target) -> dict[str, Any]:
    return {
        "sha256": target.key.digest,
        **{k: v for k, v in target.identity.items() if k in ("step", "epoch", "weights", "objective")},
    }
