"""Whether a model has seen some shards: compares them with the record of its training data, data.json.

A run writes the record, and its releases carry it: per source, the sha256 of its shards and of the files that these were
made from. `init` is the record of the weights that the run started from (`model.init`), null if they have none.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nrat_scale.core.errors import UserError, printable
from nrat_scale.core.files import MANIFEST, read_json
from nrat_scale.core.run_folder import DATA, RunFolder
from nrat_scale.data.index import ShardIndex
from nrat_scale.data.spec import VALIDATION
from nrat_scale.loading.initial_weights import TIMM
from nrat_scale.loading.release_folder import WEIGHT_FILES, resolve

SEEN = "seen"  # the model was trained or selected on some of these images
POSSIBLE = (
    "possible"  # the records cannot exclude it: shards made from the same files, or from an older version's record
)
UNSEEN = "unseen"  # none of these shards, and none made from the same files
UNRECORDED = "unrecorded"  # the model has no record of its training data
_INIT = "init"  # entry of data.json
_MOST_INITS = 16  # runs that each start from another's weights; a deeper record is damaged


@dataclass(frozen=True)
class Overlap:
    """What is known about a model and some shards."""

    verdict: str  # `SEEN`, `POSSIBLE`, `UNSEEN` or `UNRECORDED`
    reason: str  # as the end of a sentence that begins with the model: "was trained on 2 of these 3 shards (real)"
    source: str = ""  # `real`, `generated` or `validation`, of which data the verdict speaks

    @property
    def is_unseen(self) -> bool:
        """Whether the model is known to have seen none of the images."""
        return self.verdict == UNSEEN


def training_overlap(model: str | Path, shards: ShardIndex) -> Overlap:
    """Whether `model` has seen images of `shards`, while training or for the selection of its checkpoint.

    Args:
        model: a run directory, a release folder, or a release on the Hub (`user/repo[@revision]`); weight files and timm's
            models have no record of their training data.
        shards: opened shards (`data.shards.open_shards`) or their index.

    Raises:
        UserError: there is no such release, or its record of the training data is damaged.
    """
    record = training_record(model)
    return Overlap(UNRECORDED, "has no record of its training data") if record is None else overlap(record, shards)


def training_record(model: str | Path) -> dict[str, Any] | None:
    """The record of the training data of a run or a release; None if `model` has none. Raises as `training_overlap`."""
    path, run = Path(model), RunFolder(Path(model))
    if run.is_run:
        return read_json(run.data, "record of the training data") if run.data.is_file() else None
    is_folder = path.is_dir()
    if path.is_file() or (not is_folder and ("/" not in str(model) or path.suffix in WEIGHT_FILES)):
        return None
    if str(model) == TIMM or str(model).startswith(f"{TIMM}:"):
        return None
    folder = resolve(model)
    if not (folder / DATA).is_file():
        return None
    files = (
        read_json(folder / MANIFEST, "manifest of the release").get("files") if (folder / MANIFEST).is_file() else {}
    )
    # `resolve` has compared it with the manifest, if that lists it; another file of this name proves nothing.
    listed = isinstance(files, dict) and DATA in files
    return read_json(folder / DATA, "record of the training data") if listed else None


def overlap(record: dict[str, Any], shards: ShardIndex) -> Overlap:
    """`training_overlap` for a known record, the content of data.json.

    Raises `UserError` if the record is damaged.
    """
    possible = None
    for entries, initial in _records(record):
        of_whom = " by the weights that it started from" if initial else ""
        for source, entry in entries.items():
            found = _compared(entry, shards)
            if found is None:
                continue
            verdict, what = found
            did = "was selected on" if source == VALIDATION else "was trained on"
            if verdict == SEEN:
                return Overlap(SEEN, f"{did} {what} ({printable(source)} images{of_whom})", printable(source))
            possible = possible or Overlap(POSSIBLE, f"may have seen these images{of_whom}: {what}", printable(source))
    if possible is None and _starts_unrecorded(record):
        return Overlap(UNRECORDED, "started from weights that have no record of their training data")
    return possible or Overlap(UNSEEN, "has seen none of these shards, and none made from the same files")


def _records(record: dict[str, Any]) -> Iterator[tuple[dict[str, Any], bool]]:
    """(entries by source, whether they are of initial weights), of the run and of what it started from."""
    for depth in range(_MOST_INITS):
        yield {source: entry for source, entry in record.items() if source != _INIT}, depth > 0
        initial = record.get(_INIT)
        if not isinstance(initial, dict):
            return
        record = initial
    raise UserError(f"The record of the training data is damaged: more than {_MOST_INITS} runs start from each other.")


def _starts_unrecorded(record: dict[str, Any]) -> bool:
    while isinstance(record.get(_INIT), dict):
        record = record[_INIT]
    return _INIT in record


def _compared(entry: Any, shards: ShardIndex) -> tuple[str, str] | None:
    """(verdict, why) for one source of a record; None if it has nothing in common with `shards`."""
    if not isinstance(entry, dict) or not isinstance(entry.get("fingerprint"), str):
        raise UserError("The record of the training data is damaged: a source has no fingerprint.")
    if entry["fingerprint"] == shards.fingerprint:
        return SEEN, "these shards"
    trained, files = entry.get("shards_sha256"), entry.get("files_sha256")
    if trained is None or files is None:
        return POSSIBLE, "an older version recorded one fingerprint of all its shards, which is another"
    if not all(
        isinstance(hashes, list) and all(isinstance(value, str) for value in hashes) for hashes in (trained, files)
    ):
        raise UserError(
            "The record of the training data is damaged: the sha256 of its shards or files are no list of texts."
        )
    if shared := set(trained) & set(shards.shards_sha256):
        return SEEN, f"{len(shared)} of these {len(shards.shards_sha256)} shards"
    if not set(files) & set(shards.files_sha256):
        return None
    whole = entry.get("num_ids") == entry.get("num_images")  # it trained on everything that was converted
    if whole and entry.get("num_ids") == shards.num_ids and sorted(files) == sorted(shards.files_sha256):
        return SEEN, "the same files, prepared in another way or as a whole"
    return POSSIBLE, "the same files are behind both, perhaps with another split"


def with_initial_weights(record: dict[str, Any], source: str, stored: dict[str, Any] | None) -> dict[str, Any]:
    """`record` of a run that starts from the weights `source` (`model.init`), with what these were trained on.

    `stored` is the record of a run that is resumed: `source` may be gone by then.
    """
    return {**record, _INIT: training_record(source) if stored is None else stored.get(_INIT)}
