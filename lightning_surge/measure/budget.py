"""When to measure: deterministic spacing that keeps the cost inside a share of training.

Cost is counted in examples passed through probes against examples trained, never in wall time: the spacing is
equal on every rank, repeats from run to run, and is part of the checkpoint.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_surge.checking.arguments import number
from lightning_surge.checking.state import REMEDY

# Small slices and whole-gradient arithmetic make a probe's pass dearer than training's.
SAFETY = 1.25
# Norms of gradients that training computes anyway, in passes over their examples.
ARITHMETIC = 0.025
# The first measurements come this many times faster, until there are enough for a standard error.
EARLY_MEASUREMENTS = 10
EARLY_RATE = 4.0
# Of a run of known length, early and urgent measurements may take this share of all that it can afford.
EARLY_SHARE = 0.5
# By this share of a run of known length it should have been measured once.
FIRST_BY = 0.02
# A failed probe multiplies the spacing by this.
WIDENING = 2.0


def probe_cost(passes: float) -> float:
    """What a measurement is planned with and charged for."""
    return SAFETY * passes


@dataclass
class BudgetState:
    """What a checkpoint holds of a `ProbeBudget`: all but the settings."""

    trained: float
    spent: float
    arithmetic: float
    urgent: float
    measurements: int
    _trained_at_last: float
    _steps_since_last: int
    _spacing: float
    _is_urgent: bool

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "_is_urgent":
                number(name.lstrip("_"), value, REMEDY, least=float(name == "_spacing"))


class ProbeBudget(BudgetState):
    """Spends at most `max_overhead` of the examples of a run on probes.

    The early measurements run ahead of the budget and are charged to the whole run: what is left is
    spread evenly over the examples that remain. Where the length of the run is not known, nothing is
    spent until the run has caught up.

    Example:
        One measurement costs 125. At 5 % the first one is due after 2 % of 10,000 examples, the next one
        125 / (4 * 0.05) = 625 examples later. Two take half of what 10,000 examples afford; the other
        half is spread over what remains, so the third comes at 3,900, when 125 / (250 / 6100) have passed.

        >>> budget, times = ProbeBudget(max_overhead=0.05), []
        >>> for examples in range(0, 10000, 25):
        ...     budget.train(25)
        ...     if budget.due(125, planned_examples=10000):
        ...         budget.charge(125)
        ...         times.append(examples + 25)
        >>> times, budget.spent
        ([200, 825, 3900, 6975], 500.0)
    """

    def __init__(self, max_overhead: float, probe_every: int | None = None) -> None:
        super().__init__(0.0, 0.0, 0.0, 0.0, 0, 0.0, 0, 1.0, False)
        self.max_overhead = max_overhead
        self.probe_every = probe_every

    def train(self, examples: float) -> None:
        """Count one optimizer step of so many examples."""
        self.trained += examples
        self._steps_since_last += 1

    def charge(self, cost: float, *, measured: bool = True) -> None:
        """Pay for a probe, of which a measurement came or not."""
        self.spent += cost
        self.urgent += cost * self._is_urgent
        self.measurements += measured
        self._trained_at_last = self.trained
        if measured:
            self._spacing = max(1.0, self._spacing / WIDENING)

    def charge_norms(self, examples: float) -> None:
        """Pay for the norms of a window with so many examples: no pass, which delays no probe."""
        self.arithmetic += ARITHMETIC * examples

    def start(self, *, urgent: bool = False) -> None:
        """A probe starts to gather its batches: `probe_every` counts from here."""
        self._steps_since_last, self._is_urgent = 0, urgent

    def miss(self) -> None:
        """A probe that started had no batch: the next one is due at once."""
        self._steps_since_last = math.ceil((self.probe_every or 0) * self._spacing)

    def widen(self) -> None:
        """Double the spacing after a probe failed; every one that succeeds halves it again."""
        self._spacing *= WIDENING

    def due(self, cost: float, planned_examples: float = math.inf, *, urgent: bool = False) -> bool:
        """Whether a probe of this cost may start."""
        if self.probe_every is not None:
            return self._steps_since_last >= self.probe_every * self._spacing
        total = self.max_overhead * planned_examples
        left = planned_examples - self.trained
        known = math.isfinite(planned_examples)
        if known and (left <= 0.0 or not self.has_room(cost, planned_examples)):
            return False
        ahead = self.spent + cost <= EARLY_SHARE * total
        never = known and self.measurements == 0 and self._spacing == 1.0
        if never and self.trained >= FIRST_BY * planned_examples:
            return True
        if self._spacing == 1.0 and urgent:
            # Sizes that come and go must not use up what is meant for the rest of the run.
            few = self.urgent + cost <= EARLY_SHARE * total
            if few if known else self._catches_up(EARLY_RATE, cost):
                return True
        if self.measurements < EARLY_MEASUREMENTS and (ahead or not known):
            rate = EARLY_RATE * self.max_overhead
        elif known:
            rate = (total - self.spent) / left
        elif self._catches_up(1.0, cost):
            rate = self.max_overhead
        else:
            return False
        return self.trained - self._trained_at_last >= self._spacing * cost / rate

    def _catches_up(self, rate: float, cost: float) -> bool:
        return self.spent + cost <= rate * self.max_overhead * self.trained

    def has_room(self, cost: float, planned_examples: float) -> bool:
        """Whether a probe of this cost stays within what the whole run may spend."""
        return self.probe_every is not None or self.spent + cost <= self.max_overhead * planned_examples

    def affordable(self, cost: float, planned_examples: float, *, once: float = 0.0) -> float:
        """How many probes of this cost a whole run can pay for; 0 if `probe_every` asks for small ones.

        The first costs `once` more.
        """
        if self.probe_every is not None:
            return 0.0
        return (self.max_overhead * planned_examples - once) / cost
