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
from benchmarks.fidelity.regrets import CELL, DEFAULT, FIXED, shared, sweeps_after, truth_rows
from benchmarks.fidelity.rules import RULE_HEADERS, at_default, rule_columns, true_ratio
from benchmarks.fidelity.switch import BATCH_SIZES, SEEDS, sweep
from benchmarks.fidelity.training import CONTINUED_EXAMPLES
from benchmarks.fidelity.workloads import BASE_BATCH_SIZE

__all__ = ["LONG", "cells", "longer_table"]

LONG = 4 * CONTINUED_EXAMPLES
"""Examples after the change."""
LARGER = tuple(size for size in BATCH_SIZES if size > BASE_BATCH_SIZE)
PHASES = ("late", "early")
PRIORITY = 4
RULES = (
    *FIXED,
    "McCandlish",
    *(f"{DEFAULT['objective']}, {how}" for how in ("predicted", "used", "live")),
)
ROWS = {CONTINUED_EXAMPLES: "rules", LONG: "longer"}
"""By examples after the change: where the rows of rules are."""


def cells(store: Store, workloads: Iterable[str], beta_2: float) -> list[Cell]:
    """Sweeps, and the default objective live on the base learning rate of the study and on the best one."""
    found = []
    at_best_base = partial(live_at_best_base, store, {"batch_sizes": LARGER})
    for phase, workload in ((phase, workload) for phase in PHASES for workload in workloads):
        point = {"workload": workload, "beta_2": beta_2, "phase": phase, "examples": LONG}
        for size in (BASE_BATCH_SIZE, *LARGER):
            found.append(Cell("sweep", point | {"batch_size": size}, sweep, PRIORITY))
        for seed in SEEDS:
            key: dict[str, Any] = point | {"seed": seed} | DEFAULT
            found.append(Cell("live", key, partial(live, batch_sizes=LARGER), PRIORITY))
            found.append(Cell("best_base", key, at_best_base, PRIORITY + 1))
    return found


def longer_table(records: Mapping[str, Sequence[Record]]) -> str:
    """The best ratios, and what rules lose, by examples after the change; on the changes that both have."""
    of_all = {after: shared(at_default(records[name]), RULES, "tuned") for after, name in ROWS.items()}
    same = set.intersection(*({_cell(row) for row in rows} for rows in of_all.values()))
    lines = [
        [after, rule, len(part), *rule_columns(part)]
        for after, rows in of_all.items()
        for rule in RULES
        if (part := [row for row in pick(rows, rule=rule) if _cell(row) in same])
    ]
    truths = [truth for after in ROWS for truth in truth_rows(sweeps_after(records, after))]
    best = [
        [*key, *(true_ratio(truth) for truth in part)]
        for key, part in groups(truths, *CHANGE).items()
        if len(part) == len(ROWS)
    ]
    return "\n\n".join(
        [
            "R_true by the examples that are trained after the change, with its standard deviation over "
            "seeds as a factor. `*`: a lowest loss is at an end of a sweep, so that it is a bound.",
            table([*CHANGE[:-1], "B", *ROWS], best),
            "Rules on the same changes and seeds, in the columns of `rules`.",
            table(["examples", "rule", "n", *RULE_HEADERS], lines),
        ]
    )


def _cell(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in CELL)
