"""When to measure: deterministic spacing that keeps the cost inside a share of training.

Cost is counted in examples passed through probes against examples trained, times a fixed safety
factor, never in wall time: the spacing is equal on every rank, repeats from run to run, and is part
of the checkpoint.
"""

from __future__ import annotations

import math
from typing import Any

__all__ = ["ProbeBudget"]

# Small slices and whole-gradient arithmetic make a probe's pass dearer than training's.
SAFETY = 1.25
# The first measurements come this many times faster, until there are enough for a standard error.
EARLY_MEASUREMENTS = 10
EARLY_RATE = 4.0
# Of a run of known length, the early measurements may take this share of all that it can afford.
EARLY_SHARE = 0.5
# A failed probe multiplies the spacing by this.
WIDENING = 2.0


class ProbeBudget:
    """Spends at most `max_overhead` of the examples of a run on probes.

    The early measurements run ahead of the budget and are charged to the whole run: what is left is
    spread evenly over the examples that remain. Where the length of the run is not known, nothing is
    spent until the run has caught up.

    Args:
        max_overhead: largest share of extra passes, for example 0.01.
        probe_every: measure every so many optimizer steps instead, whatever it costs.

    Example:
        One measurement costs 100 passes, 125 with the safety factor. At 5 % the first one may come
        after 125 / (4 * 0.05) = 625 examples. Two take half of what 10,000 examples afford; the other
        half is spread over what remains, so the third comes 125 / (250 / 8750) = 4375 examples later.

        >>> budget, times = ProbeBudget(max_overhead=0.05), []
        >>> for examples in range(0, 10000, 25):
        ...     budget.train(25)
        ...     if budget.due(100, planned_examples=10000):
        ...         budget.charge(100)
        ...         times.append(examples + 25)
        >>> times, budget.spent
        ([625, 1250, 4175, 7100], 500.0)
    """

    def __init__(self, max_overhead: float, probe_every: int | None = None) -> None:
        self.max_overhead = max_overhead
        self.probe_every = probe_every
        self.trained = 0.0
        self.spent = 0.0
        self.measurements = 0
        self._trained_at_last = 0.0
        self._steps_since_last = 0
        self._spacing = 1.0

    def train(self, examples: float) -> None:
        """Count one optimizer step of so many examples."""
        self.trained += examples
        self._steps_since_last += 1

    def charge(self, passes: float, *, measured: bool = True) -> None:
        """Pay for a probe.

        Args:
            passes: examples passed forward and backward beyond training's own.
            measured: whether a measurement came of it.
        """
        self.spent += SAFETY * passes
        self.measurements += measured
        self._trained_at_last = self.trained
        if measured:
            self._spacing = max(1.0, self._spacing / WIDENING)

    def start(self) -> None:
        """A probe starts to gather its batches: `probe_every` counts from here."""
        self._steps_since_last = 0

    def widen(self) -> None:
        """Double the spacing after a probe failed; every one that succeeds halves it again."""
        self._spacing *= WIDENING

    def due(self, passes: float, planned_examples: float = math.inf) -> bool:
        """Whether a probe that costs `passes` may start.

        Args:
            passes: examples it will pass forward and backward.
            planned_examples: examples of the whole run; infinite if unknown.

        Returns:
            True if it is time and the budget has room.
        """
        if self.probe_every is not None:
            return self._steps_since_last >= self.probe_every * self._spacing
        cost = SAFETY * passes
        total = self.max_overhead * planned_examples
        left = planned_examples - self.trained
        known = math.isfinite(planned_examples)
        if known and (left <= 0.0 or not self.has_room(passes, planned_examples)):
            return False
        early = self.measurements < EARLY_MEASUREMENTS and not (
            known and self.spent + cost > EARLY_SHARE * total
        )
        if early:
            rate = EARLY_RATE * self.max_overhead
        elif known:
            rate = (total - self.spent) / left
        elif self.spent + cost <= self.max_overhead * self.trained:
            rate = self.max_overhead
        else:
            return False
        return self.trained - self._trained_at_last >= self._spacing * cost / rate

    def has_room(self, passes: float, planned_examples: float) -> bool:
        """Whether a probe of this cost stays within what the whole run may spend.

        Args:
            passes: examples it will pass forward and backward.
            planned_examples: examples of the whole run; infinite if unknown.
        """
        free = self.probe_every is not None
        return free or self.spent + SAFETY * passes <= self.max_overhead * planned_examples

    def affordable(self, passes: float, planned_examples: float) -> float:
        """How many probes of this cost a whole run can pay for; 0 if `probe_every` asks for small ones."""
        if self.probe_every is not None:
            return 0.0
        return self.max_overhead * planned_examples / (SAFETY * passes)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            name: value for name, value in vars(self).items() if name not in ("max_overhead", "probe_every")
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of `state_dict`; the settings stay as they are.

        Raises:
            ValueError: if a value is none that a budget can have; nothing is taken over then.
            KeyError: if one is missing.
        """
        # Everything begins at its smallest value, and as what it is.
        smallest = ProbeBudget(self.max_overhead, self.probe_every).state_dict()
        values = {name: state[name] for name in smallest}
        for name, value in values.items():
            kinds = (int, float) if type(smallest[name]) is float else type(smallest[name])
            if not (isinstance(value, kinds) and smallest[name] <= value < math.inf):
                raise ValueError(
                    f"Expected {name.lstrip('_')} of at least {smallest[name]} in the state of a budget, got "
                    f"{value!r}."
                )
        vars(self).update(values)
