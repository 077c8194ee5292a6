"""An evaluation that a stranger can repeat: any number of processes, interrupted or not, gives the same images the same
outcome; AutoAttack's is that of its own package; what makes a number doubtful is said."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyautoattack
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from nrat_scale.attacks import ThreatSpec, pgd
from nrat_scale.core.errors import UserError
from nrat_scale.evaluate import __main__ as evaluate_cli
from nrat_scale.evaluate.attacks import parse_attack
from nrat_scale.evaluate.measures import Images, block_outcome, correct_under
from nrat_scale.evaluate.results import BlockLog, FinishedBlock, read_arrays, unfinished_folder
from nrat_scale.evaluate.sanity import check_model, contradictions
from nrat_scale.loading.load import load
from nrat_scale.models import ModelSpec, create, model_arguments
from nrat_scale.prepare.input import LabelledArrays
from nrat_scale.prepare.writer import write_shards
from tests.support.run_folders import write_run

ROOT = Path(__file__).parents[2]
NAMES = tuple("0123456789")
THREAT = ThreatSpec(0.15, 0.04, 1)
FASHION = Path("/usr/share/datasets/fashion-mnist")


def digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits, uint8 [1797, 8, 8, 1], and labels."""
    found = load_digits()
    return (found.images * 15.9).astype(np.uint8)[..., None], found.target.astype(np.int64)


def as_images(pixels: np.ndarray, labels: np.ndarray) -> Images:
    return Images(
        torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()), torch.from_numpy(labels), np.arange(len(labels))
    )


def trained(pixels: np.ndarray, labels: np.ndarray, threat: ThreatSpec, width: int = 8) -> nn.Module:
    """A small CNN after a moment of adversarial training: right on most images, and robust on some."""
    torch.manual_seed(0)
    model = create("cnn4", model_arguments(ModelSpec(kwargs={"width": width, "hidden": 32}), 10, 1, (0.3,), (0.3,)))
    x, y = torch.from_numpy(pixels.transpose(0, 3, 1, 2) / 255).float(), torch.from_numpy(labels)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    attack = ThreatSpec(threat.eps, threat.eps / 2, 3)
    for step in range(240):
        rows = torch.arange(step * 64, step * 64 + 64) % len(x)
        x_adv = pgd(model, x[rows], lambda z: nn.functional.cross_entropy(z, y[rows], reduction="none"), attack)  # noqa: B023
        optimizer.zero_grad()
        (
            nn.functional.cross_entropy(model(x_adv), y[rows]) + nn.functional.cross_entropy(model(x[rows]), y[rows])
        ).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    pixels, labels = digits()
    return trained(pixels[:1200], labels[:1200], THREAT)


@pytest.fixture(scope="module")
def images() -> Images:
    pixels, labels = digits()
    return as_images(pixels[1200:1280], labels[1200:1280])


ARGUMENTS = model_arguments(ModelSpec(kwargs={"width": 8, "hidden": 32}), 10, 1, (0.3,), (0.3,))


@pytest.fixture
def run(model: nn.Module, tmp_path: Path) -> Path:
    """A run directory, and 80 test digits beside it in `test`."""
    pixels, labels = digits()
    write_shards(
        LabelledArrays(pixels[1200:1280], labels[1200:1280], "digits", NAMES), tmp_path / "test", progress=False
    )
    return write_run(tmp_path / "run", model, ARGUMENTS, 8, threat="eps: 0.15, step: 0.04")


def command(run: Path, *options: str, processes: int = 1) -> list[str]:
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    data = str(run.parent / "test")
    return [sys.executable, *launcher, "-m", "nrat_scale.evaluate", str(run), "--data", data, *options]


def environment() -> dict[str, str]:
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def launched(arguments: Sequence[str]) -> str:
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, env=environment(), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def arrays(path: Path) -> dict[str, tuple[list[int], list[bool]]]:
    return {name: (ids.tolist(), right.tolist()) for name, (ids, right) in read_arrays(path).items()}


# ---- attacks --------------------------------------------------------------------------------------------------------


