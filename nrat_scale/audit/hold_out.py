"""Whether a clean hold-out fits the audited images, and shares none with them."""

import hashlib

import numpy as np

from nrat_scale.core.errors import UserError, quoted
from nrat_scale.core.seeds import KeyedPermutation
from nrat_scale.data.shards import ShardSet

_COMPARED = 100_000  # images of each set whose pixels are compared
_MOST_SHARED = 0.01  # data sets have a few images twice; a larger share of the hold-out is an overlap
_FEWEST_SHARED = 3  # images found in both, below which their share is not estimated from a sample


def check_hold_out(hold_out: ShardSet, data: ShardSet) -> None:
    """Raise `UserError` unless the hold-out has the shape and classes of the data, and other images.

    Images are compared by the hashes of shards and by the pixels of up to 100,000 images of each, a seeded choice.
    """
    where = f"--clean-holdout {hold_out.folder}"
    if hold_out.image_shape != data.image_shape:
        raise UserError(
            f"{where} has images of shape {list(hold_out.image_shape)}, but {data.folder} has {list(data.image_shape)}. "
            "Prepare both with the same size."
        )
    if hold_out.class_names != data.class_names:
        pairs = zip(hold_out.class_names, data.class_names, strict=False)
        differing = [(one, other) for one, other in pairs if one != other]
        names = " and ".join(map(quoted, differing[0])) if differing else "one has more classes"
        raise UserError(
            f"{where} and {data.folder} have other classes ({names}). Prepare both with the same --classes."
        )
    if hold_out.fingerprint == data.fingerprint or set(hold_out.shards_sha256) & set(data.shards_sha256):
        raise UserError(f"{where} shares shards with {data.folder}: the models learn these labels. Give other images.")
    mine, theirs = _pixels(hold_out), _pixels(data)
    shared = int(np.isin(mine, theirs).sum())
    share = shared / len(mine) * len(data) / len(theirs)  # a sample of larger data finds as small a part of the overlap
    if share > _MOST_SHARED and (shared >= _FEWEST_SHARED or len(theirs) == len(data)):
        raise UserError(
            f"{where} overlaps {data.folder}: {shared} of {len(mine)} compared images are in both. The models learn these labels; "
            "give other images."
        )


def _pixels(shards: ShardSet) -> np.ndarray:
    """uint64 [m]: hashes of the pixels of up to `_COMPARED` images."""
    count = min(len(shards), _COMPARED)
    positions = np.sort(KeyedPermutation(len(shards), 0, "overlap")(np.arange(count)))
    hashes = []
    for start in range(0, count, 4096):
        for image in shards.images(positions[start : start + 4096]):
            hashes.append(hashlib.blake2b(image.tobytes(), digest_size=8).digest())
    return np.frombuffer(b"".join(hashes), "<u8")
