"""The gradient of one micro-batch by itself, while training accumulates it on top of others.

Two ways, by who owns `.grad`. Where nobody but autograd does, what has accumulated is set aside for one
backward pass and put back. Under data parallelism it belongs to the reducer, which makes a local gradient one
over all processes on the last micro-batch of a window; there hooks on the parameters see this process's own
gradient pass by. No communication hook is needed, so that the one there is stays the user's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_surge.measure.gradients import dense

__all__ = ["HookedGradients", "MicroBatchGradients", "StashedGradients"]


class MicroBatchGradients(ABC):
    """Tells a micro-batch's own gradient; asked around each backward pass of a measured window."""

    @abstractmethod
    def begin(self, parameters: Sequence[Tensor]) -> None:
        """A backward pass is about to start."""

    @abstractmethod
    def gradients(self) -> list[Tensor | None]:
        """What that pass, which has ended, computed: to read, or to scale in place if `owned`."""

    @abstractmethod
    def end(self) -> None:
        """Leave `.grad` as it would be without this, and let go of everything. May be called at any time."""


class StashedGradients(MicroBatchGradients):
    """Sets aside what has accumulated, so that `.grad` is the micro-batch's own.

    Example:
        >>> weight = torch.ones(1, requires_grad=True)
        >>> (3 * weight).sum().backward()
        >>> own = StashedGradients()
        >>> own.begin([weight]); (4 * weight).sum().backward(); own.gradients()
        [tensor([4.])]
        >>> own.end(); weight.grad
        tensor([7.])
    """

    def __init__(self) -> None:
        self._parameters: Sequence[Tensor] = ()
        self._stashed: list[Tensor | None] = []

    def begin(self, parameters: Sequence[Tensor]) -> None:
        """Set the accumulated gradients aside."""
        self._parameters = parameters
        self._stashed = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None

    def gradients(self) -> list[Tensor | None]:
        """Whatever is in `.grad`."""
        return [parameter.grad for parameter in self._parameters]

    def end(self) -> None:
        """Add what was set aside, as autograd would have added to it."""
        for parameter, stashed in zip(self._parameters, self._stashed, strict=True):
            if stashed is not None:
                parameter.grad = stashed if parameter.grad is None else stashed.add_(parameter.grad)
        self._parameters, self._stashed = (), []


class HookedGradients(MicroBatchGradients):
    """Copies gradients as they pass by, before anything accumulates or reduces them.

    Example:
        >>> weight = torch.ones(1, requires_grad=True)
        >>> (3 * weight).sum().backward()
        >>> own = HookedGradients()
        >>> own.begin([weight]); (4 * weight).sum().backward(); own.gradients()
        [tensor([4.])]
        >>> own.end(); weight.grad
        tensor([7.])
    """

    def __init__(self) -> None:
        self._hooks: list[Any] = []
        self._caught: list[Tensor | None] = []

    def begin(self, parameters: Sequence[Tensor]) -> None:
        """Hang a hook on every parameter."""
        self._caught = [None] * len(parameters)
        self._hooks = [
            parameter.register_hook(self._hook(index))  # type: ignore[no-untyped-call]
            for index, parameter in enumerate(parameters)
        ]

    def _hook(self, index: int) -> Any:
        def catch(gradient: Tensor) -> None:
            before = self._caught[index]
            # A weight that is used under reentrant checkpointing gets its gradient in parts.
            with torch.no_grad():
                own = dense(gradient.detach())
                self._caught[index] = own.clone() if before is None else before + own

        return catch

    def gradients(self) -> list[Tensor | None]:
        """What has passed by."""
        return self._caught

    def end(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._caught = [], []
