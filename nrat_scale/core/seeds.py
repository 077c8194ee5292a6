"""Randomness as a function of its arguments: hashes, permutations and generators from (seed, names, step).

Nothing here keeps state, so any process can recompute any draw. Hence the sample plan, label noise, augmentation and
attack noise do not depend on the number of processes, on workers or on restarts. The integer functions use only 64-bit
arithmetic and do not depend on the version of NumPy.
"""

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1, _MIX2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_TABLE_LIMIT = 1 << 20  # elements: up to here a permutation is a table (8 MiB at most), beyond it a Feistel network
_ROUNDS = 8


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the stream `names` under the user's `seed`; different names give unrelated streams."""
    text = "\x1f".join([str(int(seed)), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def hash64(key: int, ids: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele, Lea and Flood 2014) of `ids` [...] under `key`: uint64 [...], uniform and independent."""
    with np.errstate(over="ignore"):
        z = np.asarray(ids).astype(np.uint64) * _GOLDEN + np.uint64(key)
        z = (z ^ (z >> np.uint64(30))) * _MIX1
        z = (z ^ (z >> np.uint64(27))) * _MIX2
        return np.asarray(z ^ (z >> np.uint64(31)))


def uniform01(key: int, ids: np.ndarray) -> np.ndarray:
    """float64 [...] in [0, 1), one per id."""
    return (hash64(key, ids) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def torch_generator(device: "torch.device | str", seed: int, *names: str | int) -> "torch.Generator":
    """A torch generator on `device` for the stream (seed, names)."""
    import torch  # not at the top: data preparation uses the rest of this module without torch

    generator = torch.Generator(device=device)
    generator.manual_seed(derive(seed, *names))
    return generator


class KeyedPermutation:
    """A pseudo-random permutation of range(n) and its inverse, evaluated at any positions.

    Up to 2^20 elements it is the stable argsort of hashes, so every permutation is equally likely. Beyond that it is an
    8-round Feistel network over a rectangle a x b just above n with cycle walking (Black and Rogaway 2002), which takes
    a few hundred bytes for any n.

    Args:
        n: number of elements, at least 1.
        seed, names: name the permutation, as in `derive`.
    """

    def __init__(self, n: int, seed: int, *names: str | int) -> None:
        assert n >= 1, n
        self.n = n
        self._tables: dict[int, np.ndarray] = {}  # direction -> table
        key = derive(seed, "permutation", *names)
        if n <= _TABLE_LIMIT:
            self._tables[1] = np.argsort(hash64(key, np.arange(n)), kind="stable")
            return
        self._a = int(np.ceil(np.sqrt(n)))
        self._b = -(-n // self._a)
        self._keys = [derive(key, "round", i) for i in range(_ROUNDS)]

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """The elements (int64 [m]) at `positions` (integers [m] in [0, n))."""
        return self._apply(positions, 1)

    def inverse(self, elements: np.ndarray) -> np.ndarray:
        """The positions (int64 [m]) of `elements` (integers [m] in [0, n))."""
        if self._tables and -1 not in self._tables:
            self._tables[-1] = np.argsort(self._tables[1])
        return self._apply(elements, -1)

    def _apply(self, values: np.ndarray, direction: int) -> np.ndarray:
        values = np.asarray(values, dtype=np.int64)
        assert values.size == 0 or (values.min() >= 0 and values.max() < self.n), "out of range"
        if self._tables:
            return np.asarray(self._tables[direction][values])
        # a * b exceeds n by less than a, so hardly any value leaves the range and needs another pass.
        out = self._feistel(values, direction)
        while (outside := out >= self.n).any():
            out[outside] = self._feistel(out[outside], direction)
        return out

    def _feistel(self, values: np.ndarray, direction: int) -> np.ndarray:
        """The rounds in order and added (direction 1), or their inverse (direction -1)."""
        left, right = values // self._b, values % self._b
        for i in range(_ROUNDS)[::direction]:
            if i % 2 == 0:
                left = (left + direction * self._round(i, right, self._a)) % self._a
            else:
                right = (right + direction * self._round(i, left, self._b)) % self._b
        return np.asarray(left * self._b + right)

    def _round(self, i: int, values: np.ndarray, size: int) -> np.ndarray:
        return (hash64(self._keys[i], values) % np.uint64(size)).astype(np.int64)
