"""The measurements, the law fitted to them, and the policy that decides with it."""

from __future__ import annotations

import logging
import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch.optim import Optimizer

from lightning_surge.callbacks.lightning_host import warn
from lightning_surge.callbacks.logging import PREFIX, law_metrics, with_error
from lightning_surge.callbacks.measuring.measurer import MeasurerState
from lightning_surge.callbacks.measuring.plan import Pace
from lightning_surge.callbacks.settings import REFERENCE_RULES, SurgeSettings, check_base
from lightning_surge.checking.arguments import number, optional
from lightning_surge.checking.state import REMEDY, AnyFloat
from lightning_surge.laws.objectives import OBJECTIVES
from lightning_surge.measure.direction import Direction
from lightning_surge.measure.records import Measurement
from lightning_surge.policy.estimates import EstimatedLaw, Fit, estimate, fit_theorem3_law, law_of
from lightning_surge.policy.history import NoiseHistory, NoiseStats
from lightning_surge.policy.policy import Policy
from lightning_surge.policy.reasons import Reason

log = logging.getLogger(__name__)

# Laws kept to look at after a run, at 35 KiB each; the oldest go first.
LAW_HISTORY = 256


class LawRecord(NamedTuple):
    """The law as estimated after `step` optimizer steps, and the averaged measurements behind it."""

    step: int
    law: EstimatedLaw
    stats: NoiseStats


class StepToCome(NamedTuple):
    """The next step of an optimizer that has taken `number` steps, with complete gradients of a batch."""

    optimizer: Optimizer
    direction: Direction
    number: int
    batch_size: float


class Learner:
    """Knows only the settings at first; every training begins with a new one.

    Attributes:
        history: the measurements.
        law_history: the laws fitted to them, with the optimizer steps.
        policy: decides at the base batch size; None before the first step fixes that.
        scheduled_lr: latest scheduled learning rate of the group where it is largest.
    """

    def __init__(self, settings: SurgeSettings) -> None:
        self._settings = settings
        self.history = NoiseHistory(settings.half_life)
        self.law_history: deque[LawRecord] = deque(maxlen=LAW_HISTORY)
        self.policy: Policy | None = None
        self.scheduled_lr = math.nan
        self._law_metrics: dict[str, float] = {}
        if settings.base_batch_size is not None:
            self.fix_base(settings.base_batch_size)

    def follow(self, settings: SurgeSettings) -> None:
        """Go on with settings that differ in their objective."""
        if settings.objective != self._settings.objective:
            self._settings = settings
            if self.policy is not None:
                state = self.policy.state_dict()
                self.fix_base(self.policy.base_batch_size).load_state_dict(state)

    def fix_base(self, base_batch_size: float) -> Policy:
        """Decide from now on at this base batch size, with a policy that knows no law yet."""
        rule = REFERENCE_RULES.get(self._settings.law)
        self.policy = Policy(
            base_batch_size=base_batch_size,
            objective=self._settings.objective,
            fixed_law=None if rule is None else rule(base_lr=1.0, base_batch_size=base_batch_size),
            bounds=self._settings.lr_scale_bounds,
            max_drift_per_step=self._settings.max_drift_per_step,
        )
        return self.policy

    @property
    def law(self) -> EstimatedLaw | None:
        """The latest law; None before the first estimate."""
        return None if self.policy is None else self.policy.law

    @property
    def base_batch_size(self) -> float | None:
        """Examples at which the scheduled learning rate was tuned; None before the first step fixes it."""
        return None if self.policy is None else self.policy.base_batch_size

    # ------------------------------------------------------------------ what steps and measurements tell

    def forget(self) -> None:
        """Start measuring afresh: the law of other parameters was measured so far."""
        if not self.history.num_measurements:
            return
        log.info("the trained parameters have changed: measuring afresh, the last law is held")
        self.history = NoiseHistory(self._settings.half_life)
        self.hold(Reason.PARAMETERS_CHANGED)

    def hold(self, because: Reason, reason: str | None = None) -> None:
        """Go on with the last law, because a new one cannot be had."""
        if self.policy is not None:
            self.policy.hold(reason or because.text, because)

    def learn(self, step: StepToCome, measurement: Measurement) -> None:
        """Fit the law again with a new measurement; failures do not end the training."""
        if not any(measurement.statistics[1:3]):
            self.hold(Reason.GRADIENTS_ZERO)
            return
        policy = self.policy
        assert policy is not None
        try:
            self.history.add(measurement)
            law = estimate(self.history, self._fit(step))
            policy.update(law, step.batch_size)
            if law is not None:
                self.law_history.append(LawRecord(step.number, law, self.history.stats()))
            self._law_metrics = law_metrics(self.history, law, step.batch_size)
        except Exception as error:
            self.hold(Reason.FITTING_FAILED, f"fitting failed with {type(error).__name__}")
            warn(f"No law was fitted to a measurement: {type(error).__name__}: {error}")

    def _fit(self, step: StepToCome) -> Fit:
        """Which law the measurements are fitted with."""
        if self._settings.law == "theorem3":
            return fit_theorem3_law
        needed = self._settings.objective == "step" or self._settings.law == "theorem2"
        return law_of(step.direction, curvature=needed)

    def metrics(self, batch_size: float, examples: float) -> dict[str, float]:
        """What is logged of the law and of where the run is."""
        assert self.policy is not None
        metrics = self._law_metrics | {
            f"{PREFIX}batch_size": batch_size,
            f"{PREFIX}base_batch_size": self.policy.base_batch_size,
            f"{PREFIX}examples": examples,
            f"{PREFIX}objective": float(list(OBJECTIVES).index(self._settings.objective)),
        }
        return metrics | with_error("lr_scale_doubled", *self.policy.predicted(2.0 * batch_size))

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists."""
        return {
            "base_batch_size": self.base_batch_size,
            "history": self.history.state_dict(),
            "policy": None if self.policy is None else self.policy.state_dict(),
            "scheduled_lr": self.scheduled_lr,
            "law_metrics": dict(self._law_metrics),
        }

    def load(self, state: SurgeState) -> None:
        """Take over what a checkpoint holds, but for its base batch size if the settings have one."""
        self.history.load_state_dict(state.history)
        base = self._settings.base_batch_size or state.base_batch_size
        if base is not None:
            policy = self.fix_base(base)
            if state.policy is not None:
                policy.load_state_dict(state.policy)
        self.scheduled_lr, self._law_metrics = state.scheduled_lr, state.law_metrics


STATE_VERSION = 2


@dataclass(frozen=True)
class SurgeState:
    """What a checkpoint holds of the callback; the parts check what is theirs."""

    base_batch_size: float | None
    history: dict[str, Any]
    policy: dict[str, Any] | None
    law_metrics: dict[str, AnyFloat]
    measurer: MeasurerState
    scheduled_lr: AnyFloat = math.nan
    pace: Pace = field(default_factory=Pace)

    def __post_init__(self) -> None:
        optional(check_base, "base_batch_size", self.base_batch_size)
        if not math.isnan(self.scheduled_lr):
            number("scheduled_lr", self.scheduled_lr, REMEDY, least=0)
