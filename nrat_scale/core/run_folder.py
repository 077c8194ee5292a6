"""The files of a run directory: the one place that names them, and readers of those that several commands read.

RUN/recipe.yaml             the resolved recipe; written first, a folder without it is not a run
RUN/model.json, data.json   what was built, what it is trained on
RUN/label_noise.json, .npz  realised label noise, if there is any
RUN/metrics.jsonl           one row per epoch and validation
RUN/skipped_shards.json     shards that the run goes without (data.on_bad_shard: skip)
RUN/checkpoints/            see `nrat_scale.checkpoint`
RUN/releases/               checkpoints put aside for publication (release.every_epochs)
RUN/results.json, .npz      evaluations: accuracies, and outcomes per image
RUN/bad-step-*.safetensors  images and weights of a step that was not finite
RUN/profile/, RUN/.alive/   profiler traces; liveness files of the ranks
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nrat_scale.core.errors import UserError
from nrat_scale.core.files import read_json

RECIPE, RESULTS = "recipe.yaml", "results.json"  # also of a release folder


@dataclass(frozen=True)
class RunFolder:
    """Paths and readers of one run directory; creating it touches nothing."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / RECIPE

    @property
    def model(self) -> Path:
        """Architecture, its arguments, image shape, class names."""
        return self.path / "model.json"

    @property
    def data(self) -> Path:
        """Fingerprints and held-out samples of the training data."""
        return self.path / "data.json"

    @property
    def label_noise(self) -> Path:
        """Kind, rate and realised transition matrix of the label noise."""
        return self.path / "label_noise.json"

    @property
    def label_noise_arrays(self) -> Path:
        """Clean and given labels, in source order."""
        return self.path / "label_noise.npz"

    @property
    def metrics(self) -> Path:
        """One JSON object per line."""
        return self.path / "metrics.jsonl"

    @property
    def skipped_shards(self) -> Path:
        """The shards that the run goes without."""
        return self.path / "skipped_shards.json"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints and pointers."""
        return self.path / "checkpoints"

    @property
    def releases(self) -> Path:
        """The queue of checkpoints put aside for publication."""
        return self.path / "releases"

    @property
    def results(self) -> Path:
        """Accuracies of the evaluated checkpoints; the outcomes per image are beside it."""
        return self.path / RESULTS

    @property
    def profile(self) -> Path:
        """The folder of profiler traces."""
        return self.path / "profile"

    @property
    def alive(self) -> Path:
        """The folder of liveness files, one per rank."""
        return self.path / ".alive"

    def pointer(self, name: str) -> Path:
        """The file that names the `best` or the `last` checkpoint."""
        return self.checkpoints / f"{name}.json"

    def bad_step(self, step: int, rank: int) -> Path:
        """Where a rank keeps the images of a step that was not finite."""
        return self.path / f"bad-step-{step:08d}-rank{rank}.safetensors"

    @property
    def is_run(self) -> bool:
        """Whether this is a run directory (a release has a recipe, but no checkpoints)."""
        return self.recipe.is_file() and self.checkpoints.is_dir()

    def read_model(self) -> dict[str, Any]:
        """The description of the model; raises `UserError` if it is missing or damaged."""
        return read_json(self.model, "description of the model")

    def read_label_noise(self) -> dict[str, Any] | None:
        """The description of the label noise, None if the run has none."""
        return read_json(self.label_noise, "description of the label noise") if self.label_noise.is_file() else None

    def read_skipped_shards(self) -> list[dict[str, Any]]:
        """The shards that the run goes without: source, name, number of images, reason."""
        path = self.skipped_shards
        return list(read_json(path, "log of skipped shards").get("skipped", [])) if path.is_file() else []

    def read_results(self) -> dict[str, Any] | None:
        """The evaluation results, None if nothing was evaluated."""
        return read_json(self.results, "results") if self.results.is_file() else None

    def read_metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, empty if there is no such file.

        A last line without its line end is what a killed process leaves; it is skipped.

        Raises:
            UserError: the file cannot be read, or another line is not a JSON object.
        """
        try:
            lines = self.metrics.read_bytes().split(b"\n") if self.metrics.exists() else []
        except OSError as error:
            raise UserError(f"{self.metrics} cannot be read ({error.strerror}). Restore it.") from error
        rows = []
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line.decode()) if line.strip() else {}
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                rows.append(row)
            elif number < len(lines):
                raise UserError(
                    f"{self.metrics} is damaged: line {number} is not a JSON object. Remove that line or restore the file."
                )
        return rows
