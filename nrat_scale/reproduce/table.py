"""The table of a grid as values: ours beside the paper's numbers, and paired differences."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from nrat_scale.reproduce.contrasts import Estimate, contrast
from nrat_scale.reproduce.measured import CHECKPOINTS, Measured, Setting, Summary, summarise
from nrat_scale.reproduce.paper import CIFAR10, Names, printed

NOT_RUN = "not run"
FAILED = "failed"
MEASURES = ("natural", "pgd20", "cw20", "aa")
CAPTION = (
    "Test accuracy in %: mean over seeds ± its standard deviation over seeds (denominator S − 1), the 95 % Wilson interval of n "
    "test images at the mean (the choice of test images only, not the variation between trainings), the paper's printed number."
)
DIFFERENCES_CAPTION = (
    "Accuracy minus that of {} in points, image by image on the same test images and averaged over the seeds that both have. The "
    "95 % interval covers the choice of test images and, from two seeds on, the variation between trainings (images and seeds as "
    "crossed random effects). A star marks intervals without zero."
)


@dataclass(frozen=True)
class Plan:
    """What a grid's table shows, run or not."""

    name: str  # such as table1
    edition: str
    settings: tuple[Setting, ...]  # rows, in order
    seeds: int = 1  # asked for, per row
    title: str = ""
    space: str = "pixel"  # threat space of the cells
    split: str = "held-out"  # images of the curves
    measures: tuple[str, ...] = MEASURES
    titles: Mapping[str, str] = field(default_factory=dict)  # of methods; the id without one
    paper: Names = field(default_factory=lambda: CIFAR10)  # where printed numbers are looked up
    reference: str = "nrat"  # of the paired differences

    def method_title(self, method: str) -> str:
        """`NRAT` for `nrat`."""
        return self.titles.get(method, method)


@dataclass(frozen=True)
class Row:
    """One row of the table: a setting and a checkpoint."""

    setting: Setting
    method: str  # its title
    checkpoint: str
    numbers: dict[str, Summary | None]  # by measure, None: not run
    printed: dict[str, float | None]
    cells: tuple[Measured, ...]  # finished, one per seed
    failed: tuple[Measured, ...]

    @property
    def missing(self) -> str:
        """What is printed where a number is missing."""
        return FAILED if self.failed and not self.cells else NOT_RUN


@dataclass(frozen=True)
class Difference:
    """A method minus the reference, under one attack."""

    setting: Setting
    method: str
    checkpoint: str
    measure: str
    estimate: Estimate | str  # why there is none

    @property
    def text(self) -> str:
        """`+1.3* [+0.2, +2.8]`, or why there is none."""
        found = self.estimate
        if isinstance(found, str):
            return found
        star = "*" if found.low > 0 or found.high < 0 else ""
        return found.text.replace(" [", f"{star} [", 1)


@dataclass(frozen=True)
class GridTable:
    """All that the table of a grid says."""

    plan: Plan
    rows: list[Row]
    differences: list[Difference]
    notes: list[str]  # failed cells, missing seeds, stamps
    stamps: list[str]


def grid_table(plan: Plan, cells: Iterable[Measured]) -> GridTable:
    """The table of the cells of a plan; cells that are not in the plan are left out."""
    groups: dict[Setting, list[Measured]] = {setting: [] for setting in plan.settings}
    for cell in cells:
        if (
            cell.edition == plan.edition
            and cell.setting in groups
            and (cell.space, cell.split) == (plan.space, plan.split)
        ):
            groups[cell.setting].append(cell)
    rows = [_row(plan, setting, checkpoint, found) for setting, found in groups.items() for checkpoint in CHECKPOINTS]
    used = [cell for found in groups.values() for cell in found]
    finished = {setting: [cell for cell in found if cell.finished] for setting, found in groups.items()}
    stamps = list(dict.fromkeys(stamp for cell in used for stamp in cell.stamps))
    return GridTable(plan, rows, _differences(plan, finished), [*stamps, *_notes(plan, groups)], stamps)


def _row(plan: Plan, setting: Setting, checkpoint: str, cells: Sequence[Measured]) -> Row:
    finished = tuple(cell for cell in cells if cell.finished)
    paper = {measure: printed(setting, checkpoint, measure, plan.paper) for measure in plan.measures}
    numbers = {measure: summarise(finished, checkpoint, measure, paper[measure]) for measure in plan.measures}
    failed = tuple(cell for cell in cells if not cell.finished)
    return Row(setting, plan.method_title(setting.method), checkpoint, numbers, paper, finished, failed)


def _notes(plan: Plan, groups: Mapping[Setting, Sequence[Measured]]) -> list[str]:
    notes = []
    for setting, cells in groups.items():
        name = f"{plan.method_title(setting.method)}, {setting.noise_text}"
        notes += [f"{name}, seed {cell.seed} failed: {cell.error}" for cell in cells if not cell.finished]
        finished = sum(cell.finished for cell in cells)
        if cells and finished < plan.seeds:
            notes.append(f"{name}: {finished} of {plan.seeds} seeds are finished.")
        notes += [
            f"{name}, seed {cell.seed}, {checkpoint}: {flag}"
            for cell in cells
            for checkpoint in CHECKPOINTS
            for flag in (cell.facts.get("flags") or {}).get(checkpoint) or []
        ]
    protocols = {cell.protocol for cells in groups.values() for cell in cells if cell.finished}
    if len(protocols) > 1:
        notes.append(
            "These cells were evaluated on different images or by different attacks: rows of unlike ones cannot be compared."
        )
    return notes


def _differences(plan: Plan, groups: Mapping[Setting, Sequence[Measured]]) -> list[Difference]:
    references = {(setting.noise, setting.rate): setting for setting in groups if setting.method == plan.reference}
    found = []
    for setting in groups:
        reference = references.get((setting.noise, setting.rate))
        if reference is None or reference == setting:
            continue
        for checkpoint in CHECKPOINTS:
            for measure in plan.measures:
                terms = [(1.0, groups[setting], checkpoint, measure), (-1.0, groups[reference], checkpoint, measure)]
                title = plan.method_title(setting.method)
                found.append(Difference(setting, title, checkpoint, measure, estimate(terms)))
    return found


Part = tuple[float, Sequence[Measured], str, str]  # coefficient, cells of one setting, checkpoint, attack


def estimate(parts: Sequence[Part], constant: float = 0.0, *, across_threats: bool = False) -> Estimate | str:
    """`contrast` over the seeds that all parts have; a reason in words if there is none.

    Args:
        parts: what is added.
        constant: added to the result, in points.
        across_threats: compare cells that were evaluated in different threat spaces, on the same images.
    """
    tables = [
        {cell.seed: cell for cell in cells if (checkpoint, measure) in cell.outcomes}
        for _, cells, checkpoint, measure in parts
    ]
    if not all(tables):
        return NOT_RUN
    seeds = sorted(set.intersection(*map(set, tables)))
    if not seeds:
        return "no common seed"
    used = [table[seed] for table in tables for seed in seeds]
    if len({cell.protocol[0] if across_threats else cell.protocol for cell in used}) > 1:
        return "not comparable: evaluated on other images or by other attacks"
    rights = [
        [table[seed].outcomes[checkpoint, measure] for seed in seeds]
        for table, (_, _, checkpoint, measure) in zip(tables, parts, strict=True)
    ]
    if len({len(right) for group in rights for right in group}) > 1:
        return "not comparable: evaluated on different numbers of images"
    terms = [(part[0], np.stack(group)) for part, group in zip(parts, rights, strict=True)]
    return contrast(terms, seeds, constant)
