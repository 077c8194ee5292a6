"""The campaign that counts collapses: seeds, counts, paired differences, and rows that are not measured twice."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import main
from bench.collapse import paired, parse_seeds, summary
from nrat_scale.core.errors import UserError
from tests.support.runs import RECIPE, make_shards


def row(variant: str, seed: int, collapsed: bool = False, **accuracies: float) -> dict[str, Any]:
    return {"variant": variant, "seed": seed, "collapsed": collapsed, "rewinds": seed % 2, **accuracies}


def test_seeds() -> None:
    """Numbers and ranges; anything else is named."""
    assert parse_seeds("0-3,7") == [0, 1, 2, 3, 7]
    for text in ("", "a", "1-", "1-b", "-3", "1,,2", "5-3"):
        with pytest.raises(UserError, match=rf"'{text}' is not a list of seeds"):
            parse_seeds(text)


def test_counts_and_differences() -> None:
    """Wilson's interval of the collapses; Student's interval of the differences of the seeds that both variants have."""
    rows = [row("remedy", seed, natural=70.0 + seed, pgd20=50.0) for seed in range(4)]
    rows += [
        row("base", 1, natural=70.0, pgd20=49.0),
        row("base", 2, True, natural=70.0, pgd20=48.0),
        row("base", 9, True),
    ]
    remedy, base, natural, pgd20 = summary(rows)
    assert remedy == "remedy: 0 of 4 runs collapsed (0 %, 95 % interval 0 to 49 %); 2 were rewound"
    assert base.startswith("base: 2 of 3 runs collapsed (67 %, 95 % interval 21 to 94 %)")
    assert natural == (
        "natural: remedy minus base +1.50 points, 95 % interval -4.85 to +7.85 (Student's t, 2 seeds: +1.0, +2.0)"
    )
    assert pgd20.startswith("pgd20: remedy minus base +1.50 points")
    assert paired([1.0, 2.0, 3.0]) == (2.0, pytest.approx(4.303 / 3**0.5))


@pytest.mark.slow
def test_a_campaign(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both variants of one seed, trained and evaluated by the commands; the second call only prints the finished rows."""
    real = make_shards(tmp_path / "real", 120, 0)
    generated, test = make_shards(tmp_path / "generated", 90, 1), make_shards(tmp_path / "test", 40, 2)
    recipe, out = tmp_path / "tiny.yaml", tmp_path / "runs.json"
    recipe.write_text(RECIPE.replace("REAL", str(real)).replace("GENERATED", str(generated)))
    arguments = ["collapse", str(recipe), "objective.warm_start=0.5", "--seeds", "3", "--base-seeds", "3"]
    arguments += ["--data", str(test), "--images", "40", "--out", str(out), "--runs", str(tmp_path / "runs")]
    printed = []
    for _ in range(2):
        main(arguments)
        printed.append(re.sub(r"^#.*\n", "", capsys.readouterr().out))
    assert printed[0] == printed[1]
    runs = json.loads(out.read_text())["runs"]
    assert [(run["variant"], run["seed"], run["steps"]) for run in runs] == [("remedy", 3, 12), ("base", 3, 12)]
    assert all({"natural", "pgd20", "collapsed", "rewinds", "training_accuracy"} <= run.keys() for run in runs)
