"""docs/notebook.ipynb: its cells run one after another in a new process, by Python alone."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.support.runs import ROOT

NOTEBOOK = ROOT / "docs" / "notebook.ipynb"


@pytest.mark.slow
def test_the_cells_of_the_notebook_run(tmp_path) -> None:
    """IPython is not a dependency: the cells are joined into a script, which `matplotlib` draws into memory."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    script = tmp_path / "cells.py"
    script.write_text("\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "agg"}
    environment |= {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], cwd=ROOT / "docs", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "attacked [" in done.stdout and r"\end{tabular}" in done.stdout
    _check_accuracies(done.stdout)


def test_the_notebook_is_committed_with_its_outputs() -> None:
    """Every code cell was executed, without an error."""
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in cells)
    outputs = [out for cell in cells for out in cell["outputs"]]
    assert not [out for out in outputs if out["output_type"] == "error"]
    _check_accuracies("".join("".join(out.get("text", "")) for out in outputs))


def _check_accuracies(printed: str) -> None:
    """A reader sees a model that has learnt something, and an attack that breaks a part of it."""
    natural, attacked = (float(re.search(rf"'{name}': \(([\d.]+), 100\)", printed)[1]) for name in ("natural", "pgd20"))
    assert natural > 0.6 and 0.2 < attacked < natural
