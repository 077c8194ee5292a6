"""What a release is made from: weights of a run, their results and everything that the card reports."""

from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import urlsplit

from nrat_scale.attacks import RELEASED_CODE_WARNING
from nrat_scale.checkpoint.folder import named_checkpoint
from nrat_scale.core.errors import UserError
from nrat_scale.core.files import read_json
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.loading.release_folder import WEIGHTS
from nrat_scale.recipe import RecipeSpec, load_recipe


@dataclass(frozen=True)
class Weights:
    """A weight file of a run.

    Attributes:
        label: `best`, `last` or `epoch-NNNN`.
        sha256: of the file when it was saved.
        kind: `ema` or `model`.
    """

    label: str
    path: Path
    sha256: str
    kind: str
    epoch: int


@dataclass(frozen=True)
class Contents:
    """Everything that goes into a release.

    Attributes:
        name: of the release.
        recipe: without local paths.
        description: the run's model.json.
        noise: the run's label_noise.json, if it has label noise.
        skipped: shards that the run skipped.
        results: results.json reduced to exactly these weights, under their label; None if they were not evaluated.
        results_label: the label of these weights in the run's results.
    """

    name: str
    weights: Weights
    recipe: RecipeSpec
    description: dict[str, Any]
    noise: dict[str, Any] | None
    skipped: list[dict[str, Any]]
    results: dict[str, Any] | None
    results_label: str

    @property
    def record(self) -> dict[str, Any]:
        """The results of these weights, empty if they were not evaluated."""
        return {} if self.results is None else dict(self.results["checkpoints"][self.weights.label])

    @property
    def attacks(self) -> dict[str, Any]:
        """Attack -> its entry in the results."""
        return dict(self.record.get("attacks", {}))

    @property
    def flags(self) -> list[str]:
        """Reasons to doubt the results."""
        flags = [str(flag) for flag in self.record.get("flags") or []]
        if self.recipe.threat.space != "pixel" and RELEASED_CODE_WARNING not in flags:
            flags.insert(0, RELEASED_CODE_WARNING)
        return flags


def _require_run(run: Path) -> None:
    if not RunFolder(run).is_run:
        raise UserError(f"{run} is not a run (no recipe.yaml and checkpoints). Train one first.")


def checkpoint_weights(run: Path, name: str) -> Weights:
    """The evaluated weights of the `best` or `last` checkpoint.

    Raises:
        UserError: `run` is not a run, or the checkpoint is missing or damaged.
    """
    _require_run(run)
    checkpoint = named_checkpoint(run, name)
    file = f"{checkpoint.evaluated}.safetensors"
    epoch = int(checkpoint.state["epoch"])
    return Weights(name, checkpoint.folder / file, checkpoint.sha256[file], checkpoint.evaluated, epoch)


def queued_weights(run: Path) -> list[Weights]:
    """The weights that `release.every_epochs` put aside, oldest first.

    Raises:
        UserError: `run` is not a run, there are none, or the description of one is damaged.
    """
    _require_run(run)
    queue = RunFolder(run).releases
    folders = sorted(path for path in queue.glob("epoch-*") if path.is_dir())
    if not folders:
        raise UserError(f"{queue} holds no checkpoints. Put them aside during training with release.every_epochs=N.")
    weights = []
    for folder in folders:
        facts = read_json(folder / "queued.json", "description of the queued weights")
        weights.append(Weights(folder.name, folder / WEIGHTS, facts["sha256"], facts["weights"], facts["epoch"]))
    return weights


def gather(run: Path, weights: Weights, name: str) -> Contents:
    """Read what a release of `weights` called `name` contains."""
    folder = RunFolder(run)
    everything, results, results_label = folder.read_results() or {}, None, ""
    for label, record in everything.get("checkpoints", {}).items():
        if record.get("sha256") == weights.sha256 and record.get("attacks"):
            results, results_label = {**everything, "checkpoints": {weights.label: record}}, label
    return Contents(
        name=name,
        weights=weights,
        recipe=_without_paths(load_recipe(folder.recipe)),
        description=folder.read_model(),
        noise=folder.read_label_noise(),
        skipped=folder.read_skipped_shards(),
        results=results,
        results_label=results_label,
    )


def _without_paths(recipe: RecipeSpec) -> RecipeSpec:
    """The recipe without private folders and passwords: the last name of absolute paths, addresses without user and query."""

    def public(path: str | None) -> str | None:
        if path and "://" in path:
            parts = urlsplit(path)
            return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        return PurePath(path).name if path and PurePath(path).is_absolute() else path

    real, generated = recipe.data.real, recipe.data.generated
    noise = replace(real.noise, human_labels=public(real.noise.human_labels))
    data = replace(
        recipe.data,
        real=replace(real, shards=public(real.shards), exclude=public(real.exclude), noise=noise, prepare=None),
        generated=replace(generated, shards=public(generated.shards), exclude=public(generated.exclude), prepare=None),
        remote=replace(recipe.data.remote, cache=None),
    )
    return replace(recipe, data=data, run_dir=f"runs/{recipe.name}")
