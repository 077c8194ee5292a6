"""How float32 is computed on a GPU: exactly, or with the 10 bits of TF32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

FLOAT32_MODES = ("tf32", "ieee")


def use_float32(mode: str) -> None:
    """Compute float32 on GPUs in `mode` from now on: `ieee`, or `tf32` for convolutions, which is torch's default, too.

    Matrix products are IEEE in both: they are a small part of a network of convolutions.
    """
    assert mode in FLOAT32_MODES, mode
    torch.backends.cudnn.allow_tf32 = mode == "tf32"
    torch.set_float32_matmul_precision("highest")


def float32_mode(device: torch.device) -> str:
    """How float32 is computed on `device`: `ieee`, or `tf32` or `bf16` if convolutions or matrix products may use it."""
    cuda = device.type == "cuda"
    if cuda and torch.cuda.get_device_capability(device) < (8, 0):
        return "ieee"  # the hardware has nothing else
    modules = (torch.backends.cudnn, torch.backends.cuda) if cuda else (torch.backends.mkldnn, torch.backends.mkldnn)
    parts = getattr(modules[0], "conv", None), getattr(modules[1], "matmul", None)
    used = {getattr(part, "fp32_precision", None) for part in parts}
    if used == {None}:  # torch before 2.9
        matmul = torch.get_float32_matmul_precision()
        used = {"bf16" if matmul == "medium" and not cuda else "ieee"}
        used |= {"tf32"} if cuda and (torch.backends.cudnn.allow_tf32 or matmul != "highest") else set()
    return next((mode for mode in ("bf16", "tf32") if mode in used), "ieee")


@contextmanager
def exact_float32() -> Iterator[None]:
    """Turn off TF32, whose rounding of 1e-3 would hide the effect of small changes of an image."""
    precision, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = cudnn
