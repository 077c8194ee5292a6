"""The attack of training: phases of a schedule, N-FGSM, its text, and the threat that evaluation takes from it."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from nrat_scale.attacks import PhaseSpec, ThreatSpec, attack_text, evaluation_threat, pgd, start_noise
from nrat_scale.core.errors import UserError
from nrat_scale.cost import forward_equivalents
from nrat_scale.evaluate.attacks import gradient_threat, parse_attack
from nrat_scale.losses import LOSSES
from nrat_scale.recipe import load_recipe, to_yaml
from tests.support.runs import RECIPE

SCHEDULE = "threat.schedule=[{until: 0.25, num_steps: 1, step: 0.1}, {until: 0.5, eps: 8/255, step: 4/255}]"
IDENTITY = "426bbf1f77af00f7acc7720703eac07563a811303ce4b240afa642665f2e5ba1"  # of the recipe before there were phases
N_FGSM = ["threat.attack=n_fgsm", "threat.num_steps=1", "threat.step=0.1"]


@pytest.fixture
def recipe_path(tmp_path: Path) -> Path:
    """A recipe whose data are never read: eps 0.1, two steps of 0.05."""
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.replace("REAL", "real").replace("GENERATED", "generated"))
    return path


# ---- phases ---------------------------------------------------------------------------------------------------------


def test_a_phase_changes_what_it_names(recipe_path: Path) -> None:
    """Until the fraction at which it ends; the last phase is `threat` itself."""
    threat = load_recipe(recipe_path, [SCHEDULE]).threat
    at = [threat.at(progress).key for progress in (0.0, 0.2499, 0.25, 0.4999, 0.5, 1.0)]
    first, second, final = (1, 0.1, 0.1), (2, 4 / 255, 8 / 255), (2, 0.05, 0.1)
    assert at == [first, first, second, second, final, final]
    assert [until for until, _ in threat.phases] == [0.25, 0.5, 1.0]
    assert all(not attack.schedule for _, attack in threat.phases)
    assert ThreatSpec(0.1, 0.05, 2).at(0.7) == ThreatSpec(0.1, 0.05, 2)


def test_a_schedule_survives_the_resolved_recipe(recipe_path: Path, tmp_path: Path) -> None:
    """The stored recipe has the same identity; without the keys the identity is that of earlier versions."""
    recipe = load_recipe(recipe_path, [SCHEDULE])
    stored = tmp_path / "recipe.yaml"
    stored.write_text(to_yaml(recipe))
    assert load_recipe(stored) == recipe
    plain = load_recipe(recipe_path)
    assert recipe.identity != plain.identity
    assert (
        load_recipe(recipe_path, ["threat.schedule=[]", "threat.attack=pgd", "threat.noise=2"]).identity
        == plain.identity
    )
    assert plain.identity == IDENTITY


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ("0.3", "threat.schedule is '0.3'; it must be a list of phases, such as [{until: 0.3"),
        ("{until: 0.3}", "it must be a list of phases"),
        ("[0.3]", "it must be a list of phases"),
        ("[{until:0.3,num_steps:1}]", "it needs `until` ... YAML needs a space after each colon"),
        ("[{num_steps: 1, step: 0.1}]", "threat.schedule.1 is  ... it needs `until`"),
        ("[{until: 0.3, num_step: 1}]", "unknown key 'threat.schedule.1.num_step'. Did you mean 'num_steps'"),
        ("[{until: x, num_steps: 1}]", "threat.schedule.1.until: 'x' is not a number"),
        ("[{until: 0.3, num_steps: 1.5, step: 0.1}]", "threat.schedule.1.num_steps is 1.5; it must be a whole number"),
        ("[{until: 0.3, num_steps: true, step: 0.1}]", "num_steps is True; it must be a whole number"),
        ("[{until: 0.3, num_steps: -1}]", "Phase 1 of threat.schedule (until 0.3): threat.num_steps is -1"),
        ("[{until: 0.3, num_steps: 1, step: 8}]", "threat.step is 8;  ... Write 8/255"),
        (
            "[{until: 1, num_steps: 1, step: 0.1}]",
            "until is 1.0; it must be in (0, 1): the last phase is threat itself",
        ),
        ("[{until: 0, num_steps: 1, step: 0.1}]", "until is 0.0; it must be in"),
        ("[{until: .nan, num_steps: 1, step: 0.1}]", "until is nan; it must be in"),
        (
            "[{until: 0.5, step: 0.1}, {until: 0.5}]",
            "Phase 2 of threat.schedule (until 0.5) does not end after the phase before",
        ),
        (
            "[{until: 0.3, num_steps: 1}]",
            "Phase 1 of threat.schedule (until 0.3) is too weak for its radius: 1 step of 0.05 reaches 0.05 of",
        ),
        ("[{until: 0.3, num_steps: 0}]", "0 steps of 0.05 reach 0 of eps = 0.1. ...  for instance step: 0.1"),
    ],
)
def test_a_bad_schedule_is_refused(recipe_path: Path, schedule: str, words: str) -> None:
    """In one sentence that names the phase and the way out."""
    with pytest.raises(UserError) as caught:
        load_recipe(recipe_path, [f"threat.schedule={schedule}"])
    assert all(part in str(caught.value) for part in words.split(" ... ")), caught.value


@pytest.mark.parametrize(
    ("overrides", "text", "cost"),
    [
        ([], "2 steps of 0.05", 4 + 1 + 6),
        ([SCHEDULE], "1 step of 0.1 until 25 % of training, then 2 steps of 4/255 at eps = 8/255 until 50 % of training, then 2 "
         "steps of 0.05 at eps = 0.1", 2 * 1.75 + 1 + 6),
        (N_FGSM, "N-FGSM, 1 step of 0.1 after noise within 2 eps", 2 + 1 + 6),
        (["threat.init=per_class"], "2 steps of 0.05 from a start per class", 4 + 1 + 6),
    ],
)  # fmt: skip
def test_text_and_cost(recipe_path: Path, overrides: Sequence[str], text: str, cost: float) -> None:
    """What cards, reports and runs print, and the forward passes of a step, mean over training."""
    recipe = load_recipe(recipe_path, overrides)
    assert attack_text(recipe.threat) == text
    assert forward_equivalents(recipe) == pytest.approx(cost)
    by_epoch = [forward_equivalents(recipe, epoch) for epoch in range(3)]
    assert sum(by_epoch) / 3 == pytest.approx(cost)


# ---- evaluation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "step"),
    [
        ([], 0.05),
        ([SCHEDULE], 0.05),
        (N_FGSM, 0.025),
        (["threat.init=per_class"], 0.05),
        (["threat.num_steps=1", "threat.step=0.1"], 0.025),
    ],
)
def test_evaluation_takes_the_radius_of_the_end(recipe_path: Path, overrides: Sequence[str], step: float) -> None:
    """PGD around x within the recipe's eps; the long step of a short attack would make PGD-20 weak, so it is eps / 4."""
    taken = evaluation_threat(load_recipe(recipe_path, overrides).threat)
    assert (taken.eps, taken.step, taken.schedule, taken.attack) == (0.1, step, [], "pgd")
    pgd20 = gradient_threat(parse_attack("pgd20"), taken)
    assert (pgd20.num_steps, pgd20.init, pgd20.bn) == (20, "uniform", "eval")


