"""The files of a run and their readers."""

from pathlib import Path

import pytest

from nrat_scale.core.errors import UserError
from nrat_scale.core.run_folder import RunFolder

OLD_RUN = RunFolder(Path(__file__).parents[1] / "golden/abbf399/run")


def test_an_old_run_is_read() -> None:
    """Every reader accepts the files that commit abbf399 wrote."""
    assert OLD_RUN.is_run
    assert {"architecture", "model_args", "image_shape"} <= OLD_RUN.read_model().keys()
    assert [row["epoch"] for row in OLD_RUN.read_metrics()] == [1, 1]
    assert OLD_RUN.read_label_noise() is not None and OLD_RUN.read_results() is not None
    assert OLD_RUN.read_skipped_shards() == []
    assert OLD_RUN.checkpoint(12).is_dir() and OLD_RUN.pointer("best").is_file()


def test_optional_files_may_be_missing(tmp_path: Path) -> None:
    """A run that was not evaluated, without noise and metrics, is empty; one without a model is an error."""
    run = RunFolder(tmp_path)
    assert (run.read_metrics(), run.read_results(), run.read_label_noise(), run.read_skipped_shards()) == (
        [],
        None,
        None,
        [],
    )
    assert not run.is_run
    with pytest.raises(UserError, match="no description of the model"):
        run.read_model()


@pytest.mark.parametrize("end", ["", '{"epoch": 2', '{"epoch": 2}', "\n"])
def test_an_incomplete_last_row_is_skipped(tmp_path: Path, end: str) -> None:
    """A killed process can leave a last line that is cut; a complete one without line end counts."""
    run = RunFolder(tmp_path)
    run.metrics.write_text('{"epoch": 1}\n' + end)
    assert run.read_metrics() == [{"epoch": 1}, {"epoch": 2}] if end.endswith("}") else [{"epoch": 1}]


@pytest.mark.parametrize("line", ["{", "[]", "nonsense", "\0"])
def test_a_damaged_row_is_named(tmp_path: Path, line: str) -> None:
    """A line within metrics.jsonl that is not an object is an error with its number and the way out."""
    run = RunFolder(tmp_path)
    run.metrics.write_text(f'{{"epoch": 1}}\n{line}\n{{"epoch": 2}}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged: line 2 is not a JSON object\. Remove that line"):
        run.read_metrics()