def test_attacks_by_name() -> None:
    """Every form that the documentation names, and mistakes that are told."""
    assert parse_attack("pgd50x10").steps == 50 and parse_attack("pgd50x10").restarts == 10
    assert parse_attack("cw20").kind == "cw"
    assert parse_attack("aa").components == ("apgd-ce", "apgd-t", "fab-t", "square")
    assert parse_attack("aa-apgd").components == ("apgd-ce", "apgd-t")
    assert parse_attack("aa:square+fab").components == ("square", "fab")
    for wrong in ("pgd", "pgd0", "pgd20x0", "cw-20", "AA", "aa:", "aa:squares", "natural1", "pgd20x", ""):
        with pytest.raises(UserError):
            parse_attack(wrong)


def test_restarts_are_the_worst_of_their_starts(model: nn.Module, images: Images) -> None:
    """pgdNx1 is pgdN, more restarts break a superset, and a later start is another one."""
    one, same, five = (correct_under(a, model, images, THREAT) for a in ("pgd3", "pgd3x1", "pgd3x5"))
    assert np.array_equal(one, same)
    assert not (five & ~one).any()
    assert five.sum() < one.sum(), "five starts find more than one on these images"


def test_broken_images_stay_broken_and_are_not_attacked(model: nn.Module, images: Images) -> None:
    """What an earlier attack broke counts as wrong, and the others' outcome does not change."""
    alone = correct_under("cw5", model, images, THREAT)
    broken = np.arange(len(images)) % 3 == 0
    outcome = block_outcome(parse_attack("cw5"), model, images, THREAT, broken=broken)
    assert not outcome[broken].any()
    assert np.array_equal(outcome[~broken], alone[~broken])


def test_l2_attacks_stay_in_their_ball(model: nn.Module, images: Images) -> None:
    """The l_2 attack is bounded by its radius and [0, 1], uses it, breaks more as it grows, and none at 0."""
    x, y = images.pixels / 255, images.labels
    threat = ThreatSpec(1.5, 0.4, 20, norm="l2")
    x_adv = pgd(model, x, lambda z: nn.functional.cross_entropy(z, y, reduction="none"), threat)
    lengths = (x_adv.double() - x.double()).flatten(1).norm(dim=1)
    assert float(lengths.max()) <= 1.5 * (1 + 1e-5) and float(lengths.min()) > 0.5
    assert float(x_adv.min()) >= 0 and float(x_adv.max()) <= 1
    counts = [
        correct_under("pgd20", model, images, ThreatSpec(e, e / 4, 1, norm="l2")).sum() for e in (0.0, 0.7, 1.5, 2.5)
    ]
    natural = correct_under("natural", model, images, threat).sum()
    assert counts[0] == natural and counts == sorted(counts, reverse=True) and counts[-1] < counts[1]


