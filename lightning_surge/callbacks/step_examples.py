"""What lies behind the step about to be taken: which batches, and how many examples."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_surge.callbacks.measuring.plan import Pace
from lightning_surge.measure.gradients import dense

__all__ = ["Deposits", "StepExamples"]


class StepExamples:
    """Counts the batches whose gradients an optimizer's next step will be taken with, each once and whole.

    Where Lightning calls the steps, every backward pass is behind the next one. Where the user calls them,
    only those are that left something in the optimizer's parameters since these were zeroed.

    Attributes:
        examples: behind the step, so far.
        batches: that hold them.
        passes: micro-batches whose backward pass is behind the step, empty ones too.
        manual: whether the user calls the optimizer's steps.
        batch: the micro-batch in hand; None between batches.
        batch_idx: its index in the epoch.
        size: examples in it.
        open: whether a window has begun.
        clipped: whether gradients were changed after a backward pass, where the user calls the steps.
        pace: of the optimizer's steps; used only where the user calls them.

    Example:
        The first of two micro-batches behind a step, and a second backward pass of it.

        >>> behind = StepExamples()
        >>> behind.begin_batch([3, 1, 4], 0, size=3.0)
        >>> behind.foreseen
        3.0
        >>> behind.after_backward(), behind.after_backward()
        (3.0, 0.0)
        >>> behind.examples, behind.foreseen
        (3.0, 3.0)
    """

    def __init__(self) -> None:
        self.pace = Pace()
        self.detach()

    def detach(self) -> None:
        """Let go of the run, and of every batch; the pace is kept."""
        self._deposits: Deposits | None = None
        self.manual = False
        self.batch: Any = None
        self.batch_idx = 0
        self.size = 0.0
        self.clipped = self._told_of_backward = False
        self.close()

    def follow(self, optimizer: Optimizer) -> None:
        """Look from now on at what backward passes leave in an optimizer that the user steps."""
        self._deposits, self.manual = Deposits(optimizer), True

    def close(self) -> None:
        """The optimizer has stepped, or skipped."""
        self.open = False
        self._count_afresh()

    def _count_afresh(self) -> None:
        self.examples = 0.0
        self.batches = self.passes = 0
        self._counted_batch: int | None = None

    def steps(self, global_step: int) -> int:
        """Steps of this optimizer.

        Args:
            global_step: steps of all optimizers.
        """
        return self.pace.steps if self.manual else global_step

    # ------------------------------------------------------------------ a batch

    def begin_batch(self, batch: Any, batch_idx: int, *, size: float) -> None:
        """Take a batch in hand.

        Args:
            batch: the micro-batch.
            batch_idx: its index in the epoch.
            size: examples in it.
        """
        self.batch, self.batch_idx, self.size = batch, batch_idx, size

    @property
    def foreseen(self) -> float:
        """Examples behind the step if it is taken with the batch in hand, as well as those before."""
        return self.examples if self.counts_batch or self.batch is None else self.examples + self.size

    def end_batch(self) -> None:
        """Let go of it."""
        self.batch = None

    def before_backward(self) -> None:
        """Forget the batches whose gradients have been zeroed."""
        if self._deposits is not None and self._deposits.are_zeroed():
            self._count_afresh()

    def after_backward(self) -> float | None:
        """Count the batch in hand if its pass is behind the step.

        Returns:
            Examples that have come; 0 if they were counted before, None if the pass is not behind the step.
        """
        if self.batch is None or (self._deposits is not None and not self._deposits.have_come()):
            return None
        # Some optimizers ask for the same gradient several times in a step; the examples are the same.
        size = 0.0 if self.counts_batch else self.size
        self.passes += not self.counts_batch
        self._counted_batch = self.batch_idx
        self.examples += size
        self.batches += size > 0.0
        return size

    @property
    def counts_batch(self) -> bool:
        """Whether the batch in hand, or the last one, has been counted."""
        return self._counted_batch == self.batch_idx

    # ------------------------------------------------------------------ the step

    def look_at_gradients(self, optimizer: Optimizer, name: str, *, scaled: bool) -> bool:
        """See what the user's `training_step` has done to the gradients of the step to come.

        Args:
            optimizer: about to take it.
            name: of the callback, for messages.
            scaled: whether a scaler works on gradients too.

        Returns:
            Whether they turn out to be clipped, or changed otherwise, for the first time.
        """
        if self._deposits is None:
            return False
        changed = self._deposits.have_come()
        if self.passes == 0:
            if not self._told_of_backward and self._deposits.exist():
                self._told_of_backward = True
                rank_zero_warn(
                    f"{name} saw no manual_backward behind a step of {type(optimizer).__name__}, and leaves "
                    "the learning rate of such steps as it is: call self.manual_backward(loss) instead of "
                    "loss.backward()."
                )
            return False
        if not changed or self.clipped or scaled:
            return False
        self.clipped = True
        return True

    def end_step(self) -> None:
        """Count the step that was just taken."""
        self.pace.step(self.batches)

    def interrupt(self) -> bool:
        """Make ready for a checkpoint.

        Returns:
            Whether a window is still open.
        """
        if self.manual and self.batch is None:
            # A window of one of several optimizers may last over batches that are not behind its step.
            self.open = False
        return self.open


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
