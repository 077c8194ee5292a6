"""From probabilities to estimates: passes over the files of an audit, and the content of audit.json."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nrat_scale.audit.audited_labels import AuditedLabels
from nrat_scale.audit.confident import Thresholds, confident_classes, confident_counts
from nrat_scale.audit.correction import Correction, Estimate, HoldOut, correct, plain_estimate, transition
from nrat_scale.audit.folds import Folds
from nrat_scale.audit.probabilities import Probabilities
from nrat_scale.audit.shift import BINS, confidence_bins, histogram, measure_shift
from nrat_scale.data.shards import ShardSet
from nrat_scale.labels import transition_matrix

_CHUNK = 1 << 16  # images in memory at a time, in the passes over the probabilities


@dataclass(frozen=True)
class Audited:
    """The probabilities of the data and of the hold-out, and the labels."""

    labels: AuditedLabels
    folds: Folds
    data: Probabilities
    hold_out: Probabilities | None  # predicted by every model; None without a clean hold-out

    @property
    def shards(self) -> ShardSet:
        """The audited images."""
        return self.labels.shards

    def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """All images in the order of their positions: (positions, given labels int64 [n], probabilities float32 [n, K])."""
        for number, first in enumerate(self.shards.shard_starts[:-1].tolist()):
            probabilities = self.data.read(number)[:, 0]
            for start in range(0, len(probabilities), _CHUNK):
                part = probabilities[start : start + _CHUNK]
                positions = first + np.arange(start, start + len(part))
                yield positions, self.labels.at(positions), part


@dataclass(frozen=True)
class Statistics:
    """The first pass: sums over the images of the data."""

    thresholds: Thresholds
    counts: np.ndarray  # int64 [F, K, K]: fold, given label, predicted class
    histogram: np.ndarray  # int64 [K, BINS]: predicted class, bin of the confidence
    agreeing: np.ndarray  # int64 [BINS]: predictions equal to the given label, by bin
    confidence: np.ndarray  # float64 [BINS]: sums of the confidence, by bin


def gather_statistics(audited: Audited) -> Statistics:
    """The sums over all images of the data."""
    num_classes, folds = audited.shards.num_classes, audited.folds
    found = Statistics(
        Thresholds(num_classes),
        np.zeros((folds.number, num_classes, num_classes), np.int64),
        np.zeros((num_classes, BINS), np.int64),
        np.zeros(BINS, np.int64),
        np.zeros(BINS),
    )
    for positions, given, probabilities in audited.chunks():
        found.thresholds.add(given, probabilities)
        predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
        cells = (folds.of(positions) * num_classes + given) * num_classes + predicted
        found.counts[...] += np.bincount(cells, minlength=found.counts.size).reshape(found.counts.shape)
        found.histogram[...] += histogram(predicted, confidence, num_classes)
        bins = confidence_bins(confidence)
        found.agreeing[...] += np.bincount(bins[predicted == given], minlength=BINS)
        found.confidence[...] += np.bincount(bins, confidence, BINS)
    return found


@dataclass(frozen=True)
class HoldOutStatistics:
    """What the models predict on the hold-out."""

    predictions: HoldOut
    histogram: np.ndarray  # float64 [K, K, BINS]: true class, predicted class, bin; the models weighted by their images
    right: np.ndarray  # float64 [BINS]: right predictions, by bin of the confidence
    confidence: np.ndarray  # float64 [BINS]: sums of the confidence
    mean_confidence: np.ndarray  # float64 [K], by true class


def gather_hold_out(audited: Audited, weights: np.ndarray) -> HoldOutStatistics:
    """The predictions on the hold-out by every model, weighted by `weights` [F]."""
    assert audited.hold_out is not None
    shards = audited.hold_out.shards
    num_classes = shards.num_classes
    cells = np.zeros((num_classes, num_classes, BINS))
    right, sums, by_class = np.zeros(BINS), np.zeros(BINS), np.zeros(num_classes)
    all_true, all_predicted = [], []
    for number, first in enumerate(shards.shard_starts[:-1].tolist()):
        probabilities = audited.hold_out.read(number)
        true = shards.labels(np.arange(first, first + len(probabilities)))
        predicted, confidence = probabilities.argmax(axis=2), probabilities.max(axis=2)
        for model, weight in enumerate(weights.tolist()):
            bins = confidence_bins(confidence[:, model])
            np.add.at(cells, (true, predicted[:, model], bins), weight)
            right += weight * np.bincount(bins[predicted[:, model] == true], minlength=BINS)
            sums += weight * np.bincount(bins, confidence[:, model], BINS)
            by_class += weight * np.bincount(true, confidence[:, model], num_classes)
        all_true.append(true)
        all_predicted.append(predicted)
    predictions = HoldOut(np.concatenate(all_true), np.concatenate(all_predicted))
    sizes = np.maximum(np.bincount(predictions.true, minlength=num_classes), 1)
    return HoldOutStatistics(predictions, cells, right, sums, by_class / sizes)


@dataclass(frozen=True)
class Estimates:
    """All estimates of one audit."""

    statistics: Statistics
    hold_out: HoldOutStatistics | None
    plain: Estimate
    correction: Correction | None  # None without a hold-out
    shift: dict[str, Any] | None

    @property
    def best(self) -> Estimate:
        """The corrected estimate, or the plain one."""
        corrected = None if self.correction is None else self.correction.estimate
        return self.plain if corrected is None else corrected


def estimate(audited: Audited, seed: int, replicates: int) -> Estimates:
    """The noise rate by confident learning, and, with a hold-out, without the classifier's errors."""
    found = gather_statistics(audited)
    thresholds, num_classes = found.thresholds.values(), audited.shards.num_classes
    confident = np.zeros((num_classes, num_classes), np.int64)
    for _, given, probabilities in audited.chunks():
        confident += confident_counts(given, confident_classes(probabilities, thresholds), num_classes)
    plain = plain_estimate(confident, found.thresholds.labels, seed, replicates)
    if audited.hold_out is None:
        return Estimates(found, None, plain, None, None)
    weights = found.counts.sum(axis=(1, 2)) / found.counts.sum()
    hold_out = gather_hold_out(audited, weights)
    correction = correct(found.counts, hold_out.predictions, audited.shards.class_names, seed, replicates)
    shift = None
    if correction.estimate is not None:
        shares = correction.estimate.joint.sum(axis=1)
        means = float(found.confidence.sum() / found.counts.sum()), float(shares @ hold_out.mean_confidence)
        shift = measure_shift(found.histogram, hold_out.histogram, shares, means, seed)
    return Estimates(found, hold_out, plain, correction, shift)


