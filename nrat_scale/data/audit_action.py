"""What training does about labels that an audit doubts: drop the samples, relabel them, or weight their loss.

    quality q_i = P(given label is right), from the sidecar of the audit; it acts on training samples with q_i < below

    drop     they are no samples: plan, epochs and passes are those of a source without them
    relabel  their label becomes the suggested one
    weight   w_i = q_i for them and 1 for the others, divided by the mean over the training samples of the source;
             training minimises sum(w_i l_i) / n over a batch of n, l_i the outer loss of image i

The mean weight is 1, so that a source keeps its share of the loss and the learning rate its meaning; dividing by each
batch's own sum instead would bias the gradient and depend on how a batch is split over processes. Held-out images keep
their labels: runs with and without an action are selected on the same ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from nrat_scale.core.errors import UserError, quoted
from nrat_scale.data.audit_scores import AuditScores, read_audit_scores
from nrat_scale.data.shards import ShardSet
from nrat_scale.data.spec import DROP, RELABEL, WEIGHT, AuditSpec

_CHUNK = 1 << 22  # samples at a time


@dataclass(frozen=True)
class AuditAction:
    """The samples of one source on which an audit acts; made by `act`."""

    spec: AuditSpec
    scores: AuditScores
    acted: np.ndarray  # sorted positions int64 [m] whose sample is dropped, relabelled, or weighted by its quality
    num_trained: int  # samples that training sees
    mean_quality: float  # the mean of the weights before they are divided by it; 1 for other actions

    @property
    def dropped(self) -> np.ndarray:
        """Sorted positions of the samples that are not trained on."""
        return self.acted if self.spec.action == DROP else self.acted[:0]

    def labels(self, positions: np.ndarray, given: np.ndarray) -> np.ndarray:
        """`given` int64 [m], the labels at `positions`, with the suggested ones where they are replaced."""
        if self.spec.action != RELABEL or not len(self.acted):
            return given
        at = np.minimum(np.searchsorted(self.acted, positions), len(self.acted) - 1)
        return np.where(self.acted[at] == positions, self.scores.suggested[positions].astype(np.int64), given)

    def weights(self, positions: np.ndarray) -> np.ndarray | None:
        """float32 [m], the weight of each sample's loss; None unless the action is `weight`."""
        if self.spec.action != WEIGHT:
            return None
        quality = self.scores.quality[positions].astype(np.float64)
        return (np.where(quality < self.spec.below, quality, 1.0) / self.mean_quality).astype(np.float32)

    def describe(self, shards: ShardSet) -> dict[str, Any]:
        """The record of a run's data.json."""
        return {
            "scores_sha256": self.scores.sha256,
            "audit": self.scores.manifest.get("audit"),
            "noise": self.scores.noise,
            "action": self.spec.action,
            "below": self.spec.below,
            "num_acted": len(self.acted),
            "num_trained": self.num_trained,
            "mean_weight_before": self.mean_quality,
            "acted_by_class": np.bincount(self.scores.given[self.acted], minlength=shards.num_classes).tolist(),
        }


def act(
    kind: str, spec: AuditSpec, shards: ShardSet, given: np.ndarray | None, untouched: np.ndarray
) -> AuditAction | None:
    """The action that `spec` asks for; None if it names no scores.

    Args:
        kind: `real` or `generated`.
        given: int64 [N] by position, with the injected noise; None: the labels as stored.
        untouched: sorted positions that are held out or excluded.

    Raises:
        UserError: the scores are damaged, or of other shards or labels; nothing is left of a class, or of all weight.
    """
    if spec.scores is None:
        return None
    scores = read_audit_scores(spec.scores, f"{spec.KEY}.scores")
    scores.check_fits(shards, given)
    counts, left = np.zeros((2, shards.num_classes), np.int64)
    acted, total, num_samples = [np.zeros(0, np.int64)], 0.0, 0
    for positions in _trained(len(shards), untouched):
        labels, quality = scores.given[positions].astype(np.int64), scores.quality[positions].astype(np.float64)
        chosen = quality < spec.below
        counts += np.bincount(labels, minlength=len(counts))
        if spec.action == RELABEL:
            suggested = scores.suggested[positions].astype(np.int64)
            chosen &= suggested != labels
            labels = np.where(chosen, suggested, labels)
        left += np.bincount(labels[~chosen] if spec.action == DROP else labels, minlength=len(counts))
        acted.append(positions[chosen])
        total += float(np.where(chosen, quality, 1.0).sum())
        num_samples += len(positions)
    if len(emptied := np.flatnonzero((counts > 0) & (left == 0))):
        name, verb = shards.class_names[emptied[0]], {DROP: "drops", RELABEL: "relabels"}[spec.action]
        raise UserError(
            f"{spec.KEY} ({spec.action}, below {spec.below:g}) {verb} all {counts[emptied[0]]} {kind} training images "
            f"labelled {quoted(name)}. Lower {spec.KEY}.below."
        )
    if spec.action == WEIGHT and not total > 0:
        raise UserError(f"{spec.KEY} gives every {kind} training image the weight 0. Lower {spec.KEY}.below.")
    mean = total / num_samples if spec.action == WEIGHT else 1.0
    return AuditAction(spec, scores, np.concatenate(acted), int(left.sum()), mean)


def _trained(num_images: int, untouched: np.ndarray) -> Iterator[np.ndarray]:
    """The positions without `untouched`, in chunks."""
    for start in range(0, num_images, _CHUNK):
        stop = min(start + _CHUNK, num_images)
        first, last = np.searchsorted(untouched, [start, stop])
        kept = np.ones(stop - start, bool)
        kept[untouched[first:last] - start] = False
        yield start + np.flatnonzero(kept)


def action_text(kind: str, record: dict[str, Any]) -> str:
    """A record of `AuditAction.describe` in words: `120 of 1000 real samples dropped (...)`."""
    acted, trained, below = (record[key] for key in ("num_acted", "num_trained", "below"))
    doubted = f"labels that are right with an estimated probability below {below:g}"
    scores = f"audit {str(record.get('audit') or record['scores_sha256'])[:16]}"
    if record["action"] == DROP:
        return f"{acted} of {acted + trained} {kind} training samples dropped: {doubted} ({scores})"
    if record["action"] == RELABEL:
        return f"{acted} of {trained} {kind} training samples relabelled as suggested: {doubted} ({scores})"
    return (
        f"the loss of {acted} of {trained} {kind} training samples weighted by this probability: {doubted} ({scores})"
    )
