"""Export a model to ONNX or `torch.export` for any batch size, and compare the logits."""

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nrat_scale.core.errors import UserError


def export_onnx(model: nn.Module, x: Tensor, path: Path) -> None:
    """Write `path`, an ONNX file with the input `images` and the output `logits`.

    Args:
        model: in evaluation mode, on the CPU.
        x: images [B, C, H, W], B > 1, of the size that the model takes.

    Raises:
        UserError: a package that the export needs is not installed.
    """
    absent = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if absent:
        raise UserError(f'--onnx needs {", ".join(absent)}: pip install "nrat_scale[onnx]".')
    import onnxruntime

    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
    shapes = ({0: torch.export.Dim("batch")},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns about its own deprecated code
        options: dict[str, Any] = {"dynamo": True, "external_data": False, "verbose": False}
        torch.onnx.export(model, (x,), str(path), dynamic_shapes=shapes, **names, **options)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    _compare(model, lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), x, path)


def export_torch(model: nn.Module, x: Tensor, path: Path) -> None:
    """Write `path`, a `torch.export` file: `torch.export.load(path).module()` is the model. Arguments as `export_onnx`."""
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(exported, path)
    _compare(model, torch.export.load(path).module(), x, path)


@torch.no_grad()
def _compare(model: nn.Module, exported: Callable[[Tensor], Tensor], x: Tensor, path: Path) -> None:
    for images in (x, x[:1], torch.cat([x, 1 - x])):  # the exported batch size, 1 and a larger one
        difference = float((model(images) - exported(images)).abs().max())
        assert difference <= 1e-4, f"the logits of {path.name} differ by {difference}"
