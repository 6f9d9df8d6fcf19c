"""The batches and examples behind the optimizer step about to be taken."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_surge.callbacks.lightning_host import warn
from lightning_surge.callbacks.measuring.plan import Pace
from lightning_surge.measure.gradients import dense


class StepExamples:
    """Counts the batches whose gradients the optimizer's next step will use, each once and whole.

    In automatic optimization every backward pass is behind the next step. In manual optimization only those
    are that left something in the optimizer's parameters since these were zeroed.

    Attributes:
        examples: examples behind the step so far.
        batches: micro-batches that hold them.
        passes: micro-batches whose backward pass is behind the step, empty ones too.
        manual: whether the user calls the optimizer's steps.
        batch: the current micro-batch; None between batches.
        open: whether an accumulation window has begun.
        pace: of the optimizer's steps in manual optimization.
    """

    def __init__(self) -> None:
        self.pace = Pace()
        self.detach()

    def detach(self) -> None:
        """Forget the run and every batch, but not the pace."""
        self._tracker: MicroBatchTracker | None = None
        self.manual = False
        self.batch: Any = None
        self.batch_idx = 0
        self.size = 0.0
        self._told_of_backward = False
        self.close()

    def follow(self, optimizer: Optimizer) -> None:
        """Watch what backward passes leave in an optimizer that the user steps."""
        self._tracker, self.manual = MicroBatchTracker(optimizer), True

    def close(self) -> None:
        """The optimizer has stepped, or skipped."""
        self.open = False
        self._reset_count()

    def _reset_count(self) -> None:
        self.examples = 0.0
        self.batches = self.passes = 0
        self._counted_batch: int | None = None

    # ------------------------------------------------------------------ a batch

    def begin_batch(self, batch: Any, batch_idx: int, *, size: float) -> None:
        """Begin a micro-batch of `size` examples."""
        self.batch, self.batch_idx, self.size = batch, batch_idx, size

    @property
    def foreseen(self) -> float:
        """Examples behind the step if it is taken with the current batch, as well as those before."""
        return self.examples if self.counts_batch or self.batch is None else self.examples + self.size

    def before_backward(self) -> None:
        """Forget the batches whose gradients have been zeroed."""
        if self._tracker is not None and self._tracker.are_zeroed():
            self._reset_count()

    def after_backward(self) -> float | None:
        """Count the current batch: its examples, 0 if counted before, None if not behind the step."""
        if self.batch is None or (self._tracker is not None and not self._tracker.have_come()):
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
        """Whether the current batch, or the last one, has been counted."""
        return self._counted_batch == self.batch_idx

    # ------------------------------------------------------------------ the step

    def look_at_gradients(self, optimizer: Optimizer, name: str) -> None:
        """Warn, once, if they have come from no pass that was seen."""
        if self._tracker is None:
            return
        self._tracker.have_come()  # what clipping by hand has changed is no news to the next pass
        if self.passes == 0 and not self._told_of_backward and self._tracker.exist():
            self._told_of_backward = True
            warn(
                f"{name} saw no manual_backward behind a step of {type(optimizer).__name__}, and leaves the "
                "learning rate of such steps as it is: call self.manual_backward(loss) instead of "
                "loss.backward()."
            )

    def interrupt(self) -> bool:
        """Prepare for a checkpoint; whether an accumulation window is still open."""
        if self.manual and self.batch is None:
            # A window of one of several optimizers may last over batches that are not behind its step.
            self.open = False
        return self.open


class MicroBatchTracker:
    """Watches what micro-batches leave in the gradients of one optimizer's parameters."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._seen = self._look()

    def _look(self) -> list[tuple[int, int] | None]:
        return [
            None if parameter.grad is None else (id(parameter.grad), parameter.grad._version)
            for group in self._optimizer.param_groups
            for parameter in group["params"]
        ]

    def have_come(self) -> bool:
        """Whether any gradient has changed since the last look."""
        before, self._seen = self._seen, self._look()
        return self._seen != before

    def are_zeroed(self) -> bool:
        """Whether nothing is left of earlier passes: all gradients are None, or were set to zero.

        Gradients of zero that nobody has touched since the last look count as left by a pass.
        """
        changed = self.have_come()
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
