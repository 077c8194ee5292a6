"""A few fixed images, their perturbations and both predictions, kept beside the results for the report.

results.gallery.npz     <label>/x uint8 [k, C, H, W]; perturbation float16, of the same shape; ids int64 [k]; labels, natural
                        and attacked int32 [k]; attack, weights_sha256 and key as strings. Nothing in it is pickled.
"""

import hashlib
import io
import json
import zipfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nrat_scale.attacks import ThreatSpec
from nrat_scale.core.files import write_atomically
from nrat_scale.core.locks import locked
from nrat_scale.data.augment import to_float
from nrat_scale.evaluate.attacks import ATTACKS, Attack, Block
from nrat_scale.evaluate.measures import Images
from nrat_scale.threat import TRAINING_ONLY

NUM_IMAGES = 8
_TEXTS = ("attack", "weights_sha256", "key")
_ARRAYS = ("x", "perturbation", "ids", "labels", "natural", "attacked")


@dataclass(frozen=True)
class Gallery:
    """k images under one attack, each attacked from one random start whether the model was right or not."""

    attack: str
    weights_sha256: str
    key: str  # of weights, images, attack and threat: another key is another gallery
    x: np.ndarray  # uint8 [k, C, H, W]
    perturbation: np.ndarray  # float16 [k, C, H, W], in units of the pixel range
    ids: np.ndarray  # int64 [k]
    labels: np.ndarray  # int32 [k]
    natural: np.ndarray  # int32 [k], predicted class of x
    attacked: np.ndarray  # int32 [k], predicted class of x + perturbation


def gallery_path(results: Path) -> Path:
    """The file of the galleries beside a results file."""
    return results.with_suffix(".gallery.npz")


def gallery_attack(attacks: tuple[Attack, ...]) -> Attack | None:
    """The first attack that treats images alone and is cheap on a few: AutoAttack is not."""
    return next((a for a in attacks if ATTACKS[a.kind].perturb and not ATTACKS[a.kind].whole_blocks), None)


def gallery_key(weights_sha256: str, attack: Attack, images: Images, threat: ThreatSpec, seed: int) -> str:
    """Hex SHA-256 of everything that a gallery depends on."""
    # In training only: galleries of earlier versions keep their keys.
    spec = {key: value for key, value in asdict(threat).items() if key not in TRAINING_ONLY}
    content = [weights_sha256, attack.name, images.ids.tolist(), spec, seed]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def make_gallery(
    model: nn.Module, weights_sha256: str, attack: Attack, images: Images, threat: ThreatSpec, seed: int
) -> Gallery:
    """Attack `images` and record both predictions."""
    key = gallery_key(weights_sha256, attack, images, threat, seed)
    perturb, device = ATTACKS[attack.kind].perturb, next(model.parameters()).device
    assert perturb is not None
    x, y = to_float(images.pixels.to(device)), images.labels.to(device)
    x_adv = perturb(attack, Block(model, x, y, images.ids, threat, seed))
    with torch.no_grad():
        natural, attacked = (model(batch).argmax(1).cpu().numpy().astype(np.int32) for batch in (x, x_adv))
    moved = (x_adv - x).cpu().numpy().astype(np.float16)
    labels = images.labels.numpy().astype(np.int32)
    names = attack.name, weights_sha256, key
    return Gallery(*names, images.pixels.numpy(), moved, images.ids, labels, natural, attacked)


def read_galleries(results: Path) -> dict[str, Gallery]:
    """The galleries beside `results` by label; those that cannot be read are left out, since they can be made again."""
    found: dict[str, Gallery] = {}
    with suppress(OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        with np.load(gallery_path(results), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        for label in {name.rpartition("/")[0] for name in arrays}:
            parts: dict[str, Any] = {name: arrays[f"{label}/{name}"] for name in _ARRAYS}
            parts |= {name: str(arrays[f"{label}/{name}"]) for name in _TEXTS}
            gallery = Gallery(**parts)
            if _is_whole(gallery):
                found[label] = gallery
    return found


def _is_whole(gallery: Gallery) -> bool:
    x, count = gallery.x, len(gallery.ids)
    vectors = (gallery.ids, gallery.labels, gallery.natural, gallery.attacked)
    return (
        x.ndim == 4
        and x.dtype == np.uint8
        and x.shape == gallery.perturbation.shape
        and all(vector.shape == (count,) and vector.dtype.kind == "i" for vector in vectors)
    )


def write_gallery(results: Path, label: str, gallery: Gallery) -> None:
    """Add or replace the gallery of a label, under the lock of `results`."""
    with locked(results):
        arrays: dict[str, np.ndarray] = {}
        for name, one in sorted({**read_galleries(results), label: gallery}.items()):
            arrays |= {f"{name}/{part}": getattr(one, part) for part in _ARRAYS}
            arrays |= {f"{name}/{part}": np.array(getattr(one, part)) for part in _TEXTS}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **arrays)
        write_atomically(gallery_path(results), buffer.getvalue())
