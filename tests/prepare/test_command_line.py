"""The command line of data preparation: its table of readers, its help, its start-up time, its old names."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nrat_scale.prepare.__main__ import COMMANDS, build_parser
from nrat_scale.prepare.input import NUMBERED, LabelledArrays
from nrat_scale.prepare.readers import READERS, Reader, argument
from tests.support.preparation import assert_refused, holds, random_images

TOOLS = Path(__file__).parents[2] / "tools"
IMAGES, LABELS = random_images(20)


def test_a_reader_is_added_by_one_entry(tmp_path, cli, convert, monkeypatch):
    """An entry from outside has its help and its arguments, and converts like the others."""

    def read_raw(given, scratch: Path) -> LabelledArrays:
        images = np.fromfile(given.file, np.uint8).reshape(-1, 8, 8, given.channels)
        return LabelledArrays.of(images, np.arange(len(images)) % 10, NUMBERED, [{"name": given.file.name}])

    arguments = argument("file", type=Path), argument("--channels", type=int, default=3)
    reader = Reader(read_raw, "raw bytes of 8 x 8 images", arguments, ("a.raw --out data/raw",))
    monkeypatch.setitem(READERS, "raw", reader)
    IMAGES.tofile(tmp_path / "a.raw")
    assert holds(convert("raw", tmp_path / "a.raw"), IMAGES, np.arange(20) % 10)
    assert convert("raw", tmp_path / "a.raw", "--channels", 1).image_shape == (8, 8, 1)
    help_text = cli("raw", "--help").out
    assert "raw bytes of 8 x 8 images" in help_text and "nrat_scale.prepare raw a.raw --out data/raw" in help_text
    assert_refused(cli, tmp_path, ["raw", tmp_path / "no.raw"], "cannot be read", "No such file", "no.raw")


@pytest.mark.parametrize("command", [*READERS, *COMMANDS])
def test_the_examples_in_the_help_can_be_typed(cli, command):
    """Every example parses."""
    result = cli(command, "--help")
    assert result.status == 0 and result.out.startswith(f"usage: python -m nrat_scale.prepare {command}")
    examples = [line for line in result.out.partition("examples:\n")[2].splitlines() if line.strip()]
    assert examples
    for example in examples:
        python, option, package, *argv = shlex.split(example)
        assert (python, option, package, argv[0]) == ("python", "-m", "nrat_scale.prepare", command)
        assert callable(build_parser().parse_args(argv).run)


def test_mistyped_command_lines_end_with_the_usage(tmp_path, cli):
    """argparse names the argument; exit status 2."""
    for argv, words in [
        ([], "COMMAND"),
        (["jpeg", "x"], "'npz'"),
        (["cifar10", "x", "--out", "y"], "--split"),
        (["digits", "--out", tmp_path / "out", "--block-size", 0], "must be at least 1"),
        (["digits", "--out", tmp_path / "out", "--shard-size", "many"], "--shard-size"),
        (["digits", "--out", tmp_path / "out", "--jobs", 2], "--jobs"),
        (["npz", "a.npz", "--out", tmp_path / "out", "--dataset", "cifar"], "cifar10"),
    ]:
        result = cli(*argv)
        assert result.status == 2 and words in result.err and "usage: python -m nrat_scale.prepare" in result.err
    assert list(tmp_path.iterdir()) == []


def test_the_index_has_no_local_paths(tmp_path, convert):
    """Shards can be published: the index names the input files without their folders."""
    np.savez(tmp_path / "a.npz", image=IMAGES, label=LABELS)
    index = (convert("npz", tmp_path / "a.npz").folder / "index.json").read_text()
    assert str(tmp_path) not in index and json.loads(index)["source"][0]["name"] == "a.npz"


def test_starting_imports_nothing_heavy():
    """Preparing data starts in a fraction of a second."""
    script = (
        "import nrat_scale.prepare.__main__, sys; "
        "print([name for name in ('torch', 'torchvision', 'webdataset', 'huggingface_hub', 'PIL', 'scipy', 'sklearn') "
        "if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True, check=True)
    assert result.stdout == "[]\n"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["-m", "nrat_scale.prepare", "--help"], "usage: python -m nrat_scale.prepare"),
        ([TOOLS / "shard_dataset.py", "npz", "--help"], "usage: python -m nrat_scale.prepare npz"),
        ([TOOLS / "download.py", "--list"], "cifar10_1m"),
    ],
    ids=lambda value: str(value)[-20:],
)
def test_the_package_and_its_old_names_run(command, words):
    """tools/shard_dataset.py and tools/download.py are the same commands."""
    result = subprocess.run([sys.executable, *map(str, command)], text=True, capture_output=True, check=True)
    assert words in result.stdout
