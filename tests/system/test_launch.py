"""The launch files of recipes/launch: valid, and able to stop and resume. GPUs are replaced by CPU processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from nrat_scale.core.run_folder import RunFolder
from tests.support.launched import free_port
from tests.support.runs import RECIPE, ROOT, digest, make_shards, torchrun

LAUNCH = ROOT / "recipes" / "launch"
SCRIPTS = ("8_gpus.sh", "2x8_gpus.sh", "slurm.sbatch")
TIMEOUT_SECONDS = 600  # a loaded machine takes long to import torch in several processes

# Stand-ins for Slurm's commands. `srun` starts SLURM_NTASKS tasks and, as slurmstepd does, hands a signal on to each.
SRUN = """#!/usr/bin/env python3
import os, signal, subprocess, sys
command = [word for word in sys.argv[1:] if not word.startswith("--")]
tasks = []
def hand_on(number, frame):
    for task in tasks:
        task.send_signal(number)
signal.signal(signal.SIGTERM, hand_on)
for rank in range(int(os.environ["SLURM_NTASKS"])):
    place = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
    tasks.append(subprocess.Popen(command, env={**os.environ, **place}))
statuses = [task.wait() for task in tasks]
sys.exit(max(status if status >= 0 else 128 - status for status in statuses))
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$REQUEUED"; fi
"""


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_pass_shellcheck(name):
    """No unquoted variable, no unchecked command."""
    script = LAUNCH / name
    result = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    assert script.stat().st_mode & 0o111


def test_the_kubernetes_job_fits_the_schema():
    """The API's own schema, without unknown fields; its command and recipe exist in the image."""
    job = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    for path in (*container["command"], *container["args"]):
        assert (ROOT / path.removeprefix("/app/")).is_file()
    claims = {volume["name"] for volume in job["spec"]["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == claims


def test_the_skypilot_task_has_only_known_fields():
    """Field names of SkyPilot 0.14's task schema; its recipe exists."""
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert task.keys() <= {"name", "resources", "workdir", "envs", "file_mounts", "setup", "run", "num_nodes"}
    assert task["resources"].keys() <= {"accelerators", "use_spot", "disk_size", "cpus", "memory", "infra"}
    assert {mount["mode"] for mount in task["file_mounts"].values()} <= {"MOUNT", "COPY", "MOUNT_CACHED"}
    assert (ROOT / task["envs"]["RECIPE"]).is_file()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A small recipe whose steps are slow enough to be interrupted."""
    folder = tmp_path_factory.mktemp("launch")
    real, generated = make_shards(folder / "real", 120, 0), make_shards(folder / "generated", 160, 1)
    text = RECIPE.replace("REAL", str(real)).replace("GENERATED", str(generated)).replace("epochs: 3", "epochs: 12")
    (folder / "recipe.yaml").write_text(text + "run_dir: runs/one\n")
    return folder / "recipe.yaml"


@pytest.fixture
def environment(tmp_path):
    """The environment of a job: the tree, stand-ins for Slurm, no GPU."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    path = f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "here", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    here = {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {
        **os.environ,
        **slurm,
        **here,
        "GPUS": "2",
        "MASTER_PORT": str(free_port()),
        "REQUEUED": str(tmp_path / "requeued"),
    }


def _stopped(process: subprocess.Popen, run: Path, number: int) -> str:
    """Send `number` once a row of metrics.jsonl is there; the output."""
    metrics, end = RunFolder(run).metrics, time.monotonic() + TIMEOUT_SECONDS
    while not (metrics.is_file() and metrics.read_text().strip()):
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(number)
    return process.communicate(timeout=TIMEOUT_SECONDS)[0]


def _start(script: str, recipe: Path, environment: dict, run: Path, *more: str) -> subprocess.Popen:
    command = [str(LAUNCH / script), str(recipe), f"run_dir={run}", *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def _num_steps(run: Path) -> int:
    return [json.loads(line) for line in RunFolder(run).metrics.read_text().splitlines()][-1]["step"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, recipe):
    """The digest of the run that nobody stopped."""
    run = tmp_path_factory.mktemp("whole") / "run"
    result = torchrun([str(recipe), f"run_dir={run}"])
    assert result.returncode == 0, result.stderr
    return digest(run)


@pytest.mark.slow
@pytest.mark.parametrize(("script", "number"), [("8_gpus.sh", signal.SIGUSR1), ("slurm.sbatch", signal.SIGTERM)])
def test_a_stopped_job_is_requeued_and_resumes(tmp_path, recipe, environment, whole, script, number):
    """A signal to the launcher reaches both processes; the same command resumes; the run equals one that was not stopped."""
    run = tmp_path / "run"
    if script == "slurm.sbatch":  # Slurm signals the tasks, not the batch script
        process = _start(script, recipe, environment, run)
        process.send_signal = lambda number: subprocess.run(["pkill", "-TERM", "-P", str(process.pid), "-f", "srun"])
    else:
        process = _start(script, recipe, environment, run)
    output = _stopped(process, run, number)
    assert "Resume with:" in output and process.returncode != 0
    assert _num_steps(run) < 12 * 4
    if script == "slurm.sbatch":
        assert process.returncode == 143
        assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    again = _start(script, recipe, environment, run)
    assert again.communicate(timeout=TIMEOUT_SECONDS)[0] and again.returncode == 0
    assert digest(run) == whole


@pytest.mark.slow
def test_two_nodes(tmp_path, recipe, environment):
    """Two launches with one master make one run of two processes, with the batches of one node."""
    runs = [tmp_path / "nodes", tmp_path / "one"]
    environment |= {"GPUS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    # One thread each: by itself, each node's process would take all cores, which sums in another order.
    settings = ("train.epochs=2", "train.threads=1")
    nodes = [_start("2x8_gpus.sh", recipe, {**environment, "NODE_RANK": rank}, runs[0], *settings) for rank in "01"]
    outputs = [node.communicate(timeout=TIMEOUT_SECONDS)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    one = _start("8_gpus.sh", recipe, {**environment, "GPUS": "2"}, runs[1], *settings)
    assert one.communicate(timeout=TIMEOUT_SECONDS)[0] and one.returncode == 0
    assert digest(runs[0]) == digest(runs[1])
    assert "2 process(es)" in outputs[0]


def test_missing_settings_are_said(recipe, environment):
    """Without NODE_RANK the script ends before anything starts."""
    result = subprocess.run(
        [str(LAUNCH / "2x8_gpus.sh"), str(recipe)], capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode != 0 and "set NODE_RANK to 0" in result.stderr
