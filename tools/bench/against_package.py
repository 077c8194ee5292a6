"""AutoAttack: our evaluation against calling the package directly, on the same blocks, in turns.

The file is not called autoattack: `python tools/bench` puts this folder on the path, where the name would hide the package.
"""

import contextlib
import importlib
import io
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.attack_profile import Profile, print_profile
from bench.step import Ours, make_images
from nrat_scale.attacks import AUTOATTACK_NORMS, ThreatSpec, fraction_text
from nrat_scale.core.files import write_json
from nrat_scale.data.augment import to_float
from nrat_scale.data.shards import open_shards
from nrat_scale.evaluate.attacks import ATTACKS, Block, margin, parse_attack
from nrat_scale.evaluate.autoattack import AutoAttackLog, autoattack_package, autoattack_version
from nrat_scale.evaluate.graphed_model import GraphedModel
from nrat_scale.evaluate.measures import Images, read_images
from nrat_scale.evaluate.package_warnings import heard

_MOST_DIFFERING = {"cuda": 1e-3, "cpu": 0.0}  # share of the images whose outcome may differ from the direct call's
_TRAINING_BATCH = 64


def autoattack(
    work: Path,
    model_name: str,
    num_images: int,
    batch_size: int,
    steps: int,
    out: Path | None,
    *overrides: str,
    eps: float = 8 / 255,
) -> None:
    """Print images/s of both, the differing outcomes with their logit margins, and the time of each component.

    The model trains for `steps` steps of TRADES on the images that are attacked. float32 is IEEE float32 on a GPU, too.

    Args:
        batch_size: images of an evaluation block.
        out: JSON file with the table.
        overrides: of the recipe, for instance `model.kwargs={width: 4}`.
        eps: radius of the attack, in l_inf; a component runs on the images that the ones before it have not broken.
    """
    model, device, images = _prepared(work, model_name, num_images, steps, *overrides)
    graphed = _as_evaluated(model, device)
    seconds, components = {"direct": 0.0, "ours": 0.0}, dict[str, float]()
    found: dict[str, list[Tensor]] = {"direct": [], "ours": []}
    with ieee_float32():
        for block in _blocks(model, device, images, batch_size, eps):
            contenders: dict[str, Callable[[], Tensor]] = {
                "direct": partial(direct, block),
                "ours": partial(_evaluated, replace(block, model=graphed), components),
            }
            for name, attack in contenders.items():
                begun = time.perf_counter()
                x_adv = attack()
                _wait(device)
                seconds[name] += time.perf_counter() - begun
                found[name].append(margins(model, x_adv, block.y))
        both = {name: torch.cat(parts) for name, parts in found.items()}
    report = _report(model_name, device, both, seconds, components, images.ids.tolist(), batch_size)
    _print(report)
    if out is not None:
        write_json(out, report)
    if len(report["differing"]) > _MOST_DIFFERING[device.type] * len(images):
        raise SystemExit(f"{len(report['differing'])} of {len(images)} outcomes differ from those of a direct call.")


def autoattack_profile(
    work: Path,
    model_name: str,
    num_images: int,
    batch_size: int,
    steps: int,
    out: Path | None,
    *overrides: str,
    eps: float = 8 / 255,
) -> None:
    """Print where the time of our evaluation goes, without the comparison; arguments as of `autoattack`."""
    model, device, images = _prepared(work, model_name, num_images, steps, *overrides)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    profile = Profile(_as_evaluated(model, device), clock, partial(_wait, device))
    with ieee_float32():
        robust = sum(profile.robust_images(block) for block in _blocks(model, device, images, batch_size, eps))
    print(
        f"{card(device)}, {package()} standard, {model_name}, {num_images} images in blocks of {batch_size}, "
        f"{robust} robust at {fraction_text(eps)}, IEEE float32, {'CPU' if device.type == 'cpu' else 'wall-clock'} seconds"
    )
    print_profile(profile.components)
    if out is not None:
        write_json(out, {name: asdict(spent) for name, spent in profile.components.items()})


def _prepared(
    work: Path, model_name: str, num_images: int, steps: int, *overrides: str
) -> tuple[nn.Module, torch.device, Images]:
    """A model that has trained on the images that it will be attacked on."""
    shards = open_shards(make_images(work, max(512, num_images)))
    ours = Ours(work, model_name, "trades", _TRAINING_BATCH, "threat.num_steps=3", *overrides)
    for _ in range(steps):
        ours.step()
    return ours.state.base.eval(), ours.state.accelerator.device, read_images(shards, num_images)


