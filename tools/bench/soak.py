"""Memory, file descriptors and threads of two processes that stream remote shards for minutes."""

import functools
import http.server
import json
import os
import subprocess
import threading
import time
from pathlib import Path

import psutil
import torch

from bench.data import BENCH, make_npz, shard, spec_of
from bench.memory import anonymous_bytes
from nrat_scale.data.spec import RemoteSpec
from nrat_scale.data.training_data import open_training_data


def soak(work: Path, minutes: float) -> None:
    """Stream through a cache that is smaller than the data, and print what both processes use over time."""
    for name, count in (("edm", 100_000), ("real", 20_000)):
        make_npz(work / f"{name}.npz", count, 0)
        shard(work / f"{name}.npz", work / name, "--shard-size", "2048")
        (work / f"{name}.npz").unlink()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(work))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        ranks = [
            subprocess.Popen([*BENCH, "soak-process", url, str(work / "cache"), str(rank), str(60 * minutes)],
                             stdout=subprocess.PIPE, text=True, env={**os.environ, "LOCAL_RANK": str(rank)})
            for rank in range(2)
        ]  # fmt: skip
        rows = [[json.loads(line) for line in process.communicate()[0].splitlines()] for process in ranks]
        server.shutdown()
    print("| minute | batches | anonymous memory, MB | descriptors | threads |  (sum of two processes)")
    print("|---:|---:|---:|---:|---:|")
    for row in zip(*rows, strict=False):
        total = {key: sum(one[key] for one in row) for key in row[0]}
        print(
            f"| {row[0]['minute']:.1f} | {row[0]['batches']:,} | {total['anonymous'] / 1e6:.1f} | {total['descriptors']} "
            f"| {total['threads']} |"
        )
    assert all(process.returncode == 0 for process in ranks)


def run_soak(url: str, cache: str, rank: int, seconds: float) -> None:
    """One process: batches at a steady pace, and one line of JSON per twentieth of the time."""
    torch.set_num_threads(1)
    # 49 + 10 shards of 6.3 MB; the cache holds 32, so that every pass downloads again.
    spec = spec_of(url, remote=RemoteSpec(cache, 0.2), window=4)
    start, process, next_report = time.monotonic(), psutil.Process(), 0.0
    for number, _ in enumerate(open_training_data(spec, 0).batches(0, 10**9, rank, 2)):
        time.sleep(0.02)
        elapsed = time.monotonic() - start
        if elapsed >= next_report:
            report = {
                "minute": elapsed / 60, "batches": number, "anonymous": anonymous_bytes(process),
                "descriptors": process.num_fds(), "threads": process.num_threads(),
            }  # fmt: skip
            print(json.dumps(report), flush=True)
            next_report += seconds / 20
        if elapsed >= seconds:
            return
