"""Grids: the paper's tables are all there, settings have sources, order and choices; wrong files are refused."""

from collections import Counter
from pathlib import Path

import pytest

from nrat_scale.core.errors import UserError
from nrat_scale.recipe import RecipeSpec
from nrat_scale.reproduce.cells import Place
from nrat_scale.reproduce.grid import Choices
from nrat_scale.reproduce.grid_files import GRIDS, grid_names, read_grid
from nrat_scale.reproduce.paper import printed_numbers
from tests.support.small_grids import EDITIONS, GRID, write_grid

PAPER = [*(f"figure{i}" for i in (1, 3, 4, 5)), *(f"table{i}" for i in range(1, 6))]
NAMES = sorted(["audited-labels", "frontier", "noise-benchmark", *PAPER])
GRID_OF = {name: read_grid(name) for name in NAMES}
PAPER_EDITIONS = {"table4_mnist": "paper-mnist", "table4_fashion_mnist": "paper-fashion_mnist"}


# ---- the grids of the package ---------------------------------------------------------------------------------------


def test_the_papers_tables_and_figures_and_the_benchmark_are_there():
    """Every one is a grid, and recipes/grids is the folder that the package reads."""
    assert grid_names() == NAMES
    assert GRIDS.resolve() == (Path(__file__).parents[2] / "recipes" / "grids").resolve()


def test_every_printed_number_has_a_cell():
    """Of the 396 numbers of paper.csv, each has its method, noise and table in the grid of that table."""
    assert len(printed_numbers()) == 396
    cells = {name: {(cell.edition.name, cell.id) for cell in grid.cells("paper")} for name, grid in GRID_OF.items()}
    for table, method, noise in {key[:3] for key in printed_numbers()}:
        name = table.partition("_")[0]
        ours = {theirs: own for own, theirs in GRID_OF[name].paper[table].items()}.get(method, method)
        kind, _, rate = noise.partition("_")
        label = "none-0" if kind == "clean" else f"{kind}-{rate}"
        assert (PAPER_EDITIONS.get(table, "paper"), f"{ours}/{label}/seed-0") in cells[name]


@pytest.mark.medium
@pytest.mark.parametrize("edition", ["paper", "fashion", "mnist"])
def test_every_method_and_noise_has_a_recipe(edition, tmp_path):
    """Methods and exceptions give valid recipes, no two of which are the same training."""
    hashes: dict[str, str] = {}
    for name in NAMES:
        if (name, edition) == ("frontier", "paper"):  # the paper trains with 10 steps, the reference there
            continue
        if edition not in (GRID_OF[name].allowed or [edition]):
            continue
        for cell in GRID_OF[name].cells(edition, seeds=1):
            place = Place(cell, tmp_path)
            if cell.method == "nrat" or str(cell.noise) == "asymmetric-0.4":
                hashes[place.key] = hashes.get(place.key) or place.hash
    assert max(Counter((key.split("/")[0], value) for key, value in hashes.items()).values()) == 1


def test_the_small_editions_have_more_seeds():
    """The small editions run the headline methods five times and the others three times; the paper's once."""
    for edition, counts in (("fashion", (5, 3)), ("mnist", (5, 3)), ("paper", (1, 1))):
        seeds = Counter(cell.method for cell in GRID_OF["table1"].cells(edition) if str(cell.noise) == "none-0")
        assert (seeds["nrat"], seeds["trades"], seeds["trades_apl"]) == (counts[0],) * 3
        assert (seeds["pgd_at"], seeds["mart"]) == (counts[1],) * 2


def test_the_benchmark_runs_the_headline_first():
    """Stages in order, and within a stage all methods and noises of a seed before the next seed."""
    cells = GRID_OF["noise-benchmark"].cells("fashion")
    first = [cell.id for cell in cells[:8]]
    assert {name.split("/")[0] for name in first} == {"nrat", "trades_apl", "trades", "pgd_at"}
    assert {name.split("/")[1] for name in first} == {"none-0", "symmetric-0.4"}
    assert all(name.endswith("seed-0") for name in first)
    assert [cell.stage for cell in cells] == sorted((cell.stage for cell in cells), key=_order(cells))
    assert len({cell.id for cell in cells}) == len(cells)


def _order(cells):
    stages = list(dict.fromkeys(cell.stage for cell in cells))
    return stages.index


