"""What a run's logs say about the next batch size and learning rate, and how far to believe it.

The law in force at one step gives the critical batch size of the *next step*: where it gains half of what an
unlimited batch would. A run whose steps all have that critical batch size takes `S(B) = S_min (1 + B_crit /
B)` steps and `E(B) = E_min (1 + B / B_crit)` examples to a given loss; of a run in which it moves, these say
what a change of the batch size costs and saves at this point.

References:
    Li et al. 2024, arXiv:2405.14578, Theorem 5, Eq. 18-20; McCandlish et al. 2018, arXiv:1812.06162.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import numpy as np

from lightning_surge.checking.arguments import optional, whole
from lightning_surge.laws.base import Law, SGDLaw, checked
from lightning_surge.laws.objectives import OBJECTIVES, RETIRED
from lightning_surge.laws.theorems import Theorem3Law
from lightning_surge.laws.tradeoff import steps_needed
from lightning_surge.policy.policy import MAX_DRIFT
from lightning_surge.policy.reasons import Reason
from lightning_surge.runs.run_log import RunLog, RunLogError, wanted_factor

# Largest factor of a suggested move: the law was measured on the way that training took, and moves on.
LARGEST_MOVE = 4.0
# Thresholds of the caveats: measurements; relative standard error; factor beyond the measured sizes; share of
# the largest scheduled learning rate; share of the run since the last measurement.
FEW_MEASUREMENTS, LARGE_ERROR, FAR_BEYOND, DECAYED, STALE = 5, 0.5, 2.0, 0.1, 0.25
# What is known to within a factor of 100 at best is not known; of its logarithm.
UNKNOWN = math.log(100.0)
# What is divided by.
POSITIVE = (
    "batch_size",
    "base_batch_size",
    "lr_scale_predicted",
    "law/smallest_measured",
    "law/largest_measured",
)


class Caveat(Enum):
    """When an advice must not be trusted, or only so far: the words for it, with places for its numbers."""

    HELD = "the last law is {state.reason.text}; it may no longer fit"
    FEW_MEASUREMENTS = "it rests on {state.num_measurements} measurements only"
    UNCERTAIN = "the critical batch size is known to within a factor of two at best"
    STALE = "the last measurement is from step {state.measured_step:,}; the law moves on"
    EXTRAPOLATING = "only sizes from {smallest} to {largest} examples were measured"
    DECAYED = (
        "the schedule is at {share:.1%} of its largest learning rate: for the next run ask at an earlier "
        "step (--step)"
    )
    LIMITED_MOVE = "the critical size is further away than one should go at once: ask again there"
    GRADIENT_STEPS = "the law of plain gradient steps (SGD) has no peak and knows no momentum"
    INDEPENDENT_NOISE = "Theorem 3 takes noise as independent across coordinates; it seldom is"
    APPROACH = (
        "approach {lr:.3g} from {state.lr_used:.3g} by a few percent a step, as the callback does: curvature "
        "has to adapt"
    )


class Interval(NamedTuple):
    """A value with one standard error on both sides; `high` is infinite where the error is not known."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class RunState:
    """A run at one logged step; batch sizes in examples, errors are standard errors, infinite if unknown."""

    step: int
    batch_size: float  # in force
    base_batch_size: float  # at which the scheduled learning rate was tuned
    lr_scheduled: float
    lr_scheduled_max: float  # the largest one up to here
    lr_used: float  # which the update read
    lr_scale: float  # factor on the scheduled learning rate that the objective asks for
    objective: str  # key of `OBJECTIVES`
    law: Law  # in force
    critical_error: float  # of the law's critical batch size
    peak_error: float  # of its peak batch size
    scale_errors: tuple[tuple[float, float], ...]  # batch sizes, and the relative error of the factor there
    measured: tuple[float, float]  # smallest and largest batch size measured
    num_measurements: int  # behind the law
    measured_step: int  # of the last measurement
    reason: Reason  # what decided the factor


@dataclass(frozen=True)
class Option:
    """What one batch size would mean from here on."""

    batch_size: float  # examples per step
    lr_scale: Interval  # factor on the scheduled learning rate
    lr: Interval  # learning rate at this point of the schedule
    steps: Interval  # to the same loss, over those at the batch size in force
    examples: Interval  # to the same loss, over those at the batch size in force
    beyond: float  # factor by which the batch size is outside those measured; 1 inside


