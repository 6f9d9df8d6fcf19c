"""From the records of finished cells to numbers: pure functions, which read and write nothing.

A record is one line of `results/<kind>.jsonl`. A run that has diverged has no loss in JSON; here it is
infinite, so that it cannot get lost.
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

__all__ = ["KEYS", "Line", "Tuned", "lines", "pooled_deviation", "runs", "tuned"]

KEYS = {
    "constant": ("workload", "budget", "batch_size", "multiplier", "seed"),
    "ramp": ("workload", "budget", "ramp", "rule", "max_overhead", "multiplier", "seed"),
}
"""What tells the cells of a kind apart."""


class Tuned(NamedTuple):
    """The best learning rate of a constant batch size.

    Attributes:
        batch_size: examples per step.
        multiplier: of the example's learning rate.
        edge: whether none lower, or none higher, was tried: the best one may lie outside.
        complete: whether every multiplier was tried with every seed.
        losses: mean final loss by multiplier, of those tried with every seed.
    """

    batch_size: int
    multiplier: float
    edge: bool
    complete: bool
    losses: dict[float, float]


class Line(NamedTuple):
    """One row of a table for one workload and budget.

    Attributes:
        rule: the ramp, or the constant batch size.
        runs: one for each seed.
        loss: final, mean over seeds.
        spread: its standard deviation over seeds.
        steps: optimizer steps, mean over seeds.
        step_share: the same over those of the constant small batch.
        time_share: processor time of training on one thread over its; wall time depends on what else runs.
        difference: of the loss to its, paired by seed.
        again: runs with seeds that had no part in any choice.
    """

    rule: Rule | Tuned
    runs: list[Record]
    loss: float
    spread: float
    steps: float
    step_share: float
    time_share: float
    difference: Mean
    again: list[Record]


def runs(records: Iterable[Record], kind: str) -> list[Record]:
    """The last record of every key, with an infinite loss where there is none."""
    found = unique(records, KEYS[kind])
    return [run | {"val_loss": math.inf if run["val_loss"] is None else run["val_loss"]} for run in found]


def tuned(constants: Sequence[Record], workload: str, budget: str, batch_size: int) -> Tuned | None:
    """The multiplier with the lowest mean loss over seeds, None if none was tried with every seed."""
    grid = MULTIPLIERS[budget, batch_size]
    found = groups(
        pick(constants, workload=workload, budget=budget, batch_size=batch_size, seed=SEEDS), "multiplier"
    )
    losses = {
        multiplier: statistics.fmean(run["val_loss"] for run in found[(multiplier,)])
        for multiplier in grid
        if len(found.get((multiplier,), ())) == len(SEEDS)
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
    against = _at(constants, workload, budget, base)
    sizes = (base, tuned(constants, workload, budget, LARGE_BATCH_SIZE))
    found = [
        _line(
            best,
            _at(constants, workload, budget, best),
            against,
            _at(constants, workload, budget, best, MORE_SEEDS),
        )
        for best in sizes
        if best is not None
    ]
    here = pick(ramps, workload=workload, budget=budget, multiplier=base.multiplier)
    for rule in RULES:
        of_rule = pick(here, **rule._asdict(), seed=SEEDS)
        if of_rule:
            again = pick(here, **rule._asdict(), seed=MORE_SEEDS)
            found.append(_line(rule, of_rule, against, again))
    return found


def _at(
    constants: Sequence[Record], workload: str, budget: str, best: Tuned, seeds: Sequence[int] = SEEDS
) -> list[Record]:
    where = {"workload": workload, "budget": budget, "batch_size": best.batch_size}
    return pick(constants, **where, multiplier=best.multiplier, seed=seeds)


def _line(rule: Rule | Tuned, found: list[Record], against: list[Record], again: list[Record]) -> Line:
    def share(field: str) -> float:
        return statistics.fmean(run[field] for run in found) / statistics.fmean(run[field] for run in against)

    losses = [run["val_loss"] for run in found]
    return Line(
        rule,
        found,
        statistics.fmean(losses),
        deviation(losses),
        statistics.fmean(run["steps"] for run in found),
        share("steps"),
        share("processor_seconds"),
        paired(found, against, "val_loss", ("seed",)),
        again,
    )


def pooled_deviation(spreads: Sequence[float]) -> float:
    """Root mean square of standard deviations over equally many seeds; 0 where none is known."""
    known = [spread * spread for spread in spreads if math.isfinite(spread)]
    return math.sqrt(statistics.fmean(known)) if known else 0.0