def test_learning_rates_of_the_paper_have_sources():
    """NRAT 0.05, the others 0.1, on CIFAR-10; every exception of every edition says where its values come from."""
    grid = GRID_OF["table1"]
    for cell in grid.cells("paper")[::3]:
        assert cell.recipe().optim.lr == (0.05 if cell.method == "nrat" else 0.1)
    assert all(override.source for edition in grid.editions.values() for override in edition.overrides)


def test_omissions_of_the_paper_are_marked():
    """awp.gamma, the attack of table 4, and which asymmetric kind."""
    assert any("awp.gamma" in text for text in GRID_OF["table3"].omissions)
    assert any("number of steps" in text for text in GRID_OF["table4"].omissions)
    assert any("--noise text" in text for text in GRID_OF["table2"].omissions)


# ---- choices --------------------------------------------------------------------------------------------------------


def test_choices_change_all_cells_and_their_folder():
    """Another kind of asymmetric noise, the released code's threat space, curves on test images."""
    grid = GRID_OF["table2"]
    kinds = {"text": "asymmetric_bidirectional", "released": "asymmetric_released", "default": "asymmetric"}
    for noise, kind in kinds.items():
        assert {cell.noise.kind for cell in grid.cells("fashion", Choices(noise=noise))} == {kind}
        assert grid.cells("fashion", Choices(noise=noise))[0].recipe().data.real.noise.class_map == {
            1: 3,
            2: 4,
            6: 0,
            0: 6,
            9: 7,
        }
    (cell, *_) = grid.cells("fashion", Choices(space="released_code", curves="test"))
    assert cell.folder == "fashion-released_code-test_curves"
    assert cell.recipe().threat.space == "released_code"
    assert cell.recipe().release.every_epochs == 1
    (usual, *_) = grid.cells("fashion")
    assert (usual.folder, usual.recipe().threat.space, usual.recipe().release.every_epochs) == (
        "fashion",
        "pixel",
        None,
    )


def test_the_seed_is_that_of_training_and_of_the_noise():
    """Cells of two seeds differ in both, and share the validation split."""
    cells = [cell for cell in GRID_OF["table1"].cells("fashion") if cell.method == "nrat"]
    one, other = (cell.recipe() for cell in cells if str(cell.noise) == "symmetric-0.4" and cell.seed in (0, 1))
    assert [(one.seed, one.data.real.noise.seed), (other.seed, other.data.real.noise.seed)] == [(0, 0), (1, 1)]
    assert one.data.validation == other.data.validation


def test_a_method_is_one_line(tmp_path):
    """In methods.yaml: recipe keys, lists included, and values of the edition's base recipe."""
    schedule = 'threat.schedule: [{until: 0.5, num_steps: 1, step: "${threat.eps}"}]'
    line = f"mine: {{title: Mine, objective.name: trades, objective.lam: 2, awp.gamma: 0.01, {schedule}}}"
    path = write_grid(
        tmp_path,
        shards=False,
        methods=line,
        tiny=GRID.replace("nrat, trades", "mine"),
        editions=EDITIONS.replace(", nrat: 2", ""),
    )
    (cell, *_) = read_grid(str(path)).cells("tiny")
    recipe = cell.recipe()
    assert (recipe.objective.name, recipe.objective.lam, recipe.awp.gamma) == ("trades", 2, 0.01)
    assert [(phase.until, phase.num_steps, phase.step) for phase in recipe.threat.schedule] == [(0.5, 1, 0.1)]


def test_methods_of_ones_own_stand_beside_the_packages(tmp_path):
    """A file with one line adds to methods.yaml, also on an edition of the package; its entries replace those of the package."""
    grid = "stages: [{methods: [nrat, mine], noises: [none-0]}]"
    (tmp_path / "mine.yaml").write_text(grid)
    (tmp_path / "methods.yaml").write_text("mine: {objective.name: trades}\n")
    found = read_grid(str(tmp_path / "mine.yaml"))
    assert {cell.method for cell in found.cells("fashion", seeds=1)} == {"nrat", "mine"}
    assert found.cells("fashion")[0].recipe().threat.eps == 0.1


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("threat={space: released_code}", "threat.space"),
        ("data.real.noise={kind: symmetric, rate: 0.9}", "data.real.noise.kind"),
    ],
)
def test_a_section_cannot_change_what_a_cell_is_named_by(word, key):
    """It is found in the recipe, and not only by the key that was written."""
    (cell, *_) = GRID_OF["table1"].cells("fashion", Choices(settings=(word,)))
    with pytest.raises(UserError, match=f"{key} is .* instead of"):
        cell.recipe()


