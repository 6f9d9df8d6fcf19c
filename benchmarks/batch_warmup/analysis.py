"""From the records of finished cells to numbers: pure functions, which read and write nothing.

A run that has diverged has no loss in JSON; here it is infinite, so that it cannot get lost.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from benchmarks.batch_warmup.rules import (
    BASE_BATCH_SIZE,
    LARGE_BATCH_SIZE,
    MORE_SEEDS,
    MULTIPLIERS,
    RULES,
    SEEDS,
    Rule,
)
from benchmarks.fidelity.analysis import Mean, Record, deviation, groups, paired, pick, unique

__all__ = ["KEYS", "Line", "Tuned", "lines", "runs", "tuned"]

KEYS = {
    "constant": ("workload", "budget", "batch_size", "multiplier", "seed"),
    "ramp": ("workload", "budget", "ramp", "rule", "max_overhead", "multiplier", "seed"),
}
"""What tells the cells of a kind apart."""


class Tuned(NamedTuple):
    """The best learning rate of a constant batch size."""

    batch_size: int
    multiplier: float  # of the example's learning rate
    edge: bool  # none lower, or none higher, was tried: the best one may lie outside
    complete: bool  # every multiplier was tried with every seed
    losses: dict[float, float]  # mean final loss by multiplier, of those tried with every seed


class Line(NamedTuple):
    """One row of a table for one workload and budget; means are over seeds."""

    rule: Rule | Tuned
    runs: list[Record]  # one for each seed
    loss: float  # final
    spread: float  # its standard deviation
    steps: float
    step_share: float  # over those of the constant small batch
    time_share: float  # the same of processor time: wall time depends on what else runs
    difference: Mean  # of the loss to that of the constant small batch, paired by seed
    again: list[Record]  # runs with seeds that had no part in any choice

    @property
    def worst(self) -> float:
        """The loss of the worst seed."""
        return float(max(run["val_loss"] for run in self.runs))


def runs(records: Iterable[Record], kind: str) -> list[Record]:
    """The last record of every key, with an infinite loss where there is none."""
    found = unique(records, KEYS[kind])
    return [run | {"val_loss": math.inf if run["val_loss"] is None else run["val_loss"]} for run in found]


def tuned(constants: Sequence[Record], workload: str, budget: str, batch_size: int) -> Tuned | None:
    """The multiplier with the lowest mean loss over seeds, None if none was tried with every seed."""
    grid = MULTIPLIERS[budget, batch_size]
    here = pick(constants, workload=workload, budget=budget, batch_size=batch_size, seed=SEEDS)
    losses = {
        multiplier: statistics.fmean(run["val_loss"] for run in found)
        for (multiplier,), found in groups(here, "multiplier").items()
        if multiplier in grid and len(found) == len(SEEDS)
    }
    if not losses or min(losses.values()) == math.inf:
        return None
    best = min(losses, key=losses.__getitem__)
    return Tuned(batch_size, best, best in (min(losses), max(losses)), len(losses) == len(grid), losses)


def lines(constants: Sequence[Record], ramps: Sequence[Record], workload: str, budget: str) -> list[Line]:
    """Every row there are `runs` for, constant batch sizes first; ramps at the tuned learning rate only."""
    base = tuned(constants, workload, budget, BASE_BATCH_SIZE)
    if base is None:
        return []
    where = {"workload": workload, "budget": budget}
    found: list[tuple[Rule | Tuned, list[Record]]] = []
    for best in (base, tuned(constants, workload, budget, LARGE_BATCH_SIZE)):
        if best is not None:
            at = {"batch_size": best.batch_size, "multiplier": best.multiplier}
            found.append((best, pick(constants, **where, **at)))
    for rule in RULES:
        of_rule = pick(ramps, **where, **rule._asdict(), multiplier=base.multiplier)
        if pick(of_rule, seed=SEEDS):
            found.append((rule, of_rule))
    against = pick(found[0][1], seed=SEEDS)
    return [_line(rule, every, against) for rule, every in found]


def _line(rule: Rule | Tuned, every: list[Record], against: list[Record]) -> Line:
    found = pick(every, seed=SEEDS)

    def average(field: str, of: list[Record] = found) -> float:
        return statistics.fmean(run[field] for run in of)

    return Line(
        rule,
        found,
        average("val_loss"),
        deviation([run["val_loss"] for run in found]),
        average("steps"),
        average("steps") / average("steps", against),
        average("processor_seconds") / average("processor_seconds", against),
        paired(found, against, "val_loss", ("seed",)),
        pick(every, seed=MORE_SEEDS),
    )
