"""A file that holds no weights is named as what it is, by its first bytes and not by its suffix."""

import gzip
import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import nn

from nrat_scale.core.errors import UserError
from nrat_scale.evaluate.targets import TargetOptions, find_targets
from nrat_scale.loading.load import load
from tests.support.small_releases import same_logits, write_release

OPTIONS: dict[str, Any] = {"arch": "cnn4", "mean": [0.3], "std": [0.2], "width": 4, "hidden": 8}
LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 146034049\n"


def _zip(**members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "."), content)
    return stream.getvalue()


def _tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights.pt"), io.BytesIO())
    return stream.getvalue()


def _npz() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, a=np.zeros(3))
    return stream.getvalue()


FILES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", r"is empty \(0 bytes\).*Download it again"),
    "zeros": (bytes(9000), "zero bytes: an unfinished download"),
    "html": (b"\n<!DOCTYPE html>\n<html><head><title>Google Drive - Virus scan warning", r"is a web page \(HTML\)"),
    "html after a comment": (b"\xef\xbb\xbf<!-- cached -->\n<HTML lang='de'>", r"is a web page \(HTML\)"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is XML.*AccessDenied"),
    "lfs": (LFS.encode(), "is a Git LFS pointer to a file of 146034049 bytes.*git lfs pull"),
    "annex": (b"/annex/objects/SHA256E-s146034049--abc.pt\n", "is a git-annex pointer.*git annex get"),
    "json": (b'{"error": "Invalid credentials in Authorization header"}', "is JSON.*Invalid credentials"),
    "index": (json.dumps({"weight_map": {"a": "b-00001-of-00002.safetensors"}}).encode(), "index .*several files"),
    "text": (b"404: Not Found", "is a text file that begins with '404: Not Found'"),
    "text with an escape": ("Entry \x1b[2Jnot found €".encode(), "is a text file that begins with"),
    "UTF-16 text": ("Not found\r\n".encode("utf-16"), "is a text file that begins with 'Not found'"),
    "cut letter": (b"a" * 4095 + "€".encode(), "is a text file that begins with 'aaa"),
    "gzip": (gzip.compress(b"weights"), "compressed with gzip.*gunzip"),
    "xz": (b"\xfd7zXZ\0\0\4", "compressed with xz"),
    "zstd": (b"\x28\xb5\x2f\xfd\x04", "compressed with zstd"),
    "tar": (_tar(), "is a tar archive"),
    "zip": (_zip(weights__pt=b"x"), r"is a zip archive of other files \('weights\.pt'\)"),
    "truncated zip": (_zip(data__pkl=b"x" * 900)[:700], "is a truncated zip file: the end is missing after 700 bytes"),
    "npz": (_npz(), r"archive of NumPy arrays \(npz\)"),
    "npy": (b"\x93NUMPY\x01\x00", "is a NumPy array"),
    "hdf5": (b"\x89HDF\r\n\x1a\n\0\0", "is an HDF5 file, as Keras"),
    "image": (b"\x89PNG\r\n\x1a\n", r"is an image \(PNG\)"),
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", FILES)
def test_files_that_hold_no_weights(tmp_path: Path, name: str, suffix: str) -> None:
    """A sentence says what the file is, for the library and for the evaluation of a weight file."""
    content, message = FILES[name]
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"weights\{suffix} .*{message}") as caught:
        load(path, **OPTIONS)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300
    with pytest.raises(UserError, match=message):
        find_targets(str(path), TargetOptions(arch="cnn4"))


@pytest.mark.parametrize("name", ["nothing", "html", "lfs", "json", "text"])
def test_a_release_without_its_weights(model: nn.Module, tmp_path: Path, name: str) -> None:
    """A clone without git-lfs has a pointer for model.safetensors: said before the manifest's different bytes."""
    content, message = FILES[name]
    folder = write_release(tmp_path / "r", model)
    (folder / "model.safetensors").write_bytes(content)
    (folder / "manifest.json").write_text(json.dumps({"files": {"model.safetensors": {"bytes": 3, "sha256": "x"}}}))
    with pytest.raises(UserError, match=rf"cannot be loaded: model\.safetensors .*{message}"):
        load(folder)


@pytest.mark.parametrize("part", [0.02, 0.3, 0.97])
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_truncated_weights(model: nn.Module, tmp_path: Path, form: str, part: float) -> None:
    """Each of the three formats, cut in its header, its data or its end, is said to be truncated."""
    stream = io.BytesIO()
    if form == "safetensors":
        stream.write(save(dict(model.state_dict())))
    else:
        torch.save(model.state_dict(), stream, _use_new_zipfile_serialization=form == "zip")
    content = stream.getvalue()
    (tmp_path / "w.pt").write_bytes(content[: int(len(content) * part)])
    with pytest.raises(UserError, match=r"is truncated|is a truncated zip file") as caught:
        load(tmp_path / "w.pt", **OPTIONS)
    assert "Download it again" in str(caught.value)
    (tmp_path / "w.pt").write_bytes(content)
    assert same_logits(load(tmp_path / "w.pt", **OPTIONS), model)


def test_the_content_and_not_the_suffix_tells_the_format(model: nn.Module, tmp_path: Path) -> None:
    """safetensors in a `.pt` file and torch's format in a `.safetensors` file."""
    (tmp_path / "w.pt").write_bytes(save(dict(model.state_dict())))
    torch.save(model.state_dict(), tmp_path / "w.safetensors")
    for name in ("w.pt", "w.safetensors"):
        assert same_logits(load(tmp_path / name, **OPTIONS), model)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_of_a_whole_model_is_named(model: nn.Module, tmp_path: Path, zipped: bool) -> None:
    """torch.save(model) and its container in either format; an object beside the tensors is named too."""
    path = tmp_path / "w.pt"
    torch.save(nn.Linear(2, 2), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"pickle of a whole model .*'torch\.nn\.modules\.linear\.Linear'.*state_dict"):
        load(path, **OPTIONS)
    torch.save(
        {"state_dict": model.state_dict(), "accuracy": np.float64(0.5)}, path, _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(UserError, match=r"multiarray\.scalar' beside the tensors and could run code"):
        load(path, **OPTIONS)
    path.write_bytes(pickle.dumps(nn.Linear(2, 2), 4))
    with pytest.raises(UserError, match=r"pickle of a whole model .*'torch\.nn\.modules\.linear\.Linear'"):
        load(path, **OPTIONS)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_torchscript_is_named(tmp_path: Path) -> None:
    """An archive of torch.jit.save holds code."""
    traced = torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2))
    traced.save(str(tmp_path / "w.pt"))
    with pytest.raises(UserError, match="is a TorchScript archive"):
        load(tmp_path / "w.pt", **OPTIONS)
