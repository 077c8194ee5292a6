"""The model card of a release: `templates/card.md`, with the Hub's metadata."""

import shlex
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, constants, eval_result_entries_to_yaml
from markupsafe import Markup

import nrat_scale
from nrat_scale.attacks import RELEASED_CODE_WARNING, attack_text, fraction_text, threat_text
from nrat_scale.core.pages import environment
from nrat_scale.datasets import DATASETS
from nrat_scale.evaluate.attacks import attack_title
from nrat_scale.evaluate.results import left_out_notes
from nrat_scale.models import is_ours, is_own, origin
from nrat_scale.publications import ORIGINS, PAPERS
from nrat_scale.release.contents import Contents, init_text
from nrat_scale.remote.address import is_bucket
from nrat_scale.report.tables import markdown_table

TEMPLATES = environment("nrat_scale.release", autoescape=False)  # Markdown


def model_card(contents: Contents, curves: str | None = None) -> str:
    """README.md of a release: Hub metadata, how to load it, its robustness, how it was trained, its limits.

    Args:
        curves: file name of the learning curves, None if there are none.
    """
    recipe, results = contents.recipe, contents.results
    height, width, channels = contents.description["image_shape"]
    dataset, threat = str(contents.description["dataset"]), ""
    architecture = str(contents.description["architecture"])
    evaluation = {}
    if results is not None:
        tested = results["threat"]
        threat = threat_text(tested["norm"], tested["eps"], tested.get("space", "pixel"))
        table, command = Markup(markdown_table(results)), _check_command(contents, results)
        evaluation = {"tested_threat": threat, "table": table, "command": command}
    return TEMPLATES.get_template("card.md").render(
        contents=contents,
        curves=curves,
        address=contents.publication.address or contents.name,
        timm_address=_timm_address(contents),
        recipe=recipe,
        dataset=dataset,
        shape=f"{channels}, {height}, {width}",
        version=nrat_scale.__version__,
        metadata=Markup(_metadata(contents, dataset, threat)),
        warning=RELEASED_CODE_WARNING,
        notes=left_out_notes(contents.attacks),
        attacked=recipe.objective.name != "natural",
        trained_threat=threat_text(recipe.threat.norm, recipe.threat.eps, recipe.threat.space),
        trained_attack=attack_text(recipe.threat),
        selection_attack=attack_title(recipe.train.validation_attack),
        origin=_origin(contents),
        papers=_papers(contents),
        own=origin(architecture) if is_own(architecture) else None,
        constants=""
        if is_own(architecture) or is_ours(architecture)
        else _constants(contents.description["model_args"]),
        init=init_text(contents.description.get("init")),
        **evaluation,
    )


def _timm_address(contents: Contents) -> str:
    """The name for `timm.create_model`; timm cannot read buckets, so a copy in a folder is needed."""
    address = contents.publication.address
    on_hub = address is not None and not is_bucket(address)
    return f"hf-hub:{address}" if on_hub else f"local-dir:{contents.name}"


def evaluation_results(contents: Contents) -> str | None:
    """The accuracies in the Hub's format for leaderboards, https://huggingface.co/docs/hub/eval-results.

    One entry per attack, in percent; `task_id` is the attack's name, which the `eval.yaml` of the data set has to define. None
    without results, or if the data set of the test images has no repository on the Hub and none is named.
    """
    results, published = contents.results, contents.publication
    if results is None:
        return None
    known = DATASETS.get(str(results["data"]["dataset"]))
    benchmark = published.benchmark or (known.hub if known else None)
    if benchmark is None:
        return None
    address, source = published.address, {}
    if address is not None and not is_bucket(address):
        repo, _, revision = address.partition("@")
        url = f"{constants.ENDPOINT}/{repo}/blob/{revision or 'main'}/results.json"
        source = {"source_url": url, "source_name": "results.json"}
    tested = results["threat"]
    threat = threat_text(tested["norm"], tested["eps"], tested.get("space", "pixel"))
    entries = [
        EvalResultEntry(
            dataset_id=benchmark,
            task_id=attack,
            value=round(100 * entry["accuracy"], 4),
            notes=f"{attack_title(attack)} accuracy in %"
            + ("" if attack == "natural" else f", {threat}")
            + f", n = {entry['n']}",
            **source,
        )
        for attack, entry in contents.attacks.items()
    ]
    return str(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, width=200))


def _metadata(contents: Contents, dataset: str, threat: str) -> str:
    """The Hub's front matter as YAML, with every measured accuracy."""
    known = DATASETS.get(dataset)
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
        datasets=[known.hub] if known is not None and known.hub else None,  # the Hub links to them
        license=contents.publication.license,
        license_name=contents.publication.license_name,
        license_link=contents.publication.license_link,
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
    architecture = str(contents.description["architecture"])
    what = shlex.quote(contents.publication.address or contents.name)
    if is_own(architecture):
        what += f" --arch {':'.join(origin(architecture))}"
    return (
        f"python -m nrat_scale.evaluate {what} --data TEST_SHARDS --attacks {','.join(attacks)}"
        f" --norm {threat['norm']} --eps {fraction_text(threat['eps'])} --step {fraction_text(threat['step'])}"
        f" --batch-size {first['batch_size']} --seed {first['seed']}"
        + (" --tf32" if first.get("float32") == "tf32" else "")
        + (f" --images {most}" if most < total else "")
        + (f" --aa-images {autoattack}" if autoattack < most else "")
    )


def _constants(arguments: dict[str, Any]) -> str:
    """mean and std of a wrapped model, as Python."""
    values = ([f"{value:.6g}" for value in arguments[key]] for key in ("mean", "std"))
    return ", ".join(f"torch.tensor([{', '.join(numbers)}]).view(-1, 1, 1)" for numbers in values)


def _origin(contents: Contents) -> str:
    """Which publication the objective is, or that it is not one."""
    objective = contents.recipe.objective
    origin = ORIGINS.get(objective.name, "not a preset of nrat_scale")
    return origin if objective.title == objective.name else f"a variation of ours of {objective.name} ({origin})"


def _papers(contents: Contents) -> list[str]:
    """Citations of the objective, of the generated images and of AutoAttack, each if it was used."""
    cited = _origin(contents)
    if contents.recipe.data.generated.shards:
        cited += "; Wang et al. 2023"
    if any(attack.startswith("aa") for attack in contents.attacks):
        cited += "; Croce and Hein 2020"
    return [paper for key, paper in PAPERS.items() if key in cited]
