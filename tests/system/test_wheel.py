"""The wheel holds all that users need: it is built, installed without the clone, and runs every command."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPE = """
threat: {eps: 0.2, step: 0.2, num_steps: 1}
model: {name: cnn4, kwargs: {width: 4, hidden: 8}}
objective: {name: nrat}
data:
  batch_size: 16
  real: {shards: data/digits/train}
  validation: {size: 20}
  augment: {crop: 1, flip: false}
train: {epochs: 1, max_steps: 1, validation_attack: pgd1}
"""
LOAD = """
import nrat_scale, torch
print(nrat_scale.__file__)
print(tuple(nrat_scale.load("releases/tiny")(torch.rand(2, 1, 16, 16)).shape))
"""
PRINTED = "from nrat_scale.reproduce.paper import printed_numbers; print(len(printed_numbers()))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, so that no earlier build/ of the clone gets in."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "nrat_scale", source / "nrat_scale", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source)
    (path,) = folder.glob("*.whl")
    return path


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *map(str, arguments)]
    subprocess.run(command, check=True, timeout=120, env=environment())


def environment() -> dict[str, str]:
    """The environment without the clone that tests/conftest.py puts on the path."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}


@pytest.mark.medium
def test_every_file_of_the_package_is_in_the_wheel(wheel: Path) -> None:
    """Modules, templates, styles, and the grids, which are a link in the clone: what is missing fails at the first use."""
    source = wheel.parent / "source"
    expected = {str(path.relative_to(source)) for path in (source / "nrat_scale").rglob("*") if path.is_file()}
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == expected
    grids = {f"nrat_scale/reproduce/grids/{path.name}" for path in (ROOT / "recipes" / "grids").iterdir()}
    assert grids and grids <= packed


@pytest.mark.slow
def test_every_command_runs_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    """Prepare, train one step, evaluate, report, release, load and list the grids, from an empty folder, without the clone."""
    venv, work = tmp_path / "venv", tmp_path / "work"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = venv / "bin" / "python"
    pip("--python", python, "install", "--no-deps", "--no-index", wheel)
    # A .pth file adds a folder to the path without running the .pth files in it, so an editable nrat_scale stays hidden.
    (packages,) = venv.glob("lib/python*/site-packages")
    installed = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "dependencies.pth").write_text("\n".join(installed))
    work.mkdir()
    (work / "tiny.yaml").write_text(RECIPE)

    def run(*arguments: str) -> str:
        result = subprocess.run(
            [str(python), *arguments], capture_output=True, text=True, timeout=120, cwd=work, env=environment()
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    run("-m", "nrat_scale.prepare", "digits", "--out", "data/digits")
    run("-m", "nrat_scale.train", "tiny.yaml")
    run("-m", "nrat_scale.evaluate", "runs/tiny", "--data", "data/digits/test", "--attacks", "natural,pgd1")
    run("-m", "nrat_scale.report", "runs/tiny")
    run("-m", "nrat_scale.release", "runs/tiny", "--to", "releases/tiny")
    assert "noise-benchmark" in run("-m", "nrat_scale.reproduce", "--list")
    planned = run("-m", "nrat_scale.reproduce", "table5", "--edition", "fashion", "--seeds", "1", "--dry-run")
    assert "16 cells, 0 finished" in planned and "missing   fashion/nrat-inner-nce_rce/symmetric-0.2/seed-0" in planned
    assert run("-c", PRINTED).strip() == "396"
    imported, shape = run("-c", LOAD).splitlines()
    assert Path(imported).is_relative_to(packages)
    assert shape == "(2, 10)"
