"""The predicted class of each image, and the gallery beside the results."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nrat_scale.attacks import ThreatSpec
from nrat_scale.evaluate.attacks import parse_attack
from nrat_scale.evaluate.gallery import gallery_path, read_galleries
from nrat_scale.evaluate.measures import Images, block_outcome
from nrat_scale.evaluate.results import PREDICTIONS_VERSION, read_arrays, read_predictions, write_arrays

Measured = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("attack", ["natural", "pgd5x2", "aa:apgd-ce"])
def test_predictions_say_what_broke_an_image(attack: str, model: nn.Module, images: Images, threat: ThreatSpec) -> None:
    """An image is right exactly if its predicted class is its label; one that is wrong naturally keeps the natural prediction."""
    predicted = np.zeros(len(images), np.int32)
    right = block_outcome(parse_attack(attack), model, images, threat, predicted=predicted)
    assert np.array_equal(right, predicted == images.labels.numpy())
    with torch.no_grad():
        natural = model(images.pixels.float() / 255).argmax(1).numpy()
    wrong = natural != images.labels.numpy()
    assert np.array_equal(predicted[wrong], natural[wrong])
    assert attack == "natural" or (predicted != natural).any()


def test_skipped_images_have_no_prediction(model: nn.Module, images: Images, threat: ThreatSpec) -> None:
    """Images that an earlier attack broke are not attacked, and no class is claimed for them."""
    predicted, broken = np.zeros(len(images), np.int32), np.arange(len(images)) < 5
    block_outcome(parse_attack("pgd1"), model, images, threat, broken=broken, predicted=predicted)
    assert np.array_equal(predicted == -1, broken)


def test_predictions_are_stored(run: Path, measured: Measured) -> None:
    """They are beside the outcomes, versioned, survive a resumed evaluation, and read without pickle."""
    record = measured("--checkpoint", "best", "--attacks", "natural,pgd3")["checkpoints"]["best"]
    assert {entry["predictions"] for entry in record["attacks"].values()} == {PREDICTIONS_VERSION}
    measured("--checkpoint", "best", "--attacks", "natural,pgd3,cw3")
    arrays, predictions = (read(run / "results.json") for read in (read_arrays, read_predictions))
    assert set(predictions) == set(arrays) == {"best/natural", "best/pgd3", "best/cw3"}
    for name, (labels, predicted) in predictions.items():
        assert np.array_equal(labels == predicted, arrays[name][1])


def test_results_of_earlier_versions_have_no_predictions(run: Path, measured: Measured) -> None:
    """They count all the same; arrays that do not fit the outcome are not predictions of it."""
    measured("--checkpoint", "best", "--attacks", "natural,pgd3")
    path = run / "results.json"
    write_arrays(path, read_arrays(path))
    assert read_predictions(path) == {}
    before = path.read_bytes()
    measured("--checkpoint", "best", "--attacks", "natural,pgd3")
    assert path.read_bytes() == before, "nothing was measured again"
    outcome = np.array([1, 2]), np.array([True, False])
    write_arrays(path, {"best/natural": outcome}, {"best/natural": (np.array([3, 3]), np.array([3, 3]))})
    assert read_predictions(path) == {}


def test_gallery(run: Path, measured: Measured) -> None:
    """A few fixed images, inside the ball, with both predictions; made once, and again for other weights."""
    record = measured("--checkpoint", "best", "--attacks", "natural,pgd3")["checkpoints"]["best"]
    path = gallery_path(run / "results.json")
    gallery = read_galleries(run / "results.json")["best"]
    assert gallery.x.shape == gallery.perturbation.shape == (8, 1, 8, 8) and gallery.attack == "pgd3"
    assert gallery.weights_sha256 == record["weights_sha256"]
    assert 0 < np.abs(gallery.perturbation).max() <= 0.15 + 1e-3
    moved = gallery.x / 255 + gallery.perturbation
    assert moved.min() > -1e-3 and moved.max() < 1 + 1e-3
    with np.load(path, allow_pickle=False) as file:
        assert all(file[name] is not None for name in file.files)
    before = path.stat().st_mtime_ns
    measured("--checkpoint", "best", "--attacks", "natural,pgd3")
    assert path.stat().st_mtime_ns == before
    measured("--checkpoint", "best", "--weights", "raw", "--attacks", "natural,pgd3")
    assert set(read_galleries(run / "results.json")) == {"best", "best-raw"}
    path.write_bytes(b"damaged")
    assert read_galleries(run / "results.json") == {}


def test_worst_case_is_not_printed_beside_other_images(
    run: Path, measured: Measured, capsys: pytest.CaptureFixture[str]
) -> None:
    """With fewer images for AutoAttack, the worst case comes with the accuracies on the same images."""
    options = ("--checkpoint", "best", "--attacks", "natural,pgd3,aa:apgd-ce", "--aa-images", "20")
    worst = measured(*options)["checkpoints"]["best"]["worst"]
    assert worst["n"] == 20 and set(worst["on_common"]) == {"natural", "pgd3", "aa:apgd-ce"}
    assert {entry["n"] for entry in worst["on_common"].values()} == {20}
    assert worst["accuracy"] <= min(entry["accuracy"] for entry in worst["on_common"].values())
    lines = capsys.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(lines) if "on the 20 images that all attacks saw:" in line)
    assert not any("worst case" in line for line in lines[:first])
    assert all("n = 20" in line for line in lines[first + 1 : first + 5]) and "worst case" in lines[first + 4]
    (run / "results.json").unlink()
    assert "on_common" not in json.dumps(measured("--checkpoint", "best", "--attacks", "natural,pgd3"))
