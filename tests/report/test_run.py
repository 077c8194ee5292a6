"""Reading run directories: absent files, null values, damaged files, names."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nrat_scale.core.errors import UserError
from nrat_scale.loading.release_folder import resolve
from nrat_scale.report.page import render_page, write_report
from nrat_scale.report.run import read_run, read_runs, result_rows
from tests.support.evaluated_runs import CURVE, RECIPE, changed, dotted_keys, make_run, metrics_lines, results


def page_of(run: Path) -> str:
    """The page of a run without its figure, which takes most of the time."""
    return render_page([read_run(run, "run")], [b""])


def test_best_epoch_without_pointer(tmp_path: Path) -> None:
    """Without best.json the best epoch is the one with the highest robust accuracy."""
    assert read_run(make_run(tmp_path / "run", best=None), "run").best_row["epoch"] == 3


def test_result_rows() -> None:
    """Best comes before last; an attack that was not run has no score."""
    best, last = result_rows(results())
    assert (best.checkpoint, last.checkpoint) == ("best", "last")
    assert best.scores["aa"].n == 200 and "fgsm" not in best.scores
    assert [row.checkpoint for row in result_rows({"checkpoints": {"release": {"attacks": {}}}})] == ["release"]
    assert result_rows({}) == []


def test_worst_cases_of_different_attacks_are_not_compared() -> None:
    """The worst case of a checkpoint that met fewer attacks than another one is not shown."""
    score = {"correct": 70, "n": 100, "accuracy": 0.7, "low": 0.6, "high": 0.78}
    records = {
        "best": {"step": 8, "attacks": {"natural": score, "pgd20": score, "aa": score}, "worst": score},
        "last": {"step": 9, "attacks": {"natural": score, "pgd20": score}, "worst": score},
    }
    best, last = result_rows({"checkpoints": records})
    assert "worst" in best.scores and "worst" not in last.scores
    records["last"]["attacks"]["aa"] = score
    assert all("worst" in row.scores for row in result_rows({"checkpoints": records}))


# ---- absent and null ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["recipe", "metrics"])
def test_bare_runs(tmp_path: Path, kept: str) -> None:
    """The recipe alone or the metrics alone are enough for a report."""
    absent = {"recipe", "metrics", "best", "last", "label_noise", "model", "results"} - {kept}
    page = write_report(read_runs([make_run(tmp_path / "run", **dict.fromkeys(absent))])).read_text(encoding="utf-8")
    assert "not evaluated yet" in page and ">nan" not in page and "None" not in page.partition("</style>")[2]


def test_no_recipe_key_is_needed(tmp_path: Path) -> None:
    """Any value of the recipe may be null."""
    run = make_run(tmp_path / "run")
    for path in dotted_keys(RECIPE):
        (run / "recipe.yaml").write_text(json.dumps(changed(RECIPE, path, None)))
        page = page_of(run)
        assert "None" not in page and "nan" not in page, path


def test_no_value_of_the_other_files_is_needed(tmp_path: Path) -> None:
    """Any value of the JSON files may be null."""
    run = make_run(tmp_path / "run")
    for name in ("results.json", "label_noise.json", "checkpoints/best.json", "checkpoints/last.json"):
        whole = json.loads((run / name).read_text())
        for path in dotted_keys(whole):
            if path not in ("format", "version", "versions.torch"):
                (run / name).write_text(json.dumps(changed(whole, path, None)))
                page = page_of(run)
                assert "None" not in page and "nan" not in page, f"{name}: {path}"
        (run / name).write_text(json.dumps(whole))


def test_null_metrics_are_not_drawn(tmp_path: Path) -> None:
    """Null and NaN accuracies are "not measured"."""
    row = {"kind": "validation", "epoch": 1, "step": 1, "attack": "pgd10", "natural": None, "robust": None}
    rows = [{**row, "natural_clean": None}, {**row, "epoch": 2, "robust": {"accuracy": float("nan"), "n": 1}}]
    run = make_run(tmp_path / "run", metrics="".join(json.dumps(r) + "\n" for r in rows), best=None)
    page = write_report(read_runs([run])).read_text(encoding="utf-8")
    assert "not measured" in page and "nan %" not in page


def test_incomplete_last_line_is_skipped(tmp_path: Path) -> None:
    """A killed run leaves half a line in metrics.jsonl; a whole line without its end counts."""
    *whole, last = metrics_lines()
    run = make_run(tmp_path / "run", metrics="".join(whole) + last[:40])
    assert len(read_run(run, "run").validation) == len(CURVE) - 1
    no_newline = make_run(tmp_path / "other", metrics="".join(metrics_lines()).rstrip("\n"))
    assert len(read_run(no_newline, "run").validation) == len(CURVE)


# ---- damaged files and wrong folders --------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["{", "3", "\x00\x00", "[" * 100_000])
def test_damaged_line_is_named(tmp_path: Path, damage: str) -> None:
    """A line in the middle of metrics.jsonl that is no JSON object ends the report with its number."""
    lines = metrics_lines()
    run = make_run(tmp_path / "run", metrics="".join([*lines[:3], damage + "\n", *lines[3:]]))
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged: line 4 .* Remove that line"):
        write_report(read_runs([run]))
    assert not (run / "report.html").exists() and not (run / "curves.png").exists()


@pytest.mark.parametrize(
    ("key", "content", "message"),
    [
        ("results", "{", r"results\.json is damaged.*Delete it"),
        (
            "results",
            '{"format": "other"}',
            r"results\.json is not an nrat_scale\.results file of version 1\. Delete it",
        ),
        ("best", "[1]", r"best\.json is damaged.*Delete it"),
        ("label_noise", "?", r"label_noise\.json is damaged.*Delete it"),
        ("recipe", "a: [", r"recipe\.yaml cannot be read .*Restore it"),
        ("recipe", "- 1", r"recipe\.yaml is damaged.*Restore it"),
        ("recipe", "a: ${b", r"recipe\.yaml cannot be read .*Restore it"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, key: str, content: str, message: str) -> None:
    """One sentence with the path of the file and a way out; no page is written."""
    run = make_run(tmp_path / "run", **{key: content})
    with pytest.raises(UserError, match=message) as raised:
        write_report(read_runs([run]))
    assert str(run) in str(raised.value) and "\n" not in str(raised.value)
    assert not (run / "report.html").exists()


def test_folders_that_are_not_runs(tmp_path: Path) -> None:
    """A missing folder, a folder without a run and an empty list are refused."""
    with pytest.raises(UserError, match=r"There is no folder .*nothing\. Give a folder"):
        write_report(read_runs([tmp_path / "nothing"]))
    with pytest.raises(UserError, match=r"is not a run: it has neither recipe\.yaml nor metrics\.jsonl"):
        write_report(read_runs([tmp_path]))
    for name in ("b", "a"):
        (make_run(tmp_path / "runs" / name) / "checkpoints").mkdir(exist_ok=True)
    with pytest.raises(UserError, match=r"runs is not a run, but holds runs\. Name some: .*/runs/a .*/runs/b\."):
        write_report(read_runs([tmp_path / "runs"]))
    with pytest.raises(UserError, match=r"runs is not a release, but holds runs\. Name one: .*/runs/a, .*/runs/b\."):
        resolve(tmp_path / "runs")
    with pytest.raises(UserError, match="No run was given"):
        write_report(read_runs([]))


@pytest.mark.medium
def test_the_command_fails_with_a_sentence(tmp_path: Path) -> None:
    """Exit status 2 and one line on stderr, without a warning from an import."""
    command = [sys.executable, "-W", "error", "-m", "nrat_scale.report", str(tmp_path)]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    assert outcome.returncode == 2 and outcome.stdout == ""
    assert outcome.stderr.startswith("error: ") and outcome.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_runs_are_named_by_what_differs(tmp_path: Path) -> None:
    """Runs of the same name are named with their parent folder; a run given twice is read once."""
    one, two = make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run")
    assert [run.name for run in read_runs([one, two, one])] == ["a/run", "b/run"]
    assert [run.name for run in read_runs([one])] == ["run"]


# ---- the attack of training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"schedule": [{"until": 0.5, "num_steps": 4, "step": 2 / 255, "eps": None}]},
         "trained with 4 steps of 2/255 until 50 % of training, then 10 steps of 2/255"),
        ({"attack": "n_fgsm", "num_steps": 1, "step": 8 / 255}, "trained with N-FGSM, 1 step of 8/255 after noise within 2 eps"),
        ({"init": "per_class"}, "trained with 10 steps of 2/255 from a start per class"),
    ],
)  # fmt: skip
def test_the_attack_of_training_is_stated(tmp_path: Path, changes: dict, text: str) -> None:
    """With its phases; a schedule of a later version is not guessed at."""
    run = make_run(tmp_path / "run", recipe={**RECIPE, "threat": {**RECIPE["threat"], **changes}})
    assert text in page_of(run)
    for odd in ("linear", [{"end": 1}], [7]):
        later = {**RECIPE, "threat": {**RECIPE["threat"], "schedule": odd}}
        assert "trained with" not in page_of(make_run(tmp_path / str(odd), recipe=later))


def test_catastrophic_overfitting_is_flagged(tmp_path: Path) -> None:
    """In the report of a run whose training accuracy is high while PGD in validation breaks nearly all images."""
    assert "Catastrophic overfitting" not in page_of(make_run(tmp_path / "good"))
    lines = [json.loads(line) for line in metrics_lines()]
    for row in lines[6:]:
        if row["kind"] == "validation":
            row["robust"] |= {"correct": 2, "accuracy": 0.01}
    run = make_run(tmp_path / "bad", metrics="".join(json.dumps(row) + "\n" for row in lines))
    text = "Catastrophic overfitting after epoch 4 and 1 more: the model withstands the attack of training, and PGD-10 breaks"
    assert text in page_of(run)
