"""Write a learning rate for one step and take it off again.

A scheduler must find the learning rate that it wrote itself, or the recursive ones (exponential,
cosine, plateau) compound what was written over it. So the factor is applied before a step and removed
after it, before any scheduler moves. If somebody else wrote in between, their value is the new
schedule and is left alone. Weight decay, where it is rewritten too, is handled in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["LearningRateWriter"]

KeepsDecay = Callable[[Mapping[str, Any]], bool]
"""Whether a parameter group's `lr * weight_decay` shall stay what the schedule says."""


class _Written:
    """One entry of the parameter groups: what others set, and what was written over it."""

    def __init__(self, optimizer: Optimizer, key: str) -> None:
        self._optimizer = optimizer
        self._key = key
        self._original: list[float | None] = []
        self._written: list[float | None] = []
        seen: set[int] = set()
        for group in optimizer.param_groups:
            if isinstance(group.get(key), Tensor):
                if id(group[key]) in seen:
                    group[key] = group[key].clone()
                seen.add(id(group[key]))

    def original(self) -> list[float | None]:
        """What anybody but this class set last; None for a group without the entry."""
        return [
            self._original[i] if i < len(self._written) and value == self._written[i] else value
            for i, value in enumerate(self.current())
        ]

    def write(self, values: list[float | None]) -> None:
        """Write one value per group; None leaves what others set."""
        self._original = self.original()
        self._fill([old if new is None else new for old, new in zip(self._original, values, strict=True)])
        # Read back: a tensor may hold fewer digits.
        self._written = self.current()

    def restore(self) -> None:
        """Put back what others set; does nothing where nothing was written."""
        if self._written:
            self._fill(self.original())
        self._original, self._written = [], []

    def current(self) -> list[float | None]:
        """The entries as they are."""
        values = [group.get(self._key) for group in self._optimizer.param_groups]
        return [None if value is None else float(value) for value in values]

    def _fill(self, values: list[float | None]) -> None:
        for group, value in zip(self._optimizer.param_groups, values, strict=True):
            if isinstance(group.get(self._key), Tensor):
                group[self._key].fill_(value)
            elif value is not None and value != group[self._key]:  # what is right keeps its type
                group[self._key] = value


class LearningRateWriter:
    """Applies a factor to every parameter group of an optimizer and restores the schedule's values.

    Args:
        optimizer: the raw torch optimizer. Tensor learning rates are supported; one that groups
            share is copied per group first, so that filling it moves one group only.
        keeps_decay: of which groups `weight_decay` is divided by the factor for the step, so that a decay
            that torch multiplies with the learning rate stays what it was; None for no group.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=0.5, weight_decay=0.25)
        >>> writer = LearningRateWriter(optimizer, keeps_decay=lambda group: True)
        >>> writer.apply(2.0); optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]
        (1.0, 0.125)
        >>> writer.restore(); optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]
        (0.5, 0.25)
    """

    def __init__(self, optimizer: Optimizer, keeps_decay: KeepsDecay | None = None) -> None:
        self._optimizer = optimizer
        self._keeps_decay = keeps_decay
        self._lr = _Written(optimizer, "lr")
        self._decay = None if keeps_decay is None else _Written(optimizer, "weight_decay")

    def scheduled(self) -> list[float]:
        """The learning rates that the schedule, or anybody but this writer, set last."""
        return _numbers(self._lr.original())

    def apply(self, factor: float) -> None:
        """Write the scheduled learning rates times a factor; calling again replaces the factor.

        Args:
            factor: positive.
        """
        scheduled = self.scheduled()
        self._lr.write([lr * factor for lr in scheduled])
        if self._decay is not None and self._keeps_decay is not None:
            # By the learning rates really written, so that the product is kept to the last digit but one.
            used = _numbers(self._lr.current())
            kept = [
                decay * (lr / written) if decay is not None and written > 0.0 and keeps else None
                for decay, lr, written, keeps in zip(
                    self._decay.original(),
                    scheduled,
                    used,
                    map(self._keeps_decay, self._optimizer.param_groups),
                    strict=True,
                )
            ]
            self._decay.write(kept)

    def restore(self) -> None:
        """Put the scheduled values back; does nothing where none was written."""
        self._lr.restore()
        if self._decay is not None:
            self._decay.restore()


def _numbers(values: list[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]
