"""What a release says of itself: the model card with the Hub's metadata, and what RobustBench asks of a new model."""

from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

import nrat_scale
from nrat_scale.recipe import RecipeSpec
from nrat_scale.report.run import attack_title
from nrat_scale.report.tables import markdown_table

TO_FILL_IN = "TO FILL IN"
NORM_TITLES = {"linf": ("l_inf", "Linf"), "l2": ("l_2", "L2")}
_SPACE_WARNING = (
    "Trained and measured with `threat.space: released_code`, which applies eps and the clamp to [0, 1] in normalised units. "
    "These numbers cannot be compared with RobustBench."
)
_PAPERS = {
    "nrat": "*NRAT: towards adversarial training with inherent label noise* (the objective)",
    "dm_at": "Wang et al., *Better Diffusion Models Further Improve Adversarial Training*, ICML 2023, arXiv:2302.04638",
    "trades": "Zhang et al., *Theoretically Principled Trade-off between Robustness and Accuracy*, ICML 2019, arXiv:1901.08573",
    "mart": "Wang et al., *Improving Adversarial Robustness Requires Revisiting Misclassified Examples*, ICLR 2020",
    "pgd_at": "Madry et al., *Towards Deep Learning Models Resistant to Adversarial Attacks*, ICLR 2018, arXiv:1706.06083",
}
_AUTOATTACK = (
    "Croce and Hein, *Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks*, ICML "
    "2020, arXiv:2003.01690 (AutoAttack)"
)


@dataclass(frozen=True)
class Contents:
    """What goes into a release.

    Attributes:
        name: of the release.
        epoch, step, weights: of the checkpoint; `ema` or `model`.
        sha256: of the file of weights.
        recipe: without local paths.
        description: the run's model.json.
        noise: the run's label_noise.json.
        skipped: shards that the run did without.
        results: results.json reduced to exactly these weights, under one label; None where there are none.
    """

    name: str
    epoch: int
    step: int
    weights: str
    sha256: str
    recipe: RecipeSpec
    description: dict[str, Any]
    noise: dict[str, Any] | None
    skipped: list[dict[str, Any]]
    results: dict[str, Any] | None

    @property
    def record(self) -> dict[str, Any]:
        """The results of these weights; empty where there are none."""
        return {} if self.results is None else dict(next(iter(self.results["checkpoints"].values())))

    @property
    def flags(self) -> list[str]:
        """Reasons to doubt the results, in sentences."""
        return [str(flag) for flag in self.record.get("flags") or []]