def _as_evaluated(model: nn.Module, device: torch.device) -> nn.Module:
    """As `evaluate` attacks it, on a GPU with --graphs."""
    return GraphedModel(model) if device.type == "cuda" else model


def _blocks(model: nn.Module, device: torch.device, images: Images, batch_size: int, eps: float) -> Iterator[Block]:
    threat = ThreatSpec(eps, eps / 4, 10)
    for rows in images.blocks(batch_size):
        part = images.take(rows)
        x, y = to_float(part.pixels.to(device)), part.labels.to(device)
        yield Block(model, x, y, part.ids, threat, 0, 0, AutoAttackLog())


def direct(block: Block) -> Tensor:
    """The package's own call: the standard version on the whole block."""
    module = importlib.import_module(autoattack_package())
    official = module.__name__ == "autoattack"
    options: dict[str, Any] = {
        "norm": AUTOATTACK_NORMS[block.threat.norm],
        "seed": block.seed,
        "device": block.x.device,
    }
    options |= {"verbose": False} if official else {}
    with heard(module, []), contextlib.redirect_stdout(io.StringIO()):
        attack = module.AutoAttack(block.model, eps=block.threat.eps, version="standard", **options)
        batch = {"bs" if official else "batch_size": len(block.x)}
        result = attack.run_standard_evaluation(block.x, block.y, **batch)
    x_adv: Tensor = result[0] if isinstance(result, tuple) else result
    return x_adv


def _evaluated(block: Block, components: dict[str, float]) -> Tensor:
    """What an evaluation computes on a block; adds the seconds of each component to `components`."""
    attack = parse_attack("aa")
    perturb = ATTACKS[attack.kind].perturb
    assert perturb is not None and block.log is not None
    marks: list[tuple[str, float]] = []

    def running(name: str) -> None:
        _wait(block.x.device)
        marks.append((name, time.perf_counter()))

    block.log.running = running
    x_adv = perturb(attack, block)
    running("")
    for (name, begun), (_, ended) in itertools.pairwise(marks):
        components[name] = components.get(name, 0.0) + ended - begun
    return x_adv


@torch.no_grad()
def margins(model: nn.Module, x_adv: Tensor, y: Tensor) -> Tensor:
    """CW margin [B] of the model on `x_adv`, on the CPU: above 0 the image is misclassified."""
    return margin(model(x_adv), y).cpu()


@contextlib.contextmanager
def ieee_float32() -> Iterator[None]:
    """No TF32 in convolutions and products of matrices."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def card(device: torch.device) -> str:
    """The name of the GPU, or CPU."""
    return torch.cuda.get_device_name() if device.type == "cuda" else "CPU"


def package() -> str:
    """Name and version of the package."""
    return f"{autoattack_package()} {autoattack_version()}"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# ---- the table ------------------------------------------------------------------------------------------------------


def _report(
    model: str,
    device: torch.device,
    margins_of: dict[str, Tensor],
    seconds: dict[str, float],
    components: dict[str, float],
    ids: list[int],
    batch_size: int,
) -> dict[str, Any]:
    wrong = {name: values > 0 for name, values in margins_of.items()}
    places = (wrong["direct"] != wrong["ours"]).nonzero().flatten().tolist()
    differing = [{"id": ids[i], **{name: float(values[i]) for name, values in margins_of.items()}} for i in places]
    return {
        "card": card(device),
        "package": package(),
        "model": model,
        "images": len(ids),
        "batch_size": batch_size,
        "robust": {name: 1 - float(values.float().mean()) for name, values in wrong.items()},
        "images_per_second": {name: len(ids) / value for name, value in seconds.items()},
        "components_seconds": components,
        "differing": differing,
    }


def _print(report: dict[str, Any]) -> None:
    rates, robust = report["images_per_second"], report["robust"]
    print(f"{report['card']}, {report['package']} standard, {report['model']}, {report['images']} images, IEEE float32")
    print("| block | direct, images/s | ours, images/s | ours / direct | robust: direct | ours | different outcomes |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    print(
        f"| {report['batch_size']} | {rates['direct']:.2f} | {rates['ours']:.2f} | {rates['ours'] / rates['direct']:.2f} | "
        f"{100 * robust['direct']:.1f} % | {100 * robust['ours']:.1f} % | {len(report['differing'])} |"
    )
    for image in report["differing"]:
        print(
            f"  image {image['id']}: logit margin {image['direct']:+.2e} by the direct call, {image['ours']:+.2e} by ours"
        )
    shares = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in report["components_seconds"].items())
    print(f"time of ours by component: {shares}", flush=True)
