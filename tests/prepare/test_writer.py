"""Writing shards: the same bytes from any number of processes and any number of kills, one writer, nothing by halves."""

import json
import multiprocessing
import os
import re
import resource
import signal
import sys
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

import nrat_scale.prepare.staging
import nrat_scale.prepare.writer
from nrat_scale.core.errors import UserError, run_cli
from nrat_scale.data.shards import open_shards
from nrat_scale.prepare import writer as writer_module
from nrat_scale.prepare.input import LabelledArrays
from nrat_scale.prepare.staging import hidden_sibling
from nrat_scale.prepare.writer import write_shards

FILES = ({"name": "made.npz", "bytes": 7, "sha256": "0" * 64},)


def _source(num_images: int = 70, images: object = None) -> LabelledArrays:
    generator = np.random.default_rng(0)
    made = generator.integers(0, 256, (num_images, 8, 6, 3), dtype=np.uint8)
    return LabelledArrays(
        made if images is None else images, generator.integers(0, 7, num_images), "custom", tuple("abcdefg"), FILES
    )


def _write(folder: Path, source: LabelledArrays | None = None, **options) -> Path:
    """70 images: three shards of 32, 32 and 6, in blocks of 16."""
    sizes = {"block_size": 16, "shard_size": 32, "progress": False}
    return write_shards(source or _source(), folder, **{**sizes, **options})


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.tar")}


class _Fails:
    """The images of `_source()`, of which block number `block` (in the order of its images) cannot be read."""

    def __init__(self, error: BaseException, block: int) -> None:
        self.images, self.error = _source().images, error
        self.shape = self.images.shape
        shards = np.concatenate([np.arange(70)[i : i + 16] for i in range(0, 70, 16)])
        permutation = nrat_scale.pack.KeyedPermutation(70, 0, nrat_scale.pack.PERMUTATION)
        self.forbidden = int(permutation(shards[block * 16 : block * 16 + 1])[0])

    def __getitem__(self, ids):
        if self.forbidden in ids:
            raise self.error
        return self.images[ids]


# ---- the bytes ------------------------------------------------------------------------------------------------------


def test_the_tars_are_those_of_webdataset(tmp_path):
    """Our own writer saves copies, and gives the bytes that webdataset's gives: nothing else needs to know it."""
    source, folder = _source(), _write(tmp_path / "ours")
    shards, positions = open_shards(folder), np.arange(32)
    with open(tmp_path / "theirs.tar", "wb") as file:
        writer = webdataset.TarWriter(file, encoder=False, mtime=0)
        for key, rows in enumerate(np.split(shards.source_ids(positions), 2)):
            members = {}
            for name, array in (("images.npy", source.images[rows]), ("labels.npy", source.labels[rows])):
                with tempfile.TemporaryFile() as stream:
                    np.save(stream, array)
                    stream.seek(0)
                    members[name] = stream.read()
            writer.write({"__key__": f"{key:08d}", **members})
        writer.close()
    assert (folder / "shard-00000.tar").read_bytes() == (tmp_path / "theirs.tar").read_bytes()


@settings(deadline=None, derandomize=True, max_examples=12)
@given(
    num_images=st.integers(1, 90),
    block_size=st.integers(1, 40),
    shard_size=st.integers(1, 100),
    jobs=st.integers(2, 5),
    stored_ids=st.booleans(),
)
def test_any_number_of_processes_gives_the_same_bytes(num_images, block_size, shard_size, jobs, stored_ids):
    """--jobs is about time alone; with more processes than shards too."""
    ids = np.random.default_rng(1).permutation(200)[:num_images] if stored_ids else None
    with tempfile.TemporaryDirectory() as name:
        written = [
            _bytes(
                _write(
                    Path(name) / str(n),
                    _source(num_images),
                    block_size=block_size,
                    shard_size=shard_size,
                    jobs=n,
                    ids=ids,
                )
            )
            for n in (1, jobs)
        ]
        assert written[0] == written[1]
        assert sorted(os.listdir(name)) == sorted(["1", str(jobs)])