# ---- N-FGSM ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 1.0, 2.0])
def test_n_fgsm_is_that_of_its_authors(noise: float) -> None:
    """Noise within k eps, clipped to pixels only; one step; clipped to pixels only: further away than eps."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(8, 1, 6, 6, generator=generator, dtype=torch.float64), torch.arange(8)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.SiLU(), nn.Linear(16, 8)).double()
    threat = ThreatSpec(0.1, 0.08, 1, attack="n_fgsm", noise=noise)
    unit = start_noise(x.shape, "uniform", x, torch.Generator().manual_seed(1))
    found = pgd(model, x, lambda logits: LOSSES["ce"](logits, y), threat, generator=torch.Generator().manual_seed(1))
    eta = (noise * 0.1 * unit).clamp(-x, 1 - x).requires_grad_()
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(x + eta), y), eta)
    expected = x + (eta.detach() + 0.08 * gradient.sign()).clamp(-x, 1 - x)
    assert torch.allclose(found, expected, rtol=0, atol=1e-15)
    assert (float((found - x).abs().max()) > 0.11) == (noise > 0)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["threat.attack=nfgsm"], "threat.attack is 'nfgsm'. Did you mean 'n_fgsm'"),
        (["threat.attack=n_fgsm"], "takes one step, and threat.num_steps is 2. Use threat.num_steps=1 threat.step=0.1"),
        ([*N_FGSM, "threat.noise=-1"], "threat.noise is -1.0; it must be finite and 0 or more"),
        ([*N_FGSM, "threat.noise=.inf"], "threat.noise is inf"),
        (["threat.noise=1"], "threat.noise is 1, but it is N-FGSM's and threat.attack is 'pgd'"),
        ([*N_FGSM, "threat.init=per_class"], "starts from noise"),
        ([*N_FGSM, "threat.norm=l2", "threat.eps=0.5"], "threat.attack 'n_fgsm' is defined for threat.norm 'linf' only"),
        ([*N_FGSM, "threat.space=released_code"], "is defined in pixels only"),
        ([*N_FGSM, "threat.schedule=[{until: 0.5, num_steps: 2}]"], "Phase 1 .* takes one step"),
        (["threat.init=per_class", "threat.norm=l2", "threat.eps=0.5", "threat.step=0.2"], "threat.init 'per_class' is defined for"),
        (["threat.init=per_class", "threat.num_steps=0"], "needs a step, whose gradient moves the starts"),
        (["threat.init=per_class", "data.augment.cutmix=0.5"], "data.augment.cutmix mixes labels"),
        (["threat.init=per_class", "objective.name=natural", "objective.inner=ce"], "makes no attack"),
    ],
)  # fmt: skip
def test_what_an_attack_cannot_do_is_refused(recipe_path: Path, overrides: list[str], words: str) -> None:
    """With the way out."""
    with pytest.raises(UserError, match=words):
        load_recipe(recipe_path, overrides)


def test_starts_per_class_are_those_of_training() -> None:
    """Elsewhere nothing holds the perturbations."""
    with pytest.raises(UserError, match="is for training, which keeps the perturbations"):
        start_noise(torch.Size((1, 1, 2, 2)), "per_class", torch.zeros(()), None)
    assert ThreatSpec(0.1, 0.1, 1, schedule=[PhaseSpec(0.5, eps=0.05)]).at(0.1).eps == 0.05


def test_phases_of_another_norm_are_not_kept(recipe_path: Path) -> None:
    """Their lengths mean something else in l_2."""
    recipe_path.write_text(recipe_path.read_text().replace(
        "num_steps: 2}", "num_steps: 2, schedule: [{until: 0.5, num_steps: 1, step: 0.1}]}"
    ))  # fmt: skip
    l2 = ["threat.norm=l2", "threat.eps=0.5", "threat.step=0.25"]
    with pytest.raises(
        UserError, match=r"threat.schedule would stay .* Give all, .* threat.step=0.125 threat.schedule=\[\]"
    ):
        load_recipe(recipe_path, l2)
    assert load_recipe(recipe_path, [*l2, "threat.schedule=[]"]).threat.norm == "l2"
