"""ONNX and `torch.export` files that take any number of images, compared with the model itself."""

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
        x: images [B, C, H, W], B > 1, of the size that the model takes.

    Raises:
        UserError: a package that the export needs is not installed.
    """
    absent = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        raise UserError(f'--onnx needs {", ".join(absent)}: pip install "nrat_scale[onnx]".')
    import onnxruntime

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns about its own deprecated code
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
    """Write `path`, a `torch.export` file: `torch.export.load(path).module()` is the model. Arguments as `export_onnx`."""
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(exported, path)
    _compare(model, torch.export.load(path).module(), x, "torch.export")


@torch.no_grad()
def _compare(model: nn.Module, exported: Any, x: Tensor, what: str) -> None:
    for images in (x, x[:1], torch.cat([x, 1 - x])):  # the exported batch size, 1 and a larger one
        difference = float((model(images) - exported(images)).abs().max())
        assert difference <= TOLERANCE, f"the logits of the {what} file differ by {difference}"
