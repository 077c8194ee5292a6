"""Feeding batches, the sample plan, and conversion, against the usual loaders and writers as people write them."""

import functools
import io
import itertools
import json
import resource
import statistics
import subprocess
import sys
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

from bench import loaders
from bench.memory import anonymous_bytes, children_seconds, cpu_seconds
from nrat_scale.data.augment import AugmentSpec
from nrat_scale.data.plan import SamplePlan, SourceOrder
from nrat_scale.data.shards import open_shards
from nrat_scale.data.spec import DataSpec, GeneratedSpec, RealSpec, ValidationSpec
from nrat_scale.data.training_data import open_training_data

BATCH, REAL = 512, 50_000
TOOLS = Path(__file__).parents[1]
BENCH = [sys.executable, str(TOOLS / "bench")]


# ---- contenders: name -> an iterator of batches, and how many batches to take ---------------------------------------


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
    # Decode these two only: a member with another suffix could be unpickled.
    decoded = stream.decode("pil", only=["png", "cls"]).to_tuple("png", "cls")
    samples = decoded.map_tuple(AUGMENT, lambda label: label).batched(BATCH)
    return iter(webdataset.WebLoader(samples, batch_size=None, num_workers=0))


def spec_of(folder: Path | str, **changes: Any) -> DataSpec:
    """The sources of these benchmarks as a recipe's `data` section."""
    return DataSpec(
        batch_size=BATCH,
        real=RealSpec(f"{folder}/real"),
        generated=GeneratedSpec(f"{folder}/edm", 0.7),
        validation=ValidationSpec("generated", size=1024),
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
    "streaming": ("MosaicML streaming", functools.partial(loaders.streaming, workers=0), 100),
    "streaming_workers": ("MosaicML streaming, 2 workers", functools.partial(loaders.streaming, workers=2), 100),
    "litdata": ("litdata", functools.partial(loaders.litdata, workers=0), 240),
    "litdata_workers": ("litdata, 2 workers", functools.partial(loaders.litdata, workers=2), 240),
    "webdataset": ("nrat_scale, loader: webdataset", functools.partial(ours, loader="webdataset"), 800),
    "augmented": ("nrat_scale, augmented to float32 on the CPU", functools.partial(ours, augmented=True), 300),
    "ours": ("**nrat_scale, uint8 batches**", ours, 6000),
    "memcpy": ("memcpy of the same bytes", memcpy, 100_000),
}
# Contenders that need a package of the extra `bench` -> its module.
OPTIONAL = {name: name.partition("_")[0] for name in CONTENDERS if name.startswith(tuple(loaders.PACKAGES))}


def run_contender(name: str, folder: Path) -> None:
    """Print one measurement as JSON: CPU seconds of this process and its children, from the sixth batch on."""
    torch.set_num_threads(1)
    _, make, num_batches = CONTENDERS[name]
    batches = make(folder)
    for _ in range(5):
        next(batches)
    start = cpu_seconds() + children_seconds()
    for _ in range(num_batches):
        next(batches)
    anonymous = anonymous_bytes()
    in_self = cpu_seconds() - start
    del batches  # ends the workers, so that RUSAGE_CHILDREN includes them
    seconds = in_self + cpu_seconds(resource.RUSAGE_CHILDREN)
    print(json.dumps({"images": num_batches * BATCH, "cpu": seconds, "anonymous": anonymous}))


# ---- data -----------------------------------------------------------------------------------------------------------


def data(work: Path, num_images: int, rounds: int) -> None:
    """Print the table of loaders; each row is measured in a process of its own."""
    make_npz(work / "generated.npz", num_images, 0)
    make_npz(work / "real.npz", REAL, 1)
    _make_png_shards(work)
    for name, out in (("real", "real"), ("generated", "edm")):
        shard(work / f"{name}.npz", work / out)
    missing = _write_for_loaders(work)
    names = [name for name in CONTENDERS if OPTIONAL.get(name) not in missing]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            result = subprocess.run([*BENCH, "contender", name, str(work)], capture_output=True, text=True, check=True)
            found[name].append(json.loads(result.stdout.splitlines()[-1]))
    rates = {name: [run["images"] / run["cpu"] for run in runs] for name, runs in found.items()}
    median = {name: statistics.median(values) for name, values in rates.items()}
    memory = {name: max(run["anonymous"] for run in runs) for name, runs in found.items()}
    images = f"{num_images} generated and {REAL} real images of 32 x 32 x 3"
    print(f"{images}, batches of {BATCH} (358 + 154), {rounds} rounds")
    print("| loader | images per core-second (spread) | times PNG | times PIL | anonymous memory, MB |")
    print("|---|---:|---:|---:|---:|")
    for name in names:
        title = CONTENDERS[name][0]
        spread = f"{min(rates[name]):,.0f} to {max(rates[name]):,.0f}"
        against = [f"{median[name] / median[other]:,.1f}" for other in ("png", "pil")]
        print(f"| {title} | {median[name]:,.0f} ({spread}) | {' | '.join(against)} | {memory[name] / 1e6:,.0f} |")
    share, slower = memory["ours"] / memory["pil"], median["memcpy"] / median["ours"]
    print(f"anonymous memory: {share:.2f} of PIL + DataLoader; {slower:.1f} times slower than memcpy")
    for kind in loaders.PACKAGES.keys() - set(missing):
        fastest = max(median[name] for name, module in OPTIONAL.items() if module == kind)
        print(f"nrat_scale, uint8 batches: {median['ours'] / fastest:,.1f} times {kind} in its faster setting")


