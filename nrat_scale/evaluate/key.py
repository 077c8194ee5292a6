"""The key of an outcome: everything that changes which images a model classifies correctly under an attack."""

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class ModelKey:
    """What is attacked: the tensors in use, the architecture that they are in, and the normalisation before it."""

    weights_sha256: str  # of all tensors in the model's state dict, by name, and not of the file that they came from
    architecture: str
    model_args: dict[str, Any]
    mean: list[float] | None  # None: the model has no normalisation that we know
    std: list[float] | None

    @property
    def digest(self) -> str:
        """Hex SHA-256."""
        return _digest(asdict(self))


@dataclass(frozen=True)
class EvaluationKey:
    """Everything that an outcome depends on, as JSON values; each attack's entry of results.json holds these fields."""

    weights_sha256: str
    architecture: str
    model_args: dict[str, Any]
    mean: list[float] | None
    std: list[float] | None
    num_classes: int
    data_sha256: str  # fingerprint of the shards
    attack: str
    attack_version: int  # `AttackKind.version`
    components: list[str] | None  # of AutoAttack
    norm: str
    eps: float
    space: str
    step: float | None  # None: the attack takes no gradient steps of a given length
    steps: int | None
    restarts: int | None
    source: dict[str, Any] | None  # of a transfer attack: its label and `ModelKey`
    without_images_broken_by: list[str] | None  # earlier attacks, of --drop-broken
    skipped_sha256: str | None  # of the ids of the images that they broke
    n: int  # with `seed`: which images
    seed: int
    batch_size: int  # images of an evaluation block
    device: str  # kind: cpu, cuda
    float32: str  # see `float32_mode`
    graphs: bool | None  # whether passes were CUDA graphs on padded batches
    versions: dict[str, str]  # of packages

    @property
    def digest(self) -> str:
        """The first 16 hex digits of the SHA-256; it names the folder of unfinished blocks."""
        return _digest(asdict(self))[:16]

    def record(self) -> dict[str, Any]:
        """The fields that apply, and the digest."""
        return {**{name: value for name, value in asdict(self).items() if value is not None}, "key": self.digest}


KEY_FIELDS = tuple(field.name for field in fields(EvaluationKey))
MODEL_FIELDS = tuple(field.name for field in fields(ModelKey))


def model_key(model: nn.Module, architecture: str, model_args: Mapping[str, Any]) -> ModelKey:
    """The key of a model; mean and std are those of its buffers of these names."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, torch.Tensor):
            digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:  # the extra state of a module
            digest.update(f"{name} {value!r}\n".encode())
    constants = (getattr(model, name, None) for name in ("mean", "std"))
    mean, std = (value.flatten().tolist() if isinstance(value, torch.Tensor) else None for value in constants)
    plain = json.loads(json.dumps(dict(model_args)))  # as results.json gives it back: lists, not tuples
    return ModelKey(digest.hexdigest(), architecture, plain, mean, std)


def difference(old: Mapping[str, Any], new: Mapping[str, Any], names: Iterable[str]) -> str | None:
    """The first of the fields `names` that differs, with both values, in words; None if all are equal."""
    for name in names:
        if old.get(name) != new.get(name):
            return f"{name} {value_text(old.get(name))} (requested: {value_text(new.get(name))})"
    return None


def value_text(value: Any) -> str:
    """A value of a key for a person: hashes and floats shortened."""
    if isinstance(value, str) and len(value) == 64:
        return value[:12]
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return f"[{', '.join(map(value_text, value))}]"
    if isinstance(value, dict):
        return f"({', '.join(f'{name} {value_text(part)}' for name, part in value.items())})"
    return str(value)


def _digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def machine_facts(device: torch.device, processes: int) -> dict[str, Any]:
    """The machine that measured, as an entry of results.json records it; not a part of the key."""
    if device.type == "cuda":
        return {
            "device_name": torch.cuda.get_device_name(device),
            "processes": processes,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return {"device_name": name, "processes": processes, "threads": torch.get_num_threads()}
