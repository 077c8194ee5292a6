"""Descriptions of shards: counts, files, a warning about sorted orders, a contact sheet."""

import numpy as np
import pytest
from PIL import Image

from nrat_scale.data.shards import open_shards
from nrat_scale.prepare.input import LabelledArrays
from tests.support.preparation import NAMES, is_one_sentence, random_source, small_shards, tree


def test_info_describes_the_shards(tmp_path, cli):
    """Counts, shape, class sizes, source files and segments, without a warning."""
    folder = small_shards(tmp_path / "a", seed=5)
    result = cli("info", folder)
    assert result.status == 0 and "70 images of shape [8, 6, 3] (custom) in 3 shards" in result.out
    for name, count in zip(NAMES, open_shards(folder).class_counts, strict=True):
        assert f"  {name}: {count}\n" in result.out
    assert "made.npz, bytes 5, sha256 000000" in result.out
    assert "source ids 0..69, permuted with seed 5" in result.out and "warning" not in result.out
    assert "ids stored" in cli("info", small_shards(tmp_path / "b", ids=np.arange(70))).out


@pytest.mark.parametrize(
    ("labels", "warns"),
    [
        (np.sort(np.arange(600) % 3), True),
        (np.repeat(np.arange(60) % 3, 10), True),  # runs of ten
        (np.arange(600) % 3, False),  # more mixed than chance
        (np.random.default_rng(0).permutation(np.arange(600) % 3), False),
        (np.random.default_rng(0).permutation(np.r_[np.zeros(590, int), np.ones(10, int)]), False),  # hardly any others
        (np.zeros(600, int), False),  # one class
        (np.zeros(1, int), False),
    ],
)
def test_info_warns_of_an_order_sorted_by_class(tmp_path, cli, labels, warns):
    """Batches of one class spoil BatchNorm and the gradient: the stored order must look random."""
    source = LabelledArrays(np.zeros((len(labels), 4, 4, 1), np.uint8), labels, "custom", NAMES)
    result = cli("info", small_shards(tmp_path / "a", source, ids=np.arange(len(labels))))
    assert result.status == 0 and ("warning: the stored order is sorted by class" in result.out) == warns


@pytest.mark.parametrize("shape", [(8, 6, 3), (16, 16, 1), (90, 70, 3)])
def test_a_contact_sheet_shows_each_class_in_its_row(tmp_path, cli, shape):
    """The row of a class shows samples of this class only; the sheet is never overwritten."""
    source = random_source(shape=shape)
    source.images[:] = (source.labels * 100 + 20)[:, None, None, None]  # one colour per class
    sheet = tmp_path / "sheet.png"
    assert cli("info", small_shards(tmp_path / "a", source), "--sheet", sheet).status == 0
    picture = np.asarray(Image.open(sheet, formats=["PNG"]).convert("L"))
    height = len(picture) // 3
    for label in range(3):
        shown = set(np.unique(picture[label * height : (label + 1) * height, 140:])) - {255}
        assert shown == {label * 100 + 20}
    before = sheet.read_bytes()
    assert (
        is_one_sentence(cli("info", tmp_path / "a", "--sheet", sheet), "already exists")
        and sheet.read_bytes() == before
    )
    assert is_one_sentence(cli("info", tmp_path / "a", "--sheet", tmp_path / "sheet.gif"), ".png")
    assert is_one_sentence(cli("info", tmp_path / "a", "--sheet", tmp_path / "no" / "sheet.png"), "existing folder")


def test_class_names_in_any_script_and_classes_without_images(tmp_path, cli):
    """A name that the font cannot show, and a class without samples."""
    source = LabelledArrays(np.zeros((4, 4, 4, 3), np.uint8), np.zeros(4, np.int64), "custom", ("猫", "none"))
    assert cli("info", small_shards(tmp_path / "a", source), "--sheet", tmp_path / "sheet.png").status == 0


def test_info_of_an_address_fetches_only_the_index(tmp_path, cli, server, monkeypatch):
    """Describing 100 GB costs one small file."""
    monkeypatch.setenv("NRAT_SCALE_CACHE", str(tmp_path / "cache"))
    server.files["/a/index.json"] = tree(small_shards(tmp_path / "a"))["index.json"]
    result = cli("info", f"{server.url}/a")
    assert result.status == 0 and "70 images" in result.out and "was not checked" in result.out
