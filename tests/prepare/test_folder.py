"""Folders of images by class: exactly the images, scaled as asked, or one sentence that names the file."""

import numpy as np
import pytest
from PIL import Image

from nrat_scale.prepare.readers.images import MAX_SIDE
from tests.support.preparation import assert_refused, encoded, holds

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)


def _write(root, files):
    """`files`: relative path -> bytes, or an array that becomes a PNG."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else encoded(content, "PNG"))
    return root


def _photos(root, images=COLOUR):
    return _write(root, {f"{('cat', 'dog')[i % 2]}/{i:02d}.png": image for i, image in enumerate(images)})


BY_CLASS = np.r_[0, 2, 4, 1, 3, 5]


def test_images_come_back_by_class(tmp_path, convert):
    """Class names are the folders' names; hidden files and folders do not count."""
    root = _photos(tmp_path / "photos")
    _write(
        root,
        {"cat/.DS_Store": b"x", ".git/config": b"x", "dog/deeper/06.webp": encoded(COLOUR[0], "WEBP", lossless=True)},
    )
    shards = convert("folder", root)
    assert shards.class_names == ("cat", "dog")
    assert holds(shards, COLOUR[np.r_[BY_CLASS, 0]], np.r_[0, 0, 0, 1, 1, 1, 1])
    (source,) = shards.source_files
    assert source["name"].startswith("photos (7 files")


@pytest.mark.parametrize(("fit", "expected"), [("crop", (0, 255)), ("stretch", (255, 255))])
def test_sizes_are_scaled_as_asked(tmp_path, cli, convert, fit, expected):
    """`crop` keeps the proportions and cuts the ends off, `stretch` keeps the ends; the summary says what was done."""
    wide = np.zeros((16, 64, 3), np.uint8)
    wide[:, :16] = wide[:, 48:] = 255
    root = _write(
        tmp_path / "photos",
        {"a/1.jpg": encoded(wide, "JPEG", quality=100), "b/1.png": np.full((8, 8, 3), 255, np.uint8)},
    )
    shards = convert("folder", root, "--size", 8, "--fit", fit)
    first, second = shards.images(shards.in_source_order())
    assert abs(int(first[4, 0, 0]) - expected[0]) < 30 and second.min() == expected[1]
    result = cli("folder", root, "--size", 8, "--fit", fit, "--out", tmp_path / "again")
    assert f"1 of 2 images scaled to 8 x 8 ({fit})" in result.out
    assert f"({fit})" in shards.source_files[0]["name"]