# ---- wrong files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "before", "after", "words"),
    [
        ("tiny", "none-0", "none-0.4", "contradicts itself"),
        ("tiny", "symmetric-0.4", "symmetric-0", "contradicts itself"),
        ("tiny", "symmetric-0.4", "symetric-0.4", "symmetric"),
        ("tiny", "symmetric-0.4", "symmetric-1.4", "KIND-RATE"),
        ("tiny", "none-0,", "symmetric-0.40,", "twice"),
        ("tiny", "[nrat, trades]", "[nrat, nrat]", "twice"),
        ("tiny", "[nrat, trades]", "[nrta]", "Did you mean 'nrat'?"),
        ("tiny", "[nrat, trades]", "[]", "at least one"),
        ("tiny", "stages", "stage", "Did you mean 'stages'?"),
        ("tiny", "{table1: {}}", "{table1: {mart: mart}}", "mart"),
        ("tiny", "title: A tiny grid", "editions: {tiny: [huge]}", "huge"),
        ("tiny", "title: A tiny grid", "seeds: {nrat: 2}", "default"),
        ("tiny", "title: A tiny grid", "seeds: 0", "at least 1"),
        ("tiny", "title: A tiny grid", "title: [", "cannot be read as YAML"),
        ("tiny", "title: A tiny grid", "title: a\ntitle: b", "duplicate key"),
        ("tiny", "A tiny grid", "[a]", "text"),
        ("tiny", "A tiny grid", '"\\e[31m"', "control characters"),
        ("tiny", "title: A tiny grid", "omissions: a word", "list"),
        ("tiny", "title: A tiny grid", "editions: [tiny]", "mapping"),
        ("tiny", "[nrat, trades]", "[{nrat: 1}]", "there is no"),
        ("tiny", "{table1: {}}", "{table1: {}}\ndifferences: {narat: trades}", "Did you mean 'nrat'?"),
        ("tiny", "{table1: {}}", "{table1: {}}\ndifferences: {nrat: nrat}", "there is no 'nrat'"),
        ("tiny", "{table1: {}}", "{table1: {}}\ndifferences: [nrat]", "mapping"),
        ("tiny", "{table1: {}}", "[table1]", "mapping"),
        ("tiny", "{table1: {}}", "{table9: {}}", "Did you mean 'table"),
        ("tiny", "{table1: {}}", "{table1: {nrat: narat}}", "Did you mean 'nrat'?"),
        ("editions", "tiny:", '"../../tiny":', "the edition is"),
        ("editions", '"natural,pgd2"', "[natural, pgd2]", "text"),
        ("editions", '"natural,pgd2"', '"natural,pgdd2"', "Unknown attack"),
        ("editions", "images: 30", 'images: 30, last: "cw"', "Did you mean cw20?"),
        ("editions", "shards: TEST, ", "", "shards is missing"),
        ("editions", "base: base_tiny.yaml", "base: .", "no base recipe"),
        ("editions", "base_tiny.yaml", "base_other.yaml", "no base recipe"),
        ("editions", "images: 30", "images: 0", "at least 1"),
        ("editions", "nrat: 2", "nrta: 2", "nrta"),
        ("editions", "evaluation:", "evalution:", "Did you mean 'evaluation'?"),
    ],
)
def test_wrong_grids_are_refused(tmp_path, file, before, after, words):
    """The message names the file, and what is wrong in it."""
    text = {"tiny": GRID, "editions": EDITIONS}[file]
    assert before in text
    path = write_grid(tmp_path, shards=False, **{file: text.replace(before, after, 1)})
    with pytest.raises(UserError) as error:
        read_grid(str(path))
    assert words in str(error.value)
    assert f"{file}.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("- {set: {optim.lr: 1}}", "no source"),
        ("- {set: {optim.lr: 1}, source: us, methods: [other]}", "other"),
        ("- {set: {optim.lr: 1}, source: us, noises: [mild]}", "mild"),
        ("- {set: {optim.lr: 1}, source: us, noises: 3}", "noises is '3'"),
        ("- {set: {optim.lr: 1}, source: us, noises: [[symmetric]]}", "is no noise"),
        ("- {set: {threat.space: released_code}, source: us}", "sets threat.space, which is set by --space"),
        ("- {set: {seed: 3}, source: us}", "sets seed"),
        ("- 3", "must be a mapping"),
        (
            "- {set: {optim.lr: 1}, source: us}\n    - {set: {optim.lr: 2}, source: us, noises: [symmetric]}",
            "contradicts itself",
        ),
    ],
)
def test_wrong_exceptions_are_refused(tmp_path, overrides, words):
    """Without a source, for what is not there, or two that contradict each other for one cell."""
    path = write_grid(tmp_path, shards=False, editions=f"{EDITIONS}  overrides:\n    {overrides}\n")
    with pytest.raises(UserError, match=words):
        read_grid(str(path)).cells("tiny")


