"""Any number of processes, interrupted or not, gives each image the same outcome; nothing measured is replaced."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nrat_scale.core.errors import UserError
from nrat_scale.core.files import unfinished_sibling
from nrat_scale.evaluate import __main__ as evaluate_cli
from nrat_scale.evaluate.results import BlockLog, FinishedBlock, read_arrays

ROOT = Path(__file__).parents[2]
Measured = Callable[..., dict[str, Any]]


def launched(*words: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT)


def outcomes(path: Path) -> dict[str, tuple[list[int], list[bool]]]:
    return {name: (ids.tolist(), right.tolist()) for name, (ids, right) in read_arrays(path).items()}


@pytest.mark.medium
def test_two_processes_measure_the_same_as_one(run: Path, tmp_path: Path) -> None:
    """Each image is evaluated exactly once and has the same outcome, AutoAttack included."""
    options = ["--attacks", "natural,pgd5x2,aa:apgd-ce", "--batch-size", "16", "--checkpoint", "best", "--images", "42"]
    command, files = [str(run), "--data", str(run.parent / "test"), *options, "--out"], []
    for name in ("one", "two"):
        files.append(tmp_path / name / "results.json")
    evaluate_cli.main([*command, str(files[0])])
    script = tmp_path / "counted.py"  # prints the number of processes
    script.write_text(
        "import sys\nfrom accelerate import PartialState\nfrom nrat_scale.core.errors import run_cli\n"
        "from nrat_scale.evaluate.__main__ import main\n"
        "def counted():\n    main(sys.argv[1:])\n    state = PartialState()\n"
        "    print('WORLD', state.num_processes, flush=True) if state.is_main_process else None\n"
        "run_cli(counted)\n"
    )
    done = launched("-m", "torch.distributed.run", "--nproc_per_node", "2", str(script), *command, str(files[1]))
    assert done.returncode == 0, done.stderr
    assert "WORLD 2" in done.stdout
    one, two = (outcomes(path) for path in files)
    assert one == two
    assert one["best/pgd5x2"][0] == sorted(set(one["best/pgd5x2"][0])) and len(one["best/pgd5x2"][0]) == 42
    records = [json.loads(path.read_text())["checkpoints"]["best"] for path in files]
    for record in records:
        for entry in record["attacks"].values():
            for name in ("seconds", "processes", "threads"):
                del entry[name]
    assert records[0] == records[1]


KILLED_AFTER_ONE_BLOCK = """
import os, signal, sys
from nrat_scale.evaluate.results import BlockLog
from nrat_scale.evaluate.__main__ import main
write = BlockLog.write
def write_and_die(log, first, block):
    write(log, first, block)
    os.kill(os.getpid(), signal.SIGKILL)
