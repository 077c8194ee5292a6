"""The measurements behind `bench.py data | plan | convert | soak`. The baselines are written as people write them."""

import functools
import http.server
import io
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import webdataset
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, WeightedRandomSampler
from torchvision import transforms

from nrat_scale.data.augment import AugmentSpec
from nrat_scale.data.spec import DataSpec, GeneratedSpec, RealSpec, RemoteSpec, ValidationSpec
from nrat_scale.data.training_data import open_training_data

BATCH, REAL = 512, 50_000
TOOLS = Path(__file__).parent
BENCH = [sys.executable, str(TOOLS / "bench.py")]


# ---- contenders: name -> an iterator of batches, and how many images to take ----------------------------------------


class PilDataset(Dataset):
    """The usual data set of this field: an array in memory, each image through PIL and torchvision's transforms."""

    def __init__(self, path: Path, transform: Any) -> None:
        with np.load(path) as file:
            self.images, self.labels = file["image"], file["label"]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


AUGMENT = transforms.Compose(
    [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
)


def pil(folder: Path, transform: Any, workers: int) -> Iterator[Any]:
    """PIL + DataLoader: 30 % of the draws from the real images, 70 % from the generated ones."""
    sets = [PilDataset(folder / f"{name}.npz", transform) for name in ("real", "generated")]
    weights = [share / len(part) for part, share in zip(sets, (0.3, 0.7), strict=True) for _ in range(len(part))]
    sampler = WeightedRandomSampler(weights, 1_000 * BATCH)
    return iter(DataLoader(ConcatDataset(sets), BATCH, sampler=sampler, num_workers=workers))


def png(folder: Path) -> Iterator[Any]:
    """One PNG per sample, as in webdataset's own examples."""
    files = sorted(str(path) for path in folder.glob("png-*.tar"))
    stream = webdataset.WebDataset(files * 10, shardshuffle=len(files)).shuffle(1000)
    # Of these two only: by its name a member could otherwise ask to be unpickled.
    decoded = stream.decode("pil", only=["png", "cls"]).to_tuple("png", "cls")
    samples = decoded.map_tuple(AUGMENT, lambda label: label).batched(BATCH)
    return iter(webdataset.WebLoader(samples, batch_size=None, num_workers=0))


def spec_of(folder: Path | str, **changes: Any) -> DataSpec:
    return DataSpec(
        batch_size=BATCH,
        real=RealSpec(f"{folder}/real"),
        generated=GeneratedSpec(f"{folder}/edm", 0.7),
        validation=ValidationSpec("generated", 1024),
        augment=AugmentSpec(4, True),
        **changes,
    )


def ours(folder: Path, augmented: bool = False, **changes: Any) -> Iterator[Any]:
    """nrat_scale's batches; `augmented` adds crop, flip and floats, on the CPU."""
    data = open_training_data(spec_of(folder, **changes), 0)
    batches = data.batches(0, 10**6)
    return (data.augmented(batch, torch.device("cpu")) for batch in batches) if augmented else batches


def memcpy(folder: Path) -> Iterator[Any]:
    """A bare copy of the same bytes."""
    source = np.ones((BATCH, 32, 32, 3), np.uint8)
    return (source.copy() for _ in itertools.count())


CONTENDERS: dict[str, tuple[str, Callable[[Path], Iterator[Any]], int]] = {
    "png": ("WebDataset, one PNG per sample", png, 16),
    "pil": ("PIL + DataLoader", functools.partial(pil, transform=AUGMENT, workers=0), 40),
    "pil_workers": ("PIL + DataLoader, 2 workers", functools.partial(pil, transform=AUGMENT, workers=2), 40),
    "pil_plain": (
        "PIL + DataLoader, no augmentation, uint8",
        functools.partial(pil, transform=transforms.PILToTensor(), workers=0),
        80,
    ),
    "webdataset": ("nrat_scale, loader: webdataset", functools.partial(ours, loader="webdataset"), 800),
    "workers": ("nrat_scale, 1 worker process", functools.partial(ours, workers=1), 2000),
    "augmented": ("nrat_scale, augmented to float32 on the CPU", functools.partial(ours, augmented=True), 300),
    "ours": ("**nrat_scale, uint8 batches**", ours, 6000),
    "memcpy": ("memcpy of the same bytes", memcpy, 100_000),
}


def run_contender(name: str, folder: Path) -> None:
    """One measurement, printed as JSON: CPU seconds of this process and its children, from the 6th batch on."""
    torch.set_num_threads(1)
    _, make, num_batches = CONTENDERS[name]
    batches = make(folder)
    for _ in range(5):
        next(batches)
    start, wall = _cpu_seconds(), time.perf_counter()
    for _ in range(num_batches):
        next(batches)
    wall = time.perf_counter() - wall
    anonymous = _anonymous_bytes(psutil.Process())
    in_self = _cpu_seconds() - start
    del batches  # workers end, and their time is counted
    workers = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = in_self + workers.ru_utime + workers.ru_stime
    print(json.dumps({"images": num_batches * BATCH, "cpu": seconds, "wall": wall, "anonymous": anonymous}))


def _cpu_seconds() -> float:
    own = resource.getrusage(resource.RUSAGE_SELF)
    return own.ru_utime + own.ru_stime


def _anonymous_bytes(process: psutil.Process) -> int:
    """RssAnon of a process and all its descendants: what neither a file nor shared memory stands behind."""
    total = 0
    for member in [process, *process.children(recursive=True)]:
        try:
            with open(f"/proc/{member.pid}/status") as file:
                total += sum(1024 * int(line.split()[1]) for line in file if line.startswith("RssAnon"))
        except OSError:  # it has ended
            continue
    return total


# ---- data -----------------------------------------------------------------------------------------------------------


def data(work: Path, num_images: int, rounds: int) -> None:
    """Print the table of loaders."""
    make_npz(work / "generated.npz", num_images, 0)
    make_npz(work / "real.npz", REAL, 1)
    _make_png_shards(work)
    for name, out in (("real", "real"), ("generated", "edm")):
        _shard(work / f"{name}.npz", work / out)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name in CONTENDERS:
            result = subprocess.run([*BENCH, "contender", name, str(work)], capture_output=True, text=True, check=True)
            found[name].append(json.loads(result.stdout))
    rates = {name: [run["images"] / run["cpu"] for run in runs] for name, runs in found.items()}
    median = {name: statistics.median(values) for name, values in rates.items()}
    memory = {name: max(run["anonymous"] for run in runs) for name, runs in found.items()}
    print(
        f"{num_images} generated and {REAL} real images of 32 x 32 x 3, batches of {BATCH} (358 + 154), {rounds} rounds"
    )
    print("| loader | images per core-second (spread) | times PNG | times PIL | anonymous memory, MB |")
    print("|---|---:|---:|---:|---:|")
    for name, (title, _, _) in CONTENDERS.items():
        spread = f"{min(rates[name]):,.0f} to {max(rates[name]):,.0f}"
        against = [f"{median[name] / median[other]:,.1f}" for other in ("png", "pil")]
        print(f"| {title} | {median[name]:,.0f} ({spread}) | {' | '.join(against)} | {memory[name] / 1e6:,.0f} |")
    share = memory["ours"] / memory["pil"]
    print(
        f"anonymous memory: {share:.2f} of PIL + DataLoader; {median['memcpy'] / median['ours']:.1f} times slower than memcpy"
    )


def make_npz(path: Path, num_images: int, seed: int) -> None:
    """An npz like the published ones: uint8 [N, 32, 32, 3], labels sorted by class; smooth noise, written in pieces."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (512, 8, 8, 3), dtype=np.uint8)
    block = coarse.repeat(4, axis=1).repeat(4, axis=2)
    scratch = path.with_suffix(".npy")
    images = np.lib.format.open_memmap(scratch, "w+", np.uint8, (num_images, 32, 32, 3))
    for first in range(0, num_images, 512):
        part = images[first : first + 512]
        part[:] = block[: len(part)] ^ generator.integers(0, 8, part.shape, dtype=np.uint8)
    labels = np.arange(num_images) * 10 // num_images
    images.flush()
    np.savez(path, image=images, label=labels)
    del images
    scratch.unlink()


def _make_png_shards(work: Path) -> None:
    with np.load(work / "real.npz") as file:
        images, labels = file["image"], file["label"]
    order = np.random.default_rng(0).permutation(len(labels))[:10_000]
    for number, part in enumerate(np.array_split(order, 4)):
        with webdataset.TarWriter(str(work / f"png-{number}.tar")) as writer:
            for i in part:
                buffer = io.BytesIO()
                Image.fromarray(images[i]).save(buffer, "PNG")
                writer.write({"__key__": f"{i:08d}", "png": buffer.getvalue(), "cls": str(labels[i]).encode()})


def _shard(npz: Path, out: Path, *options: str) -> list[str]:
    command = [
        sys.executable,
        str(TOOLS / "shard_dataset.py"),
        "npz",
        str(npz),
        "--dataset",
        "cifar10",
        "--out",
        str(out),
    ]
    subprocess.run([*command, *options], check=True, capture_output=True)
    return command


# ---- plan -----------------------------------------------------------------------------------------------------------

_PLAN = """
import json, resource, sys, time
import numpy as np, torch
from nrat_scale.data import open_training_data
from nrat_scale.sampling import SamplePlan, SourceOrder
from nrat_scale.data.shards import open_shards
from bench_data import _anonymous_bytes
import psutil
before = _anonymous_bytes(psutil.Process())
start = time.perf_counter()
shards = open_shards(sys.argv[1])
seconds = time.perf_counter() - start
orders = {"whole": None, "windows of 8 shards": 8}
found = {}
for name, window in orders.items():
    plan = SamplePlan((SourceOrder(154, (0, 50_000)), SourceOrder(358, tuple(shards.shard_starts.tolist()), window)), 0)
    plan.batch(0)
    times = []
    for step in range(1, 1001):
        begin = time.perf_counter()
        kinds, samples = plan.batch(step)
        ids = shards.source_ids(samples[kinds == 1])
        times.append(time.perf_counter() - begin)
    found[name] = [float(np.median(times)) * 1e3, float(np.max(times)) * 1e3]
print(json.dumps({"n": len(shards), "seconds": seconds, "bytes": _anonymous_bytes(psutil.Process()) - before, "ms": found}))
"""


def plan(work: Path) -> None:
    """Open an index of 50 million images and ask for the ids of batches; no image exists."""
    num_shards, per_shard, block = 977, 51_200, 512
    step = 512 + 128 + block * 3072 + 512 + 128 + block * 8 + 256
    blocks = [[640 + i * step, 640 + i * step + block * 3072 + 640, block] for i in range(per_shard // block)]
    shard = {"bytes": 200_000_000, "sha256": "0" * 64, "class_counts": [per_shard // 10] * 10, "blocks": blocks}
    n = num_shards * per_shard
    index = {
        "format": "nrat_scale.shards", "version": 2, "dataset": "cifar10", "class_names": [str(i) for i in range(10)],
        "image_shape": [32, 32, 3], "num_images": n, "class_counts": [n // 10] * 10, "block_size": block, "source": [],
        "parts": [{"num_images": n, "first_id": 0, "num_ids": n, "seed": 0}],
        "shards": [{"name": f"shard-{i:05d}.tar", **shard} for i in range(num_shards)],
    }  # fmt: skip
    path = work / "index.json"
    path.write_text(json.dumps(index))
    environment = {**os.environ, "PYTHONPATH": f"{TOOLS}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-c", _PLAN, str(work)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found = json.loads(result.stdout)
    print(f"index of {found['n']:,} images ({path.stat().st_size / 1e6:.1f} MB): opened in {found['seconds']:.2f} s, "
          f"{found['bytes'] / 1e6:.0f} MB of anonymous memory after 2,000 batches")  # fmt: skip
    for name, (median, longest) in found["ms"].items():
        print(f"  plan of a batch of 512 with source ids, {name}: {median:.3f} ms (longest of 1000: {longest:.1f} ms)")


# ---- convert --------------------------------------------------------------------------------------------------------


def convert(work: Path, num_images: int) -> None:
    """Convert an npz and print core-seconds and memory, beside writing PNGs."""
    make_npz(work / "source.npz", num_images, 0)
    size = (work / "source.npz").stat().st_size
    command = [sys.executable, str(TOOLS / "shard_dataset.py"), "npz", str(work / "source.npz"), "--dataset", "cifar10"]
    for jobs in (1, 2):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        start, peak = time.perf_counter(), 0
        process = subprocess.Popen([*command, "--out", str(work / f"out{jobs}"), "--jobs", str(jobs)])
        while process.poll() is None:
            peak = max(peak, _anonymous_bytes(psutil.Process(process.pid)))
            time.sleep(0.05)
        assert process.returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(
            f"{num_images:,} images ({size / 1e9:.2f} GB), --jobs {jobs}: {seconds:.1f} core-seconds, "
            f"{time.perf_counter() - start:.1f} s, at most {peak / 1e6:.0f} MB of anonymous memory"
        )
        if jobs == 1:
            ours = seconds / num_images
    sample = min(num_images, 10_000)
    with np.load(work / "source.npz", mmap_mode="r") as file:
        images = file["image"][:sample]
    start = _cpu_seconds()
    with webdataset.TarWriter(str(work / "png.tar")) as writer:
        for i, image in enumerate(images):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG")
            writer.write({"__key__": f"{i:08d}", "png": buffer.getvalue(), "cls": b"0"})
    png_seconds = (_cpu_seconds() - start) / sample
    print(f"one PNG per sample ({sample:,} images): {png_seconds / ours:.1f} times the CPU per image of --jobs 1")


# ---- soak -----------------------------------------------------------------------------------------------------------


def soak(work: Path, minutes: float) -> None:
    """Two processes stream remote shards through a cache that holds less than the data; print what they use over time."""
    for name, count in (("edm", 100_000), ("real", 20_000)):
        make_npz(work / f"{name}.npz", count, 0)
        _shard(work / f"{name}.npz", work / name, "--shard-size", "2048")
        (work / f"{name}.npz").unlink()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(work))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        ranks = [
            subprocess.Popen([*BENCH, "soak-rank", url, str(work / "cache"), str(rank), str(60 * minutes)],
                             stdout=subprocess.PIPE, text=True, env={**os.environ, "LOCAL_RANK": str(rank)})
            for rank in range(2)
        ]  # fmt: skip
        rows = [[json.loads(line) for line in process.communicate()[0].splitlines()] for process in ranks]
        server.shutdown()
    print("| minute | batches | anonymous memory, MB | descriptors | threads |  (two processes, summed)")
    print("|---:|---:|---:|---:|---:|")
    for row in zip(*rows, strict=False):
        total = {key: sum(one[key] for one in row) for key in row[0]}
        print(
            f"| {row[0]['minute']:.1f} | {row[0]['batches']:,} | {total['anonymous'] / 1e6:.1f} | {total['descriptors']} "
            f"| {total['threads']} |"
        )
    assert all(process.returncode == 0 for process in ranks)


def run_soak_rank(url: str, cache: str, rank: int, seconds: float) -> None:
    """One process: batches at a steady pace, a line of JSON every twentieth of the time."""
    torch.set_num_threads(1)
    # 49 + 10 shards of 6.3 MB; the cache holds 32, so every pass fetches again.
    remote = RemoteSpec(cache, 0.2)
    opened = open_training_data(spec_of(url, remote=remote, window=4), 0)
    start, process, next_report = time.monotonic(), psutil.Process(), 0.0
    for number, _ in enumerate(opened.batches(0, 10**9, rank, 2)):
        time.sleep(0.02)
        elapsed = time.monotonic() - start
        if elapsed >= next_report:
            report = {
                "minute": elapsed / 60, "batches": number, "anonymous": _anonymous_bytes(process),
                "descriptors": process.num_fds(), "threads": process.num_threads(),
            }  # fmt: skip
            print(json.dumps(report), flush=True)
            next_report += seconds / 20
        if elapsed >= seconds:
            return
