"""`evaluate` for Python and for the command line."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from nrat_scale.core.distributed import join_processes, on_main, use_all_cores
from nrat_scale.core.errors import UserError, first_line, warn
from nrat_scale.core.float32 import use_float32
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.data.shards import ShardSet, open_shards
from nrat_scale.evaluate import run
from nrat_scale.evaluate.attacks import Attack, parse_attack
from nrat_scale.evaluate.curves import Curve, parse_curve
from nrat_scale.evaluate.measures import memory_errors
from nrat_scale.evaluate.request import Request, check_fits, check_unseen, request_threat
from nrat_scale.evaluate.results import results_text
from nrat_scale.evaluate.targets import CHECKPOINTS, WEIGHT_CHOICES, FoundTargets, Target, TargetOptions, find_targets
from nrat_scale.recipe import flat_values, load_recipe, to_yaml
from nrat_scale.tracking import Trackers

DEFAULT_ATTACKS = "natural,pgd20,cw20,aa"


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` returns; printed, it is the table of the command line."""

    path: Path  # results.json; `nrat_scale.results(path)` has it as a table
    results: dict[str, Any]  # its content
    labels: tuple[str, ...]  # the evaluated checkpoints, such as `best`

    @property
    def entries(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Checkpoint -> attack -> correct, n, accuracy, low, high (95 % Wilson interval), and what they depend on."""
        return {label: self.results["checkpoints"][label]["attacks"] for label in self.labels}

    @property
    def flags(self) -> dict[str, list[str]]:
        """Checkpoint -> reasons to doubt its numbers."""
        return {label: self.results["checkpoints"][label]["flags"] for label in self.labels}

    def __str__(self) -> str:
        return results_text(self.results, list(self.labels))


def evaluate(
    what: str | Path,
    data: str | Path,
    *,
    attacks: str | Sequence[str | Attack] | None = None,
    curve: str | Curve | Sequence[str | Curve] = (),
    checkpoint: str | Sequence[str] = CHECKPOINTS,
    weights: str | Sequence[str] = WEIGHT_CHOICES[:1],
    arch: str | None = None,
    arch_args: Mapping[str, Any] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    weights_key: str | None = None,
    trust_code: bool = False,
    transfer_from: str | None = None,
    source_arch: str | None = None,
    source_weights_key: str | None = None,
    drop_broken: bool = False,
    images: int | None = None,
    aa_images: int | None = None,
    norm: str | None = None,
    eps: float | None = None,
    step: float | None = None,
    space: str | None = None,
    batch_size: int = 256,
    seed: int = 0,
    device: str | None = None,
    tf32: bool = False,
    graphs: bool = False,
    out: str | Path | None = None,
) -> Evaluation:
    """Measure natural and robust accuracy, and write results.json; what has been measured before is read from it.

    Args:
        what: a run directory, a release folder, `user/repo[@revision]` on the Hub, a weight file with `arch`, a timm model.
        data: folder of shards with the test images.
        attacks: names, such as `"natural,pgd20,aa"`; default: `DEFAULT_ATTACKS`, with a curve none.
        curve: accuracy against eps or attack steps, such as `"eps=0,2/255,8/255"` or `["eps=0,8/255", "steps=1,10,50"]`.
        checkpoint, weights: of a run.
        eps, step: fractions of the pixel range, such as 8 / 255; by default those of the training.
        space: `released_code` measures in the threat space of NRAT's released code; by default that of the training.
        images, aa_images: a fixed seeded choice of that many; None: all, and for curves at most 1000.
        out: results file; default: in the run, else evaluations/NAME-HASH/results.json.

    The other arguments are the options of `python -m nrat_scale.evaluate --help`.

    Raises:
        UserError: there is no such model or data, they do not fit together, or `out` holds other results.
        FloatingPointError: logits or gradients are not finite.
    """
    curves = [curve] if isinstance(curve, str | Curve) else curve
    parsed_curves = tuple(one if isinstance(one, Curve) else parse_curve(one) for one in curves)
    if attacks is None:
        attacks = () if curves else DEFAULT_ATTACKS
    what, parsed = str(what), tuple(one if isinstance(one, Attack) else parse_attack(one) for one in _names(attacks))
    state, chosen = _join(device)
    use_float32("tf32" if tf32 else "ieee")
    shards = open_shards(data, "--data")
    options = TargetOptions(
        _names(checkpoint), _names(weights), arch, mean, std, weights_key, trust_code, arch_args or {}
    )
    found = find_targets(what, options)
    if found.run is not None:
        check_unseen(found.run, shards)
    source = None
    if transfer_from is not None:
        options = TargetOptions(("best",), arch=source_arch, weights_key=source_weights_key, trust_code=trust_code)
        source = _source(transfer_from, options)
    threat = request_threat(what, found.threat, norm, eps, step, space)
    if graphs and chosen.type != "cuda":
        raise UserError(f"--graphs needs a GPU, and this evaluation is on {chosen.type}. Omit it.")
    request = Request(parsed, threat, images, aa_images, batch_size, seed, source, drop_broken, graphs, parsed_curves)
    path = _results_path(found, out)
    on_main(state, shards.verify)
    _place([*found.targets, *([] if source is None else [source])], shards, what, chosen)
    results = run.evaluate(found.targets, shards, request, path, replace_models=out is None)
    evaluation = Evaluation(path, results, tuple(target.label for target in found.targets))
    if state.is_main_process and found.run is not None and path == found.results:
        _track(found.run, evaluation)
    return evaluation


def _source(what: str, options: TargetOptions) -> Target:
    """The model on which a transfer attack makes its images."""
    (source,) = find_targets(what, options).targets
    return replace(source, label=Path(what).name)


def _results_path(found: FoundTargets, out: str | Path | None) -> Path:
    """The results file: `out`, or by default that of the targets."""
    path = found.results if out is None else Path(out)
    if out is None and found.earlier is not None and found.earlier.is_file():
        warn(f"{found.earlier} is not used: an earlier version wrote it, which did not tell all models apart.")
    if path.is_dir() or path.suffix != ".json":
        raise UserError(
            f"--out {path} must be a .json file (the per-image outcomes go beside it). Choose another name."
        )
    return path


def _place(targets: Sequence[Target], shards: ShardSet, what: str, device: torch.device) -> None:
    """Check that the models fit the test images, and move them to the device."""
    for target in targets:
        check_fits(target.model, shards, what)
        with memory_errors(f"The model of {target.label}", 1):
            target.model.to(device)


def _track(run_folder: RunFolder, evaluation: Evaluation) -> None:
    """Send the results of a run to its trackers."""
    recipe = load_recipe(run_folder.recipe, run_code=False)
    with contextlib.closing(Trackers(run_folder, recipe.train.trackers)) as trackers:
        trackers.describe(flat_values(recipe), to_yaml(recipe))
        trackers.results(evaluation.results, "".join(f"    {line}\n" for line in str(evaluation).splitlines()))


def _names(given: Any) -> tuple[Any, ...]:
    """The parts of `"a,b"`, or of a sequence."""
    parts = given.split(",") if isinstance(given, str) else given
    return tuple(dict.fromkeys(part.strip() if isinstance(part, str) else part for part in parts if part))


def _join(device: str | None) -> tuple[PartialState, torch.device]:
    """The processes of this launch, and the device of this one."""
    try:
        state = join_processes(on_cpu=device is not None and torch.device(device).type == "cpu")
        chosen = state.device if device is None or state.num_processes > 1 else torch.device(device)
        torch.zeros(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device} cannot be used here: {first_line(error)}") from error
    if chosen.type == "cpu":
        use_all_cores()
    return state, chosen
