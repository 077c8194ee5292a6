"""Names of all files in a run directory, and readers of those that several commands read."""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from nrat_scale.core.errors import UserError
from nrat_scale.core.files import read_json

RECIPE, RESULTS, OUTCOMES, DATA = "recipe.yaml", "results.json", "results.npz", "data.json"  # also of a release folder
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{12}\.tmp")  # `core.files.temporary_sibling`
_IN_ALIVE = re.compile(r"lock|owner\.json|\.owner\.json\.[0-9a-f]{12}\.tmp|rank-[0-9]+|now-[0-9a-f]{8}|\.nfs[0-9a-f]+")
QUEUED = "queued.json"  # in a folder of `RunFolder.releases`: describes its weights


class RunFolder:
    """Paths and readers of one run directory; creating it touches nothing on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / RECIPE  # the resolved recipe; written first: a folder without it is not a run
        self.model = path / "model.json"  # architecture, its arguments, image shape, class names
        self.data = path / DATA  # fingerprints and held-out samples of the training data
        self.label_noise = path / "label_noise.json"  # kind, rate, realised transition matrix; only with label noise
        self.label_noise_arrays = path / "label_noise.npz"  # clean and given labels, in source order
        self.generated_noise = path / "label_noise_generated.json"  # the same of data.generated.noise
        self.generated_noise_arrays = path / "label_noise_generated.npz"
        self.label_scores = (
            path / "label_scores.npy"
        )  # with `objective.refine.kind: scores`: for the label noise `badlabel`
        self.metrics = path / "metrics.jsonl"  # one JSON object per epoch and per validation
        self.timing = path / "timing.jsonl"  # hardware, seconds and throughput; a resumed run appends
        self.skipped_shards = path / "skipped_shards.json"  # with data.on_bad_shard: skip
        self.checkpoints = path / "checkpoints"  # step-XXXXXXXX/, best.json, last.json: see `nrat_scale.checkpoint`
        self.releases = path / "releases"  # weights queued for publication (release.every_epochs)
        self.results = path / RESULTS  # accuracies; `OUTCOMES` beside it: outcomes per image
        self.tensorboard = path / "tensorboard"  # TensorBoard's event files
        self.tracking = path / "tracking.json"  # id of the run in W&B and trackio
        self.profile = path / "profile"  # profiler traces
        self.alive = path / ".alive"  # liveness files of the ranks
        self.lock = self.alive / "lock"  # held by the process that trains
        self.owner = self.alive / "owner.json"  # which process that is

    def checkpoint(self, step: int) -> Path:
        """The checkpoint folder of a step."""
        return self.checkpoints / f"step-{step:08d}"

    def pointer(self, name: str) -> Path:
        """The file that names the `best` or the `last` checkpoint."""
        return self.checkpoints / f"{name}.json"

    def release(self, epoch: int) -> Path:
        """The folder of the weights queued for publication after an epoch."""
        return self.releases / f"epoch-{epoch:04d}"

    def bad_step(self, step: int, rank: int) -> Path:
        """The file in which a rank saves the images of a step whose loss or gradient was not finite."""
        return self.path / f"bad-step-{step:08d}-rank{rank}.safetensors"

    @property
    def is_below_working_directory(self) -> bool:
        """Whether the run is the user's own, whose code may be imported: it lies under the working directory."""
        return self.path.resolve().is_relative_to(Path.cwd().resolve())

    @property
    def is_run(self) -> bool:
        """Whether this is a run directory (a release has a recipe, but no checkpoints)."""
        return self.recipe.is_file() and self.checkpoints.is_dir()

    @property
    def is_new(self) -> bool:
        """Whether nothing is here, or only what a start leaves that was killed before it had written recipe.yaml."""
        return not self.path.exists() or all(map(self._is_of_a_start, self.path.iterdir()))

    def _is_of_a_start(self, entry: Path) -> bool:
        if entry == self.alive and entry.is_dir() and not entry.is_symlink():
            return all(_IN_ALIVE.fullmatch(path.name) for path in entry.iterdir())
        temporary = _TEMPORARY.fullmatch(entry.name)
        return temporary is not None and temporary[1] == RECIPE and entry.is_file()

    def leftovers(self) -> list[Path]:
        """Temporary files and folders of a training process that was killed. Only the run's owner may remove them.

        Those of other commands, such as results.json of an evaluation, may be in use and are not among them.
        """
        ours = re.compile(
            "|".join(
                re.escape(path.name)
                for path in (
                    self.recipe,
                    self.model,
                    self.data,
                    self.label_noise,
                    self.label_noise_arrays,
                    self.metrics,
                )
            )
            + r"|skipped_shards\.json|bad-step-[0-9]{8}-rank[0-9]+\.safetensors|epoch-[0-9]{4}|owner\.json"
        )
        folders = [folder for folder in (self.path, self.releases, self.alive) if folder.is_dir()]
        found = [(_TEMPORARY.fullmatch(path.name), path) for folder in folders for path in folder.iterdir()]
        stale = [path for temporary, path in found if temporary and ours.fullmatch(temporary[1])]
        ranks = [path for path in self.alive.glob("*") if re.fullmatch(r"rank-[0-9]+|now-[0-9a-f]{8}", path.name)]
        return sorted([*stale, *ranks])

    def read_model(self) -> dict[str, Any]:
        """The contents of model.json; raises `UserError` if it is missing or damaged."""
        return read_json(self.model, "description of the model")

    def noise_files(self, kind: str) -> tuple[Path, Path]:
        """Description and arrays of the label noise of the `real` or `generated` images."""
        if kind == "real":
            return self.label_noise, self.label_noise_arrays
        return self.generated_noise, self.generated_noise_arrays

    def read_label_noise(self, kind: str = "real") -> dict[str, Any] | None:
        """The description of the label noise of the `real` or `generated` images, None if the run has none."""
        path, _ = self.noise_files(kind)
        return read_json(path, "description of the label noise") if path.is_file() else None

    def read_skipped_shards(self) -> list[dict[str, Any]]:
        """Shards skipped by this run: source, name, number of images, reason."""
        path = self.skipped_shards
        return list(read_json(path, "log of skipped shards").get("skipped", [])) if path.is_file() else []

    def read_results(self) -> dict[str, Any] | None:
        """The evaluation results, None if nothing was evaluated."""
        return read_json(self.results, "results") if self.results.is_file() else None

    def read_timing(self) -> list[dict[str, Any]]:
        """The rows of timing.jsonl; lines that a killed process left incomplete are skipped, as is an unreadable file."""
        rows = []
        with suppress(OSError):
            for line in self.timing.read_bytes().split(b"\n"):
                with suppress(ValueError, RecursionError):
                    row = json.loads(line.decode())
                    rows += [row] if isinstance(row, dict) else []
        return rows

    def read_metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl; empty if the file does not exist.

        An incomplete last line, as a killed process leaves it, is skipped.

        Raises:
            UserError: the file cannot be read, or another line is not a JSON object.
        """
        try:
            lines = self.metrics.read_bytes().split(b"\n") if self.metrics.exists() else []
        except OSError as error:
            raise UserError(f"{self.metrics} cannot be read ({error.strerror}). Restore it.") from error
        rows = []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            row = None
            with suppress(ValueError, RecursionError):
                row = json.loads(line.decode())
            if isinstance(row, dict):
                rows.append(row)
            elif number < len(lines):
                raise UserError(
                    f"{self.metrics} is damaged: line {number} is not a JSON object. Remove that line or restore the file."
                )
        return rows


def runs_in(path: Path) -> list[Path]:
    """The runs directly in the folder `path`, at most three."""
    return sorted(found.parent for found in path.glob(f"*/{RECIPE}") if RunFolder(found.parent).checkpoints.is_dir())[
        :3
    ]