def model_card(contents: Contents) -> str:
    """README.md of a release: Hub metadata, how to load it, its robustness, what it was trained on, its limits."""
    recipe, threat = contents.recipe, contents.recipe.threat
    dataset = str(contents.description["dataset"])
    trained = (
        "without an attack"
        if recipe.objective.name == "natural"
        else f"against {NORM_TITLES[threat.norm][0]} perturbations of eps = {eps_text(threat.eps)}"
    )
    sections = [
        _metadata(contents, dataset),
        f"# {contents.name}",
        f"`{contents.description['architecture']}` trained with **{recipe.objective.name}** {trained} on `{dataset}`, by "
        f"nrat_scale {nrat_scale.__version__}.",
        *(["> **Warning.** " + _SPACE_WARNING] if threat.space != "pixel" else []),
        "```python\n"
        "import nrat_scale\n\n"
        f'model = nrat_scale.load("{contents.name}")  # [0, 1] images [B, {_shape(contents)}] -> logits\n'
        "```\n\n"
        f'After `import nrat_scale`, `timm.create_model("local-dir:{contents.name}", pretrained=True)` gives the same model '
        f'(on the Hub: `nrat_scale.load("user/{contents.name}")`, `timm.create_model("hf-hub:user/{contents.name}", '
        "pretrained=True)`). Do not normalise images: it happens inside.",
        "## Robustness",
        _robustness(contents),
        *(["## Reasons for doubt", "\n".join(f"* {flag}" for flag in contents.flags)] if contents.flags else []),
        *(["## Check these numbers", _check(contents)] if contents.results is not None else []),
        "## Training",
        _training(contents),
        "## Limits",
        "Robustness was measured against the attacks and the radius named above, on the data set named above, and holds for "
        "nothing else: not for other perturbations, larger radii or images of another kind. Labels of the training data may be "
        "wrong, as said above; what the model learnt from them is not known.",
        "## Citation",
        "\n".join(f"* {paper}" for paper in _papers(contents)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _metadata(contents: Contents, dataset: str) -> str:
    """The Hub's front matter, with a model-index of the measured accuracies."""
    results = [
        EvalResult(
            task_type="image-classification",
            task_name="Adversarial robustness" if attack != "natural" else "Image classification",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split="test",
            metric_type="accuracy",
            metric_name=_metric(attack, entry, contents),
            metric_value=round(100 * entry["accuracy"], 4),
        )
        for attack, entry in contents.record.get("attacks", {}).items()
    ]
    data = ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "adversarial-robustness", "adversarial-training", "nrat_scale"],
        datasets=[dataset],
        model_name=contents.name if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _metric(attack: str, entry: dict[str, Any], contents: Contents) -> str:
    if attack == "natural":
        return f"natural accuracy in % (n = {entry['n']})"
    assert contents.results is not None
    norm, eps = NORM_TITLES[contents.results["threat"]["norm"]][0], eps_text(contents.results["threat"]["eps"])
    return f"{attack_title(attack)} accuracy in %, {norm} eps = {eps} (n = {entry['n']})"


def _robustness(contents: Contents) -> str:
    results = contents.results
    if results is None:
        return "**Not evaluated.** This release was made without any measurement of its robustness."
    threat = results["threat"]
    return (
        f"{markdown_table(results)}\n\n"
        f"Test data `{results['data']['dataset']}` ({results['data']['num_images']} images, fingerprint "
        f"`{results['data']['fingerprint'][:16]}`), {NORM_TITLES[threat['norm']][0]} eps = {eps_text(threat['eps'])}, epoch "
        f"{contents.epoch}, 95 % Wilson intervals. The checkpoint was selected on held-out training images, never on the test "
        "data. Per-image outcomes are in `results.npz`."
    )


def _check(contents: Contents) -> str:
    assert contents.results is not None
    attacks = contents.record["attacks"]
    plain = [name for name in attacks if not name.startswith("transfer-")]
    entry = attacks[plain[0]] if plain else next(iter(attacks.values()))
    counts = {name: attacks[name]["n"] for name in plain}
    total = contents.results["data"]["num_images"]
    most = max(counts.values(), default=total)
    limits = f" --images {most}" if most < total else ""
    autoattack = {n for name, n in counts.items() if name.startswith("aa")}
    limits += f" --aa-images {min(autoattack)}" if autoattack and min(autoattack) < most else ""
    threat = contents.results["threat"]
    return (
        "With the same test images (their fingerprint stands above):\n\n"
        "```bash\n"
        f"python -m nrat_scale.evaluate {contents.name} --data TEST_SHARDS --attacks {','.join(plain)} --norm {threat['norm']} "
        f"--eps {eps_text(threat['eps'])} --step {eps_text(threat['step'])} --batch-size {entry['batch_size']} --seed "
        f"{entry['seed']}{limits}\n"
        "```\n\n"
        "`correct` and `outcome_sha256` of each attack in its results.json are then those of `results.json` here, with the same "
        f"versions on the same kind of hardware. Weights: sha256 `{contents.sha256}`."
    )


def _training(contents: Contents) -> str:
    recipe, noise = contents.recipe, contents.noise
    data, threat = recipe.data, recipe.threat
    attack = (
        "" if recipe.objective.name == "natural" else f", {threat.num_steps} attack steps of {eps_text(threat.step)}"
    )
    lines = [
        f"objective `{recipe.objective.name}` (lam {recipe.objective.lam:g}, inner loss {recipe.objective.inner}){attack}",
        f"{recipe.train.epochs} epochs, batches of {data.batch_size}, {recipe.precision}, seed {recipe.seed}",
        f"released: epoch {contents.epoch}, {'EMA' if contents.weights == 'ema' else 'raw'} weights",
    ]
    if data.real.shards:
        text = f"real images: `{data.real.shards}`"
        if noise is not None:
            text += (
                f", label noise {noise['kind']} ({100 * noise['realised_rate']:.1f} % of {noise['num_labels']} labels)"
            )
        lines.append(text)
    if data.generated.shards:
        share = 100 * data.generated.fraction if data.real.shards else 100
        lines.append(f"generated images: `{data.generated.shards}`, {share:g} % of every batch")
    if contents.skipped:
        total = sum(entry["num_images"] for entry in contents.skipped)
        names = ", ".join(f"{entry['source']} `{entry['shard']}`" for entry in contents.skipped)
        lines.append(
            f"{len(contents.skipped)} shard(s) with {total} images could not be used and were skipped: {names}"
        )
    validation = data.validation
    lines.append(f"selection: {validation.size} held-out {validation.source} images, {recipe.train.validation_attack}")
    return "\n".join(f"* {line}" for line in lines) + "\n\nThe complete recipe is in `recipe.yaml`."


def _papers(contents: Contents) -> list[str]:
    name = contents.recipe.objective.name
    family = next((key for key in _PAPERS if name.startswith(key)), None)
    papers = [_PAPERS[family]] if family is not None else []
    if contents.recipe.data.generated.shards and family != "dm_at":
        papers.append(_PAPERS["dm_at"])
    if any(attack.startswith("aa") for attack in contents.record.get("attacks", {})):
        papers.append(_AUTOATTACK)
    return papers or ["nrat_scale"]


def _shape(contents: Contents) -> str:
    height, width, channels = contents.description["image_shape"]
    return f"{channels}, {height}, {width}"


def eps_text(value: float) -> str:
    """8/255 where the number is one, else its digits, such that it reads back as the same number."""
    levels = round(value * 255)
    return f"{levels}/255" if levels >= 1 and levels / 255 == value else repr(float(value))
