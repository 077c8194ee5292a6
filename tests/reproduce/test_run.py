"""`python -m nrat_scale.reproduce`: a grid from the first cell to the table, and what it refuses."""

import base64
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nrat_scale.core.errors import run_cli
from nrat_scale.evaluate.results import read_arrays
from nrat_scale.prepare import __main__ as prepare_cli
from nrat_scale.reproduce import __main__ as command_line
from nrat_scale.reproduce.cells import Place
from nrat_scale.reproduce.grid_files import read_grid
from nrat_scale.reproduce.jobs import LOCK_VARIABLE
from tests.support.runs import make_shards
from tests.support.small_grids import BASE, EDITIONS, GRID, write_grid

Reproduce = Callable[..., SimpleNamespace]
KEY = "tiny/nrat/symmetric-0.4/seed-0"


@pytest.fixture
def reproduce(capfd: pytest.CaptureFixture[str]) -> Reproduce:
    """Run the command in this process: its exit status and its output."""

    def run(*words: object) -> SimpleNamespace:
        status = 0
        try:
            run_cli(lambda: command_line.main([str(word) for word in words]))
        except SystemExit as end:
            status = end.code
        printed = capfd.readouterr()
        return SimpleNamespace(status=status, out=printed.out, err=printed.err)

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A grid of which one cell is finished, by `--cell`."""
    folder = tmp_path_factory.mktemp("finished")
    path, out = write_grid(folder / "grid"), folder / "out"
    words = [str(path), "--edition", "tiny", "--out", str(out), "--cells", "none"]
    command_line.main([*words, "--cell", KEY])
    return SimpleNamespace(grid=path, out=out, words=words, cell=out / "tiny" / "cells" / KEY.removeprefix("tiny/"))


def refused(result: SimpleNamespace, *words: str) -> bool:
    """Whether the command ended with one error and no traceback."""
    return result.status == 2 and result.err.startswith("error: ") and all(word in result.err for word in words)


# ---- a cell ---------------------------------------------------------------------------------------------------------


@pytest.mark.medium
def test_a_finished_cell_says_what_was_measured(finished):
    """cell.json has the outcome of each image as in results.npz, curve, memorisation, noise, cost, recipe, provenance."""
    cell, run = json.loads((finished.cell / "cell.json").read_text()), finished.cell / "run"
    identity = ("version", "edition", "method", "noise", "rate", "seed", "space", "status", "error")
    assert [cell[key] for key in identity] == [1, "tiny", "nrat", "symmetric", 0.4, 0, "pixel", "finished", None]
    arrays = read_arrays(run / "results.json")
    for label in ("best", "last"):
        for attack in ("natural", "pgd2"):
            entry = cell["results"][label][attack]
            ids, right = arrays[f"{label}/{attack}"]
            bits = np.unpackbits(np.frombuffer(base64.b64decode(entry["outcomes"]), np.uint8), count=entry["n"])
            assert np.array_equal(bits.astype(bool), right[np.argsort(ids)])
            assert (entry["n"], entry["correct"]) == (30, int(right.sum()))
            assert entry["low"] <= entry["accuracy"] == entry["correct"] / 30 <= entry["high"]
    validations = [
        json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if '"validation"' in line
    ]
    assert [point["epoch"] for point in cell["curve"]] == [1, 2]
    for point, row in zip(cell["curve"], validations, strict=True):
        assert (point["natural"], point["pgd2"]) == (row["natural_clean"]["accuracy"], row["robust_clean"]["accuracy"])
        assert (point["n"], point["split"]) == (20, "held-out")
    assert [row["epoch"] for row in cell["memorisation"]] == [1, 2]
    assert all(0 <= row["noisy_fitted"] <= 1 and 0 <= row["clean_fitted"] <= 1 for row in cell["memorisation"])
    assert cell["noise_realised"]["rate"] == cell["noise_realised"]["effective_rate"] == pytest.approx(0.4)
    assert cell["cost"]["steps"] == 4 and cell["cost"]["forward_equivalents"] == 11  # 2 x 2 + 1 for the attack, 3 x 2
    assert cell["cost"]["train_seconds"] > 0 and cell["cost"]["evaluate_seconds"] > 0 and cell["cost"]["hardware"]
    assert cell["recipe"]["objective.name"] == "nrat" and cell["recipe"]["data.real.noise.rate"] == 0.4
    assert len(cell["recipe_hash"]) == 16
    assert str(finished.out) not in json.dumps(cell)  # no path of this machine
    assert cell["evaluation"]["attacks"] == ["natural", "pgd2"] and len(cell["evaluation"]["data"]) == 64
    assert (finished.cell / "cell.json").stat().st_size < 20_000


@pytest.mark.medium
def test_the_hash_depends_on_what_is_computed_alone(finished, tmp_path):
    """Not on where the data or the run lie; but on the recipe and on the evaluation."""

    def of(name: str, **texts: str) -> str:
        path = write_grid(tmp_path / name, shards=False, **texts)
        cells = {cell.id: cell for cell in read_grid(str(path)).cells("tiny")}
        return Place(cells[KEY.removeprefix("tiny/")], tmp_path / f"{name}-out").hash

    assert of("moved") == json.loads((finished.cell / "cell.json").read_text())["recipe_hash"]
    changed = {
        "base_tiny": BASE.replace("num_steps: 2", "num_steps: 3"),
        "editions": EDITIONS.replace("images: 30", "images: 20"),
    }
    assert len({of("moved"), *(of(name, **{name: text}) for name, text in changed.items())}) == 3


# ---- states, tables -------------------------------------------------------------------------------------------------


@pytest.mark.medium
def test_list_and_dry_run_tell_what_is_done(finished, reproduce):
    """States of all cells, and the hours of the missing ones, by the speed of the finished one."""
    listed = reproduce(*finished.words, "--list")
    assert listed.status == 0
    states = dict(reversed(line.split()) for line in listed.out.splitlines())
    assert len(states) == 6 and states.pop(KEY) == "finished" and set(states.values()) == {"missing"}
    dry = reproduce(*finished.words, "--dry-run")
    assert dry.status == 0 and "6 cells, 1 finished" in dry.out
    assert "5 cells: about" in dry.out and "CPU-hours" in dry.out and "by 1 finished cell on" in dry.out
    dry = reproduce(*finished.words, "--dry-run", "--only", "trades")
    assert "2 cells: about" in dry.out and "by the speed of a few passes" in dry.out
    path = finished.cell / "cell.json"
    whole = path.read_text()
    try:
        cell = json.loads(whole)
        path.write_text(json.dumps({**cell, "cost": {**cell["cost"], "hardware": "Another CPU, 1 thread(s)"}}))
        assert "by the speed of a few passes" in reproduce(*finished.words, "--dry-run").out, "of another machine"
    finally:
        path.write_text(whole)
    assert set(finished.out.rglob("cell.json")) == {finished.cell / "cell.json"}


@pytest.mark.medium
def test_a_finished_selection_ends_with_its_table(finished, reproduce):
    """Nothing is run again; text, Markdown, CSV, page and figures are written."""
    before = (finished.cell / "cell.json").read_bytes()
    result = reproduce(*finished.words, "--only", "nrat/symmetric-0.4/seed-0")
    assert result.status == 0, result.err
    assert "1 cell, 1 finished" in result.out and "starts" not in result.out
    assert "NRAT" in result.out and "symmetric 0.4" in result.out
    assert {"tiny.txt", "tiny.md", "tiny.csv", "tiny.html"} <= {path.name for path in (finished.out / "tiny").iterdir()}
    assert (finished.cell / "cell.json").read_bytes() == before


@pytest.mark.medium
def test_collected_cells_count_as_finished(finished, reproduce, tmp_path):
    """--collect copies cell.json; with --cells the copy counts, and nothing is run."""
    kept = tmp_path / "kept"
    assert "1 finished cell(s) copied" in reproduce(*finished.words, "--collect", kept).out
    (copy,) = kept.rglob("*.json")
    assert copy == kept / "tiny" / "nrat" / "symmetric-0.4" / "seed-0.json"
    assert copy.read_bytes() == (finished.cell / "cell.json").read_bytes()
    assert "0 finished cell(s) copied" in reproduce(*finished.words, "--collect", kept).out
    words = [finished.grid, "--edition", "tiny", "--out", tmp_path / "out", "--cells", kept]
    assert f"finished  {KEY}" in reproduce(*words, "--list").out
    result = reproduce(*words, "--only", "nrat/symmetric-0.4/seed-0")
    assert result.status == 0 and "1 finished" in result.out and "symmetric 0.4" in result.out


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.medium
def test_a_changed_recipe_under_a_finished_cell_is_refused(finished, reproduce):
    """By an override, in a base recipe, in the evaluation: the message names the key, both values, and the file."""
    result = reproduce(*finished.words, "train.epochs=3")
    assert refused(result, "train.epochs was '2' and is '3' now", "cell.json", "--out")
    try:
        write_grid(finished.grid.parent, shards=False, editions=EDITIONS.replace("images: 30", "images: 40"))
        assert refused(reproduce(*finished.words), "evaluation.images was '30' and is '40' now")
    finally:
        write_grid(finished.grid.parent, shards=False)


@pytest.mark.medium
def test_other_test_images_than_those_of_finished_cells_are_refused(finished, reproduce, tmp_path):
    """Differences between methods are image by image."""
    make_shards(tmp_path / "other", 60, 5)
    texts = {"editions": EDITIONS.replace("TEST", str(tmp_path / "other"))}
    try:
        write_grid(finished.grid.parent, shards=False, **texts)
        assert refused(reproduce(*finished.words), "other images than those that finished cells")
    finally:
        write_grid(finished.grid.parent, shards=False)


def test_a_wrong_method_is_found_before_anything_is_run(reproduce, tmp_path):
    """A key that no recipe has, in the line of the last method: the message names the cell and the nearest key."""
    methods = "nrat: {objective.name: nrat}\ntrades: {objective.name: trades, objective.lamb: 5}"
    path = write_grid(tmp_path, methods=methods)
    result = reproduce(path, "--edition", "tiny", "--out", tmp_path / "out")
    assert refused(result, "tiny/trades/none-0/seed-0", "'objective.lamb'", "Did you mean 'lam'")
    assert not (tmp_path / "out").exists()


@pytest.mark.medium
def test_a_damaged_result_is_refused_by_name(finished, reproduce):
    """Half a cell.json, one of another version, or one without its recipe."""
    path = finished.cell / "cell.json"
    whole = path.read_text()
    try:
        for content, word in (
            (whole[:400], "not valid JSON"),
            (whole.replace('"version": 1', '"version": 2'), "version"),
            (json.dumps({"version": 1, "status": "finished"}), "another recipe"),
            (json.dumps({"version": 1, "status": "finished", "recipe": "x"}), "another recipe"),
            (whole.replace('"seed": 0', '"seed": 1', 1), "another cell"),
        ):
            path.write_text(content)
            assert refused(reproduce(*finished.words), "cell.json", word)
    finally:
        path.write_text(whole)


@pytest.mark.medium
def test_cells_that_are_not_selected_are_checked_before_anything_is_run(finished, reproduce, tmp_path):
    """The table has them, too: a finished one of another recipe is refused now and not after hours of training."""
    result = reproduce(*finished.words, "--only", "trades", "optim.lr=0.123")
    assert refused(result, "finished cell of another recipe", "optim.lr", "0.123")
    assert not list(finished.out.rglob("trades/**/run"))


def test_missing_data_give_the_commands(reproduce, tmp_path):
    """Both commands, of the training and the test images, and nothing is run."""
    path = write_grid(tmp_path, shards=False)
    result = reproduce(path, "--edition", "tiny", "--out", tmp_path / "out")
    assert refused(result, "make train shards", "make test shards")
    assert "make train shards" in reproduce(path, "--edition", "tiny", "--out", tmp_path / "out", "--dry-run").out
    assert not (tmp_path / "out").exists()


def test_missing_audits_are_refused_before_anything_is_run(reproduce, tmp_path):
    """Of each seed; a method may train on labels that an audit of its seed doubts."""
    method = 'nrat-drop: {objective.name: nrat, data.real.audit.scores: "${data.real.shards}-audit-${seed}"}'
    grid = "stages: [{methods: [nrat-drop], noises: [symmetric-0.4]}]"
    path = write_grid(tmp_path, tiny=grid, methods=method)
    result = reproduce(path, "--edition", "tiny", "--out", tmp_path / "out")
    assert refused(result, "train-audit-0 (data.real.audit.scores)", "no such folder")
    path.write_text(f"{path.read_text()}\nprepare: {{tiny: make the audits}}\n")
    result = reproduce(path, "--edition", "tiny", "--out", tmp_path / "out")
    assert refused(result, "there is no", "train-audit-0", "make the audits")
    assert not (tmp_path / "out").exists()


def test_missing_scores_of_a_noise_are_refused_before_anything_is_run(reproduce, tmp_path):
    """The worst labels follow from a training whose scores must be there."""
    editions = (
        EDITIONS.rstrip()
        + "\n  overrides: [{noises: [badlabel], set: {data.real.noise.scores: no.npy}, source: ours}]\n"
    )
    path = write_grid(tmp_path, tiny="stages: [{methods: [nrat], noises: [badlabel-0.4]}]", editions=editions)
    result = reproduce(path, "--edition", "tiny", "--out", tmp_path / "out")
    assert refused(result, "data.real.noise.scores", "no.npy", "docs/objectives.md")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tabel1"], "Did you mean 'table1'"),
        (["table1", "--edition", "fashon"], "Did you mean 'fashion'"),
        (["table1", "--only", "nrta"], "Did you mean 'nrat'"),
        (["table1", "--only", "nrat/symmetric-0.3"], "'nrat/symmetric-0.3', which is not in this grid"),
        (["table1", "--only", "nrat/symmetric-0.4/seed-9"], "which is not in this grid"),
        (["table1", "--cell", "paper/nrat/none-0/seed-7"], "There is no cell"),
        (["table1", "--seeds", "0"], "--seeds"),
        (["table1", "--noise", "bidirectional"], "--noise"),
        (["table1", "--space", "released"], "released_code"),
        (["table1", "--curves", "training"], "--curves"),
        (["table1", "--cells", "no/such/folder"], "no/such/folder"),
        (["table1", "epochs"], "key=value"),
        (["table1", "objective.name=trades"], "--only"),
        (["table1", "seed=3"], "--seeds"),
        (["table1", "threat.space=released_code"], "--space"),
        (["table1", "train.epoch=3"], "Did you mean 'epochs'"),
        (["noise-benchmark", "objective.lam=5"], "nrat-lam3"),
        (["train.epochs=2"], "Name the grid before it"),
        (["claims", "--out", "no/such/folder", "--cells", "none"], "no/such/folder"),
    ],
)
def test_wrong_words_are_refused(reproduce, words, message, tmp_path, monkeypatch):
    """Unknown grids, cells and choices: one sentence and status 2."""
    monkeypatch.chdir(tmp_path)
    assert refused(reproduce(*words), message)
    assert not list(tmp_path.iterdir())


@pytest.mark.medium
def test_a_failure_is_in_the_cell_and_the_next_try_finishes_it(tmp_path, reproduce, monkeypatch):
    """A recipe that training refuses: cell.json says why; once mended, the same cell is finished."""
    path = write_grid(tmp_path, base_tiny=BASE.replace("size: 20", "size: 500"))
    words = [path, "--edition", "tiny", "--out", tmp_path / "out", "--cells", "none", "--cell", KEY]
    assert reproduce(*words).status == 2
    cell = tmp_path / "out" / "tiny" / "cells" / KEY.removeprefix("tiny/") / "cell.json"
    failed = json.loads(cell.read_text())
    assert failed["status"] == "failed" and "500" in failed["error"]
    write_grid(tmp_path, shards=False)
    assert reproduce(*words).status == 0
    assert json.loads(cell.read_text())["status"] == "finished"


@pytest.mark.medium
def test_methods_with_another_step_are_evaluated_alike(finished, tmp_path, reproduce):
    """A step of 0.06 in training: PGD of the evaluation has the step of the base recipe, as for the other methods."""
    line = "nrat: {objective.name: nrat, threat.num_steps: 2, threat.step: 0.06}\ntrades: {objective.name: trades}"
    path = write_grid(tmp_path, methods=line)
    words = [path, "--edition", "tiny", "--out", tmp_path / "out", "--cells", "none", "--cell", KEY]
    assert reproduce(*words).status == 0
    cells = [tmp_path / "out" / "tiny" / "cells" / KEY.removeprefix("tiny/"), finished.cell]
    changed, usual = (json.loads((cell / "cell.json").read_text()) for cell in cells)
    assert (changed["recipe"]["threat.step"], usual["recipe"]["threat.step"]) == (0.06, 0.05)
    assert changed["evaluation"]["keys"]["pgd2"] == usual["evaluation"]["keys"]["pgd2"]


@pytest.mark.medium
def test_test_curves_and_the_released_space_are_stamped(tmp_path, reproduce):
    """Own folders; the curve is that of test images, and selection that of held-out ones; the table says both."""
    path, out = write_grid(tmp_path), tmp_path / "out"
    words = [path, "--edition", "tiny", "--out", out, "--cells", "none"]
    words += ["--curves", "test", "--space", "released_code"]
    assert reproduce(*words, "--cell", KEY).status == 0
    folder = out / "tiny-released_code-test_curves"
    cell = json.loads((folder / "cells" / KEY.removeprefix("tiny/") / "cell.json").read_text())
    assert (cell["space"], {point["split"] for point in cell["curve"]}) == ("released_code", {"test"})
    assert [(point["epoch"], point["n"]) for point in cell["curve"]] == [(1, 30), (2, 30)]
    last = cell["results"]["last"]
    assert cell["curve"][-1]["natural"] == last["natural"]["accuracy"]  # the same images and weights
    result = reproduce(*words, "--only", "nrat/symmetric-0.4/seed-0")
    assert "released_code" in result.out and "--curves test" in result.out


# ---- the paper's edition --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_papers_edition_runs_on_images_of_cifars_shape(tmp_path, reproduce, monkeypatch):
    """An npz becomes the shards that the edition names; the printed numbers stand beside ours.

    A small CNN stands in for ResNet-18, under which AutoAttack takes half an hour of a core.
    """
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for split, n in (("train", 60), ("test", 10)):
        images = generator.integers(0, 256, (n, 32, 32, 3)).astype(np.uint8)
        np.savez(f"{split}.npz", image=images, label=np.arange(n) % 10)
        prepare_cli.main(["npz", f"{split}.npz", "--dataset", "cifar10", "--out", f"data/cifar10_{split}"])
    short = [
        "train.epochs=1",
        "data.epoch_samples=8",
        "data.batch_size=8",
        "data.validation.size=10",
        "threat.num_steps=4",
    ]
    short += ["model.name=cnn4", "model.kwargs={width: 4, hidden: 8}"]
    words = ["table1", *short, "--cells", "none", "--only", "nrat/symmetric-0.2"]
    result = reproduce(*words)
    assert result.status == 0, result.err
    (path,) = Path("runs/reproduce/paper/cells").rglob("cell.json")
    cell = json.loads(path.read_text())
    assert cell["recipe"]["optim.lr"] == 0.05 and cell["recipe"]["optim.milestones"] == [100, 150]
    assert {name: entry["n"] for name, entry in cell["results"]["best"].items()} == dict.fromkeys(
        ("natural", "pgd20", "cw20", "aa"), 10
    )
    assert cell["evaluation"]["threat"] == "l_inf, eps = 8/255"
    table = Path("runs/reproduce/paper/table1.md").read_text()
    assert "NRAT" in table and "83.88" in table  # the printed natural accuracy


# ---- interruption ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_interrupted_grid_resumes(tmp_path):
    """SIGTERM in the middle of a training, then the same command: the result is that of an uninterrupted grid."""
    long = BASE.replace("epochs: 2", "epochs: 12").replace("epoch_samples: 32", "epoch_samples: 160")
    path = write_grid(tmp_path, base_tiny=long, tiny=GRID.replace("none-0, ", "").replace(", trades", ""))
    environment = {key: value for key, value in os.environ.items() if key != LOCK_VARIABLE}

    def command(out: str) -> list[str]:
        words = [str(path), "--edition", "tiny", "--out", str(tmp_path / out), "--cells", "none", "--seeds", "1"]
        return [sys.executable, "-m", "nrat_scale.reproduce", *words]

    with subprocess.Popen(command("a"), env=environment, stdout=subprocess.PIPE, text=True) as process:
        metrics = tmp_path / "a" / "tiny" / "cells" / KEY.removeprefix("tiny/") / "run" / "metrics.jsonl"
        while process.poll() is None and not (metrics.is_file() and len(metrics.read_text().splitlines()) >= 4):
            pass
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate()
    assert process.returncode == 143 and "the same command resumes" in printed
    cells = [tmp_path / out / "tiny" / "cells" / KEY.removeprefix("tiny/") / "cell.json" for out in ("a", "b")]
    assert not cells[0].exists()
    for out in ("a", "b"):
        result = subprocess.run(command(out), env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
    one, other = (json.loads(cell.read_text()) for cell in cells)
    for key in ("results", "curve", "memorisation", "best_epoch", "recipe_hash"):
        assert one[key] == other[key]
