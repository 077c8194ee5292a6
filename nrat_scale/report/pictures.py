"""The gallery: images, their perturbations and the attacked images as PNG."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from nrat_scale.evaluate.attacks import attack_title
from nrat_scale.report.run import Row, Run, value_at


@dataclass(frozen=True)
class Picture:
    """One image of a gallery; PNGs of its own size, which the page enlarges."""

    number: int  # its id in the test images
    x: bytes
    perturbation: bytes
    x_adv: bytes
    label: str
    natural: str
    attacked: str
    natural_right: bool
    attacked_right: bool


@dataclass(frozen=True)
class Pictures:
    """The gallery of one checkpoint."""

    caption: str
    pictures: list[Picture]


def pictures(run: Run, row: Row) -> Pictures | None:
    """The gallery of a checkpoint; None if there is none, or if it is of other weights."""
    gallery = run.galleries.get(row.label)
    if gallery is None or gallery.weights_sha256 != value_at(run.record(row.label), "weights_sha256"):
        return None
    moved = gallery.perturbation.astype(np.float32)
    largest = float(np.abs(moved).max()) if moved.size else 0.0
    # A power of two, so that galleries of similar perturbations are magnified alike.
    factor = 2.0 ** np.floor(np.log2(0.5 / largest)) if largest > 0 else 1.0
    found = []
    for i, number in enumerate(gallery.ids.tolist()):
        x, label = gallery.x[i].astype(np.float32) / 255, int(gallery.labels[i])
        natural, attacked = int(gallery.natural[i]), int(gallery.attacked[i])
        images = _png(x), _png(0.5 + factor * moved[i]), _png(x + moved[i])
        names = _name(run, label), _name(run, natural), _name(run, attacked)
        found.append(Picture(number, *images, *names, natural == label, attacked == label))
    caption = (
        f"Image, perturbation magnified {factor:.3g} times around grey, and attacked image, under {attack_title(gallery.attack)} "
        f"from one start ({row.checkpoint} checkpoint). A fixed choice of test images; each is attacked, whether the model was "
        "right or not."
    )
    return Pictures(caption, found)


def _name(run: Run, number: int) -> str:
    return str(run.class_names[number]) if 0 <= number < len(run.class_names) else str(number)


def _png(values: np.ndarray) -> bytes:
    """An image [C, H, W] in [0, 1] as PNG, with one channel in grey."""
    pixels = (values.clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)
    pixels = pixels[:, :, 0] if pixels.shape[2] == 1 else pixels[:, :, :3]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()