def test_the_l2_step_is_the_gradient_scaled_to_the_step() -> None:
    """One step on a linear model has a known answer: w / ||w|| times the step, whatever the size of the gradient."""
    for scale in (1e-30, 1.0, 1e20):

        class Linear(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(scale * torch.tensor([3.0, 4.0]))  # noqa: B023

            def forward(self, x: Tensor) -> Tensor:
                return (x.flatten(1) * self.weight).sum(1, keepdim=True)

        x = torch.full((1, 1, 1, 2), 0.5)
        x_adv = pgd(Linear(), x, lambda z: z[:, 0], ThreatSpec(0.2, 0.1, 1, "zero", norm="l2"))
        torch.testing.assert_close(x_adv - x, torch.tensor([[[[0.06, 0.08]]]]))


def test_transfer_attacks_another_model(model: nn.Module, images: Images) -> None:
    """The images are made on the source and judged by the model; from itself it is the ordinary attack."""
    pixels, labels = digits()
    other = trained(pixels[:600], labels[:600], ThreatSpec(0.02, 0.01, 1), width=4)
    own = block_outcome(parse_attack("pgd10"), model, images, THREAT)
    assert np.array_equal(block_outcome(parse_attack("pgd10"), model, images, THREAT, source=model), own)
    moved = block_outcome(parse_attack("pgd10"), model, images, THREAT, source=other)
    assert own.sum() < moved.sum() <= correct_under("natural", model, images, THREAT).sum()


# ---- AutoAttack is AutoAttack ---------------------------------------------------------------------------------------


def direct(
    model: nn.Module,
    images: Images,
    eps: float,
    seed: int,
    size: int,
    norm: str = "Linf",
    parts: list[str] | None = None,
) -> np.ndarray:
    """Survivors of pyautoattack called by itself, block by block."""
    outcome = []
    for start in range(0, len(images), size):
        x, y = images.pixels[start : start + size].float() / 255, images.labels[start : start + size]
        attack = pyautoattack.AutoAttack(model, eps=eps, norm=norm, seed=seed, device="cpu", version="standard")
        attack.attacks_to_run = parts or attack.attacks_to_run
        x_adv, _ = attack.run_standard_evaluation(x, y, batch_size=size)
        outcome.append(model(x_adv).argmax(1).eq(y).numpy())
    return np.concatenate(outcome)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_autoattack_on_digits_equals_a_direct_call(model: nn.Module, images: Images, norm: str) -> None:
    """Image for image, over several blocks of which the last is short, in both norms."""
    eps, package = (0.15, "Linf") if norm == "linf" else (0.8, "L2")
    some = images.take(np.arange(11))
    ours = correct_under("aa", model, some, ThreatSpec(eps, eps / 4, 1, norm=norm), seed=3, batch_size=8)
    expected = direct(model, some, eps, 3, 8, package)
    assert np.array_equal(ours, expected)
    natural = correct_under("natural", model, some, THREAT)
    assert 0 < expected.sum() < natural.sum(), "otherwise this would say little"


@pytest.mark.skipif(not FASHION.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_autoattack_on_fashion_mnist_equals_a_direct_call() -> None:
    """The same on real clothes, 28 x 28."""

    def read(name: str, header: int) -> np.ndarray:
        return np.frombuffer(gzip.decompress((FASHION / f"{name}-ubyte.gz").read_bytes()), np.uint8, offset=header)

    pixels = read("t10k-images-idx3", 16).reshape(-1, 28, 28, 1)
    labels = read("t10k-labels-idx1", 8).astype(np.int64)
    model = trained(pixels[2000:4000], labels[2000:4000], ThreatSpec(0.05, 0.02, 1), width=4)
    some = as_images(pixels[:6], labels[:6])
    ours = correct_under("aa", model, some, ThreatSpec(0.05, 0.02, 1), seed=0, batch_size=4)
    expected = direct(model, some, 0.05, 0, 4)
    assert np.array_equal(ours, expected) and expected.any()


def test_autoattack_on_a_robust_resnet_equals_a_direct_call() -> None:
    """The real robust ResNet-18 of pyautoattack's own example, on images of our making, with the labels it gives them: this
    says nothing of its accuracy on CIFAR-10."""
    path = Path(pyautoattack.__file__).parent / "examples" / "model_test.pt"
    model = load(path, arch="resnet18_cifar", mean=[0.0, 0.0, 0.0], std=[1.0, 1.0, 1.0])
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (3, 4, 4, 3)).repeat(8, axis=1).repeat(8, axis=2)
    pixels = np.clip(coarse + generator.integers(-20, 20, (3, 32, 32, 3)), 0, 255).astype(np.uint8)
    some = as_images(pixels, np.zeros(3, np.int64))
    with torch.no_grad():
        labels = model(some.pixels / 255).argmax(1)
    some = Images(some.pixels, labels, some.ids)
    ours = correct_under("aa-apgd", model, some, ThreatSpec(8 / 255, 2 / 255, 1), seed=1, batch_size=2)
    expected = direct(model, some, 8 / 255, 1, 2, parts=["apgd-ce", "apgd-t"])
    assert np.array_equal(ours, expected)


# ---- processes and interruptions ------------------------------------------------------------------------------------


def test_two_processes_measure_what_one_does(run: Path, tmp_path: Path) -> None:
    """Every image exactly once, the same outcome for each, AutoAttack included."""
    options = ["--attacks", "natural,pgd5x2,aa-apgd", "--batch-size", "16", "--checkpoint", "best", "--images", "42"]
    launched(command(run, *options, "--out", str(tmp_path / "one" / "results.json")))
    script = tmp_path / "counted.py"  # says how many processes there really were
    script.write_text(
        "from accelerate import PartialState\nfrom nrat_scale.evaluate.__main__ import main\nimport sys\nmain(sys.argv[1:])\n"
        "state = PartialState()\nprint('WORLD', state.num_processes, flush=True) if state.is_main_process else None\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(script), str(run)]
    out = launched(
        [*launch, "--data", str(run.parent / "test"), *options, "--out", str(tmp_path / "two" / "results.json")]
    )
    assert "WORLD 2" in out
    one, two = (arrays(tmp_path / n / "results.json") for n in ("one", "two"))
    assert one == two
    assert one["best/pgd5x2"][0] == sorted(set(one["best/pgd5x2"][0])) and len(one["best/pgd5x2"][0]) == 42
    records = [json.loads((tmp_path / n / "results.json").read_text())["checkpoints"]["best"] for n in ("one", "two")]
    for record in records:
        for entry in record["attacks"].values():
            del entry["seconds"]
    assert records[0] == records[1]


def test_a_killed_evaluation_goes_on_with_the_next_block(run: Path) -> None:
    """Finished blocks are on disk when the process is killed, are not measured again, and the end is the same."""
    options = ["--attacks", "aa:apgd-t", "--batch-size", "3", "--checkpoint", "best", "--images", "12"]
    process = subprocess.Popen(command(run, *options), env=environment(), cwd=ROOT, stderr=subprocess.DEVNULL)
    folder = unfinished_folder(run / "results.json")
    deadline = time.monotonic() + 200
    while not (blocks := list(folder.glob("*/block-*.json"))):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path: path.read_bytes() for path in folder.glob("*/block-*.json")}
    assert 1 <= len(before) < 4 and blocks
    # A finished block is taken as it is: one that says something else would show in the result.
    first = sorted(before)[0]
    value = json.loads(before[first])
    flipped = "".join("10"[int(letter)] for letter in value["right"])
    first.write_text(json.dumps({**value, "right": flipped}))
    launched(command(run, *options))
    shown = arrays(run / "results.json")["best/aa:apgd-t"][1]
    launched(command(run, *options, "--out", str(run.parent / "whole.json")))
    whole = arrays(run.parent / "whole.json")["best/aa:apgd-t"][1]
    assert ["01"[right] for right in shown[:3]] == list(flipped)
    assert shown[3:] == whole[3:] and [not right for right in shown[:3]] == whole[:3]
    assert not folder.exists(), "nothing is left once the answer is written"


def test_blocks_of_another_question_are_not_taken(tmp_path: Path) -> None:
    """The key of a finished block holds everything that its outcome depends on; a damaged block is told."""
    log = BlockLog(tmp_path / "results.json", {"seed": 0})
    log.write(4, FinishedBlock(np.array([True, False]), 1.5, ["w"]))
    ((first, block),) = log.read().items()
    assert (first, block.right.tolist(), block.seconds, block.warnings) == (4, [True, False], 1.5, ["w"])
    assert not BlockLog(tmp_path / "results.json", {"seed": 1}).read()
    (path,) = unfinished_folder(tmp_path / "results.json").glob("*/*.json")
    path.write_text(path.read_text().replace("10", "1x"))
    with pytest.raises(UserError, match="damaged"):
        log.read()


# ---- results --------------------------------------------------------------------------------------------------------


def measured(run: Path, *options: str) -> dict[str, Any]:
    evaluate_cli.main([str(run), "--data", str(run.parent / "test"), *options])
    return json.loads((run / "results.json").read_text())


def test_the_record_is_complete(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every number says what it belongs to, the arrays are those that results.json names, and the worst case is theirs."""
    results = measured(run, "--attacks", "natural,fgsm,pgd5,cw5", "--checkpoint", "best", "--weights", "evaluated,raw")
    assert set(results["checkpoints"]) == {"best", "best-raw"}
    assert results["checkpoints"]["best"]["sha256"] != results["checkpoints"]["best-raw"]["sha256"]
    record = results["checkpoints"]["best"]
    assert (
        results["versions"]["torch"] == torch.__version__.partition("+")[0]
        and len(results["data"]["fingerprint"]) == 64
    )
    entry = record["attacks"]["cw5"]
    wanted = {
        "seed": 0,
        "eps": 0.15,
        "step": 0.04,
        "steps": 5,
        "restarts": 1,
        "norm": "linf",
        "batch_size": 256,
        "n": 80,
    }
    assert wanted.items() <= entry.items()
    found = read_arrays(run / "results.json")
    assert found["best/cw5"][1].sum() == entry["correct"]
    worst = np.all([found[f"best/{name}"][1] for name in ("natural", "fgsm", "pgd5", "cw5")], axis=0)
    assert record["worst"]["correct"] == worst.sum() and record["worst"]["n"] == 80
    assert "worst case" in capsys.readouterr().out


def test_nothing_measured_is_overwritten(run: Path) -> None:
    """Another radius, other settings and fewer images are refused with the way out; more images replace fewer."""
    first = measured(run, "--attacks", "pgd3", "--images", "40")
    content = (run / "results.json").read_bytes()
    for options, message in (
        (["--eps", "8/255"], "threat"),
        (["--images", "20"], "n 40"),
        (["--seed", "1", "--images", "40"], "seed 0"),
        (["--batch-size", "8", "--images", "40"], "batch_size"),
    ):
        with pytest.raises(UserError, match=message):
            measured(run, "--attacks", "pgd3", *options)
        assert (run / "results.json").read_bytes() == content
    assert first["checkpoints"]["best"]["attacks"]["pgd3"]["n"] == 40
    assert measured(run, "--attacks", "pgd3")["checkpoints"]["best"]["attacks"]["pgd3"]["n"] == 80


def test_results_without_their_arrays_are_measured_again(run: Path) -> None:
    """An entry counts only with the outcomes that it names (a crash between the two files, for instance)."""
    first = measured(run, "--attacks", "pgd3")["checkpoints"]["best"]["attacks"]["pgd3"]
    (run / "results.npz").unlink()
    again = measured(run, "--attacks", "pgd3")["checkpoints"]["best"]["attacks"]["pgd3"]
    assert again["outcome_sha256"] == first["outcome_sha256"]
    (run / "results.npz").write_bytes(b"PK nothing")
    with pytest.raises(UserError, match="damaged"):
        measured(run, "--attacks", "pgd3")


def test_dropping_what_is_broken_is_said(run: Path) -> None:
    """The list ends with the worst case, and entries name what they left out."""
    alone = measured(run, "--attacks", "natural,pgd5,cw5", "--checkpoint", "best")["checkpoints"]["best"]
    evaluate_cli.main(
        [
            str(run),
            "--data",
            str(run.parent / "test"),
            "--attacks",
            "natural,pgd5,cw5",
            "--checkpoint",
            "best",
            "--drop-broken",
            "--out",
            str(run / "dropped.json"),
        ]
    )
    dropped = json.loads((run / "dropped.json").read_text())["checkpoints"]["best"]
    assert dropped["attacks"]["cw5"]["without_images_broken_by"] == ["natural", "pgd5"]
    assert dropped["attacks"]["cw5"]["correct"] == alone["worst"]["correct"] == dropped["worst"]["correct"]


def test_a_file_of_weights_and_a_source_of_transfer(run: Path, model: nn.Module, tmp_path: Path) -> None:
    """A plain state dict is evaluated with --arch, in l_2 too, and as the source of a transfer attack."""
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "weights.pt")
    big = create("cnn4", model_arguments(ModelSpec(), 10, 1, (0.3,), (0.3,)))
    torch.save(big.state_dict(), tmp_path / "plain.pt")
    out, data = tmp_path / "file.json", str(run.parent / "test")
    with pytest.raises(UserError, match="--arch"):
        evaluate_cli.main([str(tmp_path / "plain.pt"), "--data", data, "--eps", "0.1"])
    given = [str(tmp_path / "plain.pt"), "--arch", "cnn4", "--mean", "0.3", "--std", "0.3", "--data", data]
    with pytest.raises(UserError, match="--eps"):
        evaluate_cli.main([*given, "--out", str(out)])
    options = ["--attacks", "natural,pgd2", "--eps", "0.5", "--norm", "l2", "--out", str(out)]
    evaluate_cli.main([*given, *options, "--transfer-from", str(run)])
    results = json.loads(out.read_text())
    entries = results["checkpoints"]["file"]["attacks"]
    assert results["threat"] == {"norm": "l2", "eps": 0.5, "step": 0.125, "space": "pixel"}
    assert set(entries) == {"natural", "transfer-pgd2"} and entries["transfer-pgd2"]["source"]["label"] == "run"


# ---- refusals and flags ---------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """A model whose logits are changed."""

    def __init__(self, model: nn.Module, change: Any) -> None:
        super().__init__()
        self.model, self.change = model, change
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.model(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z: z + 0.1 * torch.randn_like(z), "different logits for the same images"),
        (lambda z: z - z.mean(0), "depend on the other images"),
        (lambda z: z / 0, "not finite"),
        (lambda z: z[:, 0], "expected logits"),
        (lambda z: torch.where(z < 1e9, z, z).sqrt().nan_to_num(), "gradients that are not finite"),
    ],
)
def test_what_cannot_be_measured_is_refused(model: nn.Module, images: Images, change: Any, message: str) -> None:
    """Randomness, dependence on the batch, NaN, other shapes, broken gradients."""
    with pytest.raises(UserError, match=message):
        check_model(Wrapped(model, change), images, THREAT, "the model")


def test_training_mode_is_refused(model: nn.Module, images: Images) -> None:
    """Also where only a part of the model is in it."""
    wrapped = Wrapped(model, nn.Identity())
    wrapped.change.train()
    with pytest.raises(UserError, match=r"training mode \(change\)"):
        check_model(wrapped, images, THREAT, "the model")


def test_masked_gradients_are_flagged(model: nn.Module, images: Images) -> None:
    """Saturated logits and probabilities give flags, the model itself none; the released code's threat is always flagged."""
    assert check_model(model, images, THREAT, "the model") == []
    (flag,) = check_model(Wrapped(model, lambda z: z * 1e4), images, THREAT, "the model")
    assert "vanishes" in flag
    assert any("probabilities" in f for f in check_model(Wrapped(model, lambda z: z.softmax(1)), images, THREAT, "m"))
    (flag,) = check_model(model, images, ThreatSpec(0.15, 0.04, 1, space="released_code"), "the model")
    assert "RobustBench" in flag


def test_a_sound_model_contradicts_nothing(model: nn.Module, images: Images) -> None:
    """Measured outcomes of an adversarially trained model raise no flag."""
    honest = {a: (images.ids, correct_under(a, model, images, THREAT)) for a in ("natural", "fgsm", "pgd20", "pgd50x2")}
    assert contradictions(honest) == []


def outcome(n: int, right: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(n), np.arange(n) < right


@pytest.mark.parametrize(
    ("outcomes", "words"),
    [
        ({"pgd20": outcome(100, 50), "aa": outcome(100, 51)}, "AutoAttack leaves 51.0 %"),
        ({"cw20": outcome(200, 50), "aa": outcome(100, 51)}, "it failed"),
        ({"natural": outcome(100, 90), "fgsm": outcome(100, 50), "pgd20": outcome(100, 50)}, "one step"),
        ({"pgd20": outcome(100, 50), "pgd50": outcome(100, 46)}, "converged"),
        ({"cw20": outcome(100, 50), "cw20x10": outcome(100, 40)}, "restarts"),
    ],
)
def test_contradictions(outcomes: dict[str, tuple[np.ndarray, np.ndarray]], words: str) -> None:
    """What two attacks say of the same images and cannot both be true."""
    (flag,) = contradictions(outcomes)
    assert words in flag


@pytest.mark.parametrize(
    "outcomes",
    [
        {"pgd20": outcome(100, 50), "aa": outcome(100, 50)},
        {"pgd20": (np.arange(100, 200), np.arange(100) < 50), "aa": outcome(100, 60)},  # not the same images
        {"natural": outcome(100, 90), "fgsm": outcome(100, 90), "pgd20": outcome(100, 90)},  # eps 0
        {"natural": outcome(100, 90), "fgsm": outcome(100, 0), "pgd20": outcome(100, 0)},  # nothing is left to mask
        {"pgd20": outcome(100, 50), "pgd50": outcome(100, 48)},
        {"natural": outcome(100, 90), "aa": outcome(100, 50), "fgsm": outcome(100, 70), "pgd20": outcome(100, 55)},
    ],
)
def test_honest_outcomes_are_not_flagged(outcomes: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """What every sound evaluation looks like."""
    assert contradictions(outcomes) == []
