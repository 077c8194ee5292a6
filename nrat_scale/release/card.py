"""The model card of a release: `templates/card.md`, with the Hub's metadata."""

import shlex
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from markupsafe import Markup

import nrat_scale
from nrat_scale.attacks import RELEASED_CODE_WARNING, fraction_text, threat_text
from nrat_scale.evaluate.attacks import attack_title
from nrat_scale.release.contents import Contents
from nrat_scale.report.page import environment
from nrat_scale.report.tables import markdown_table

TEMPLATES = environment("nrat_scale.release", autoescape=False)  # Markdown
_PAPERS = {  # first word of an objective, or `aa` for AutoAttack -> citation
    "nrat": "*NRAT: towards adversarial training with inherent label noise* (the objective)",
    "trades": "Zhang et al., *Theoretically Principled Trade-off between Robustness and Accuracy*, ICML 2019, arXiv:1901.08573",
    "mart": "Wang et al., *Improving Adversarial Robustness Requires Revisiting Misclassified Examples*, ICLR 2020",
    "pgd_at": "Madry et al., *Towards Deep Learning Models Resistant to Adversarial Attacks*, ICLR 2018, arXiv:1706.06083",
    "dm_at": "Wang et al., *Better Diffusion Models Further Improve Adversarial Training*, ICML 2023, arXiv:2302.04638",
    "aa": "Croce and Hein, *Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks*, "
    "ICML 2020, arXiv:2003.01690 (AutoAttack)",
}


def model_card(contents: Contents) -> str:
    """README.md of a release: Hub metadata, how to load it, its robustness, how it was trained, its limits."""
    recipe, results = contents.recipe, contents.results
    height, width, channels = contents.description["image_shape"]
    dataset, threat = str(contents.description["dataset"]), ""
    evaluation = {}
    if results is not None:
        threat = threat_text(results["threat"]["norm"], results["threat"]["eps"])
        table, command = Markup(markdown_table(results)), _check_command(contents, results)
        evaluation = {"tested_threat": threat, "table": table, "command": command}
    return TEMPLATES.get_template("card.md").render(
        contents=contents,
        recipe=recipe,
        dataset=dataset,
        shape=f"{channels}, {height}, {width}",
        version=nrat_scale.__version__,
        metadata=Markup(_metadata(contents, dataset, threat)),
        warning=RELEASED_CODE_WARNING,
        attacked=recipe.objective.name != "natural",
        trained_threat=threat_text(recipe.threat.norm, recipe.threat.eps),
        step=fraction_text(recipe.threat.step),
        selection_attack=attack_title(recipe.train.validation_attack),
        papers=_papers(contents),
        **evaluation,
    )


def _metadata(contents: Contents, dataset: str, threat: str) -> str:
    """The Hub's front matter as YAML, with every measured accuracy."""
    measured = [
        EvalResult(
            task_type="image-classification",
            task_name="Image classification" if attack == "natural" else "Adversarial robustness",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split="test",
            metric_type="accuracy",
            metric_name=f"{attack_title(attack)} accuracy in %{'' if attack == 'natural' else f', {threat}'} (n = {entry['n']})",
            metric_value=round(100 * entry["accuracy"], 4),
        )
        for attack, entry in contents.attacks.items()
    ]
    return ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "adversarial-robustness", "adversarial-training", "nrat_scale"],
        datasets=[dataset],
        model_name=contents.name if measured else None,
        eval_results=measured or None,
    ).to_yaml()


def _check_command(contents: Contents, results: dict[str, Any]) -> str:
    """The command that reproduces the results, except those of transfer attacks."""
    attacks = {name: entry for name, entry in contents.attacks.items() if not name.startswith("transfer-")}
    first = next(iter((attacks or contents.attacks).values()))
    total, threat = results["data"]["num_images"], results["threat"]
    most = max((entry["n"] for entry in attacks.values()), default=total)
    autoattack = min((entry["n"] for name, entry in attacks.items() if name.startswith("aa")), default=most)
    return (
        f"python -m nrat_scale.evaluate {shlex.quote(contents.name)} --data TEST_SHARDS --attacks {','.join(attacks)}"
        f" --norm {threat['norm']} --eps {fraction_text(threat['eps'])} --step {fraction_text(threat['step'])}"
        f" --batch-size {first['batch_size']} --seed {first['seed']}"
        + (f" --images {most}" if most < total else "")
        + (f" --aa-images {autoattack}" if autoattack < most else "")
    )


def _papers(contents: Contents) -> list[str]:
    name, generated = contents.recipe.objective.name, contents.recipe.data.generated.shards
    cited = {"dm_at": generated, "aa": any(attack.startswith("aa") for attack in contents.attacks)}
    return [paper for key, paper in _PAPERS.items() if name.startswith(key) or cited.get(key)]