def test_colour_modes(tmp_path, convert):
    """Grey stays grey if all are; palettes, CMYK and opaque alpha become RGB; the orientation is applied."""
    grey = COLOUR[..., 0]
    assert holds(
        convert("folder", _photos(tmp_path / "grey", grey)), grey[BY_CLASS][..., None], np.r_[0, 0, 0, 1, 1, 1]
    )
    assert convert("folder", tmp_path / "grey", "--channels", 3).image_shape == (8, 8, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    solid = Image.fromarray(np.dstack([COLOUR[1], np.full((8, 8), 255, np.uint8)]))
    root = _write(
        tmp_path / "mixed",
        {
            "a/0.png": encoded(grey[0], "PNG"),
            "a/1.png": encoded(solid, "PNG"),
            "a/2.png": encoded(Image.fromarray(grey[2] // 128).convert("P"), "PNG"),
            "a/3.png": encoded(COLOUR[3], "PNG", exif=exif),
            "b/4.jpg": encoded(Image.fromarray(COLOUR[4]).convert("CMYK"), "JPEG"),
        },
    )
    images = convert("folder", root).images(np.arange(5))
    assert images.shape == (5, 8, 8, 3)
    turned = [any(np.array_equal(np.rot90(COLOUR[3], -1), image) for image in images)]
    assert all(turned) and any(np.array_equal(COLOUR[1], image) for image in images)


def test_classes_in_the_order_of_a_list(tmp_path, convert):
    """`--classes` and `--dataset` set the order, and keep a class without a folder; numbers are ordered as numbers."""
    root = _photos(tmp_path / "photos")
    shards = convert("folder", root, "--classes", "dog,fox,cat")
    assert shards.class_names == ("dog", "fox", "cat") and list(shards.class_counts) == [3, 0, 3]
    assert convert("folder", root, "--dataset", "cifar10").class_counts[3] == 3
    numbers = _write(tmp_path / "numbers", {f"{n}/a.png": COLOUR[0] for n in (1, 2, 10)})
    assert convert("folder", numbers).class_names == ("1", "2", "10")


PNG = encoded(COLOUR[0], "PNG")
CLEAR = np.dstack([COLOUR[0], np.full((8, 8), 7, np.uint8)])
FRAMES = {"save_all": True, "append_images": [Image.fromarray(COLOUR[1])]}
MISTAKES = {
    "no folder": ({}, ("There is no folder",)),
    "flat": ({"1.png": PNG}, ("no subfolder", "ROOT/CLASS".replace("ROOT", ""))),
    "tars": ({"1.tar": b""}, ("prepare reshard",)),
    "splits": ({"train/cat/1.png": PNG, "test/cat/1.png": PNG}, ("splits test, train", "one by one")),
    "empty class": ({"cat/1.png": PNG, "dog/readme.txt": b""}, ("dog has no image",)),
    "sizes": ({"cat/1.png": PNG, "dog/2.png": COLOUR[0, :4]}, ("cat/1.png is 8 x 8", "dog/2.png is 8 x 4", "--size")),
    "text": ({"cat/1.png": b"hello"}, ("cat/1.png is not a readable",)),
    "page": ({"cat/1.jpg": b"<html>"}, ("cat/1.jpg is not a readable",)),
    "cut": ({"cat/1.png": PNG[:-40]}, ("cat/1.png is damaged",)),
    "empty": ({"cat/1.webp": b""}, ("cat/1.webp is not a readable",)),
    "transparent": ({"cat/1.png": CLEAR}, ("transparent pixels",)),
    "frames": ({"cat/1.webp": encoded(COLOUR[0], "WEBP", lossless=True, **FRAMES)}, ("several frames",)),
    "16 bits": ({"cat/1.png": np.zeros((8, 8), np.uint16)}, ("mode I;16",)),
    "large": ({"cat/1.png": np.zeros((MAX_SIDE + 1, 2), np.uint8)}, ("--size",)),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_every_mistake_is_a_sentence(tmp_path, cli, name):
    """Exit status 2, one line with the way out, and nothing is left."""
    files, words = MISTAKES[name]
    assert_refused(cli, tmp_path, ["folder", _write(tmp_path / "photos", files)], *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--classes", "cat,bird"), ("'dog'", "cat, bird")),
        (("--size", 0), ("--size is 0",)),
        (("--size", 5000), ("--size is 5000",)),
        (("--channels", 1), ("is a colour image",)),
    ],
)
def test_options_that_do_not_fit(tmp_path, cli, options, words):
    """Options are checked against the images."""
    assert_refused(cli, tmp_path, ["folder", _photos(tmp_path / "photos"), *options], *words)


def test_wrong_command_names_the_right_one(tmp_path, cli):
    """A folder for `reshard`, .npy files for `npz`, an npz for `arrays`."""
    root = _photos(tmp_path / "photos")
    np.save(tmp_path / "a.npy", COLOUR)
    np.savez(tmp_path / "a.npz", image=COLOUR)
    assert_refused(cli, tmp_path, ["reshard", root], f"prepare folder {root}")
    assert_refused(cli, tmp_path, ["npz", tmp_path / "a.npy", tmp_path / "a.npy"], "prepare arrays")
    assert_refused(cli, tmp_path, ["arrays", tmp_path / "a.npz", tmp_path / "a.npy"], "prepare npz")