@settings(deadline=None, derandomize=True, max_examples=15)
@given(num_images=st.integers(1, 90), block_size=st.integers(1, 40), seed=st.integers(0, 99), spare=st.integers(0, 9))
def test_given_ids_are_stored_and_found(num_images, block_size, seed, spare):
    """With `ids` the order is the one given, each sample is found under its id, and unknown ids are not."""
    ids = np.random.default_rng(seed).permutation(300)[:num_images]
    source = _source(num_images)
    with tempfile.TemporaryDirectory() as name:
        num_ids = int(ids.max()) + 1 + spare if spare else None
        folder = _write(Path(name) / "out", source, block_size=block_size, ids=ids, num_ids=num_ids)
        shards = open_shards(folder)
        positions = np.arange(num_images)
        assert shards.segments[0].seed is None and shards.num_ids == int(ids.max()) + 1 + spare
        assert np.array_equal(shards.images(positions), source.images)
        assert np.array_equal(shards.labels(positions), source.labels)
        assert np.array_equal(shards.source_ids(positions), ids)
        assert np.array_equal(shards.positions_of(ids), positions)
        assert (shards.positions_of(np.setdiff1d(np.arange(400), ids)) == -1).all()


@pytest.mark.parametrize(
    ("ids", "num_ids"),
    [([0] * 70, None), (range(69), None), (range(-1, 69), None), (range(70), 69), (range(71), None)],
)
def test_ids_that_name_no_sample_or_two_are_refused(tmp_path, ids, num_ids):
    """A duplicate, one too few or too many, negative, beyond the id space."""
    with pytest.raises(UserError, match="different numbers"):
        _write(tmp_path / "out", ids=np.array(ids), num_ids=num_ids)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_read_again_to_be_hashed(tmp_path, monkeypatch):
    """The sha256 in the index is the file's, and was computed on the way."""

    def never(path: Path) -> str:
        raise AssertionError("read again")

    monkeypatch.setattr(nrat_scale.prepare.writer, "sha256_of", never)
    folder = _write(tmp_path / "out")
    monkeypatch.undo()
    open_shards(folder).verify(full=True)


# ---- kills ----------------------------------------------------------------------------------------------------------


class _Slow:
    """Images of which every block takes 4 ms."""

    def __init__(self, images: np.ndarray) -> None:
        self.images, self.shape = images, images.shape

    def __getitem__(self, ids):
        time.sleep(0.004)
        return self.images[ids]


def _write_slowly(out: Path, jobs: int, log: Path) -> None:
    """38 shards of 4 blocks, in a process of its own, which ends as a command does."""
    sys.stderr = log.open("w", buffering=1)
    source = _source(1200)
    run_cli(lambda: _write(out, replace(source, images=_Slow(source.images)), block_size=8, shard_size=32, jobs=jobs))


class _Process(multiprocessing.get_context("fork").Process):
    """A writing process, forked so that nothing need be imported; `errors()` is what it printed when it has ended."""

    def __init__(self, out: Path, jobs: int) -> None:
        self._log = Path(tempfile.mkstemp()[1])
        super().__init__(target=_write_slowly, args=(out, jobs, self._log))
        self.start()

    def errors(self) -> str:
        self.join(30)
        assert self.exitcode is not None
        return self._log.read_text()


@pytest.fixture
def start():
    """`start(out, jobs)`: a process that writes there."""
    running = []

    def begin(out: Path, jobs: int) -> _Process:
        running.append(_Process(out, jobs))
        return running[-1]

    yield begin
    for process in running:
        process.kill()
        process.join()
        process._log.unlink()


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _gone(pids: list[int]) -> bool:
    """Whether all of them have ended."""
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() and "Z" not in _state(pid) for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def _in_the_middle(out: Path, process: _Process, jobs: int) -> list[int]:
    """The processes that write for `process`, once something is written."""
    while not any(hidden_sibling(out).glob("whole/*.tar")):
        time.sleep(0.002)
    assert len(_children(process.pid)) == jobs
    return _children(process.pid)


def test_killed_at_random_moments_it_goes_on(tmp_path, start):
    """SIGKILL of the writer alone, whenever: no --out, no orphan that writes on, and what was finished is not written
    again; in the end the bytes are those of an undisturbed conversion."""
    generator = np.random.default_rng(3)
    out, whole = tmp_path / "out", hidden_sibling(tmp_path / "out") / "whole"
    kept: list[dict] = []
    for jobs in (1, 2, 3, 1, 2):
        process = start(out, jobs)
        time.sleep(generator.uniform(0.05, 0.2))
        children = _children(process.pid)
        process.kill()
        process.join()
        assert not out.exists() and _gone(children)
        recorded = {path.stem for path in whole.parent.glob("records/shards/*.json")}
        kept.append({name: stamp for name, stamp in _stamps(whole).items() if Path(name).stem in recorded})
    processes = start(out, 2), start(tmp_path / "undisturbed", 1)
    for process in processes:
        assert process.errors() == "" and process.exitcode == 0
    assert _bytes(out) == _bytes(tmp_path / "undisturbed") and len(_stamps(out)) == 38
    assert sorted(os.listdir(tmp_path)) == ["out", "undisturbed"]
    assert 0 < len(kept[-1]) < 38, "the kills fell before the first finished shard, or after the last"
    for before, after in pairwise([*kept, _stamps(out)]):
        assert before.items() <= after.items()