def test_unknown_names_are_refused(tmp_path):
    """A grid, an edition, choices, a number of seeds."""
    with pytest.raises(UserError, match="Did you mean 'table1'"):
        read_grid("tabel1")
    with pytest.raises(UserError, match="no grid file"):
        read_grid(str(tmp_path / "none.yaml"))
    grid = GRID_OF["table1"]
    for call in (
        lambda: grid.cells("fashon"),
        lambda: grid.cells("fashion", seeds=0),
        lambda: Choices(noise="txt"),
        lambda: Choices(space="l2"),
    ):
        with pytest.raises(UserError, match="--"):
            call()


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("trades_gkl", {"ikl_temperature": 1.0, "ikl_gamma": 0.2}),  # the constants of the parity tests
        ("trades_ikl", {"ikl_temperature": 4.0, "ikl_gamma": 0.0}),
        ("trades-nfl_rce", {"loss": "nfl_rce"}),
        ("nrat-inner-nce_rce", {"inner": "nce_rce"}),
    ],
)
def test_methods_are_what_their_titles_say(method: str, values: dict[str, object]) -> None:
    """A grid's line has the constants of the method that it names."""
    (cell,) = [
        one
        for one in read_grid("noise-benchmark").cells("fashion", seeds=1)
        if one.id == f"{method}/symmetric-0.4/seed-0"
    ]
    objective = cell.recipe().objective
    assert {name: getattr(objective, name) for name in values} == values


def test_a_grid_of_generated_images_is_for_editions_that_have_them() -> None:
    """Figure 5 on a small edition would be another experiment under its title."""
    with pytest.raises(UserError, match=r"figure5 is not for the edition fashion.*It is for paper"):
        read_grid("figure5").cells("fashion")


def recipe_of(grid: str, edition: str, method: str, noise: str) -> RecipeSpec:
    """The recipe of a cell of the package."""
    (cell,) = [one for one in read_grid(grid).cells(edition, seeds=1) if one.id == f"{method}/{noise}/seed-0"]
    return cell.recipe()


@pytest.mark.parametrize("edition", ["paper", "fashion", "mnist"])
def test_compared_methods_differ_in_one_thing(edition: str) -> None:
    """A third of the epochs is one, ADR's control averages as ADR does, NRAT's variants have NRAT's learning rate."""
    short, long = (
        recipe_of("frontier", edition, f"trades-pgd10{end}", "none-0").train.epochs for end in ("-third", "")
    )
    assert abs(3 * short - long) <= 2
    for method, control in (("adr", "pgd_at-ema"), ("trades_adr", "trades-ema")):
        one, other = (recipe_of("noise-benchmark", edition, name, "symmetric-0.4") for name in (method, control))
        assert one.ema == other.ema and one.ema.decay > 0
    rates = {
        recipe_of("frontier", edition, f"nrat{end}", "symmetric-0.4").optim.lr
        for end in ("", "-pgd10", "-n_fgsm", "-per_class", "-phases")
    }
    assert len(rates) == 1


@pytest.mark.parametrize("edition", ["fashion", "mnist"])
def test_noilin_has_enough_validations(edition: str) -> None:
    """Its rate grows after validations only: in a small edition after each epoch, as the authors' does."""
    recipe = recipe_of("noise-benchmark", edition, "noilin", "symmetric-0.4")
    validations = recipe.train.epochs // recipe.train.validate_every
    assert validations >= 4 * recipe.objective.refine.noilin_window
