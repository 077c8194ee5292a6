"""Gather the contents of a release: weights of a run, their results, and the facts for the model card."""

from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import urlsplit

from nrat_scale.attacks import RELEASED_CODE_WARNING
from nrat_scale.checkpoint.folder import named_checkpoint
from nrat_scale.core.errors import UserError, quoted
from nrat_scale.core.files import read_json
from nrat_scale.core.run_folder import QUEUED, RunFolder
from nrat_scale.data.audit_action import action_text
from nrat_scale.data.spec import GENERATED, REAL, VALIDATION
from nrat_scale.evaluate.results import Outcome, read_arrays
from nrat_scale.labels import BEFORE, UNKNOWN
from nrat_scale.loading.release_folder import WEIGHTS
from nrat_scale.publications import LICENSES
from nrat_scale.recipe import RecipeSpec, load_recipe
from nrat_scale.remote.hub import check_repository


@dataclass(frozen=True)
class Weights:
    """A weight file of a run."""

    label: str  # `best`, `last` or `epoch-NNNN`
    path: Path
    sha256: str  # of the file when it was saved
    kind: str  # `ema` or `model`
    epoch: int


@dataclass(frozen=True)
class Publication:
    """What the author of a release decides: where it goes, and its licence."""

    address: str | None = None  # `user/repo`, `user/repo@revision` or hf://buckets/USER/BUCKET/FOLDER; None: not pushed
    license: str | None = None  # one of the Hub's `publications.LICENSES`; None: not stated
    license_name: str | None = None  # only and always of the licence `other`
    license_link: str | None = None
    benchmark: str | None = (
        None  # the Hub data set whose leaderboard the results are for; None: that of the test images
    )

    def __post_init__(self) -> None:
        if self.license is not None and self.license not in LICENSES:
            near = get_close_matches(self.license.lower(), LICENSES, n=1, cutoff=0.6)
            hint = (
                f"Did you mean '{near[0]}'?" if near else "See https://huggingface.co/docs/hub/repositories-licenses."
            )
            raise UserError(f"--license {quoted(self.license)} is not an identifier of the Hub. {hint}")
        named = self.license_name is not None, self.license_link is not None
        if named != (self.license == "other",) * 2:
            raise UserError("--license other needs --license-name and --license-link, and no other licence has them.")
        if self.benchmark is not None:
            check_repository(self.benchmark, None)


@dataclass(frozen=True)
class Contents:
    """Everything that goes into a release. Results and outcomes are of exactly these weights, under their label."""

    name: str  # of the release
    weights: Weights
    recipe: RecipeSpec  # without local paths
    description: dict[str, Any]  # model.json
    noise: dict[str, dict[str, Any]]  # by source with injected label noise: its description
    skipped: list[dict[str, Any]]  # shards that the run skipped
    results: dict[str, Any] | None  # results.json; None if the weights were not evaluated
    attacks: dict[str, Any]  # attack -> its entry in the results
    flags: list[str]  # reasons to doubt the results
    outcomes: dict[str, Outcome]  # <label>/<attack> -> outcomes per image
    publication: Publication
    data: dict[str, Any] | None = None  # data.json: fingerprints of the training data; None in runs of early versions

    @property
    def num_validation(self) -> int | None:
        """The number of images that selected the checkpoint, if they are of data.validation.shards."""
        return (self.data or {}).get(VALIDATION, {}).get("num_held_out")

    def fingerprint(self, source: str) -> str:
        """The first digits of the fingerprint of the `real` or `generated` images; empty if the run has no record."""
        return str((self.data or {}).get(source, {}).get("fingerprint", ""))[:16]

    def audit_texts(self) -> list[str]:
        """What the run did about labels that an audit doubted, a sentence's end for each source."""
        records = {source: (self.data or {}).get(source, {}).get("audit") for source in (REAL, GENERATED)}
        return [action_text(source, record) for source, record in records.items() if record]

    def noise_text(self, source: str) -> str:
        """`20.0 % of its real training labels (6.0 % of a batch's labels, the effective rate)`."""
        rate, share = 100 * self.noise[source]["realised_rate"], self.recipe.data.shares.get(source, 0.0)
        return f"{rate:.1f} % of its {source} training labels ({rate * share:.1f} % of a batch's labels, the effective rate)"

    def injected_blindly(self, source: str) -> bool:
        """Whether noise was injected into labels that were not known to be clean."""
        return self.noise.get(source, {}).get(BEFORE) == UNKNOWN

    def noise_effect(self, source: str) -> str:
        """`noise_text` with what is known about these labels."""
        if self.injected_blindly(source):
            return f"{self.noise_text(source)} were changed; whether the labels before injection were right is unknown"
        return f"{self.noise_text(source)} are wrong"

    @property
    def has_unchecked_labels(self) -> bool:
        """Whether nobody knows how many of the real training labels are wrong."""
        data = self.recipe.data
        return data.real.shards is not None and (data.real.noise.kind == UNKNOWN or self.injected_blindly(REAL))


