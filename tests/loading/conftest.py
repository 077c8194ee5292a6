"""The small model whose weights the tests of this folder save."""

import pytest
import torch
from torch import nn

from nrat_scale.models import create
from tests.support.small_releases import ARGUMENTS


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return create("cnn4", ARGUMENTS).eval()
