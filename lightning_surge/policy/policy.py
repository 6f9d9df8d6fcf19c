"""A law and the batch size in force in, a decision about the learning rate out.

The decision is a factor R(B) on the scheduled learning rate, which keeps its meaning: the rate that
is right at `base_batch_size`. So `R(base_batch_size) = 1`, whatever is measured.

Curvature takes some steps to adapt to a larger learning rate, so a rise is approached, by at most
`max_drift_per_step` a step, from the factor that training is used to; a fall acts at once.

A worked example with base 16: before anything is measured the batch grows to 256. Square-root scaling asks
for 4, and the steps get 1.05, 1.05^2 = 1.10, ..., and 4 from the 29th on. A batch of 8 in between gets at
once what is asked for there, and takes half a percent off what training is used to.

Had a noise scale of 100 been measured before, `objective="progress"` would ask for 7.01 at 256, and the 40th
step there would get all of it. `objective="alignment"` would ask for 2.28, and get it from the 17th step on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightning_surge.checking.state import REMEDY, restore, save
from lightning_surge.laws.base import Law
from lightning_surge.laws.objectives import OBJECTIVES, step_ratio
from lightning_surge.policy.estimates import EstimatedLaw
from lightning_surge.policy.reasons import Reason

# What training is used to is forgotten ten times more slowly than it is gained: batches counted in tokens
# have another size at every step, and the larger ones would never get what is asked for.
FORGETTING = 0.1
# Of a rise per step, unless the user chooses one.
MAX_DRIFT = 0.05
# The law's share in the factor above which it counts as followed; below, sqrt scaling has the larger share.
FOLLOWED = 0.5
# No training has batch sizes, or learning rates, that are farther apart.
FARTHEST = 1e9
# Batches counted in tokens can have a new size at every step.
MOST_ANSWERS = 64


class Decision(NamedTuple):
    """What to do with the learning rate in one step.

    Attributes:
        predicted: the ratio that the objective asks for; square-root scaling before any measurement.
        standard_error: of `predicted`, in units of `predicted`; infinite before it is known.
        used: the ratio to apply, after shrinkage, bounds and the limit on drift.
        reason: which of these decided, in words.
        because: the same as one of a few, for logs.
    """

    predicted: float
    standard_error: float
    used: float
    reason: str
    because: Reason


@dataclass(frozen=True)
class PolicyState:
    """What a checkpoint holds of a `Policy`."""

    law: dict[str, Any] | None
    used_to: float
    at: float | None
    held: str | None
    held_because: Reason | None


class Policy:
    """Turns laws into ratios that are safe to apply: inside bounds, and approached as told above.

    Before anything is measured the ratio is `sqrt(B / base)`, the small-batch limit of both objectives; it
    moves to the measured ratio as that one's standard error shrinks, by precision:
    `log R = w log R_measured + (1 - w) log R_sqrt`, `w = t^2 / (t^2 + se^2)`, with the width `t` of what is
    believed beforehand: one standard deviation reaches from sqrt to 1 and to B / base. A law that cannot be
    evaluated is not used: the last good one is held.

    Args:
        base_batch_size: examples at which the scheduled learning rate was tuned.
        objective: key of `OBJECTIVES`.
        fixed_law: a law to follow instead of measured ones, with no shrinkage.
        bounds: smallest and largest ratio; None for `[1/r, r]` with `r = max(B/base, base/B)`.
        max_drift_per_step: largest relative rise per step; None for 5 % with measured laws and no limit with
            a fixed one.

    Example:
        >>> policy = Policy(base_batch_size=16)
        >>> decision = policy.decide(64)
        >>> decision.predicted, decision.standard_error, decision.used, decision.reason
        (2.0, inf, 1.05, 'rising: limited by max_drift_per_step')
        >>> [round(policy.decide(64).used, 4) for _ in range(3)], policy.decide(4).used
        ([1.1025, 1.1576, 1.2155], 0.5)
    """

    def __init__(
        self,
        *,
        base_batch_size: float,
        objective: str = "step",
        fixed_law: Law | None = None,
        bounds: tuple[float, float] | None = None,
        max_drift_per_step: float | None = None,
    ) -> None:
        self.base_batch_size = base_batch_size
        self.law: EstimatedLaw | None = None
        self._objective = OBJECTIVES[objective]
        self.fixed_law = fixed_law
        self._bounds = bounds
        unlimited = max_drift_per_step is None and fixed_law is not None
        self._max_drift = math.inf if unlimited else max_drift_per_step or MAX_DRIFT
        # The factor that training is used to, which may be above that of the latest step, and the batch size
        # of that step, None before the first.
        self._used_to = 1.0
        self._at: float | None = None
        # In words and as one of a few; None while the law is followed.
        self._held: tuple[str, Reason] | None = None
        # By batch size, before the limit on rises.
        self._answers: dict[float, Decision] = {}
        # The latest batch size and decision, once asking again would decide the same.
        self._settled: tuple[float, Decision] | None = None

    def update(self, law: EstimatedLaw | None, batch_size: float) -> None:
        """Take over the law estimated at a batch size; without one hold the last."""
        if law is None or not self._usable(law, batch_size):
            self.hold(Reason.NO_LAW.text, Reason.NO_LAW)
            return
        asked = None if self._at is None else self._target(self._at).used
        self._held = None
        self.law = law
        self._ask_again()
        if self._at is not None and asked is not None:
            # Where less is asked for now, what was kept above it comes down with it.
            above = max(self._used_to / asked, 1.0)
            self._used_to = min(self._used_to, above * self._target(self._at).used)

    def hold(self, reason: str, because: Reason = Reason.MEASURING_FAILED) -> None:
        """Keep the last law because a new one cannot be had: in words, and as one of a few for logs."""
        self._held = f"held: {reason.removeprefix('held: ')}", because
        self._ask_again()

    def _ask_again(self) -> None:
        self._answers.clear()
        self._settled = None

    def decide(self, batch_size: float) -> Decision:
        """The ratio for a step of so many examples. One step of the limit passes."""
        if self._settled is not None and self._settled[0] == batch_size:
            return self._settled[1]
        target = self._target(batch_size)
        self._used_to, used = self._approach(target)
        self._at = batch_size
        rising = used < target.used and not target.because.held
        because = Reason.RISING if rising else target.because
        reason = self._held[0] if self._held is not None and because.held else because.text
        decision = target._replace(used=used, reason=reason, because=because)
        self._settled = (batch_size, decision) if self._used_to == target.used == used else None
        return decision

    def _approach(self, target: Decision) -> tuple[float, float]:
        """What training is used to once a step has passed at the size of a target, and that step's factor."""
        # Lower than the base's learning rate from the first step on: then it is used to that.
        before = min(1.0, target.used) if self._at is None else self._used_to
        kept = max(target.used, before / (1.0 + FORGETTING * self._max_drift))
        used_to = min(kept, before * (1.0 + self._max_drift))
        used = min(target.used, used_to)
        if self._bounds is not None:
            used = max(used, self._bounds[0])  # others may have been in force before resuming
        return max(used_to, used), used

    def predicted(self, batch_size: float) -> tuple[float, float]:
        """What the objective asks for, and its standard error: before shrinkage, bounds and limit."""
        target = self._target(batch_size)
        return target.predicted, target.standard_error

    def lr_scale(self, batch_size: float) -> float:
        """The ratio that the next step would get at a batch size."""
        return self._approach(self._target(batch_size))[1]

    def _wanted(self, law: Law, batch_size: float) -> float:
        return self._objective(law, batch_size, self.base_batch_size)

    def _usable(self, law: EstimatedLaw, batch_size: float) -> bool:
        try:
            sizes = (batch_size, self.base_batch_size)
            ratios = [self._wanted(law, size) for size in sizes]
            return all(
                math.isfinite(ratio) and ratio > 0.0 for ratio in (*ratios, law.lr(self.base_batch_size))
            )
        except (ArithmeticError, ValueError):
            return False

    def _target(self, batch_size: float) -> Decision:
        # The law changes every hundred steps, the question is asked at every one.
        if batch_size not in self._answers:
            if len(self._answers) > MOST_ANSWERS:
                self._answers.clear()
            self._answers[batch_size] = self._compute_target(batch_size)
        return self._answers[batch_size]

    def _compute_target(self, batch_size: float) -> Decision:
        quotient = batch_size / self.base_batch_size
        reach = max(quotient, 1.0 / quotient)
        if self.fixed_law is not None:
            predicted = step_ratio(self.fixed_law, batch_size, self.base_batch_size)
            return self._bounded(predicted, 0.0, predicted, reach, Reason.RULE, None)
        held = None if self._held is None else self._held[1]
        if self.law is None:
            root = math.sqrt(quotient)
            return self._bounded(root, math.inf, root, reach, Reason.NOTHING_MEASURED, held)
        try:
            predicted = self._wanted(self.law, batch_size)
            log_predicted = math.log(predicted)
        except (ArithmeticError, ValueError):
            predicted, log_predicted = math.nan, math.nan
        if not math.isfinite(log_predicted):
            root = math.sqrt(quotient)
            return self._bounded(root, math.inf, root, reach, Reason.NO_LAW_HERE, None)
        error = self._log_standard_error(batch_size)
        log_sqrt = 0.5 * math.log(quotient)
        weight = log_sqrt**2 / (log_sqrt**2 + error**2) if log_sqrt != 0.0 else 1.0
        shrunk = math.exp(weight * log_predicted + (1.0 - weight) * log_sqrt)
        if weight <= FOLLOWED:
            because = Reason.UNCERTAIN
        else:
            because = Reason.UNRESOLVED if self.law.at_edge else Reason.MEASURED
        return self._bounded(predicted, predicted * error, shrunk, reach, because, held)

    def _log_standard_error(self, batch_size: float) -> float:
        if self.law is None or batch_size == self.base_batch_size:
            return 0.0
        scatter = self.law.standard_error(lambda law: math.log(self._wanted(law, batch_size)))
        beyond = map(self.law.extrapolation_error, (batch_size, self.base_batch_size))
        return math.hypot(scatter, *beyond)

    def _bounded(
        self, predicted: float, error: float, ratio: float, reach: float, because: Reason, held: Reason | None
    ) -> Decision:
        low, high = self._bounds or (1.0 / reach, reach)
        if not low <= ratio <= high:
            because = Reason.BOUNDED_ABOVE if ratio > high else Reason.BOUNDED_BELOW
        because = held or because
        return Decision(predicted, error, min(max(ratio, low), high), because.text, because)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists."""
        law = None if self.law is None else self.law.state_dict()
        state: dict[str, Any] = save(PolicyState(law, self._used_to, self._at, *(self._held or (None, None))))
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of `state_dict`, or nothing if a value is missing or out of range."""
        saved = restore(PolicyState, state)
        ratios = (saved.used_to, 1.0 if saved.at is None else saved.at / self.base_batch_size)
        near = all(1.0 / FARTHEST < ratio < FARTHEST for ratio in ratios)
        if not near or (saved.held is None) != (saved.held_because is None):
            raise ValueError(
                f"Expected factors and a batch size in reach of {self.base_batch_size:g}, and a reason or "
                f"None, got used_to={saved.used_to}, at={saved.at}, held={saved.held!r}: {REMEDY}."
            )
        self.law = None if saved.law is None else EstimatedLaw.from_state_dict(saved.law)
        self._held = None
        if saved.held is not None and saved.held_because is not None:
            self._held = saved.held, saved.held_because
        self._used_to, self._at = saved.used_to, saved.at
        self._ask_again()
