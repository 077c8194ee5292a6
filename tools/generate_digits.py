"""Generate digits for the quickstart: samples of a class-conditional density model, in an npz like EDM's.

    python tools/generate_digits.py recipes/quickstart.yaml --out data/digits_generated.npz
    python -m nrat_scale.prepare npz data/digits_generated.npz --dataset digits --out data/digits_generated

The model is PCA of the images, then one Gaussian kernel density per class whose bandwidth is chosen by cross-validation.
It is fitted to the recipe's real training images with their clean labels, *without* the held-out validation images, so
validation and test stay independent of the generated images.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nrat_scale.core.errors import UserError, run_cli
from nrat_scale.core.files import make_folder, temporary_sibling
from nrat_scale.data.shards import ShardSet, open_shards
from nrat_scale.data.split import choose_held_out
from nrat_scale.recipe import load_recipe

_BANDWIDTHS = np.logspace(-1.5, 0.5, 13)  # in units of the pixel range times the square root of the dimension


def generate(
    images: np.ndarray, labels: np.ndarray, per_class: int, components: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [K * per_class, H, W, C], int64 [K * per_class]) sampled from a model of `images` uint8 [n, H, W, C]."""
    try:
        from sklearn.decomposition import PCA
        from sklearn.model_selection import GridSearchCV
        from sklearn.neighbors import KernelDensity
    except ImportError as error:
        raise UserError("tools/generate_digits.py needs scikit-learn: pip install scikit-learn") from error
    pixels = images.reshape(len(images), -1).astype(np.float64) / 255
    pca = PCA(n_components=components, random_state=seed).fit(pixels)
    features = pca.transform(pixels)
    samples, sampled_labels = [], []
    for label in np.unique(labels):
        search = GridSearchCV(KernelDensity(), {"bandwidth": _BANDWIDTHS}, cv=5).fit(features[labels == label])
        drawn = search.best_estimator_.sample(per_class, random_state=seed + int(label))
        samples.append(pca.inverse_transform(drawn).clip(0, 1))
        sampled_labels.append(np.full(per_class, label, np.int64))
    generated = np.rint(np.concatenate(samples) * 255).astype(np.uint8)
    return generated.reshape(-1, *images.shape[1:]), np.concatenate(sampled_labels)


def _training_images(shards: ShardSet, held_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    positions = np.setdiff1d(np.arange(len(shards)), held_out)
    return shards.images(positions), shards.labels(positions)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="the recipe to train with: it names the real shards and the validation split")
    parser.add_argument("--out", type=Path, required=True, help="npz file to write (`image`, `label`)")
    parser.add_argument("--per-class", type=int, default=1000)
    parser.add_argument("--components", type=int, default=20, help="PCA components (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if arguments.per_class < 1 or arguments.components < 1:
        raise UserError("--per-class and --components must be at least 1.")
    if arguments.out.exists():
        raise UserError(f"{arguments.out} exists and is never overwritten. Choose another --out, or remove it.")
    spec = load_recipe(arguments.recipe).data
    shards = open_shards(str(spec.real.shards), "data.real.shards", commands=[spec.real.prepare or ""])
    shards.verify()
    held_out = choose_held_out(shards, spec.validation) if spec.validation.source == "real" else np.zeros(0, np.int64)
    images, labels = _training_images(shards, held_out)
    generated, generated_labels = generate(images, labels, arguments.per_class, arguments.components, arguments.seed)
    make_folder(arguments.out.parent)
    temporary = temporary_sibling(arguments.out).with_suffix(".npz")
    try:
        np.savez(temporary, image=generated, label=generated_labels)
        os.replace(temporary, arguments.out)
    finally:
        temporary.unlink(missing_ok=True)
    print(
        f"{arguments.out}: {len(generated)} images from a density model of {len(images)} real ones "
        f"({len(held_out)} validation images excluded)"
    )


if __name__ == "__main__":
    run_cli(main)