BlockLog.write = write_and_die
main(sys.argv[1:])
"""


@pytest.mark.medium
def test_a_killed_evaluation_resumes_with_the_next_block(run: Path) -> None:
    """A finished block survives a kill, is not evaluated again, and the result is that of an uninterrupted evaluation."""
    command = [str(run), "--data", str(run.parent / "test"), "--attacks", "aa:apgd-ce", "--batch-size", "3"]
    command += ["--checkpoint", "best", "--images", "12"]
    assert launched("-c", KILLED_AFTER_ONE_BLOCK, *command).returncode == -signal.SIGKILL
    folder = unfinished_sibling(run / "results.json")
    (path,) = folder.glob("*/block-*.json")
    # A finished block is used as it is: changed outcomes appear in the result.
    value = json.loads(path.read_text())
    flipped = "".join("10"[int(letter)] for letter in value["right"])
    path.write_text(json.dumps({**value, "right": flipped}))
    evaluate_cli.main(command)
    evaluate_cli.main([*command, "--out", str(run.parent / "whole.json")])
    resumed, whole = (
        outcomes(path)["best/aa:apgd-ce"][1] for path in (run / "results.json", run.parent / "whole.json")
    )
    assert ["01"[right] for right in resumed[:3]] == list(flipped)
    assert resumed[3:] == whole[3:] and [not right for right in resumed[:3]] == whole[:3]
    assert not folder.exists(), "finished blocks are removed once the result is written"


def test_blocks_of_another_key_are_not_used(tmp_path: Path) -> None:
    """A finished block counts only for the same settings; a damaged block ends in a sentence."""
    log = BlockLog(tmp_path / "results.json", "a")
    log.write(4, FinishedBlock(np.array([True, False]), 1.5, ["w"]))
    ((first, block),) = log.read().items()
    assert (first, block.right.tolist(), block.seconds, block.warnings) == (4, [True, False], 1.5, ["w"])
    assert not BlockLog(tmp_path / "results.json", "b").read()
    (path,) = unfinished_sibling(tmp_path / "results.json").glob("*/*.json")
    path.write_text(path.read_text().replace("10", "1x"))
    with pytest.raises(UserError, match="damaged"):
        log.read()


def test_the_record_is_complete(run: Path, measured: Measured, capsys: pytest.CaptureFixture[str]) -> None:
    """Every number records its settings, the arrays are those that results.json names, the worst case follows from them."""
    attacks = ("natural", "fgsm", "pgd5", "cw5")
    results = measured("--attacks", ",".join(attacks), "--checkpoint", "best", "--weights", "evaluated,raw")
    assert set(results["checkpoints"]) == {"best", "best-raw"}
    record = results["checkpoints"]["best"]
    assert record["weights"] == "ema" and record["sha256"] != results["checkpoints"]["best-raw"]["sha256"]
    assert results["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert len(results["data"]["fingerprint"]) == 64
    assert results["threat"] == {"norm": "linf", "eps": 0.15, "step": 0.04, "space": "pixel"}
    entry = record["attacks"]["cw5"]
    settings = {"n": 80, "seed": 0, "batch_size": 256, "eps": 0.15, "norm": "linf", "step": 0.04, "steps": 5}
    assert {**settings, "restarts": 1}.items() <= entry.items()
    assert entry["accuracy"] == entry["correct"] / 80 and entry["low"] < entry["accuracy"] < entry["high"]
    assert record["attacks"]["fgsm"]["step"] == 0.15
    found = read_arrays(run / "results.json")
    assert found["best/cw5"][1].sum() == entry["correct"]
    worst = np.all([found[f"best/{name}"][1] for name in attacks], axis=0)
    assert record["worst"]["correct"] == worst.sum() and record["worst"]["n"] == 80
    assert "worst case" in capsys.readouterr().out


def test_known_results_are_reused(measured: Measured) -> None:
    """Equal weights, and attacks that results.json holds already, are not measured again: even the seconds are equal."""
    first = measured("--attacks", "pgd3")["checkpoints"]
    assert first["best"] == first["last"]
    again = measured("--attacks", "pgd3,natural")["checkpoints"]["best"]["attacks"]
    assert again["pgd3"] == first["best"]["attacks"]["pgd3"]


def test_nothing_measured_is_overwritten(run: Path, measured: Measured) -> None:
    """Another radius, other settings and fewer images are refused with the way out; more images replace fewer."""
    first = measured("--attacks", "pgd3", "--images", "40")
    content = (run / "results.json").read_bytes()
    for options, message in (
        (["--eps", "8/255"], "threat"),
        (["--images", "20"], "n 40"),
        (["--seed", "1", "--images", "40"], "seed 0"),
        (["--batch-size", "8", "--images", "40"], "batch_size"),
    ):
        with pytest.raises(UserError, match=message):
            measured("--attacks", "pgd3", *options)
        assert (run / "results.json").read_bytes() == content
    assert first["checkpoints"]["best"]["attacks"]["pgd3"]["n"] == 40
    assert measured("--attacks", "pgd3")["checkpoints"]["best"]["attacks"]["pgd3"]["n"] == 80


def test_results_without_their_arrays_are_measured_again(run: Path, measured: Measured) -> None:
    """An entry counts only with its outcomes per image, which a crash between the two files may have lost."""
    first = measured("--attacks", "pgd3")["checkpoints"]["best"]["attacks"]["pgd3"]
    (run / "results.npz").unlink()
    again = measured("--attacks", "pgd3")["checkpoints"]["best"]["attacks"]["pgd3"]
    assert again["outcome_sha256"] == first["outcome_sha256"]
    (run / "results.npz").write_bytes(b"PK nothing")
    with pytest.raises(UserError, match="damaged"):
        measured("--attacks", "pgd3")


def test_dropped_images_are_recorded(run: Path, measured: Measured) -> None:
    """With --drop-broken the last attack ends at the worst case, and entries name the attacks whose images they skipped."""
    attacks = ["--attacks", "natural,pgd5,cw5", "--checkpoint", "best"]
    alone = measured(*attacks)["checkpoints"]["best"]
    measured(*attacks, "--drop-broken", "--out", str(run / "dropped.json"))
    dropped = json.loads((run / "dropped.json").read_text())["checkpoints"]["best"]
    assert dropped["attacks"]["cw5"]["without_images_broken_by"] == ["natural", "pgd5"]
    assert dropped["attacks"]["cw5"]["correct"] == alone["worst"]["correct"] == dropped["worst"]["correct"]