def checkpoint_weights(run: Path, name: str) -> Weights:
    """The evaluated weights of the `best` or `last` checkpoint.

    Raises:
        UserError: the checkpoint is missing or damaged.
    """
    checkpoint = named_checkpoint(run, name)
    file = f"{checkpoint.evaluated}.safetensors"
    epoch = int(checkpoint.state["epoch"])
    return Weights(name, checkpoint.folder / file, checkpoint.sha256[file], checkpoint.evaluated, epoch)


def queued_weights(run: Path) -> list[Weights]:
    """The weights that `release.every_epochs` has queued, oldest first.

    Raises:
        UserError: there are none, or the description of one is damaged.
    """
    queue = RunFolder(run).releases
    folders = sorted(path for path in queue.glob("epoch-*") if path.is_dir())
    if not folders:
        raise UserError(f"{queue} holds no checkpoints. Queue them during training with release.every_epochs=N.")
    weights = []
    for folder in folders:
        facts = read_json(folder / QUEUED, "description of the queued weights")
        weights.append(Weights(folder.name, folder / WEIGHTS, facts["sha256"], facts["weights"], facts["epoch"]))
    return weights


def gather(run: Path, weights: Weights, name: str, publication: Publication) -> Contents:
    """Read what a release of `weights` called `name` contains."""
    folder = RunFolder(run)
    recipe, everything = load_recipe(folder.recipe, run_code=False), folder.read_results() or {}
    results: dict[str, Any] | None = None
    record, outcomes = {}, {}
    for label, found in everything.get("checkpoints", {}).items():
        if found.get("sha256") == weights.sha256 and found.get("attacks"):
            record, results = found, {**everything, "checkpoints": {weights.label: found}}
            arrays = read_arrays(folder.results)
            names = {f"{weights.label}/{attack}": f"{label}/{attack}" for attack in found["attacks"]}
            outcomes = {new: arrays[old] for new, old in names.items() if old in arrays}
    flags = [] if recipe.threat.space == "pixel" else [RELEASED_CODE_WARNING]
    flags += [flag for flag in map(str, record.get("flags") or []) if flag not in flags]
    noise = {kind: folder.read_label_noise(kind) or {} for kind in (REAL, GENERATED)}
    return Contents(
        name=name,
        weights=weights,
        recipe=_without_paths(recipe),
        description=folder.read_model(),
        noise={kind: found for kind, found in noise.items() if found.get("num_noisy")},
        skipped=folder.read_skipped_shards(),
        results=results,
        attacks=record.get("attacks", {}),
        flags=flags,
        outcomes=outcomes,
        data=read_json(folder.data, "record of the training data") if folder.data.is_file() else None,
        publication=publication,
    )


def init_text(init: dict[str, Any] | None) -> str:
    """`model.init` of a run in words, from model.json: the source, its hash, and what was not loaded; empty without one."""
    if init is None:
        return ""
    left = ", ".join(map(str, init["not_loaded"][:4])) + (", ..." if len(init["not_loaded"]) > 4 else "")
    source = public(str(init["source"]))
    text = f"`{source}` (sha256 `{init['sha256'][:16]}`), {init['num_loaded']} of {init['num_tensors']} tensors"
    return text + (f"; not loaded: {left}" if left else "")


def public(path: str | None) -> str | None:
    """`path` without what is private: of an absolute one the last name, of an address no user, password and query."""
    if path and "://" in path:
        parts = urlsplit(path)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    return PurePath(path).name if path and PurePath(path).is_absolute() else path


def _without_paths(recipe: RecipeSpec) -> RecipeSpec:
    """The recipe with only the last name of absolute paths, and addresses without user, password and query."""

    def without(source: Any) -> Any:
        matrix = source.noise.matrix
        known = public(matrix) if isinstance(matrix, str) else matrix
        files = {name: public(getattr(source.noise, name)) for name in ("human_labels", "scores")}
        noise = replace(source.noise, **files, matrix=known)
        kept = {"shards": public(source.shards), "exclude": public(source.exclude), "prepare": None}
        return replace(source, **kept, noise=noise, audit=replace(source.audit, scores=public(source.audit.scores)))

    data = replace(
        recipe.data,
        real=without(recipe.data.real),
        generated=without(recipe.data.generated),
        validation=replace(recipe.data.validation, shards=public(recipe.data.validation.shards)),
        remote=replace(recipe.data.remote, cache=None),
    )
    model = replace(recipe.model, init=public(recipe.model.init))
    return replace(recipe, data=data, model=model, run_dir=f"runs/{recipe.name}")
