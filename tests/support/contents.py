"""Contents of files and their sha256."""

import hashlib
import random

GB = 1e-9  # one byte, in the unit of a cache's limit


def random_bytes(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def sha256_hex(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