def _write_for_loaders(work: Path) -> list[str]:
    """Write the images for the optional loaders that are installed; returns the modules of the others, after a sentence."""
    missing = []
    for kind, package in loaders.PACKAGES.items():
        installed = loaders.version(package)
        if installed is None:
            missing.append(kind)
            print(f"{kind} has no row: {package} is not installed (pip install -e '.[bench]').")
            continue
        print(f"{package} {installed}", flush=True)
        subprocess.run([*BENCH, "loader-files", kind, str(work)], check=True, capture_output=True)
    return missing


def make_npz(path: Path, num_images: int, seed: int) -> None:
    """An npz like the published ones: uint8 [N, 32, 32, 3] of smooth noise, labels sorted by class; written in pieces."""
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


def shard(npz: Path, out: Path, *options: str) -> None:
    """Convert an npz of `make_npz` to shards, by the command."""
    subprocess.run([*_conversion(npz, out), *options], check=True, capture_output=True)


def _conversion(npz: Path, out: Path) -> list[str]:
    source = ["npz", str(npz), "--dataset", "cifar10"]
    return [sys.executable, str(TOOLS / "shard_dataset.py"), *source, "--out", str(out)]


def _make_png_shards(work: Path) -> None:
    with np.load(work / "real.npz") as file:
        images, labels = file["image"], file["label"]
    order = np.random.default_rng(0).permutation(len(labels))[:10_000]
    for number, part in enumerate(np.array_split(order, 4)):
        _write_pngs(work / f"png-{number}.tar", images[part], labels[part])


def _write_pngs(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    with webdataset.TarWriter(str(path)) as writer:
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG")
            writer.write({"__key__": f"{i:08d}", "png": buffer.getvalue(), "cls": str(label).encode()})


# ---- plan -----------------------------------------------------------------------------------------------------------


def plan(work: Path) -> None:
    """Open an index of 50 million images and compute the sample ids of batches; the images do not exist."""
    path = work / "index.json"
    path.write_text(json.dumps(_large_index()))
    result = subprocess.run([*BENCH, "plan-process", str(work)], capture_output=True, text=True, check=True)
    found = json.loads(result.stdout)
    print(f"index of {found['n']:,} images ({path.stat().st_size / 1e6:.1f} MB): opened in {found['seconds']:.2f} s, "
          f"{found['bytes'] / 1e6:.0f} MB of anonymous memory after 2,000 batches")  # fmt: skip
    for name, (median, longest) in found["ms"].items():
        print(f"  plan of a batch of 512 with source ids, {name}: {median:.3f} ms (longest of 1000: {longest:.1f} ms)")


def _large_index() -> dict[str, Any]:
    num_shards, per_shard, block = 977, 51_200, 512
    step = 512 + 128 + block * 3072 + 512 + 128 + block * 8 + 256
    blocks = [[640 + i * step, 640 + i * step + block * 3072 + 640, block] for i in range(per_shard // block)]
    facts = {"bytes": 200_000_000, "sha256": "0" * 64, "class_counts": [per_shard // 10] * 10, "blocks": blocks}
    n = num_shards * per_shard
    return {
        "format": "nrat_scale.shards", "version": 2, "dataset": "cifar10", "class_names": [str(i) for i in range(10)],
        "image_shape": [32, 32, 3], "num_images": n, "class_counts": [n // 10] * 10, "block_size": block, "source": [],
        "parts": [{"num_images": n, "first_id": 0, "num_ids": n, "seed": 0}],
        "shards": [{"name": f"shard-{i:05d}.tar", **facts} for i in range(num_shards)],
    }  # fmt: skip


def run_plan(folder: Path) -> None:
    """Print the measurements of `plan` as JSON."""
    before, start = anonymous_bytes(), time.perf_counter()
    shards = open_shards(folder)
    seconds = time.perf_counter() - start
    found = {}
    for name, window in {"whole": None, "windows of 8 shards": 8}.items():
        generated = SourceOrder(358, tuple(shards.shard_starts.tolist()), window)
        batches = SamplePlan((SourceOrder(154, (0, 50_000)), generated), 0)
        batches.batch(0)
        times = []
        for step in range(1, 1001):
            begun = time.perf_counter()
            kinds, samples = batches.batch(step)
            shards.source_ids(samples[kinds == 1])
            times.append(1e3 * (time.perf_counter() - begun))
        found[name] = [float(np.median(times)), max(times)]
    print(json.dumps({"n": len(shards), "seconds": seconds, "bytes": anonymous_bytes() - before, "ms": found}))


# ---- convert --------------------------------------------------------------------------------------------------------


def convert(work: Path, num_images: int) -> None:
    """Print core-seconds and memory of converting an npz, and of writing PNGs instead."""
    npz = work / "source.npz"
    make_npz(npz, num_images, 0)
    before, start, peak = cpu_seconds(resource.RUSAGE_CHILDREN), time.perf_counter(), 0
    process = subprocess.Popen(_conversion(npz, work / "out"))
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(psutil.Process(process.pid)))
        time.sleep(0.05)
    assert process.returncode == 0
    wall, seconds = time.perf_counter() - start, cpu_seconds(resource.RUSAGE_CHILDREN) - before
    print(
        f"{num_images:,} images ({npz.stat().st_size / 1e9:.2f} GB): {seconds:.1f} core-seconds, {wall:.1f} s, "
        f"at most {peak / 1e6:.0f} MB of anonymous memory"
    )
    sample = min(num_images, 10_000)
    with np.load(npz, mmap_mode="r") as file:
        images, labels = file["image"][:sample], file["label"][:sample]
    before = cpu_seconds()
    _write_pngs(work / "png.tar", images, labels)
    ratio = (cpu_seconds() - before) / sample / (seconds / num_images)
    print(f"one PNG per sample ({sample:,} images): {ratio:.1f} times the CPU per image")