@dataclass(frozen=True)
class Advice:
    """An answer for one step of a run; batch sizes in examples."""

    state: RunState
    critical_batch_size: Interval  # of the next step
    peak_batch_size: Interval  # where the law's learning rate is largest; infinite if it never falls
    suggested: float  # batch size to go on with
    options: tuple[Option, ...]  # those in force, suggested, twice that in force, and asked for; increasing
    caveats: tuple[Caveat, ...]  # why not to trust it


def run_state(run: RunLog, *, step: int | None = None, group: str | None = None) -> RunState:
    """A run at one step.

    Args:
        run: what it logged.
        step: optimizer step within the run; the last logged one up to it is taken. None takes the last.
        group: the parameter group whose learning rate counts, where there are several.

    Raises:
        RunLogError: if the step is outside the run, or no law was known by then.
    """
    step = optional(whole, "step", step, "count optimizer steps", least=0)
    run = run.of_group(group)
    logged = run.require("batch_size").steps
    if step is not None and not logged[0] <= step <= logged[-1]:
        raise RunLogError(
            f"Expected {logged[0]} <= step <= {logged[-1]}, got step={step}: the run's log begins and ends "
            "there. Pass one of these, or leave it out for the last."
        )
    at = int(logged[-1] if step is None else logged[np.searchsorted(logged, step, side="right") - 1])
    law = run.law_at(at)
    if law is None:
        measured = run.at("num_measurements", at)
        if run.at("held_because", at) == Reason.RULE:
            raise RunLogError("Expected a law that was measured, got a rule: train with law='measured'.")
        few = f"{measured:g} measurements, which do not determine it"
        later = run.law_steps[run.law_steps > at]
        raise RunLogError(
            f"Expected a law to be known by step {at}, got "
            f"{'no measurement' if math.isnan(measured) else few}: "
            f"{f'pass a step from {later[0]} on' if later.size else 'train longer, or raise max_overhead'}."
        )

    def value(name: str, group: str | None = None) -> float:
        if math.isnan(number := run.at(name, at, group)):
            run.require(name, group)
            raise RunLogError(f"Expected {name} to be logged at step {at}, got none: pass another step.")
        if math.isinf(number) or (number <= 0.0 and name in POSITIVE):
            rule = f"{name} to be finite{' and positive' * (name in POSITIVE)}"
            raise RunLogError(f"Expected {rule} at step {at}, got {number:g}: pass another step.")
        return number

    def error(name: str) -> float:
        # Logged only while it is finite.
        return math.inf if math.isnan(number := run.at(f"{name}_standard_error", at)) else number

    def one_of(kind: str, known: dict[int, Any]) -> Any:
        if (code := int(value(kind))) not in known:
            if kind == "objective" and code in RETIRED:
                raise RunLogError(
                    f"Expected one of {', '.join(known.values())}, got objective={RETIRED[code]!r}, which is "
                    "retired: train with objective='progress'."
                )
            raise RunLogError(f"Expected {kind} to be one of {list(known)}, got {code}: use a newer version.")
        return known[code]

    size, scale = value("batch_size"), value("lr_scale_predicted")
    scheduled, counts = run.require("lr_scheduled", group), run.get("num_measurements")
    errors = {
        size: error("lr_scale") / scale,
        2.0 * size: error("lr_scale_doubled") / (run.at("lr_scale_doubled", at) or math.nan),
    }
    return RunState(
        step=at,
        batch_size=size,
        base_batch_size=value("base_batch_size"),
        lr_scheduled=value("lr_scheduled", group),
        lr_scheduled_max=float(np.max(scheduled.values[scheduled.steps <= at])),
        lr_used=value("lr_used", group),
        lr_scale=scale,
        objective=one_of("objective", dict(enumerate(OBJECTIVES))),
        law=law,
        critical_error=error("critical_batch_size"),
        peak_error=error("peak_batch_size"),
        scale_errors=tuple((size, one) for size, one in errors.items() if math.isfinite(one)),
        measured=(value("law/smallest_measured"), value("law/largest_measured")),
        num_measurements=int(value("num_measurements")),
        measured_step=int(counts.changes[counts.changes <= at][-1]),
        reason=one_of("held_because", {int(reason): reason for reason in Reason}),
    )


