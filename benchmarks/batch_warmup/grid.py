"""Which cells there are.

A ramp starts at the small batch size, with the learning rate that was tuned there for the same workload and
budget. So its cells are known once the runs at the small batch size are finished.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from benchmarks.batch_warmup.analysis import Tuned, lines, runs, tuned
from benchmarks.batch_warmup.rules import (
    BASE_BATCH_SIZE,
    BUDGETS,
    DEFAULT,
    DEFAULT_OVERHEAD,
    FOLLOW,
    LARGE_BATCH_SIZE,
    MORE_SEEDS,
    MULTIPLIERS,
    RULES,
    SEEDS,
    Rule,
)
from benchmarks.batch_warmup.targets import LOSS_BOUND, contest
from benchmarks.batch_warmup.training import constant, ramp
from benchmarks.batch_warmup.workloads import WORKLOADS
from benchmarks.cells import Cell
from benchmarks.fidelity.analysis import Record

__all__ = ["confirmations", "constants", "quick", "ramps", "sizes"]


def constants(batch_size: int) -> list[Cell]:
    """Tuning of a constant batch size, the short budget first."""
    keys = [
        {"workload": workload, "budget": budget, "batch_size": batch_size, "multiplier": factor, "seed": seed}
        for workload, budget in itertools.product(WORKLOADS, BUDGETS)
        for factor, seed in itertools.product(MULTIPLIERS[budget, batch_size], SEEDS)
    ]
    return [Cell("constant", key, constant, priority=2 * BUDGETS.index(key["budget"])) for key in keys]


def ramps(records: Sequence[Record]) -> tuple[list[Cell], list[str]]:
    """Growing batch sizes where the small batch size is tuned, and the names of what is not tuned yet."""
    cells, untuned, found = [], [], runs(records, "constant")
    for workload, budget in itertools.product(WORKLOADS, BUDGETS):
        best = tuned(found, workload, budget, BASE_BATCH_SIZE)
        if best is None or not best.complete:
            untuned.append(f"{workload} {budget}")
            continue
        for seed, rule in itertools.product(SEEDS, RULES):
            key = {"workload": workload, "budget": budget, **rule._asdict()}
            later = 2 * BUDGETS.index(budget) + (rule.max_overhead == DEFAULT_OVERHEAD)
            cells.append(Cell("ramp", key | {"multiplier": best.multiplier, "seed": seed}, ramp, later))
    return cells, untuned


def confirmations(constants: Sequence[Record], ramps: Sequence[Record]) -> list[Cell]:
    """More seeds for both sides of the contest of the long budget, until the interval is narrow enough."""
    cells = []
    found, budget = (runs(constants, "constant"), runs(ramps, "ramp")), BUDGETS[-1]
    for workload in WORKLOADS:
        result = contest(lines(*found, workload, budget))
        if result is None or (result.seeds > len(SEEDS) and result.difference.half_width < LOSS_BOUND):
            continue
        best, base = tuned(found[0], workload, budget, BASE_BATCH_SIZE), result.constant.rule
        assert best is not None
        assert isinstance(base, Tuned)
        assert isinstance(result.best.rule, Rule)
        where = {"workload": workload, "budget": budget}
        for seed in MORE_SEEDS:
            key = {"batch_size": base.batch_size, "multiplier": base.multiplier, "seed": seed}
            cells.append(Cell("constant", where | key, constant))
            key = {**result.best.rule._asdict(), "multiplier": best.multiplier, "seed": seed}
            cells.append(Cell("ramp", where | key, ramp))
    return cells


def sizes() -> dict[str, int]:
    """Number of cells of each kind in the full grid."""
    constant_cells = sum(len(constants(size)) for size in (BASE_BATCH_SIZE, LARGE_BATCH_SIZE))
    ramp_cells = len(WORKLOADS) * len(BUDGETS) * len(RULES) * len(SEEDS)
    return {"constant": constant_cells, "ramp": ramp_cells}


def quick() -> list[Cell]:
    """A few cells of each kind, on the least there is."""
    cells = []
    for workload, size in (("text", BASE_BATCH_SIZE), ("digits", LARGE_BATCH_SIZE)):
        key = {"workload": workload, "budget": "quick", "batch_size": size, "multiplier": 1.0, "seed": 0}
        cells.append(Cell("constant", key, constant))
    # The run is short: a cost that no real one would bear makes it measure at all.
    for workload, rule in (
        ("digits", Rule("fast", "constant", 0.0)),
        ("digits", Rule("slow", "sqrt", 0.0)),
        ("text", Rule("fast", DEFAULT, 0.5)),
        ("digits", Rule(FOLLOW, DEFAULT, 0.5)),
    ):
        key = {"workload": workload, "budget": "quick", **rule._asdict(), "multiplier": 1.0, "seed": 0}
        cells.append(Cell("ramp", key, ramp))
    return cells
