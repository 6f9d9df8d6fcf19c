"""A law and the batch size in force in, a decision about the learning rate out.

The decision is a factor R(B) on the scheduled learning rate, which keeps its meaning: the rate that
is right at `base_batch_size`. So `R(base_batch_size) = 1`, whatever is measured.

Two limits stand between what the law asks for and what is used. Both let the factor rise by at most
`max_drift_per_step` a step, and both act on rises only:

* *Heat* is about a larger batch. It is the factor that training has got used to, over the factor at
  which a step costs what it costs at the base (`objectives.at_once_ratio`), and at least 1.
* *Lag* is about a new measurement. It is the factor used over the factor wanted, at most 1, at about
  the batch size where the measurement came.

A worked example of heat: base 16, a noise scale of 100, `objective="progress"`, and a change to 256
examples. The law asks for 7.01, of which 2.28 costs no more than a step at the base. The first step at
256 gets 2.28 * 1.05 = 2.40 (heat 1.05), the next one 2.52, and the 23rd all of 7.01 (heat 3.07). A batch
of 8 in between gets at once what the law asks for there, and takes half a percent off the heat.

And of lag: with `objective="alignment"` the same law asks for 2.28 at 256 and gets it. Then a measurement
finds a noise scale of 400, and the law asks for 3.19, at no greater cost. Lag begins at 2.28 / 3.19 =
0.72, and the steps get 2.40, 2.52, ..., and 3.19 after 7 of them. A change to 64 examples meanwhile is
another matter, and not held back.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from lightning_surge.checking.arguments import number
from lightning_surge.laws.base import Law
from lightning_surge.laws.objectives import FOLLOW_LR, OBJECTIVES, at_once_ratio, step_ratio
from lightning_surge.policy.estimates import EstimatedLaw
from lightning_surge.policy.reasons import Reason

__all__ = ["Decision", "Policy"]

# Heat is forgotten ten times more slowly than it is gained: batches counted in tokens have another size at
# every step, and the larger ones would never get what is asked for.
FORGETTING = 0.1
# The law's share in the factor above which it counts as followed; below, sqrt scaling has the larger share.
FOLLOWED = 0.5
ROUNDING = 1e-9
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


class _Target(NamedTuple):
    """What the law asks for at a batch size.

    Attributes:
        predicted: the ratio of the objective.
        standard_error: of it.
        used: after shrinkage and bounds.
        because: what decided it.
        at_once: the ratio at an unchanged cost of a step, after the same shrinkage; infinite where nothing is
            measured, and nothing limited.
    """

    predicted: float
    standard_error: float
    used: float
    because: Reason
    at_once: float = math.inf


class Policy:
    """Turns laws into ratios that are safe to apply.

    * Before anything is measured the ratio is `sqrt(B / base)`, the small-batch limit of both
      objectives; it moves to the measured ratio as that one's standard error shrinks, by precision:
      `log R = w log R_measured + (1 - w) log R_sqrt`, `w = t^2 / (t^2 + se^2)`, with the width `t`
      of what is believed beforehand: one standard deviation reaches from sqrt to 1 and to B / base.
    * It stays inside bounds.
    * A larger batch raises it at once only as far as `objectives.at_once_ratio`, which is right as long as
      the cost of a step stays what it is. Curvature takes some steps to adapt to a larger learning rate: what
      the objective asks for beyond is approached by at most `max_drift_per_step` a step, and so is a rise
      that a measurement asks for at about the batch size in force. Downward moves act at once.
    * A law that cannot be evaluated is not used: the last good one is held.

    Args:
        base_batch_size: examples at which the scheduled learning rate was tuned.
        objective: key of `OBJECTIVES`.
        fixed_law: a law to follow instead of measured ones, with no shrinkage.
        bounds: smallest and largest ratio; None for `[1/r, r]` with `r = max(B/base, base/B)`.
        max_drift_per_step: largest relative rise per step beyond what the batch size allows at once.

    Example:
        >>> policy = Policy(base_batch_size=16)
        >>> decision = policy.decide(64)
        >>> decision.predicted, decision.standard_error, decision.used, decision.reason
        (2.0, inf, 2.0, 'sqrt: nothing measured yet')
    """

    def __init__(
        self,
        *,
        base_batch_size: float,
        objective: str = "step",
        fixed_law: Law | None = None,
        bounds: tuple[float, float] | None = None,
        max_drift_per_step: float = 0.05,
    ) -> None:
        self.base_batch_size = base_batch_size
        self.law: EstimatedLaw | None = None
        self._objective = OBJECTIVES[objective]
        self._follows_lr = objective in FOLLOW_LR
        self.fixed_law = fixed_law
        self._bounds = bounds
        self._max_drift = max_drift_per_step
        self._heat = 1.0
        self._lag = 1.0
        # The batch size of the measurement that the lag is about.
        self._lag_at: float | None = None
        # In words and as one of a few; None while the law is followed.
        self._held: tuple[str, Reason] | None = None
        self._answers: dict[tuple[float, float], _Target] = {}

    def update(self, law: EstimatedLaw | None, batch_size: float, lr: float = math.nan) -> None:
        """Take over a new law, or hold the last one if there is none.

        Args:
            law: the law as estimated now; None if the measurements do not determine one.
            batch_size: the batch size in force, at which the ratio must not jump up.
            lr: the scheduled learning rate, for objectives that follow it.
        """
        if law is None or not self._usable(law, batch_size, lr):
            no_edge = law is not None and self._follows_lr and math.isnan(law.edge_lr(batch_size))
            because = Reason.NO_EDGE if no_edge else Reason.NO_LAW
            self.hold(because.text, because)
            return
        before = self.lr_scale(batch_size, lr)
        known = None if self.law is None else self._target(batch_size, lr).at_once
        self._held = None
        self.law = law
        self._answers.clear()
        # Training stays used to the factor in use; away from the size that it rose for, to the heat.
        hotter = known is not None and math.isfinite(known) and self._heat > 1.0
        used_to = max(before, self._heat * known) if hotter and known is not None else before
        self._heat = max(used_to / self._target(batch_size, lr).at_once, 1.0)
        self._lag, self._lag_at = min(1.0, before / self._limited(batch_size, lr)), batch_size

    def hold(self, reason: str, because: Reason = Reason.MEASURING_FAILED) -> None:
        """Keep the last law because a new one cannot be had.

        Args:
            reason: in words.
            because: the same as one of a few, for logs.
        """
        self._held = f"held: {reason.removeprefix('held: ')}", because
        self._answers.clear()

    def decide(self, batch_size: float, lr: float = math.nan) -> Decision:
        """The ratio for the next step; one step of the limit on drift passes.

        Args:
            batch_size: examples behind the step.
            lr: the scheduled learning rate, for objectives that follow it.

        Returns:
            The decision.
        """
        target, rise = self._target(batch_size, lr), 1.0 + self._max_drift
        caught_up = min(1.0, self._lag * rise)
        # What the one limit leaves of this step's rise is the other's.
        left = self._lag * rise / caught_up if self._is_lagging(batch_size) else rise
        goal = max(target.used / target.at_once, 1.0)
        self._heat = min(max(goal, self._heat / (1.0 + FORGETTING * self._max_drift)), self._heat * left)
        self._lag = caught_up
        used, because = self.lr_scale(batch_size, lr), target.because
        if used < target.used:
            because = Reason.RISING
        reason = self._held[0] if self._held is not None and because.held else because.text
        return Decision(target.predicted, target.standard_error, used, reason, because)

    def predicted(self, batch_size: float, lr: float = math.nan) -> tuple[float, float]:
        """What the objective asks for at any batch size, before shrinkage, bounds and the limit on drift.

        Args:
            batch_size: examples per optimizer step.
            lr: the scheduled learning rate, for objectives that follow it.

        Returns:
            The ratio to the scheduled learning rate, and its standard error in the same unit.
        """
        target = self._target(batch_size, lr)
        return target.predicted, target.standard_error

    def lr_scale(self, batch_size: float, lr: float = math.nan) -> float:
        """The ratio that would be applied at a batch size now, with no step passing.

        Args:
            batch_size: examples per optimizer step.
            lr: the scheduled learning rate, for objectives that follow it.

        Returns:
            The ratio to the scheduled learning rate.
        """
        limited = self._limited(batch_size, lr)
        if self._lag == 1.0 or not self._is_lagging(batch_size):
            return limited
        # The lag was taken at a neighbouring size, whose bounds may be wider.
        return self._bounded(limited * self._lag, batch_size / self.base_batch_size, Reason.RISING)[0]

    def _is_lagging(self, batch_size: float) -> bool:
        """Whether a rise that a measurement asks for is limited here: at about the batch size of that.

        Never at the base, where the ratio is 1 by definition.
        """
        if self._lag_at is None or batch_size == self.base_batch_size:
            return False
        return round(math.log2(batch_size / self._lag_at)) == 0

    def _limited(self, batch_size: float, lr: float) -> float:
        """The ratio wanted, as far as training has got used to it."""
        target = self._target(batch_size, lr)
        limit = target.at_once * self._heat
        if limit * (1.0 + ROUNDING) >= target.used:
            return target.used
        return self._bounded(limit, batch_size / self.base_batch_size, Reason.RISING)[0]

    def _wanted(self, law: Law, batch_size: float, lr: float) -> float:
        return self._objective(law, batch_size, self.base_batch_size, lr)

    def _usable(self, law: EstimatedLaw, batch_size: float, lr: float) -> bool:
        try:
            sizes = (batch_size, self.base_batch_size)
            ratios = [self._wanted(law, size, lr) for size in sizes]
            return all(
                math.isfinite(ratio) and ratio > 0.0 for ratio in (*ratios, law.lr(self.base_batch_size))
            )
        except (ArithmeticError, ValueError):
            return False

    def _target(self, batch_size: float, lr: float) -> _Target:
        # The law changes every hundred steps, the question is asked at every one.
        question = (batch_size, lr if self._follows_lr else 0.0)
        if question not in self._answers:
            if len(self._answers) > MOST_ANSWERS:
                self._answers.clear()
            self._answers[question] = self._compute_target(*question)
        return self._answers[question]

    def _compute_target(self, batch_size: float, lr: float) -> _Target:
        quotient = batch_size / self.base_batch_size
        if self.fixed_law is not None:
            predicted = step_ratio(self.fixed_law, batch_size, self.base_batch_size)
            used, because = self._bounded(predicted, quotient, Reason.RULE)
            return _Target(predicted, 0.0, used, because)
        held = None if self._held is None else self._held[1]
        if self.law is None:
            used, because = self._bounded(math.sqrt(quotient), quotient, Reason.NOTHING_MEASURED)
            return _Target(math.sqrt(quotient), math.inf, used, held or because)
        try:
            predicted = self._wanted(self.law, batch_size, lr)
            log_predicted = math.log(predicted)
        except (ArithmeticError, ValueError):
            predicted, log_predicted = math.nan, math.nan
        if not math.isfinite(log_predicted):
            used, because = self._bounded(math.sqrt(quotient), quotient, Reason.NO_LAW_HERE)
            return _Target(math.sqrt(quotient), math.inf, used, because)
        error = self._log_standard_error(batch_size, lr)
        log_sqrt = 0.5 * math.log(quotient)
        weight = log_sqrt**2 / (log_sqrt**2 + error**2) if log_sqrt != 0.0 else 1.0
        shrunk = math.exp(weight * log_predicted + (1.0 - weight) * log_sqrt)
        log_at_once = math.log(at_once_ratio(self.law, batch_size, self.base_batch_size))
        at_once = math.exp(weight * log_at_once + (1.0 - weight) * max(log_sqrt, 0.0))
        if weight <= FOLLOWED:
            because = Reason.UNCERTAIN
        else:
            because = Reason.UNRESOLVED if self.law.at_edge else Reason.MEASURED
        used, because = self._bounded(shrunk, quotient, because)
        return _Target(predicted, predicted * error, used, held or because, at_once)

    def _log_standard_error(self, batch_size: float, lr: float) -> float:
        if self.law is None or batch_size == self.base_batch_size:
            return 0.0
        scatter = self.law.standard_error(lambda law: math.log(self._wanted(law, batch_size, lr)))
        return math.hypot(
            scatter,
            self.law.extrapolation_error(batch_size),
            self.law.extrapolation_error(self.base_batch_size),
        )

    def _bounded(self, ratio: float, quotient: float, because: Reason) -> tuple[float, Reason]:
        reach = max(quotient, 1.0 / quotient)
        low, high = self._bounds or (1.0 / reach, reach)
        if ratio > high:
            return high, Reason.BOUNDED_ABOVE
        if ratio < low:
            return low, Reason.BOUNDED_BELOW
        return ratio, because

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists."""
        return {
            "law": None if self.law is None else self.law.state_dict(),
            "heat": self._heat,
            "lag": self._lag,
            "lag_at": self._lag_at,
            "held": None if self._held is None else self._held[0],
            "held_because": None if self._held is None else int(self._held[1]),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of `state_dict`.

        Raises:
            ValueError: if a value is out of range; nothing is taken over then.
            KeyError: if one is missing.
        """
        law = None if state["law"] is None else EstimatedLaw.from_state_dict(state["law"])
        remedy = "load what state_dict returned"
        lag_at = None if state["lag_at"] is None else number("lag_at", state["lag_at"], remedy)
        heat = number("heat", state["heat"], remedy)
        lag = number("lag", state["lag"], remedy)
        held = state["held"]
        far = lag_at is not None and not 1 / FARTHEST < lag_at / self.base_batch_size < FARTHEST
        if lag > 1.0 or far or not 1.0 <= heat < FARTHEST or not (held is None or isinstance(held, str)):
            raise ValueError(
                f"Expected heat >= 1, lag <= 1 at a batch size in reach of {self.base_batch_size:g}, and a "
                f"reason or None, got heat={heat}, lag={lag}, lag_at={lag_at}, held={held!r}: {remedy}."
            )
        because = Reason.MEASURING_FAILED if held is None else Reason(state["held_because"])
        self.law = law
        self._held = None if held is None else (held, because)
        self._heat, self._lag, self._lag_at = heat, lag, lag_at
        self._answers.clear()