def advise(state: RunState, batch_sizes: Sequence[float] = ()) -> Advice:
    """Which batch size and learning rate to go on with.

    The suggestion is the power-of-two multiple of the batch size in force that is nearest to the critical
    one, where steps and examples are both twice the fewest: a larger one mostly costs examples, a smaller one
    mostly costs steps.

    Args:
        state: the run at one step.
        batch_sizes: further sizes to judge, examples, positive.

    Raises:
        ValueError: if a batch size is not positive and finite.
    """
    size, law = state.batch_size, state.law
    critical = _interval(law.critical_batch_size, state.critical_error)
    wanted = critical.value
    if 0.0 < wanted < math.inf:
        wanted = size * 2.0 ** round(math.log2(wanted / size))
    allowed = min(max(wanted, size / LARGEST_MOVE), size * LARGEST_MOVE)
    suggested = max(1.0, float(round(allowed)))
    sizes = {size, 2.0 * size, suggested, *map(checked, batch_sizes)}
    options = tuple(_option(state, one, critical) for one in sorted(sizes))
    found = {
        Caveat.HELD: state.reason.held,
        Caveat.FEW_MEASUREMENTS: state.num_measurements < FEW_MEASUREMENTS,
        Caveat.UNCERTAIN: not critical.high - critical.value < LARGE_ERROR * critical.value,
        Caveat.STALE: state.step - state.measured_step > STALE * state.step,
        Caveat.EXTRAPOLATING: any(option.beyond > FAR_BEYOND for option in options),
        Caveat.DECAYED: state.lr_scheduled < DECAYED * state.lr_scheduled_max,
        Caveat.LIMITED_MOVE: wanted != allowed,
        Caveat.GRADIENT_STEPS: isinstance(law, SGDLaw),
        Caveat.INDEPENDENT_NOISE: isinstance(law, Theorem3Law),
        Caveat.APPROACH: any(
            one.lr.value > state.lr_used * (1.0 + MAX_DRIFT) for one in options if one.batch_size == suggested
        ),
    }
    caveats = tuple(caveat for caveat, applies in found.items() if applies)
    peak = _interval(law.peak.batch_size, state.peak_error)
    return Advice(state, critical, peak, suggested, options, caveats)


def _option(state: RunState, size: float, critical: Interval) -> Option:
    # Relative to what was logged.
    level = state.lr_scale / _factor(state, state.batch_size)
    scale, error = level * _factor(state, size), _relative_error(state, size)
    spread = math.exp(error) if error < UNKNOWN else math.inf
    interval = Interval(scale, scale / spread, scale * spread)
    smallest, largest = state.measured
    steps = [_steps_ratio(size, state.batch_size, one) for one in critical]
    return Option(
        batch_size=size,
        lr_scale=interval,
        lr=Interval(*(state.lr_scheduled * one for one in interval)),
        steps=_ordered(steps),
        examples=_ordered(ratio * size / state.batch_size for ratio in steps),  # E = B S
        beyond=max(smallest / size, size / largest, 1.0),
    )


def _factor(state: RunState, size: float) -> float:
    return wanted_factor(state.objective, state.law, size, state.base_batch_size)


def _relative_error(state: RunState, size: float) -> float:
    """Standard error of the log of the factor at any batch size.

    Nothing is unsure at the base, where it is 1. What is measured is about the exponent of a power law, so
    that the error grows with the distance from the base: in proportion, from the nearest size at which it is
    known.
    """

    def distance(one: float) -> float:
        return abs(math.log2(one / state.base_batch_size))

    if distance(size) == 0.0:
        return dict(state.scale_errors).get(size, 0.0)
    known = [(one, error) for one, error in state.scale_errors if distance(one) > 0.0]
    if not known:
        return math.inf
    nearest, error = min(known, key=lambda pair: abs(math.log2(pair[0] / size)))
    return error * distance(size) / distance(nearest)


def _steps_ratio(size: float, now: float, critical: float) -> float:
    """Steps to the same loss at one batch size over those at another."""
    if critical <= 0.0 or math.isinf(critical):
        return 1.0 if critical <= 0.0 else now / size
    needed = [steps_needed(one, critical_batch_size=critical, min_steps=1.0) for one in (size, now)]
    return needed[0] / needed[1]


def _interval(value: float, error: float) -> Interval:
    if math.isinf(value):
        return Interval(value, 0.0, math.inf)
    return Interval(value, max(value - error, 0.0), value + error)


def _ordered(values: Iterable[float]) -> Interval:
    """From a quantity at the value and at both ends of what it depends on."""
    value, *ends = values
    return Interval(value, min(ends), max(ends))
