"""The results table in Markdown and for the terminal."""

import csv
import shutil
from pathlib import Path

import pytest

from nrat_scale.report.__main__ import main
from nrat_scale.report.content import all_tables
from nrat_scale.report.run import read_runs
from nrat_scale.report.tables import markdown_table
from tests.support.evaluated_runs import RECIPE, changed, make_run, results, score


def test_markdown_table() -> None:
    """Accuracy, interval and n of each checkpoint under each attack; text from a file cannot end a cell or add a tag."""
    assert markdown_table(results()).splitlines()[:3] == [
        "| checkpoint | natural | PGD-20 | CW-20 | AutoAttack |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| best (epoch 3) | 97.4 % [95.6, 98.5], n = 500 | 62.0 % [57.7, 66.1], n = 500 | 61.0 % [56.7, 65.2], n = 500 "
        "| 59.0 % [52.1, 65.6], n = 200 |",
    ]
    assert markdown_table({}).count("\n") == 2
    hostile = changed(results(), "checkpoints.best.attacks.<b>|\x1b", score(1, 2, 0.1, 0.9))
    assert "| &lt;b&gt;\\|? |" in markdown_table(hostile)


def test_text_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Aligned columns; n is in the heading if all rows have the same; a run without results shows how to evaluate it."""
    runs = [make_run(tmp_path / "nrat"), make_run(tmp_path / "plain", results=None)]
    main([*map(str, runs), "--out", str(tmp_path / "r.html")])
    assert capsys.readouterr().out.splitlines() == [
        "run   checkpoint  natural (n=500)    PGD-20 (n=500)     CW-20 (n=500)      AA (n=200)",
        "nrat  best        97.4 [95.6, 98.5]  62.0 [57.7, 66.1]  61.0 [56.7, 65.2]  59.0 [52.1, 65.6]",
        "nrat  last        98.4 [96.9, 99.2]  55.0 [50.6, 59.3]  61.0 [56.7, 65.2]  59.0 [52.1, 65.6]",
        f"plain: not evaluated yet: python -m nrat_scale.evaluate {runs[1]} --data SHARDS --attacks natural,pgd20,cw20,aa",
        "nrat: tested in l_inf, eps = 8/255",
        str(tmp_path / "r.html"),
    ]
    shutil.rmtree(runs[1])
    other = changed(results(), "checkpoints.best.attacks.aa", score(50, 100, 0.4, 0.6))
    main([str(runs[0]), str(make_run(tmp_path / "plain", results=other))])
    assert "50.0 [40.0, 60.0] n=100" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("norm", "eps", "space", "text"),
    [
        ("l2", 0.5, "pixel", "l_2, eps = 0.5"),
        ("l2", 128 / 255, "pixel", "l_2, eps = 128/255"),
        ("linf", 4 / 255, "pixel", "l_inf, eps = 4/255"),
        ("linf", 8 / 255, "released_code", "l_inf, eps = 8/255 in released_code space"),
    ],
)
def test_every_table_names_the_threat_that_was_tested(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], norm: str, eps: float, space: str, text: str
) -> None:
    """Terminal and page say the norm and radius of the training and of the test, whatever they are."""
    threat = {"eps": eps, "step": eps / 4, "num_steps": 10, "norm": norm, "space": space}
    files = {"recipe": {**RECIPE, "threat": threat}, "results": {**results(), "threat": threat}}
    run = make_run(tmp_path / "run", **files)
    main([str(run)])
    page = (run / "report.html").read_text(encoding="utf-8")
    assert f"run: tested in {text}\n" in capsys.readouterr().out
    assert page.count(text) == 2, "the training's threat and the test's"
    assert ("l_2" in page, "l_inf" in page) == (norm == "l2", norm == "linf")


def test_tables_as_files(tmp_path: Path) -> None:
    """By the command line: results as tidy CSV, accuracies in LaTeX without what was not measured, every table of the page."""
    flagged = changed(results(), "checkpoints.best.flags", ["50 % of\nthe doubt"])
    runs = [make_run(tmp_path / "a_b", results=flagged), make_run(tmp_path / "=c")]
    files = [tmp_path / "new" / "r.csv", tmp_path / "new" / "r.tex", tmp_path / "tables"]
    options = [
        text for name, file in zip(("--csv", "--latex", "--tables"), files, strict=True) for text in (name, str(file))
    ]
    main([*map(str, runs), "--out", str(tmp_path / "r.html"), *options])
    rows = list(csv.DictReader(files[0].read_text().splitlines()))
    assert len(rows) == 16 and {row["run"] for row in rows} == {"a_b", "'=c"}
    assert (rows[1]["attack"], float(rows[1]["accuracy"]), rows[1]["n"]) == ("pgd20", 0.62, "500")
    lines = files[1].read_text().splitlines()
    comments = [line for line in lines if line.startswith("%")]
    assert "% needs \\usepackage{booktabs}" in comments and any("of?the doubt" in line for line in comments)
    body = next(line for line in lines if line.startswith(r"a\_b & best"))
    assert (
        body.count("&") == lines[lines.index(r"\toprule") + 1].count("&") == 7 and "59.0 [52.1, 65.6], n = 200" in body
    )
    names = {file.name for file in files[2].iterdir()}
    assert {"accuracies.csv", "accuracies.tex", "gaps_1.csv", "label_noise_2.tex"} <= names
    assert len(names) == 2 * len(all_tables(read_runs(runs)))
    assert not any(
        line.startswith(("=", '"=')) for file in files[2].glob("*.csv") for line in file.read_text().splitlines()
    )
