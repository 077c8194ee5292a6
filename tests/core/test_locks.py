"""The lock between processes: it excludes, it ends with its owner, and a file system without locks is named."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nrat_scale.core.locks import locked

COUNT = """
import sys
from pathlib import Path
from nrat_scale.core.locks import locked
path = Path(sys.argv[1])
for _ in range(50):
    with locked(path):
        path.write_text(str(int(path.read_text()) + 1))
"""
HOLD = """
import sys, time
from pathlib import Path
from nrat_scale.core.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_lock_excludes_other_processes(tmp_path: Path) -> None:
    """No increment of a counter is lost by three processes that read and write it, and no lock file is left."""
    path = tmp_path / "count"
    path.write_text("0")
    children = [subprocess.Popen([sys.executable, "-c", COUNT, str(path)]) for _ in range(3)]
    assert [child.wait(timeout=60) for child in children] == [0, 0, 0]
    assert path.read_text() == "150" and [each.name for each in tmp_path.iterdir()] == ["count"]


def test_a_killed_owner_frees_the_lock(tmp_path: Path) -> None:
    """The kernel frees the lock of a killed process; the file that it leaves is used again and removed."""
    path = tmp_path / "results.json"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        descriptor = os.open(tmp_path / ".results.json.lock", os.O_RDWR)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
        child.send_signal(signal.SIGKILL)
    with locked(path):
        assert [each.name for each in tmp_path.iterdir()] == [".results.json.lock"]
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lustre and some FUSE mounts refuse flock: the work is done, with a warning."""

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path / "results.json"):
        pass
    assert "has no locks" in capsys.readouterr().err
