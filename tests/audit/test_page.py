"""The page of an audit: self-contained, escaped, complete, and made again by a command."""

import base64
import copy
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nrat_scale.audit import page as page_cli
from nrat_scale.audit.api import Audit
from nrat_scale.audit.page import read_audit, render_page
from nrat_scale.core.errors import UserError
from nrat_scale.data.shards import ShardSet, open_shards

PICTURE = re.compile(r'<img src="data:image/png;base64,([^"]+)" alt="Image (\d+): given ([^,]+), suggested ([^"]+)"')


@pytest.fixture
def content(finished: Audit) -> dict[str, Any]:
    return copy.deepcopy(finished.content)


@pytest.fixture
def shards(data: Path) -> ShardSet:
    return open_shards(data)


def test_the_page_of_an_audit(finished: Audit, content: dict[str, Any], shards: ShardSet) -> None:
    """It is written with the audit, loads nothing, and has the rates, the notes, and the images of the worst suspects."""
    text = (finished.path / "audit.html").read_text()
    assert "<script" not in text and "http:" not in text and "https" not in text and "default-src 'none'" in text
    assert set(re.findall(r'(?:src|href)="([^"]{5})', text)) == {"data:"}
    best = content["corrected"]
    assert (
        f"{100 * best['rate']:.2f} %" in text
        and f"[{100 * best['interval'][0]:.2f}, {100 * best['interval'][1]:.2f}]" in text
    )
    assert "20.00 % were injected" in text and all(note in text for note in content["notes"])
    entries = {entry["id"]: entry for label in content["suspects"]["worst"].values() for entry in label}
    pictures = PICTURE.findall(text)
    assert len(pictures) == len(entries) > 20
    for png, number, given, suggested in pictures:
        entry = entries[int(number)]
        assert (int(given), int(suggested)) == (entry["given"], entry["suggested"])
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(png))))
        assert np.array_equal(pixels, shards.images(np.array([entry["position"]]))[0, :, :, 0])
    assert text.count('<th scope="row">') >= 2 * 10 and "The matrix that was injected" in text
    assert text == render_page(content, shards), "equal audits give equal pages"


def test_the_command_makes_it_again(
    finished: Audit, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also beside shards that have moved, and under another name."""
    moved = shutil.copytree(data, tmp_path / "moved")
    page_cli.main([str(finished.path), "--shards", str(moved), "--out", str(tmp_path / "again.html")])
    assert capsys.readouterr().out == f"{tmp_path / 'again.html'}\n"
    assert (tmp_path / "again.html").read_text() == (finished.path / "audit.html").read_text()


def test_names_are_escaped_and_many_classes_are_a_list(content: dict[str, Any], shards: ShardSet) -> None:
    """A class name is no HTML, TeX or control sequence; beyond 20 classes the confusions are a table."""
    content["data"]["class_names"][0] = "<script>alert(1)</script>"
    content["data"]["class_names"][1] = "$x_{$ \x1b[2J"
    text = render_page(content, shards)
    assert "<script" not in text and "&lt;script&gt;" in text and "\x1b" not in text
    more = 40
    content["data"]["class_names"] += [f"c{i}" for i in range(10, 10 + more)]
    for key in ("plain", "corrected"):
        record = content[key]
        for name in ("joint", "transition"):
            record[name] = np.pad(np.asarray(record[name]), (0, more)).tolist()
        record["per_class"] += [{"class": 10 + i, "share": 0, "rate": 0.5, "interval": [0.4, 0.6]} for i in range(more)]
    content["suspects"]["worst"] |= {str(10 + i): [] for i in range(more)}
    content["suspects"]["by_class"] += [0] * more
    text = render_page(content, shards)
    assert (
        "Estimated transition matrix" not in text and "the 40 highest" in text and "Most frequent wrong labels" in text
    )
    assert "more are listed in audit.json" in text


def test_an_audit_without_hold_out_suspects_or_truth(content: dict[str, Any], shards: ShardSet) -> None:
    """What is missing is left out, and the plain estimate is called what it is."""
    content |= {"injected": None, "noise": None, "measured_truth": None, "overlapping": [], "notes": []}
    content["corrected"] = {"identified": False, "reason": "x", "condition": 1e9}
    content["method"]["holdout"] = content["accuracy"]["holdout"] = content["calibration"]["holdout_bins"] = None
    content["suspects"] = {"count": 0, "by_class": [0] * 10, "worst": {str(i): [] for i in range(10)}}
    text = render_page(content, shards)
    assert "There is no suspect." in text and "this includes the classifier&#39;s own errors" in text
    assert f"{100 * content['plain']['rate']:.2f} %" in text and "injected" not in text and "Read with" not in text


def test_a_shard_that_is_gone(finished: Audit, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without its images the page has the numbers, and a warning names the shard."""
    lost = shutil.copytree(data, tmp_path / "lost")
    next(lost.glob("*.tar")).unlink()
    page_cli.main([str(finished.path), "--shards", str(lost), "--out", str(tmp_path / "page.html")])
    assert "The gallery lacks the images of a shard." in capsys.readouterr().err
    assert not PICTURE.findall((tmp_path / "page.html").read_text())


def test_what_is_no_audit(finished: Audit, hold_out: Path, tmp_path: Path) -> None:
    """An interrupted audit, another format, damaged content, other shards, another kind of file."""
    with pytest.raises(UserError, match="is not complete"):
        page_cli.main([str(tmp_path)])
    with pytest.raises(UserError, match="There is no audit at"):
        page_cli.main([str(tmp_path / "nowhere")])
    for content, message in (
        ({**finished.content, "version": 9}, "is not an audit that this program reads"),
        (
            {key: value for key, value in finished.content.items() if key != "plain"},
            r"audit\.json is damaged .*'plain'",
        ),
        ({**finished.content, "suspects": {}}, "is damaged"),
        ({**finished.content, "data": 3}, "does not name its shards"),
        ({**finished.content, "calibration": {"bins": [{}], "holdout_bins": None}}, "is damaged"),
    ):
        (tmp_path / "audit.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            page_cli.main([str(tmp_path)])
    with pytest.raises(UserError, match="holds other shards than the audit was of"):
        page_cli.main([str(finished.path), "--shards", str(hold_out)])
    with pytest.raises(UserError, match=r"must be an \.html file"):
        page_cli.main([str(finished.path), "--out", str(tmp_path / "page.pdf")])
    assert read_audit(finished.path) == finished.content
