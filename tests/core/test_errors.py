"""Messages: exit status, warnings, suggestions, and text from files that must not control the terminal."""

import subprocess
import sys
from pathlib import Path

import pytest

from nrat_scale.core.errors import UserError, did_you_mean, first_line, missing_folder, printable, quoted, run_cli, warn


def _raises(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "status"), [(UserError("wrong"), 2), (FloatingPointError("wrong"), 1), (KeyboardInterrupt("wrong"), 130)]
)
def test_exit_status(capsys: pytest.CaptureFixture[str], error: BaseException, status: int) -> None:
    """User errors end with 2 and NaN with 1, each with its message; Ctrl-C ends with 130 and no message."""
    with pytest.raises(SystemExit, match=str(status)):
        run_cli(lambda: _raises(error))
    assert capsys.readouterr().err == ("" if status == 130 else "error: wrong\n")


def test_only_local_rank_0_prints_the_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every process of a launch fails alike; one message is enough."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit, match="2"):
        run_cli(lambda: _raises(UserError("wrong")))
    assert capsys.readouterr().err == ""


def test_a_closed_pipe_is_not_an_error() -> None:
    """`command | head` ends without a traceback."""
    script = "from nrat_scale.core.errors import run_cli; run_cli(lambda: [print('x' * 1000) for _ in range(10_000)])"
    done = subprocess.run(
        ["bash", "-c", f'python -c "{script}" | head -c 10'], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("x" * 10, "")


def test_warnings_are_printed_by_rank_0(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One line on stderr, from one process."""
    warn("a full disk.")
    monkeypatch.setenv("RANK", "1")
    warn("not this one.")
    assert capsys.readouterr() == ("", "warning: a full disk.\n")


def test_suggestions() -> None:
    """The closest name, or all of them."""
    assert did_you_mean("trade", ["trades", "nrat"]) == "Did you mean 'trades'?"
    assert did_you_mean("TRADES", ["trades", "nrat"]) == "Did you mean 'trades'?"
    assert did_you_mean("xyz", ["trades", "nrat"]) == "Known: nrat, trades."


def test_a_missing_folder_names_the_one_beside_it(tmp_path: Path) -> None:
    """Only if its name is near; a file is said to be one."""
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "a.yaml").touch()
    assert missing_folder(tmp_path / "quikstart").endswith(f"Did you mean {tmp_path / 'quickstart'}?")
    assert missing_folder(tmp_path / "x").endswith("/x.") and missing_folder(tmp_path / "no" / "x").endswith("/no/x.")
    assert missing_folder(tmp_path / "a.yaml") == f"{tmp_path / 'a.yaml'} is not a folder."


def test_text_from_files_is_harmless() -> None:
    """Control characters and lone surrogates are replaced or escaped, and long values are cut."""
    assert printable("a\x1b[2J\n\udc80é") == "a?[2J??é"
    assert first_line(ValueError("\x1bone\ntwo")) == "?one"
    assert first_line(ValueError(" ")) == "ValueError"
    assert quoted("a\x1b\n") == r"'a\x1b\n'"
    assert len(quoted("x" * 1000)) == 82 and quoted("x" * 1000).endswith("...'")


_JOINED = """
import atexit, sys
import torch.distributed as distributed
from nrat_scale.core.errors import UserError, run_cli
distributed.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
atexit.register(lambda: print("joined at exit:", distributed.is_initialized()))
def main():
    END
run_cli(main)
"""


@pytest.mark.parametrize(
    ("end", "status"),
    [("pass", 0), ("raise UserError('wrong')", 2), ("raise FloatingPointError('nan')", 1), ("sys.exit(143)", 143)],
)
def test_a_command_leaves_its_process_group(end: str, status: int, tmp_path: Path) -> None:
    """Threads of a group that is still joined when the interpreter ends may abort it, and hide the exit status."""
    command = [sys.executable, "-c", _JOINED.replace("END", end), str(tmp_path / "group")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (status, "joined at exit: False\n"), done.stderr
