"""Which backward passes left a gradient in an optimizer's parameters, where the user calls them.

In manual optimization a loss is nobody's: the generator's leaves gradients in the discriminator's
parameters too, which are zeroed before they are used. What is behind an optimizer's step is what its `.grad`
tensors hold, so they are looked at before and after every backward pass. A look reads identities and version
counters, which torch keeps on the host; it waits for the device only to tell a zeroed gradient from one that
was scaled.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_surge.gradients import dense

__all__ = ["Deposits"]


class Deposits:
    """Watches the gradients of one optimizer's parameters.

    Args:
        optimizer: the raw torch optimizer; its groups are read afresh at every look.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> deposits = Deposits(torch.optim.SGD([weight], lr=0.1))
        >>> deposits.are_zeroed()
        True
        >>> weight.sum().backward(); deposits.have_come(), deposits.are_zeroed()
        (True, False)
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._seen = self._look()

    def _look(self) -> list[tuple[int, int] | None]:
        return [
            None if parameter.grad is None else (id(parameter.grad), parameter.grad._version)
            for group in self._optimizer.param_groups
            for parameter in group["params"]
        ]

    def _look_again(self) -> bool:
        before, self._seen = self._seen, self._look()
        return self._seen != before

    def have_come(self) -> bool:
        """Whether any gradient has changed since the last look."""
        return self._look_again()

    def are_zeroed(self) -> bool:
        """Whether nothing is left of earlier passes: all gradients are None, or were set to zero.

        Gradients of zero that nobody has touched since the last look count as left by a pass.
        """
        changed = self._look_again()
        if not any(self._seen):
            return True
        return changed and not self.exist()

    def exist(self) -> bool:
        """Whether any gradient is not zero. Waits for the device."""
        flags: dict[torch.device, list[Tensor]] = {}
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    flags.setdefault(parameter.grad.device, []).append(dense(parameter.grad).any())
        return any(bool(torch.stack(found).any()) for found in flags.values())
