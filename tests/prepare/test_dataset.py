"""`write_shards` of any data set, and `open_shards` as one."""

import pickle

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.transforms import v2

import nrat_scale
from nrat_scale.core.errors import UserError
from nrat_scale.data.shards import open_shards
from nrat_scale.prepare import write_shards
from tests.support.preparation import holds, random_images, tree

IMAGES, LABELS = random_images(40, num_classes=4)
NCHW = torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy())


class Pictures(Dataset):
    """Items made by `item(number)`."""

    def __init__(self, item, classes=None):
        self.item = item
        if classes is not None:
            self.classes = classes

    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, number):
        return self.item(number)  # does not raise IndexError at its end


FORMS = {
    "arrays": (IMAGES, LABELS),
    "tensors": (NCHW, torch.from_numpy(LABELS)),
    "tensor data set": TensorDataset(NCHW, torch.from_numpy(LABELS)),
    "floats": TensorDataset(NCHW.float() / 255, torch.from_numpy(LABELS)),
    "pil": Pictures(lambda i: (Image.fromarray(IMAGES[i]), int(LABELS[i]))),
    "numpy": Pictures(lambda i: (IMAGES[i], LABELS[i])),
    "dicts": Pictures(lambda i: {"image": Image.fromarray(IMAGES[i]), "label": LABELS[i]}),
    "generator": [(IMAGES[i], LABELS[i], "more") for i in range(40)],
}


@pytest.mark.parametrize("form", FORMS)
def test_any_data_set_comes_back(tmp_path, form):
    """Arrays, tensors, PIL images, floats of ToTensor, dicts."""
    folder = write_shards(FORMS[form], tmp_path / "out", block_size=16, progress=False)
    assert holds(open_shards(folder), IMAGES, LABELS)


def test_a_data_set_of_torchvision(tmp_path):
    """Class names come from `dataset.classes`."""
    for number in range(8):
        path = tmp_path / "photos" / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(IMAGES[number]).save(path)
    data = torchvision.datasets.ImageFolder(str(tmp_path / "photos"), transform=v2.PILToTensor())
    shards = open_shards(write_shards(data, tmp_path / "out", progress=False))
    assert shards.class_names == ("cat", "dog")
    assert holds(shards, IMAGES[[0, 2, 4, 6, 1, 3, 5, 7]], np.r_[0, 0, 0, 0, 1, 1, 1, 1])


MISTAKES = {
    "normalised": (TensorDataset(NCHW.float() / 255 - 0.5, torch.from_numpy(LABELS)), "multiples of 1/255"),
    "floats to 255": (TensorDataset(NCHW.float(), torch.from_numpy(LABELS)), r"expected \[0, 1\]"),
    "int64 images": (TensorDataset(NCHW.long(), torch.from_numpy(LABELS)), "int64"),
    "float labels": (TensorDataset(NCHW, torch.rand(40)), "expected a class number"),
    "no labels": (TensorDataset(NCHW), r"expected \(image, label\)"),
    "other keys": (Pictures(lambda i: {"picture": 0}), "keys picture"),
    "two sizes": (Pictures(lambda i: (IMAGES[i][: 4 + i % 2], 0)), "shape"),
    "a gap": ((IMAGES, LABELS + 1), "--labels-start 1"),
    "a number": (5, "is not a data set"),
    "a class": (Pictures, "is not a data set"),
    "an empty list": ([], "empty"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_sentences(tmp_path, name):
    """What cannot be stored exactly is refused, and nothing is left."""
    data, words = MISTAKES[name]
    with pytest.raises(UserError, match=words):
        write_shards(data, tmp_path / "out", progress=False)
    assert tree(tmp_path) == {}


def test_shards_are_a_torch_data_set(tmp_path):
    """Source order, uint8 [C, H, W], transforms, batches, workers in other processes."""
    write_shards((IMAGES, LABELS), tmp_path / "out", classes=["a", "b", "c", "d"], block_size=16, progress=False)
    data = nrat_scale.open_shards(tmp_path / "out")
    assert isinstance(data, Dataset) and len(data) == 40 and data.classes == ["a", "b", "c", "d"]
    image, label = data[7]
    assert image.dtype == torch.uint8 and torch.equal(image, NCHW[7]) and label == LABELS[7]
    assert torch.equal(data[-1][0], NCHW[-1]) and len(list(data)) == 40
    x, y = next(iter(DataLoader(data, batch_size=40, num_workers=1)))
    assert torch.equal(x, NCHW) and torch.equal(y, torch.from_numpy(LABELS)) and torch.equal(data.targets, y)
    assert torch.equal(pickle.loads(pickle.dumps(data))[3][0], NCHW[3])  # noqa: S301 - as a spawned worker gets it
    scaled = nrat_scale.open_shards(str(tmp_path / "out"), transform=v2.ToDtype(torch.float32, scale=True))
    assert torch.allclose(scaled[5][0], NCHW[5].float() / 255)
    with pytest.raises(UserError, match="There are no shards"):
        nrat_scale.open_shards(tmp_path / "nothing")
