"""Which cells there are.

A ramp starts at the small batch size, with the learning rate that was tuned there for the same workload and
budget. So its cells are known once the runs at the small batch size are finished.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from benchmarks.batch_warmup.analysis import lines, runs, tuned
from benchmarks.batch_warmup.rules import (
    BASE_BATCH_SIZE,
    BUDGETS,
    DEFAULT,
    DEFAULT_OVERHEAD,
    LARGE_BATCH_SIZE,
    MORE_SEEDS,
    MULTIPLIERS,
    RULES,
    SEEDS,
    SEESAW,
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
    return [
        _constant(workload, budget, batch_size, factor, seed, 2 * BUDGETS.index(budget))
        for workload, budget in itertools.product(WORKLOADS, BUDGETS)
        for factor, seed in itertools.product(MULTIPLIERS[budget, batch_size], SEEDS)
    ]


def ramps(records: Sequence[Record]) -> tuple[list[Cell], list[str]]:
    """Growing batch sizes where the small batch size is tuned, and the names of what is not tuned yet."""
    cells, untuned, found = [], [], runs(records, "constant")
    for workload, budget in itertools.product(WORKLOADS, BUDGETS):
        best = tuned(found, workload, budget, BASE_BATCH_SIZE)
        if best is None or not best.complete:
            untuned.append(f"{workload} {budget}")
            continue
        for seed, rule in itertools.product(SEEDS, RULES):
            later = 2 * BUDGETS.index(budget) + (rule.max_overhead == DEFAULT_OVERHEAD)
            cells.append(_ramp(workload, budget, rule, best.multiplier, seed, later))
    return cells, untuned


def confirmations(constants: Sequence[Record], ramps: Sequence[Record]) -> list[Cell]:
    """More seeds for both sides of the contest of the long budget, until the interval is narrow enough."""
    cells: list[Cell] = []
    found, budget = (runs(constants, "constant"), runs(ramps, "ramp")), BUDGETS[-1]
    for workload in WORKLOADS:
        result = contest(lines(*found, workload, budget))
        best = tuned(found[0], workload, budget, BASE_BATCH_SIZE)
        if result is None or best is None:
            continue
        if result.difference.n > len(SEEDS) and result.difference.half_width < LOSS_BOUND:
            continue
        for seed in MORE_SEEDS:
            rival = result.constant
            cells.append(_constant(workload, budget, rival.batch_size, rival.multiplier, seed))
            cells.append(_ramp(workload, budget, result.best, best.multiplier, seed))
    return cells


def sizes() -> dict[str, int]:
    """Number of cells of each kind in the full grid."""
    constant_cells = sum(len(constants(size)) for size in (BASE_BATCH_SIZE, LARGE_BATCH_SIZE))
    return {"constant": constant_cells, "ramp": len(WORKLOADS) * len(BUDGETS) * len(RULES) * len(SEEDS)}


def quick() -> list[Cell]:
    """A few cells of each kind, on the least there is."""
    # The run is short: a cost that no real one would bear makes it measure at all.
    return [
        _constant("text", "quick", BASE_BATCH_SIZE, 1.0, 0),
        _ramp("digits", "quick", Rule("slow", "sqrt, approached", 0.0), 1.0, 0),
        _ramp("digits", "quick", Rule("fast", DEFAULT, 0.5), 1.0, 0),
        _ramp("digits", "quick", Rule(SEESAW, "sqrt", 0.0), 1.0, 0),
    ]


def _constant(
    workload: str, budget: str, batch_size: int, multiplier: float, seed: int, priority: int = 0
) -> Cell:
    key = {"workload": workload, "budget": budget, "batch_size": batch_size, "multiplier": multiplier}
    return Cell("constant", key | {"seed": seed}, constant, priority)


def _ramp(workload: str, budget: str, rule: Rule, multiplier: float, seed: int, priority: int = 0) -> Cell:
    key = {"workload": workload, "budget": budget, **rule._asdict(), "multiplier": multiplier}
    return Cell("ramp", key | {"seed": seed}, ramp, priority)
