"""A model as an ONNX or `torch.export` file with any number of images, compared with the model itself."""

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nrat_scale.core.errors import UserError

TOLERANCE = 1e-4  # of logits
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def export_onnx(model: nn.Module, x: Tensor, path: Path) -> None:
    """Write `path`, an ONNX file with the input `images` and the output `logits`.

    Args:
        model: in evaluation mode, on the CPU.
        x: images [B, C, H, W], B > 1, of the size that it takes.

    Raises:
        UserError: the packages for it are not installed.
    """
    absent = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        raise UserError(f'--onnx needs {", ".join(absent)}: pip install "nrat_scale[onnx]".')
    import onnxruntime

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter deprecates its own parts
        torch.onnx.export(
            model,
            (x,),
            str(path),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    _compare(model, run, x, "ONNX")


def export_torch(model: nn.Module, x: Tensor, path: Path) -> None:
    """Write `path`, a `torch.export` file; `torch.export.load(path).module()` gives the logits. Arguments as `export_onnx`."""
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(exported, path)
    _compare(model, torch.export.load(path).module(), x, "torch.export")


@torch.no_grad()
def _compare(model: nn.Module, other: Any, x: Tensor, what: str) -> None:
    for images in (x, x[:1], torch.cat([x, 1 - x])):  # as exported, one image, and more of them
        distance = float((model(images) - other(images)).abs().max())
        assert distance <= TOLERANCE, f"the {what} file gives other logits, by {distance}"
