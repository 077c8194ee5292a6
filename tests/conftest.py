"""What several test files share."""

import hashlib
import http.server
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from nrat_scale.core.errors import run_cli
from nrat_scale.data.shards import ShardSet, open_shards
from nrat_scale.prepare import __main__ as prepare_cli

# Processes that tests start find the modules of tools/ and of tests/ as pytest does.
_ROOT = Path(__file__).parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(_ROOT), str(_ROOT / "tools"), *filter(None, [os.environ.get("PYTHONPATH")])]
)

torch.set_num_threads(1)  # the small models of the tests only lose time to more


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
        """The classifier behind the normalisation."""
        return self.fc(nn.functional.silu(self.bn(self.conv(normalised))).flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.core((x - self.mean) / self.std)


@pytest.fixture(scope="session")
def make_net() -> Callable[..., SmallNet]:
    """`make_net(seed=0, dtype=torch.float64)`: a SmallNet in training mode whose running statistics are far off."""

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
def server() -> Iterator[SimpleNamespace]:
    """A loopback server: `files` maps paths to contents, with the headers of the Hugging Face Hub; `requests` counts."""
    files: dict[str, bytes] = {}
    requests: Counter[str] = Counter()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            content = files.get(self.path)
            self.send_response(404 if content is None else 200)
            self.send_header("X-Repo-Commit", "0" * 40)
            if content is None:
                self.send_header("X-Error-Code", "EntryNotFound")
            else:
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()

        def do_GET(self) -> None:
            requests[f"GET {self.path}"] += 1
            self.do_HEAD()
            self.wfile.write(files.get(self.path, b""))

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.05,))
        thread.start()
        yield SimpleNamespace(url=f"http://127.0.0.1:{running.server_port}", files=files, requests=requests)
        running.shutdown()
        thread.join()


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """Run tools/shard_dataset.py in this process, as `run_cli` does: its exit status and what it printed."""

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
    """Convert into a new folder with small blocks, and open what was written."""

    def run(*argv: object) -> ShardSet:
        out = tmp_path / f"out-{len(list(tmp_path.glob('out-*')))}"
        result = cli(*argv, "--out", out, "--block-size", 16, "--shard-size", 48)
        assert result.status == 0, result.err
        shards = open_shards(out)
        shards.verify(full=True)
        return shards

    return run