def overlapping_classes(joint: np.ndarray, num_images: int) -> list[dict[str, Any]]:
    """Pairs of classes by the share of all images that have one of them instead of the other, by cleanlab; above 0 alone."""
    from cleanlab.dataset import find_overlapping_classes

    clipped = np.maximum(joint.T, 0)  # cleanlab's rows are given labels
    table = find_overlapping_classes(joint=clipped / clipped.sum(), num_examples=num_images)
    columns = (table[name].tolist() for name in ("Class Index A", "Class Index B", "Joint Probability"))
    pairs = zip(*columns, strict=True)
    return [{"classes": [int(one), int(other)], "share": float(share)} for one, other, share in pairs if share > 0]


def estimate_record(found: Estimate) -> dict[str, Any]:
    """An estimate as audit.json has it; rates and bounds below 0 are 0 there, and `unclipped...` has what was estimated."""
    labels = found.joint.sum(axis=0)
    per_class = zip(found.by_given.tolist(), found.by_given_interval.tolist(), labels.tolist(), strict=True)
    return {
        "rate": _share(found.rate),
        "unclipped": found.rate,
        "unclipped_interval": [float(bound) for bound in found.interval],
        "interval": [_share(bound) for bound in found.interval],
        "joint": found.joint.tolist(),
        "transition": transition(found.joint).tolist(),
        "per_class": [
            {"class": label, "share": share, "rate": _share(rate), "interval": [_share(bound) for bound in bounds]}
            for label, (rate, bounds, share) in enumerate(per_class)
        ],
    }


def _share(value: float) -> float:
    return min(max(float(value), 0.0), 1.0)


def correction_record(found: Correction) -> dict[str, Any]:
    """The correction as audit.json has it."""
    record: dict[str, Any] = {
        "identified": found.estimate is not None,
        "reason": found.reason,
        "condition": found.condition,
        "smallest_singular_value": found.smallest,
        "sampling_error": found.error,
    }
    return record if found.estimate is None else {**record, **estimate_record(found.estimate)}


def calibration_record(estimates: Estimates) -> dict[str, Any]:
    """Confidence against agreement with the given labels, and against accuracy on the hold-out, by bin."""

    def bins(numbers: np.ndarray, sums: np.ndarray, hits: np.ndarray, name: str) -> list[dict[str, Any]]:
        rows = zip(range(BINS), numbers.tolist(), sums.tolist(), hits.tolist(), strict=True)
        return [
            {"low": i / BINS, "high": (i + 1) / BINS, "n": round(n), "confidence": total / n, name: hit / n}
            for i, n, total, hit in rows
            if n
        ]

    data, hold_out = estimates.statistics, estimates.hold_out
    found = {
        "bins": bins(data.histogram.sum(axis=0), data.confidence, data.agreeing, "agreement"),
        "holdout_bins": None,
    }
    if hold_out is not None:
        numbers = hold_out.histogram.sum(axis=(0, 1))
        found["holdout_bins"] = bins(numbers, hold_out.confidence, hold_out.right, "accuracy")
    return found


def injected_record(labels: AuditedLabels) -> dict[str, Any] | None:
    """The noise that was injected: its realised rate, and counts of labels before it (rows) and after it."""
    if labels.given is None or labels.clean is None:
        return None
    num_classes = labels.shards.num_classes
    counts = transition_matrix(labels.clean.astype(np.int64), labels.given.astype(np.int64), num_classes)
    return {"rate": float((labels.clean != labels.given).mean()), "counts": counts.tolist()}


def truth_record(labels: AuditedLabels, folder: Path) -> dict[str, Any] | None:
    """Precision and recall of the suspects in the sidecar of `folder`, if noise was injected."""
    if labels.given is None or labels.clean is None:
        return None
    suspect = np.load(folder / "suspect.npy", "r", allow_pickle=False)
    suggested = np.load(folder / "suggested.npy", "r", allow_pickle=False)
    wrong = labels.clean != labels.given
    hits, number = int((suspect & wrong).sum()), int(suspect.sum())
    repaired = int((suspect & wrong & (suggested == labels.clean)).sum())
    return {
        "wrong": int(wrong.sum()),
        "suspects": number,
        "found": hits,
        "precision": hits / number if number else None,
        "recall": hits / int(wrong.sum()) if wrong.any() else None,
        "suggested_right": repaired / hits if hits else None,
    }
