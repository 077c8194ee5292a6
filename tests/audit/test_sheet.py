"""The contact sheet of suspects: which are on it, and the share that a person finds wrong."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nrat_scale.audit import sheet as sheet_cli
from nrat_scale.audit.api import Audit
from nrat_scale.core.errors import UserError
from nrat_scale.data.audit_scores import read_audit_scores
from nrat_scale.evaluate.statistics import wilson


def rows(table: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(table.read_text())))


def test_a_random_sample_and_the_worst(finished: Audit, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A larger sample contains a smaller one, another seed draws others, and the worst are the first in audit.json."""
    scores = read_audit_scores(finished.path)
    suspects = set(scores.ids[scores.suspect].tolist())
    found = {}
    for name, options in {
        "small": ["--count", "9"], "large": ["--count", "30"], "other": ["--count", "9", "--seed", "1"],
        "worst": ["--count", "9", "--worst"], "all": ["--count", "9999"],
    }.items():  # fmt: skip
        sheet_cli.main([str(finished.path), "--out", str(tmp_path / f"{name}.png"), *options])
        found[name] = [int(row["id"]) for row in rows(tmp_path / f"{name}.csv")]
        image = Image.open(tmp_path / f"{name}.png")
        assert image.format == "PNG" and np.asarray(image.convert("L")).std() > 10
    assert found["large"][:9] == found["small"] != found["other"] and set(found["all"]) == suspects
    assert len(set(found["large"])) == 30 and set(found["large"]) <= suspects
    order = np.lexsort((scores.ids, scores.p_given, scores.quality))
    assert found["worst"] == [int(scores.ids[at]) for at in order if scores.suspect[at]][:9]
    row = rows(tmp_path / "small.csv")[0]
    at = int(np.flatnonzero(scores.ids == int(row["id"]))[0])
    assert (
        row["given"] == str(scores.given[at]) and row["suggested"] == str(scores.suggested[at]) and row["verdict"] == ""
    )
    assert f"9 of {len(suspects)} suspects" in capsys.readouterr().out


def test_verdicts_give_a_share_with_its_interval(
    finished: Audit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 20 suspects 13 wrong, 4 right, 3 unclear."""
    table = tmp_path / "sheet.csv"
    sheet_cli.main([str(finished.path), "--out", str(tmp_path / "sheet.png"), "--count", "20"])
    with pytest.raises(UserError, match=r"Row 1 of .*sheet\.csv has no verdict; expected wrong, right, unclear"):
        sheet_cli.main(["--verdicts", str(table)])
    given = ["wrong"] * 13 + ["Right "] * 4 + ["unclear"] * 3
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0], *(line + verdict for line, verdict in zip(lines[1:], given, strict=True))]))
    capsys.readouterr()
    sheet_cli.main(["--verdicts", str(table)])
    said = capsys.readouterr().out
    low, high = wilson(13, 17)
    assert "20 suspects checked: 13 wrong, 4 right, 3 unclear" in said and "random sample" not in said
    assert f"76.5 % [{100 * low:.1f}, {100 * high:.1f}] (n = 17) of those with a clear verdict" in said
    assert "65.0 % [" in said and "(n = 20) of all, the unclear ones as right" in said
    table.write_text(table.read_text().replace('"random, seed 0"', "worst"))
    sheet_cli.main(["--verdicts", str(table)])
    assert "not a random sample" in capsys.readouterr().out


def test_mistakes(finished: Audit, tmp_path: Path) -> None:
    """A table with verdicts is never overwritten; bad options and tables are sentences."""
    out = tmp_path / "sheet.png"
    sheet_cli.main([str(finished.path), "--out", str(out), "--count", "3"])
    before = out.with_suffix(".csv").read_bytes()
    bad = tmp_path / "bad.csv"
    bad.write_text("number,verdict\n1,maybe\n")
    empty = tmp_path / "empty.csv"
    empty.write_text("")
    for arguments, message in (
        ([str(finished.path), "--out", str(out)], "exists already and may hold verdicts"),
        ([str(finished.path), "--out", str(tmp_path / "x.jpg")], r"must be a \.png file"),
        ([str(finished.path), "--out", str(tmp_path / "x.png"), "--count", "0"], "--count is 0"),
        ([str(finished.path)], "Give the folder of an audit and --out"),
        ([str(tmp_path), "--out", str(tmp_path / "x.png")], "is not complete"),
        (["--verdicts", str(bad)], "Row 1 of .* has the verdict 'maybe'"),
        (["--verdicts", str(empty)], "has no column `verdict`"),
        (["--verdicts", str(tmp_path / "nowhere.csv")], "There is no table"),
        ([str(finished.path), "--verdicts", str(bad)], "reads a table alone"),
    ):
        with pytest.raises(UserError, match=message):
            sheet_cli.main(arguments)
    assert out.with_suffix(".csv").read_bytes() == before and not (tmp_path / "x.png").exists()
