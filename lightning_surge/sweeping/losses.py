"""What a cell makes of the losses that it sees: an average over examples, and when targets were reached."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_surge.sweeping.cells import Reached

__all__ = ["Crossings", "SmoothedLoss"]


class SmoothedLoss:
    """An exponential average over examples, so that every batch size averages over equally much data.

    Args:
        examples: after so many a loss counts 1/e as much.

    Raises:
        ValueError: if that is not positive.

    Example:
        >>> loss = SmoothedLoss(100)
        >>> loss.add(2.0, examples=50), loss.add(2.0, examples=50)
        (2.0, 2.0)
    """

    def __init__(self, examples: float) -> None:
        if not 0 < examples < math.inf:
            raise ValueError(f"Expected 0 < smoothing < inf, got smoothing={examples}: count examples.")
        self._examples = examples
        self._sum = self._weight = 0.0

    @property
    def value(self) -> float | None:
        """The average; None before the first loss."""
        return self._sum / self._weight if self._weight else None

    def add(self, loss: float, examples: float) -> float:
        """Take a loss into account.

        Args:
            loss: mean over the examples of one step.
            examples: how many they are.

        Returns:
            The average now.
        """
        kept = math.exp(-examples / self._examples)
        # The weight is kept beside the sum, so that the zero at the beginning does not count.
        self._sum = kept * self._sum + (1 - kept) * loss
        self._weight = kept * self._weight + (1 - kept)
        return self._sum / self._weight


class Crossings:
    """Notes when a loss first is at most each of some targets.

    Between two looks at the loss a straight line is drawn, so that looking seldom does not mean counting too
    many steps.

    Args:
        targets: losses.

    Example:
        >>> crossings = Crossings([1.0, 0.1])
        >>> crossings.look(10, 160, 3.0)
        >>> crossings.look(20, 320, 0.5)
        >>> crossings.reached
        (Reached(target=1.0, steps=18, examples=288), Reached(target=0.1, steps=None, examples=None))
    """

    def __init__(self, targets: Sequence[float]) -> None:
        self._reached = {target: Reached(target, None, None) for target in targets}
        self._last: tuple[int, int, float] | None = None

    def look(self, steps: int, examples: int, loss: float) -> None:
        """Take note of a loss.

        Args:
            steps: optimizer steps taken so far.
            examples: behind them.
            loss: finite.
        """
        steps_before, examples_before, loss_before = self._last or (steps, examples, loss)
        for target, reached in self._reached.items():
            if reached.steps is None and loss <= target:
                # The loss before was above the target, or there was none.
                share = (loss_before - target) / (loss_before - loss) if self._last else 1.0
                # Whole steps, and the examples behind them.
                step = math.ceil(steps_before + share * (steps - steps_before))
                share = (step - steps_before) / max(1, steps - steps_before) if self._last else 1.0
                seen = round(examples_before + share * (examples - examples_before))
                self._reached[target] = Reached(target, step, seen)
        self._last = (steps, examples, loss)

    @property
    def reached(self) -> tuple[Reached, ...]:
        """One entry for each target."""
        return tuple(self._reached.values())

    @property
    def complete(self) -> bool:
        """Whether there are targets and all of them were reached."""
        return bool(self._reached) and all(entry.steps is not None for entry in self._reached.values())
