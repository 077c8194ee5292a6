"""The table of a grid as values: ours beside the paper's numbers, and paired differences."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from nrat_scale.evaluate.attacks import attack_title
from nrat_scale.reproduce.contrasts import Estimate, contrast
from nrat_scale.reproduce.measured import CHECKPOINTS, Measured, Setting, Summary, strongest_attack, summarise
from nrat_scale.reproduce.paper import CIFAR10, Names, names_for, printed

NOT_RUN = "not run"
FAILED = "failed"
MEASURES = ("natural", "pgd20", "cw20", "aa")
_CAPTION = (
    "Test accuracy in %: mean over seeds ± its standard deviation over seeds (denominator S − 1), the 95 % Wilson interval of n "
    "test images at the mean (the choice of test images only, not the variation between trainings){}."
)
_DIFFERENCES_CAPTION = (
    "Accuracy minus that of {} in points, image by image on the same test images and averaged over the seeds that both have. The "
    "95 % interval covers the choice of test images and, from two seeds on, the variation between trainings (images and seeds as "
    "crossed random effects). A star marks intervals of several seeds without zero."
)

OTHER_EDITION = (
    "The paper's numbers are of other data or models (tables 1, 2, 3 and 5: CIFAR-10, ResNet-18, eps 8/255; table 4: eps 0.3), one run "
    "each, in its code's threat space: compare differences between methods, not levels."
)
PAPER_EDITION = "The paper's numbers are one run each, in its code's threat space, which is not that of pixels: --space released_code is comparable."


@dataclass(frozen=True)
class Plan:
    """What a grid's table shows, run or not."""

    name: str  # such as table1
    edition: str
    settings: tuple[Setting, ...]  # rows; the table has clean labels first, then each kind of noise
    seeds: int | Mapping[Setting, int] = 1  # asked for, of all rows or of each
    title: str = ""
    space: str = "pixel"  # threat space of the cells
    split: str = "held-out"  # images of the curves
    measures: tuple[str, ...] = MEASURES
    titles: Mapping[str, str] = field(default_factory=dict)  # of methods; the id without one
    sources: Mapping[str, str] = field(default_factory=dict)  # of methods: publications
    paper: Names = field(default_factory=lambda: CIFAR10)  # where printed numbers are looked up
    reference: str = "nrat"  # of the paired differences
    references: Mapping[str, str] = field(
        default_factory=dict
    )  # by method, instead; other methods have no difference then

    def method_title(self, method: str) -> str:
        """`NRAT` for `nrat`."""
        return self.titles.get(method, method)

    def reference_of(self, method: str) -> str | None:
        """The method that is subtracted from `method`; None if there is none."""
        found = self.references.get(method) if self.references else self.reference
        return None if found == method else found

    @property
    def differences_caption(self) -> str:
        """What the paired differences are."""
        named = "the method after the minus sign" if self.references else self.method_title(self.reference)
        return _DIFFERENCES_CAPTION.format(named)


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

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show: no cell was tried, and the paper prints no number."""
        return not self.cells and not self.failed and all(number is None for number in self.printed.values())

    @property
    def flagged(self) -> int:
        """How many seeds have a warning of the evaluation about this checkpoint."""
        return sum(bool(flags_of(cell, self.checkpoint)) for cell in self.cells)


@dataclass(frozen=True)
class Difference:
    """A method minus the reference, under one attack."""

    setting: Setting
    reference: str  # its id
    method: str  # titles: `TRADES`, or `TRADES, suspects dropped − TRADES` where references differ
    checkpoint: str
    measure: str
    estimate: Estimate | str  # why there is none

    @property
    def text(self) -> str:
        """`+1.3* [+0.2, +2.8]`, or why there is none."""
        found = self.estimate
        if isinstance(found, str):
            return found
        star = "*" if len(found.seeds) > 1 and (found.low > 0 or found.high < 0) else ""
        return found.text.replace(" [", f"{star} [", 1)


@dataclass(frozen=True)
class GridTable:
    """All that the table of a grid says."""

    plan: Plan
    rows: list[Row]  # all of the plan; tables that are read show `shown`
    differences: list[Difference]
    notes: list[str]  # failed cells, missing seeds, stamps
    stamps: list[str]

    @property
    def shown(self) -> list[Row]:
        """The rows with a number of ours or of the paper; the others are named by `not_run`."""
        return [row for row in self.rows if not row.empty]

    @property
    def not_run(self) -> str:
        """The methods without a row in `shown`, by noise, in a sentence; empty if there are none."""
        methods: dict[str, list[str]] = {}
        for row in self.rows:
            if row.empty and row.checkpoint == CHECKPOINTS[0]:
                methods.setdefault(row.setting.noise_text, []).append(row.method)
        texts = [
            f"{noise}: {', '.join(f'“{name}”' if ',' in name else name for name in names)}"
            for noise, names in methods.items()
        ]
        return f"Not run: {'; '.join(texts)}." if texts else ""

    @property
    def strongest(self) -> str:
        """The attack of the overview: AutoAttack, or the parts of it that were run."""
        return strongest_attack(cell for row in self.rows for cell in row.cells)

    @property
    def sources(self) -> list[str]:
        """`ADR: Wu, Wang and Chen, ICLR 2024`: the publications of the methods that were run."""
        methods = dict.fromkeys(row.setting.method for row in self.rows if row.cells)
        return list(
            dict.fromkeys(
                f"{self.plan.method_title(one)}: {self.plan.sources[one]}"
                for one in methods
                if one in self.plan.sources
            )
        )

    def overview(self) -> dict[str, dict[str, Row]]:
        """Id of a method -> noise -> the row of its best checkpoint, where the strongest attack was run or a cell failed.

        It is empty if all of them are of one method or of one noise: the table itself says it then.
        """
        found: dict[str, dict[str, Row]] = {}
        for row in self.rows:
            if row.checkpoint == CHECKPOINTS[0] and (row.numbers.get(self.strongest) or row.failed):
                found.setdefault(row.setting.method, {})[row.setting.noise_text] = row
        return found if len(found) > 1 and len(self.noises(found)) > 1 else {}

    def noises(self, overview: Mapping[str, Mapping[str, Row]]) -> list[str]:
        """The columns of an overview, in the order of the table."""
        found = {noise for rows in overview.values() for noise in rows}
        return [noise for noise in dict.fromkeys(row.setting.noise_text for row in self.rows) if noise in found]

    @property
    def overview_caption(self) -> str:
        """What the numbers of the overview are."""
        return (
            f"Test accuracy in % under {attack_title(self.strongest)} of the best checkpoint: mean over seeds ± its standard deviation, the "
            "95 % Wilson interval of n test images at the mean. “Flagged”: the notes warn of that many seeds."
        )

    @property
    def has_printed(self) -> bool:
        """Whether the paper prints any of these numbers."""
        return _has_printed(self.rows)

    @property
    def caption(self) -> str:
        """What the numbers of the rows are."""
        return _CAPTION.format(", the paper's printed number" if self.has_printed else "")


def _has_printed(rows: Iterable[Row]) -> bool:
    return any(number is not None for row in rows for number in row.printed.values())


def grid_table(plan: Plan, cells: Iterable[Measured]) -> GridTable:
    """The table of the cells of a plan; cells that are not in the plan are left out."""
    groups: dict[Setting, list[Measured]] = {setting: [] for setting in _ordered(plan.settings)}
    for cell in cells:
        if (
            cell.edition == plan.edition
            and cell.setting in groups
            and (cell.space, cell.split) == (plan.space, plan.split)
        ):
            groups[cell.setting].append(cell)
    rows = [_row(plan, setting, checkpoint, found) for setting, found in groups.items() for checkpoint in CHECKPOINTS]
    used = [cell for found in groups.values() for cell in found]
    compared = _has_printed(rows)
    notes = [PAPER_EDITION if plan.edition.startswith("paper") else OTHER_EDITION] if compared else []
    finished = {setting: [cell for cell in found if cell.finished] for setting, found in groups.items()}
    stamps = list(dict.fromkeys(stamp for cell in used for stamp in cell.stamps))
    return GridTable(plan, rows, _differences(plan, finished), [*stamps, *notes, *_notes(plan, groups)], stamps)


def _ordered(settings: Sequence[Setting]) -> list[Setting]:
    """By noise, clean labels first, then by method; kinds and methods in the order in which they were given."""
    methods = list(dict.fromkeys(setting.method for setting in settings))
    kinds = list(dict.fromkeys(["none", *(setting.noise for setting in settings)]))
    return sorted(set(settings), key=lambda one: (kinds.index(one.noise), one.rate, methods.index(one.method)))


def _row(plan: Plan, setting: Setting, checkpoint: str, cells: Sequence[Measured]) -> Row:
    finished = tuple(cell for cell in cells if cell.finished)
    names = names_for(plan.edition, plan.paper)
    paper = {measure: printed(setting, checkpoint, measure.partition(":")[0], names) for measure in plan.measures}
    numbers = {measure: summarise(finished, checkpoint, measure, paper[measure]) for measure in plan.measures}
    failed = tuple(cell for cell in cells if not cell.finished)
    return Row(setting, plan.method_title(setting.method), checkpoint, numbers, paper, finished, failed)


def _notes(plan: Plan, groups: Mapping[Setting, Sequence[Measured]]) -> list[str]:
    notes = []
    for setting, cells in groups.items():
        name = f"{plan.method_title(setting.method)}, {setting.noise_text}"
        notes += [f"{name}, seed {cell.seed} failed: {cell.error}" for cell in cells if not cell.finished]
        finished = sum(cell.finished for cell in cells)
        asked = plan.seeds if isinstance(plan.seeds, int) else plan.seeds.get(setting, 1)
        if cells and finished < asked:
            notes.append(f"{name}: {finished} of {asked} seeds are finished.")
        notes += [
            f"{name}, seed {cell.seed}, {checkpoint}: {flag}"
            for cell in cells
            for checkpoint in CHECKPOINTS
            for flag in flags_of(cell, checkpoint)
        ]
    for measure, names in (("aa", "test images, threats or AutoAttacks"), ("pgd20", "settings of PGD")):
        if len({cell.protocol(measure) for cells in groups.values() for cell in cells if cell.finished}) > 1:
            return [*notes, f"These cells were evaluated with different {names}: rows of unlike ones are not compared."]
    return notes


def flags_of(cell: Measured, checkpoint: str) -> list[str]:
    """What the evaluation warns of about a checkpoint."""
    return (cell.facts.get("flags") or {}).get(checkpoint) or []


def _differences(plan: Plan, groups: Mapping[Setting, Sequence[Measured]]) -> list[Difference]:
    found = []
    for setting in groups:
        name = plan.reference_of(setting.method)
        if name is None or (reference := replace(setting, method=name)) not in groups:
            continue
        title = plan.method_title(setting.method) + (f" − {plan.method_title(name)}" if plan.references else "")
        for checkpoint in CHECKPOINTS:
            for measure in plan.measures:
                terms = [(1.0, groups[setting], checkpoint, measure), (-1.0, groups[reference], checkpoint, measure)]
                found.append(Difference(setting, name, title, checkpoint, measure, estimate(terms)))
    return found


def paper_label(measure: str) -> str:
    """What precedes a printed number: the paper has AutoAttack beside ours under a part of it."""
    return "paper, AutoAttack" if measure.startswith("aa:") else "paper"


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
    used = [(table[seed], part[3]) for table, part in zip(tables, parts, strict=True) for seed in seeds]
    data, threats = (set(found) for found in zip(*(cell.protocol(measure)[:2] for cell, measure in used), strict=True))
    attacks = [{cell.protocol(measure)[2] for cell, measure in used if measure == one} for _, one in used]
    if len(data) > 1 or (not across_threats and (len(threats) > 1 or max(map(len, attacks)) > 1)):
        return "not comparable: evaluated on other images or by other attacks"
    rights = [
        [table[seed].outcomes[checkpoint, measure] for seed in seeds]
        for table, (_, _, checkpoint, measure) in zip(tables, parts, strict=True)
    ]
    if len({len(right) for group in rights for right in group}) > 1:
        return "not comparable: evaluated on different numbers of images"
    terms = [(part[0], np.stack(group)) for part, group in zip(parts, rights, strict=True)]
    return contrast(terms, seeds, constant)
