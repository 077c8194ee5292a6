"""Whole runs on remote shards: two processes on S3, and a run that skips a shard."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import nrat_scale.remote.transfer
from nrat_scale.checkpoint.folder import named_checkpoint
from nrat_scale.core.errors import UserError
from nrat_scale.core.files import sha256_of
from nrat_scale.data.shards import open_shards
from nrat_scale.evaluate import __main__ as evaluate_cli
from nrat_scale.prepare.input import LabelledArrays
from nrat_scale.prepare.writer import write_shards
from nrat_scale.recipe import load_recipe
from nrat_scale.release import bundle
from nrat_scale.train.loop import train
from tests.support.accelerate import new_process
from tests.support.launched import launched
from tests.support.runs import RECIPE, make_shards

pytestmark = pytest.mark.medium
SHORT = ["precision=fp64", "train.epochs=2", "data.window=2"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Folders `real` (one shard), `generated` (six shards of 32 images) and `test`."""
    make_shards(tmp_path / "real", 120, 0)
    one = open_shards(make_shards(tmp_path / "one", 180, 1))
    order = one.in_source_order()
    source = LabelledArrays(one.images(order), one.labels(order), "custom", one.class_names)
    write_shards(source, tmp_path / "generated", block_size=16, shard_size=32, progress=False)
    make_shards(tmp_path / "test", 40, 2)
    return tmp_path


def recipe(data: Path, where: str) -> Path:
    """The tiny recipe on shards at `where`."""
    path = data / "tiny.yaml"
    path.write_text(RECIPE.replace("REAL", f"{where}/real").replace("GENERATED", f"{where}/generated"))
    return path


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an empty bucket of an S3 server on loopback."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in (
        ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
        ("AWS_ACCESS_KEY_ID", "testing"),
        ("AWS_SECRET_ACCESS_KEY", "testing"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    import boto3

    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    client.create_bucket(Bucket="shards")
    yield "s3://shards"
    client.close()
    server.stop()


def upload(folder: Path, bucket: str) -> None:
    import boto3

    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    for name in ("real", "generated"):
        for path in (folder / name).glob("[!.]*"):
            client.upload_file(str(path), bucket.partition("//")[2], str(path.relative_to(folder)))
    client.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:botocore.*", "ignore::DeprecationWarning:moto.*")
@pytest.mark.usefixtures("collected")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_two_processes_train_from_s3(data: Path, bucket: str) -> None:
    """Two processes with one cache train the model that one process trains on local shards."""
    local = train(load_recipe(recipe(data, str(data)), [*SHORT, f"run_dir={data / 'local'}"]))
    upload(data, bucket)
    overrides = [*SHORT, f"run_dir={data / 's3'}", f"data.remote.cache={data / 'cache'}"]
    credentials = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    with launched([str(recipe(data, bucket)), *overrides], processes=2, environment=credentials) as launch:
        assert "2 process(es)" in launch.succeed()
    one, two = (named_checkpoint(run, "last").tensors("model") for run in (local, data / "s3"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
    stored = [json.loads((run / "data.json").read_text()) for run in (local, data / "s3")]
    assert stored[0] == stored[1], "the same images are held out"
    cached = {path.stem for path in (data / "cache").glob("*.tar")}
    assert cached <= {sha256_of(path) for name in ("real", "generated") for path in (data / name).glob("*.tar")}
    assert len(cached) >= 5


def test_a_skipped_shard_is_recorded(data: Path, server: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing shard ends the run by name; with on_bad_shard=skip, results and model card name it."""
    monkeypatch.setattr(nrat_scale.remote.transfer, "FIRST_PAUSE_SECONDS", 0.01)
    for path in data.glob("*/*"):
        server.files[f"/{path.relative_to(data)}"] = path.read_bytes()
    del server.files["/generated/shard-00003.tar"]
    path = recipe(data, server.url)
    overrides = [*SHORT, "train.epochs=4", f"data.remote.cache={data / 'cache'}"]
    with pytest.raises(UserError, match=r"shard-00003\.tar of data\.generated\.shards cannot be used.*404"):
        train(load_recipe(path, [*overrides, f"run_dir={data / 'stopped'}"]))
    fresh = [*overrides, "data.on_bad_shard=skip", f"run_dir={data / 'run'}"]
    with new_process():
        run = train(load_recipe(path, fresh))
    evaluate_cli.main([str(run), "--data", str(data / "test"), "--attacks", "natural"])
    results = json.loads((run / "results.json").read_text())
    assert [e["shard"] for e in results["checkpoints"]["best"]["skipped_shards"]] == ["shard-00003.tar"]
    card = (bundle.release(run, data / "release") / "README.md").read_text()
    assert "1 shard(s) with 32 images could not be used and were skipped: generated `shard-00003.tar`" in card
