"""The targets, as rows of a summary. A missed one is a row like the others."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from benchmarks.batch_warmup.analysis import Line, Tuned, lines, pooled_deviation
from benchmarks.batch_warmup.rules import (
    BUDGETS,
    CANDIDATES,
    DEFAULT,
    LARGE_OVERHEAD,
    RAMPS,
    SEEDS,
    Rule,
    growth,
)
from benchmarks.batch_warmup.workloads import WORKLOADS
from benchmarks.fidelity.analysis import Mean, Record, paired
from benchmarks.results import target

__all__ = ["Contest", "contest", "targets"]

COMMAND = "make bench-batch-warmup"
LOSS_BOUND = 0.005  # nats
STEPS_BOUND = 0.5


class Contest(NamedTuple):
    """A growing batch size with the callback against the best constant one.

    Attributes:
        best: of the growing ones.
        constant: the best constant one.
        difference: of the losses, paired by seed; by seeds that had no part in choosing the two, if they are
            as many.
        seeds: number of pairs behind it.
        step_share: optimizer steps over those of the constant one.
    """

    best: Line
    constant: Line
    difference: Mean
    seeds: int
    step_share: float


def contest(found: Sequence[Line]) -> Contest | None:
    """The best candidate that needs at most half the steps; the best of all where none does.

    Args:
        found: lines of one workload and budget.

    Returns:
        None while seeds of a candidate or of a constant batch size are missing.
    """
    whole = [line for line in found if len(line.runs) == len(SEEDS)]
    constants = [line for line in whole if isinstance(line.rule, Tuned) and line.rule.complete]
    candidates = [line for line in whole if line.rule in CANDIDATES]
    if len(constants) < 2 or len(candidates) < len(CANDIDATES):
        return None
    constant = min(constants, key=lambda line: line.loss)
    thrifty = [line for line in candidates if line.steps <= STEPS_BOUND * constant.steps]
    best = min(thrifty or candidates, key=lambda line: line.loss)
    pairs = {run["seed"] for run in best.again} & {run["seed"] for run in constant.again}
    fresh = len(pairs) >= len(SEEDS)
    sides = (best.again, constant.again) if fresh else (best.runs, constant.runs)
    difference = paired(*sides, "val_loss", ("seed",))
    return Contest(
        best, constant, difference, len(pairs) if fresh else len(SEEDS), best.steps / constant.steps
    )


def targets(constants: Sequence[Record], ramps: Sequence[Record]) -> list[dict[str, Any]]:
    """Every target of which all is measured."""
    found = []
    for workload, budget in itertools.product(WORKLOADS, BUDGETS):
        here = lines(constants, ramps, workload, budget)
        found += [
            *_against_constant(here, f"{workload}, {budget}"),
            *_against_fixed(here, f"{workload}, {budget}"),
        ]
    return found


def _against_constant(here: Sequence[Line], where: str) -> Iterable[dict[str, Any]]:
    result = contest(here)
    if result is None:
        return
    assert isinstance(result.best.rule, Rule)
    assert isinstance(result.constant.rule, Tuned)
    who = f"{growth(result.best.rule.ramp)} with SurgeLR"
    constant = f"constant B = {result.constant.rule.batch_size} at its tuned lr"
    details = {"half_width": round(result.difference.half_width, 4), "seeds": result.seeds}
    name = f"{where}: final loss, {who} minus {constant}, nats"
    yield target(name, result.difference.value, LOSS_BOUND, COMMAND, **details)
    yield target(f"{where}: optimizer steps, {who} over {constant}", result.step_share, STEPS_BOUND, COMMAND)


def _against_fixed(here: Sequence[Line], where: str) -> Iterable[dict[str, Any]]:
    by_rule = {
        line.rule: line for line in here if isinstance(line.rule, Rule) and len(line.runs) == len(SEEDS)
    }
    for ramp in RAMPS:
        own = by_rule.get(Rule(ramp, DEFAULT, LARGE_OVERHEAD))
        fixed = [by_rule.get(Rule(ramp, rule, 0.0)) for rule in ("sqrt", "constant")]
        if own is None or None in fixed:
            continue
        best = min((line for line in fixed if line is not None), key=lambda line: line.loss)
        assert isinstance(best.rule, Rule)
        # Standard deviations of runs: that of a difference of means over the seeds is smaller.
        bound = pooled_deviation([own.spread, best.spread])
        # Both diverged: no better, no worse.
        difference = own.loss - best.loss if math.isfinite(own.loss) or math.isfinite(best.loss) else math.nan
        against = f"SurgeLR minus {best.rule.label} (bound: pooled sd of seeds)"
        name = f"{where}, {ramp} ramp: final loss, {against}, nats"
        yield target(name, difference, round(bound, 4), COMMAND)
