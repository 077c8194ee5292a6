"""The label noise of a run: its files, and the stored labels that a resumed run keeps."""

import io
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from nrat_scale.core.errors import UserError, warn
from nrat_scale.core.files import read_json, write_atomically, write_json
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.data.audit_action import action_text
from nrat_scale.data.source import TrainingSource
from nrat_scale.data.spec import REAL
from nrat_scale.data.training_data import TrainingData
from nrat_scale.labels import BEFORE, BEFORE_AUDIT, UNKNOWN, describe_noise, labels_sha256


def write_noise(run: RunFolder, data: TrainingData) -> None:
    """Write description and arrays of the label noise of each source, and print the rate that training sees.

    The arrays are those from before an audit's action, from which a resumed run restores its labels; the description counts
    what is left after it.
    """
    for source in data.sources:
        if source.action is not None:
            print(f"audit: {action_text(source.kind, source.action.describe(source.shards))}")
        if source.kind == REAL and data.spec.noise_of(REAL).kind == UNKNOWN:
            print("labels of the real images: as they came, nobody has checked them (data.real.noise.kind: unknown)")
        if source.given is None or source.clean is None:
            continue
        order = source.shards.in_source_order()
        clean, given = source.clean[order], source.given[order]
        noise = _description(source, data, order)
        file, arrays = run.noise_files(source.kind)
        content = io.BytesIO()
        np.savez(content, clean=clean, given=given, noisy=clean != given)
        if not arrays.is_file() or arrays.read_bytes() != content.getvalue():  # lost or damaged
            write_atomically(arrays, content.getvalue())
        write_json(file, noise)  # last: a run with the description has the arrays
        if noise["num_noisy"]:
            rate, share = noise["realised_rate"], data.spec.shares[source.kind]
            print(
                f"label noise: {noise['kind']}, {100 * rate:.1f} % of the {source.kind} "
                f"{'training ' if BEFORE_AUDIT in noise else ''}labels, "
                f"{100 * rate * share:.1f} % of a batch's labels"
                + (
                    f" ({100 * noise[BEFORE_AUDIT]['realised_rate']:.1f} % before the audit)"
                    if BEFORE_AUDIT in noise
                    else ""
                )
                + ("; whether the labels before injection were right is unknown" if BEFORE in noise else "")
            )


def _description(source: TrainingSource, data: TrainingData, order: np.ndarray) -> dict[str, Any]:
    """`describe_noise` of all labels, whose hash is in it.

    After an audit's action the counts are those of the training samples, as are those before it: held-out labels stay.
    """
    assert source.given is not None and source.clean is not None
    spec, num_classes = data.spec.noise_of(source.kind), source.shards.num_classes
    known = spec.known_before(source.shards.dataset)
    drawn = describe_noise(source.clean[order], source.given[order], num_classes, spec, known_before=known)
    if source.action is None:
        return drawn
    kept = order[~np.isin(order, source.untrained)]
    candidates = np.sort(np.concatenate([kept, source.action.dropped]))
    labels = source.acted_labels(kept, source.given[kept])
    noise = describe_noise(source.clean[kept], labels, num_classes, spec, known_before=known)
    unaudited = describe_noise(source.clean[candidates], source.given[candidates], num_classes, spec)
    before = {key: unaudited[key] for key in ("num_labels", "num_noisy", "realised_rate", "transition_matrix")}
    return {**noise, "sha256": drawn["sha256"], BEFORE_AUDIT: before}


def keep_stored_noise(run: RunFolder, data: TrainingData) -> None:
    """Give each source the labels with which the run began, with a warning if others would be drawn now.

    Raises `UserError` if the run began with other labels and they cannot be restored.
    """
    for source in data.sources:
        file, arrays = run.noise_files(source.kind)
        if source.given is None or not file.is_file():
            continue
        stored = read_json(file, "description of the label noise").get("sha256")
        if stored != source.given_sha256:
            restored = _restored(source, arrays, stored)
            before, now = ((labels != source.clean).sum() for labels in (restored, source.given))
            warn(
                f"{file}: other noisy labels are drawn now than when the run began ({now} instead of {before} wrong ones), as "
                f"by another version or from other human labels. The run continues with its own labels, of {arrays.name}."
            )
            source.given = restored


def _restored(source: TrainingSource, arrays: Path, sha256: object) -> np.ndarray:
    """int64 [N] by position: the given labels in `arrays`, if they have this hash and the clean labels of `source`."""
    order = source.shards.in_source_order()
    given = clean = np.zeros(0, np.int64)
    try:
        with arrays.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            given, clean = stored["given"], stored["clean"]
    except (OSError, ValueError, LookupError, EOFError, BadZipFile):
        pass  # an empty array fails the comparison below
    assert source.clean is not None
    if not np.array_equal(clean, source.clean[order]) or labels_sha256(given) != sha256:
        raise UserError(
            f"The run began with other {source.kind} labels than {source.shards.folder} has now, and {arrays} does not hold "
            "them. Restore the shards or the human labels of that time, or start a new run with run_dir=PATH."
        )
    by_position = np.empty_like(source.clean)
    by_position[order] = given
    return by_position
