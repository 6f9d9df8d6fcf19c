"""Who comes before whom among a Trainer's callbacks."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_surge.callbacks.batch_size_scheduler import BatchSizeScheduler
from lightning_surge.callbacks.hosts import is_accumulation_scheduler

__all__ = ["batch_size_scheduler", "check_indices", "take_place"]


def batch_size_scheduler(trainer: pl.Trainer) -> BatchSizeScheduler | None:
    """The callback of a Trainer that sets its batch size, if there is one."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((one for one in callbacks if isinstance(one, BatchSizeScheduler)), None)


def check_indices(indices: Sequence[int | None], name: str) -> None:
    """Refuse several callbacks that serve the same optimizer.

    Args:
        indices: of the optimizers that the callbacks of this kind serve.
        name: of the callback, for messages.

    Raises:
        MisconfigurationException: with the rule, and what was found.
    """
    if len(indices) > 1 and (None in indices or len(set(indices)) < len(indices)):
        raise MisconfigurationException(
            f"Expected one {name}, or several with a different optimizer= each, got {len(indices)} with "
            f"optimizer={indices}: two would multiply the same learning rate."
        )


def take_place(trainer: pl.Trainer, served: Sequence[pl.Callback], *, measures: bool) -> None:
    """Put callbacks that set learning rates between schedules of the batch size and everything else.

    Monitors must see the learning rate of the step, so they come after; schedules of the batch size must have
    spoken, so they come before.

    Args:
        trainer: at `setup`.
        served: the callbacks that set learning rates.
        measures: whether laws will be measured, which schedules may follow.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    first = [
        callback
        for callback in callbacks
        if isinstance(callback, BatchSizeScheduler) or is_accumulation_scheduler(callback)
    ]
    rest = [callback for callback in callbacks if callback not in first and callback not in served]
    # A new list: Lightning iterates over the old one now.
    trainer.callbacks = [*first, *served, *rest]  # type: ignore[attr-defined]
    if measures:
        for callback in first:
            if isinstance(callback, BatchSizeScheduler):
                callback.expect_law()