def test_two_writers_of_one_place(tmp_path, start, monkeypatch):
    """The second ends with a sentence and does not disturb the first."""
    monkeypatch.setattr(nrat_scale.prepare.staging, "_LOCK_SECONDS", 0.1)
    out = tmp_path / "out"
    first = start(out, 2)
    _in_the_middle(out, first, 2)
    second = start(out, 1)
    assert "is being written by another process" in second.errors() and second.exitcode == 2
    assert first.errors() == "" and first.exitcode == 0
    open_shards(out).verify()
    third = start(out, 1)
    assert "never overwritten" in third.errors() and third.exitcode == 2


def test_a_killed_child_ends_the_whole(tmp_path, start):
    """Out of memory, the kernel kills one: a sentence and exit status 2, and no waiting for ever."""
    process = start(tmp_path / "out", 2)
    children = _in_the_middle(tmp_path / "out", process, 2)
    os.kill(children[1], signal.SIGKILL)
    assert "has ended before its time" in process.errors() and process.exitcode == 2 and _gone(children)
    assert not (tmp_path / "out").exists()


def test_ctrl_c_ends_every_process(tmp_path, start):
    """The terminal interrupts the whole group; the parent ends the children."""
    process = start(tmp_path / "out", 2)
    children = _in_the_middle(tmp_path / "out", process, 2)
    for pid in [*children, process.pid]:
        os.kill(pid, signal.SIGINT)
    assert process.errors() == "" and process.exitcode == 130 and _gone(children)


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_error_keeps_what_is_finished(tmp_path, jobs):
    """A disk error in the third shard: the message says where the others are; without it, the same call goes on."""
    bad = _source(images=_Fails(OSError(5, "Input/output error"), 4))
    out, kept = tmp_path / "new" / "out", tmp_path / "new" / ".out.unfinished"
    with pytest.raises(UserError, match=r"Input/output error.*What is finished stays in .*\.out\.unfinished"):
        _write(out, bad, jobs=jobs)
    assert list(out.parent.iterdir()) == [kept]
    before = _stamps(kept / "whole")
    recorded = {f"{path.stem}.tar" for path in kept.glob("records/shards/*.json")}
    assert (recorded and jobs > 1) or recorded == {"shard-00000.tar", "shard-00001.tar"}
    _write(out)
    assert all(_stamps(out)[name] == before[name] for name in recorded)
    assert _bytes(out) == _bytes(_write(tmp_path / "undisturbed"))
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize(
    "error", [UserError("a sentence"), OSError(28, "No space left on device"), RuntimeError("bug")]
)
def test_an_error_in_the_first_shard_leaves_nothing(tmp_path, jobs, error, capfd):
    """Nothing is finished, so nothing is kept, nor the parents that were made for it."""
    source = _source(images=_Fails(error, 0))
    with pytest.raises((UserError, RuntimeError)) as caught:
        _write(tmp_path / "new" / "out", source, jobs=jobs, shard_size=70)
    assert str(caught.value) == str(error) or "No space left" in str(caught.value) or "bug" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_file_size_limit_is_a_sentence(tmp_path, jobs):
    """The kernel refuses the bytes (RLIMIT_FSIZE, as a full quota does): a sentence, and no half of a shard is kept."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard))
    try:
        with pytest.raises(UserError, match="File too large"):
            _write(tmp_path / "out", jobs=jobs)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert not (tmp_path / "out").exists()
    _write(tmp_path / "out")
    open_shards(tmp_path / "out").verify()


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
@pytest.mark.parametrize("at", [0, 3, 8])
def test_a_full_disk_at_any_step(tmp_path, monkeypatch, call, at):
    """ENOSPC from the n-th write, fsync or rename: a sentence and no --out; later the same call gives the right bytes."""
    calls = 0

    def fails(real):
        def wrapped(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls > at:
                raise OSError(28, "No space left on device")
            return real(*arguments, **options)

        return wrapped

    with monkeypatch.context() as patched:
        if call == "write":
            patched.setattr(writer_module._Tar, "_write", fails(writer_module._Tar._write))
        else:
            patched.setattr(os, call, fails(getattr(os, call)))
        with pytest.raises(UserError, match="No space left on device"):
            _write(tmp_path / "out")
    assert calls > at and not (tmp_path / "out").exists()
    _write(tmp_path / "out")
    assert _bytes(tmp_path / "out") == _bytes(_write(tmp_path / "undisturbed"))
    assert sorted(os.listdir(tmp_path)) == ["out", "undisturbed"]


# ---- what may be gone on with ---------------------------------------------------------------------------------------


@pytest.fixture
def begun(tmp_path):
    """A place where two of three shards are finished."""
    with pytest.raises(UserError):
        _write(tmp_path / "out", _source(images=_Fails(OSError(5, "Input/output error"), 4)))
    return tmp_path / "out"


OTHER = {
    "seed": {"seed": 1},
    "block_size": {"block_size": 8},
    "shard_size": {"shard_size": 16},
    "options": {"options": {"split": "test"}},
    "ids": {"ids": np.arange(70)},
    "source": {"source": replace(_source(), files=({"name": "made.npz", "bytes": 7, "sha256": "1" * 64},))},
    "labels": {"source": replace(_source(), labels=np.zeros(70, np.int64))},
    "class_names": {"source": replace(_source(), class_names=tuple("abcdefgh"))},
    "dataset": {"source": replace(_source(), dataset="other")},
    "image_shape": {"source": replace(_source(), images=np.zeros((70, 4, 4, 3), np.uint8))},
}


@pytest.mark.parametrize("name", OTHER)
def test_other_arguments_do_not_go_on(begun, name):
    """Shards of two conversions never mix; the message names the folder and what differs, and nothing is touched."""
    kept = _bytes(begun.parent)
    with pytest.raises(UserError, match=re.escape(str(hidden_sibling(begun)))) as caught:
        _write(begun, **OTHER[name])
    assert name in str(caught.value) and "Remove" in str(caught.value) and "goes on" not in str(caught.value)
    assert _bytes(begun.parent) == kept
    _write(begun)
    open_shards(begun).verify()


@pytest.mark.parametrize("damage", ["bit", "cut", "missing", "record"])
def test_a_finished_shard_is_kept_only_if_it_is_whole(begun, damage):
    """The other one stays; the damaged one is written again."""
    whole = hidden_sibling(begun) / "whole"
    before = _stamps(whole)
    path = whole / "shard-00000.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    if damage == "record":
        (hidden_sibling(begun) / "records" / "shards" / "shard-00000.json").unlink()
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data if damage == "bit" else data[:-1])
    _write(begun)
    assert _stamps(begun)["shard-00001.tar"] == before["shard-00001.tar"]
    assert _stamps(begun)["shard-00000.tar"] != before["shard-00000.tar"]
    open_shards(begun).verify(full=True)


def test_what_a_killed_writer_left_beside_its_shards_is_removed(begun):
    """Temporary files and an index from before the kill never reach --out."""
    whole = hidden_sibling(begun) / "whole"
    for name in (".shard-00002.tar.tmp", "shard-00002.tar", "index.json", ".index.json.123.tmp"):
        (whole / name).write_text("left")
    (hidden_sibling(begun) / "scratch").mkdir()
    (hidden_sibling(begun) / "scratch" / "image").write_text("left")
    _write(begun)
    assert _bytes(begun) == _bytes(_write(begun.with_name("undisturbed")))


def test_images_that_nothing_identifies_are_not_gone_on_with(tmp_path):
    """Without hashes of its files, nobody can tell whether the images are the same: nothing is kept."""
    source = replace(_source(images=_Fails(OSError(5, "Input/output error"), 4)), files=({"name": "made.npz"},))
    with pytest.raises(UserError, match="Input/output error") as caught:
        _write(tmp_path / "out", source)
    assert "goes on" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_out_that_appears_meanwhile_is_not_overwritten(tmp_path):
    """Somebody else's folder at --out, made while the shards were written, stays; so do the shards."""
    out = tmp_path / "out"

    class Late:
        shape = (70, 8, 6, 3)

        def __getitem__(self, ids):
            out.mkdir(exist_ok=True)
            (out / "notes.txt").write_text("keep me")
            return _source().images[ids]

    with pytest.raises(UserError, match="not empty"):
        _write(out, _source(images=Late()))
    assert _bytes(out) == {"notes.txt": b"keep me"}


def test_the_hidden_folder_is_a_plain_thing(begun):
    """What lies in it is what its documentation says, so that a person can judge it."""
    kept = hidden_sibling(begun)
    assert sorted(path.name for path in kept.iterdir() if path.name != "lock") == ["plans.json", "records", "whole"]
    assert json.loads((kept / "plans.json").read_text())["plans"][0]["num_images"] == 70
