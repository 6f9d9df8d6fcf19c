"""The targets, as rows of a summary. A missed one is a row like the others."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from benchmarks.batch_warmup.analysis import Line, Tuned, lines
from benchmarks.batch_warmup.rules import (
    APPROACHED,
    BASE_BATCH_SIZE,
    BUDGETS,
    CANDIDATES,
    DEFAULT,
    LARGE_OVERHEAD,
    RAMPS,
    SEEDS,
    SEESAW,
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
SEESAW_STEPS_BOUND = 0.7


class Contest(NamedTuple):
    """The best growing batch size with the callback against the best constant one."""

    best: Rule
    constant: Tuned
    difference: Mean  # of losses by seed; of seeds without part in the choice if there are enough
    step_share: float  # optimizer steps over those of the constant one


def contest(found: Sequence[Line]) -> Contest | None:
    """The best candidate that needs at most half the steps; the best of all where none does.

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
    assert isinstance(best.rule, Rule)
    assert isinstance(constant.rule, Tuned)
    difference = paired(best.again, constant.again, "val_loss", ("seed",))
    if difference.n < len(SEEDS):
        difference = paired(best.runs, constant.runs, "val_loss", ("seed",))
    return Contest(best.rule, constant.rule, difference, best.steps / constant.steps)


def targets(constants: Sequence[Record], ramps: Sequence[Record]) -> list[dict[str, Any]]:
    """Every target of which all is measured."""
    found: list[dict[str, Any]] = []
    for workload, budget in itertools.product(WORKLOADS, BUDGETS):
        here, where = lines(constants, ramps, workload, budget), f"{workload}, {budget}"
        if (result := contest(here)) is not None:
            who = f"{growth(result.best.ramp)} with SurgeLR"
            constant = f"constant B = {result.constant.batch_size} at its tuned lr"
            details = {"half_width": round(result.difference.half_width, 4), "seeds": result.difference.n}
            name = f"{where}: final loss, {who} minus {constant}, nats"
            found.append(target(name, result.difference.value, LOSS_BOUND, COMMAND, **details))
            name = f"{where}: optimizer steps, {who} over {constant}"
            found.append(target(name, result.step_share, STEPS_BOUND, COMMAND))
        found += _against_fixed(here, where)
        if budget == BUDGETS[-1]:
            found += _seesaw(here, where)
    return found


def _seesaw(here: Sequence[Line], where: str) -> Iterable[dict[str, Any]]:
    """The decay traded for batch size, against the tuned constant small batch."""
    for line in here:
        if line.rule == Rule(SEESAW, "sqrt", 0.0) and len(line.runs) == len(SEEDS):
            who = f"Seesaw with {line.rule.label}"
            against = f"constant B = {BASE_BATCH_SIZE} at its tuned lr"
            details = {"half_width": round(line.difference.half_width, 4), "seeds": line.difference.n}
            name = f"{where}: final loss, {who} minus {against}, nats"
            yield target(name, line.difference.value, LOSS_BOUND, COMMAND, **details)
            name = f"{where}: optimizer steps, {who} over {against}"
            yield target(name, line.step_share, SEESAW_STEPS_BOUND, COMMAND)


def _against_fixed(here: Sequence[Line], where: str) -> Iterable[dict[str, Any]]:
    """The callback against the better of sqrt scaling and no change, and against sqrt scaling approached."""
    whole = [line for line in here if len(line.runs) == len(SEEDS)]
    by_rule = {line.rule: line for line in whole if isinstance(line.rule, Rule)}
    for ramp, rules in itertools.product(RAMPS, (("sqrt", "constant"), (f"sqrt{APPROACHED}",))):
        own = by_rule.get(Rule(ramp, DEFAULT, LARGE_OVERHEAD))
        fixed = [line for rule in rules if (line := by_rule.get(Rule(ramp, rule, 0.0)))]
        if own is None or len(fixed) < len(rules):
            continue
        best = min(fixed, key=lambda line: line.loss)
        assert isinstance(best.rule, Rule)
        # Standard deviations of runs: that of a difference of means over the seeds is smaller.
        known = [line.spread**2 for line in (own, best) if math.isfinite(line.spread)]
        bound = math.sqrt(statistics.fmean(known)) if known else 0.0
        # Both diverged: no better, no worse.
        difference = own.loss - best.loss if math.isfinite(own.loss) or math.isfinite(best.loss) else math.nan
        against = f"SurgeLR minus {best.rule.label} (bound: pooled sd of seeds)"
        name = f"{where}, {ramp} ramp: final loss, {against}, nats"
        yield target(name, difference, round(bound, 4), COMMAND)
