"""How one of several optimizers gets on, where the user calls their steps."""

from __future__ import annotations

from typing import Any

__all__ = ["Pace"]


class Pace:
    """Counts the batches that begin, and those behind one optimizer's steps.

    The Trainer's `global_step` and `max_steps` count the steps of all optimizers, and not every batch is
    behind a step of each, nor behind one step only. So the examples that an optimizer will still be trained
    on are foreseen from those of the batches and steps so far.

    Attributes:
        steps: of this optimizer.
        batches_per_step: batches behind its latest step; 1 before the first.

    Example:
        A critic takes every batch of 8, and five steps to one of the other optimizer.

        >>> pace = Pace()
        >>> for steps_of_all in (0, 1, 2, 3, 4):
        ...     pace.begin_batch(steps_of_all)
        ...     pace.step(1)
        >>> pace.examples_per_batch(40.0), pace.examples_per_step(40.0, global_step=6)
        (8.0, 6.666666666666667)
    """

    def __init__(self) -> None:
        self.steps = 0
        self.batches_per_step = 1
        self._batches = 0
        self._steps_before: int | None = None

    def begin_batch(self, global_step: int) -> None:
        """A batch begins.

        Args:
            global_step: steps of all optimizers before it.
        """
        if self._steps_before is None:
            self._steps_before = global_step
        self._batches += 1

    def step(self, batches: int) -> None:
        """The optimizer has stepped.

        Args:
            batches: whose gradients were behind the step.
        """
        self.steps += 1
        self.batches_per_step = max(batches, 1)

    def examples_per_batch(self, trained: float) -> float | None:
        """Examples behind this optimizer's steps per batch so far; None before the first step.

        Args:
            trained: examples behind its steps so far.
        """
        return trained / self._batches if self.steps and self._batches else None

    def examples_per_step(self, trained: float, global_step: int) -> float | None:
        """Examples behind this optimizer's steps per step of any optimizer; None before the first step.

        Args:
            trained: examples behind its steps so far.
            global_step: steps of all optimizers so far.
        """
        taken = global_step - (self._steps_before or 0)
        return trained / taken if self.steps and taken > 0 else None

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of `state_dict`.

        Raises:
            ValueError: if a value is none that a count can have; nothing is taken over then.
        """
        counts = {name: state.get(name, value) for name, value in vars(Pace()).items()}
        before = counts["_steps_before"]
        known = [counts[name] for name in counts if name != "_steps_before" or before is not None]
        if any(type(count) is not int or not 0 <= count < 2**63 for count in known):
            raise ValueError(
                f"Expected whole numbers of steps and batches, got {counts}: load what state_dict returned."
            )
        vars(self).update(counts)
