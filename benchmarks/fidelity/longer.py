"""The same changes of the batch size with four times the examples after them: is a ratio a matter of time?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.cells import Cell, Store
from benchmarks.fidelity.analysis import CHANGE, Record, Row, groups, pick
from benchmarks.fidelity.best_base import live_at_best_base
from benchmarks.fidelity.live import live
from benchmarks.fidelity.markdown import table
from benchmarks.fidelity.regrets import CELL, DEFAULT, FIXED, shared, sweeps_of, switch_rows, truth_rows
from benchmarks.fidelity.run_tables import RULE_HEADERS, at_default, rule_columns, true_ratio
from benchmarks.fidelity.switch import BATCH_SIZES, SEEDS, sweep
from benchmarks.fidelity.training import CONTINUED_EXAMPLES
from benchmarks.fidelity.workloads import BASE_BATCH_SIZE

__all__ = ["cells", "longer_rows", "longer_table"]

LONG = {"examples": 4 * CONTINUED_EXAMPLES}
LARGER = tuple(size for size in BATCH_SIZES if size > BASE_BATCH_SIZE)
PHASES = ("late", "early")
PRIORITY = 4
RULES = (
    *FIXED,
    "McCandlish",
    *(f"{DEFAULT['objective']}, {how}" for how in ("predicted", "used", "live")),
)
KINDS = {
    f"{CONTINUED_EXAMPLES}": ("sweep", "live", "best_base"),
    f"{LONG['examples']}": ("long_sweep", "long_live", "long_best_base"),
}
"""By examples after the change: the kinds of cells."""


def cells(store: Store, workloads: Iterable[str], beta_2: float) -> list[Cell]:
    """Sweeps, and the default objective live on the base learning rate of the study and on the best one.

    Args:
        store: of the finished sweeps.
        workloads: their names.
        beta_2: Adam's.
    """
    found = []
    settings = LONG | {"batch_sizes": LARGER}
    at_best_base = partial(live_at_best_base, store, "long_sweep", settings)
    for phase, workload in ((phase, workload) for phase in PHASES for workload in workloads):
        point = {"workload": workload, "beta_2": beta_2, "phase": phase}
        for size in (BASE_BATCH_SIZE, *LARGER):
            cell = Cell("long_sweep", point | {"batch_size": size}, partial(sweep, **LONG), PRIORITY)
            found.append(cell)
        for seed in SEEDS:
            key: dict[str, Any] = point | {"seed": seed} | DEFAULT
            found.append(Cell("long_live", key, partial(live, **settings), PRIORITY))
            found.append(Cell("long_best_base", key, at_best_base, PRIORITY + 1))
    return found


def longer_table(records: Mapping[str, Sequence[Record]]) -> str:
    """The best ratios, and what rules lose, by examples after the change; on the changes that both have."""
    truths_of = {examples: truth_rows(sweeps_of(records[kinds[0]])) for examples, kinds in KINDS.items()}
    rows_of = {examples: at_default(_rows(records, examples)) for examples in KINDS}
    of_all = {examples: shared(rows, RULES, "tuned") for examples, rows in rows_of.items()}
    same = set.intersection(*({_cell(row) for row in rows} for rows in of_all.values()))
    lines = [
        [examples, rule, len(part), *rule_columns(part)]
        for examples, rows in of_all.items()
        for rule in RULES
        if (part := [row for row in pick(rows, rule=rule) if _cell(row) in same])
    ]
    best = [
        [*key, *(true_ratio(truth) for truth in part)]
        for key, part in groups([truth for truths in truths_of.values() for truth in truths], *CHANGE).items()
        if len(part) == len(KINDS)
    ]
    return "\n\n".join(
        [
            "R_true by the examples that are trained after the change, with its standard deviation over "
            "seeds as a factor. `*`: a lowest loss is at an end of a sweep, so that it is a bound.",
            table([*CHANGE[:-1], "B", *KINDS], best),
            "Rules on the same changes and seeds, in the columns of `rules.md`.",
            table(["examples", "rule", "n", *RULE_HEADERS], lines),
        ]
    )


def longer_rows(records: Mapping[str, Sequence[Record]]) -> list[Row]:
    """Of every rule at every change with more examples after it."""
    return _rows(records, f"{LONG['examples']}")


def _rows(records: Mapping[str, Sequence[Record]], examples: str) -> list[Row]:
    sweeps, lives, at_best_base = (records[kind] for kind in KINDS[examples])
    return switch_rows(sweeps_of(sweeps), lives, records["laws"], at_best_base)


def _cell(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in CELL)
