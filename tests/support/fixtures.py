"""Fixtures of several test folders; tests/conftest.py loads them."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from nrat_scale.core.errors import run_cli
from nrat_scale.data.shards import ShardSet, open_shards
from nrat_scale.prepare import __main__ as prepare_cli
from tests.support.http_server import HttpServer


class SmallNet(nn.Module):
    """Convolution, BatchNorm, SiLU, Linear; normalisation inside: [B, 3, 8, 8] in [0, 1] -> [B, num_classes]."""

    mean: Tensor
    std: Tensor

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        for name, values in (("mean", [0.4914, 0.4822, 0.4465]), ("std", [0.2471, 0.2435, 0.2616])):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)
        self.conv = nn.Conv2d(3, 6, 3, padding=1, stride=2)
        self.bn = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6 * 16, num_classes)

    def core(self, normalised: Tensor) -> Tensor:
        """The classifier after the normalisation."""
        return self.fc(nn.functional.silu(self.bn(self.conv(normalised))).flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.core((x - self.mean) / self.std)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Training, evaluation and audits of this process use one thread: the number decides how sums round.

    For the session, because fixtures with a wider scope than a function come before any fixture of one test.
    """
    with pytest.MonkeyPatch.context() as patch:
        for user in ("train.setup", "evaluate.api", "audit.api"):
            name = f"nrat_scale.{user}.use_all_cores"
            patch.setattr(name, lambda threads=None: torch.set_num_threads(threads or 1))
        yield


@pytest.fixture(scope="session")
def make_net() -> Callable[..., SmallNet]:
    """`make_net(seed=0, dtype=torch.float64)`: a SmallNet in training mode with non-trivial running statistics."""

    def make(seed: int = 0, dtype: torch.dtype = torch.float64, num_classes: int = 5) -> SmallNet:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = SmallNet(num_classes)
            with torch.no_grad():
                assert net.bn.running_mean is not None and net.bn.running_var is not None
                net.bn.running_mean.normal_()
                net.bn.running_var.uniform_(0.5, 2.0)
                net.bn.weight.uniform_(0.5, 1.5)
                net.bn.bias.normal_(std=0.3)
        return net.to(dtype)

    return make


@pytest.fixture
def collected() -> Iterator[None]:
    """Collect garbage when the test ends, while its filter of ResourceWarning holds: webdataset and boto3 leave files to the collector."""
    yield
    gc.collect()


@pytest.fixture
def server() -> Iterator[SimpleNamespace]:
    """A server of `files` (path -> content) with the Hub's headers; `requests` counts "METHOD path"."""
    with HttpServer(hub=True) as running:
        yield SimpleNamespace(url=running.url, files=running.files, requests=running.counts)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """Run `python -m nrat_scale.prepare` in this process: its exit status and its output."""

    def run(*argv: object) -> SimpleNamespace:
        status = 0
        try:
            run_cli(lambda: prepare_cli.main([str(word) for word in argv]))
        except SystemExit as end:
            status = end.code
        printed = capsys.readouterr()
        return SimpleNamespace(status=status, out=printed.out, err=printed.err)

    return run


@pytest.fixture
def convert(cli: Callable[..., SimpleNamespace], tmp_path: Path) -> Callable[..., ShardSet]:
    """Convert into a new folder with small blocks, verify the shards and open them."""

    def run(*argv: object) -> ShardSet:
        out = tmp_path / f"out-{len(list(tmp_path.glob('out-*')))}"
        result = cli(*argv, "--out", out, "--block-size", 16, "--shard-size", 48)
        assert result.status == 0, result.err
        shards = open_shards(out)
        shards.verify(full=True)
        return shards

    return run
