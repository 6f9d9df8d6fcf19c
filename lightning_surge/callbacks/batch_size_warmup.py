"""The ramp that most people want, in three numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_surge.callbacks.batch_size_scheduler import BatchSizeScheduler
from lightning_surge.schedules import GeometricRamp, whole_number

__all__ = ["BatchSizeWarmup"]


class BatchSizeWarmup(BatchSizeScheduler):
    """Ramps the number of examples per optimizer step from ``start`` to ``end``, by equal factors.

    At optimizer step t (``trainer.global_step``) the ramp requests
    ``start * (end / start) ** (t / num_steps)`` examples: `BatchSizeScheduler` with a `GeometricRamp`.

    Args:
        start: Examples per optimizer step at first. Where a DataLoader's batches are accumulated: the
            micro-batch size times the replicas, times a power of two.
        end: Examples per optimizer step from ``num_steps`` on, of the same form, at least ``start``.
        num_steps: Length of the ramp in optimizer steps.
        micro_batch_size: Examples per micro-batch on one replica. ``None`` reads the ``batch_size``
            of the training DataLoader, or of its batch sampler.
        batch_size_fn: Counts the examples, or tokens, in a batch; None takes the leading dimension of its
            first tensor.

    Raises:
        ValueError: If an argument is no positive whole number, or ``end < start``.
        MisconfigurationException: As for `BatchSizeScheduler`.

    Example:
        >>> from lightning_surge.schedules import Progress
        >>> warmup = BatchSizeWarmup(start=16, end=512, num_steps=2000)
        >>> warmup.requested_batch_size, warmup.scheduled_batch_size
        (16, 16)
        >>> [warmup.schedule(Progress(step=step)) for step in (0, 400, 2000)]
        [16, 32, 512]
    """

    def __init__(
        self,
        start: int,
        end: int,
        num_steps: int,
        *,
        micro_batch_size: int | None = None,
        batch_size_fn: Callable[[Any], float] | None = None,
    ) -> None:
        num_steps = whole_number("num_steps", num_steps, minimum=1)
        super().__init__(
            GeometricRamp(start, end, num_steps),
            micro_batch_size=micro_batch_size,
            batch_size_fn=batch_size_fn,
        )
