"""What the Trainer's loaders tell, and what Lightning must be told again when an epoch changes its length."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_surge.sampling import ScheduledBatchSampler

__all__ = [
    "batches_per_epoch",
    "loader_batch_size",
    "refresh_epoch_length",
    "refuse_scheduled_validation",
    "replicas_of",
    "scheduled_sampler",
]


def batches_per_epoch(trainer: pl.Trainer) -> int | None:
    """Micro-batches of the present epoch; None if it has no end that is known."""
    # An IterableDataset without a length counts as infinitely many.
    batches = trainer.num_training_batches
    return batches if isinstance(batches, int) else None


def replicas_of(trainer: pl.Trainer) -> int:
    """Number of data-parallel replicas, which all see different examples."""
    # Not world_size: under tensor parallelism several ranks share one replica's examples.
    kwargs = trainer.distributed_sampler_kwargs
    return 1 if kwargs is None else int(kwargs["num_replicas"])


def loader_batch_size(loader: Any) -> int:
    """Examples per micro-batch that a loader was made with.

    Raises:
        MisconfigurationException: if it does not say.
    """
    size = getattr(loader, "batch_size", None)
    if size is None:  # a DataLoader with a batch sampler has batch_size=None
        size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise MisconfigurationException(
            f"Expected a training DataLoader with a batch_size, got batch_size={size!r} from"
            f" {type(loader).__name__}: pass micro_batch_size= to BatchSizeScheduler."
        )
    return size


def scheduled_sampler(loader: Any) -> ScheduledBatchSampler | None:
    """The batch sampler of a loader, if it is one that follows schedules.

    Raises:
        MisconfigurationException: if it sits in one of several loaders.
    """
    if isinstance(loader, (list, tuple, dict)):
        if _has_scheduled_sampler(loader):
            raise MisconfigurationException(
                f"Expected one training DataLoader with a ScheduledBatchSampler, got {len(loader)} loaders:"
                " Lightning puts their batches together. Use DataLoader(batch_size=...) in each, and pass"
                " micro_batch_size= to BatchSizeScheduler, which then accumulates."
            )
        return None
    sampler = getattr(loader, "batch_sampler", None)
    return sampler if isinstance(sampler, ScheduledBatchSampler) else None


def _has_scheduled_sampler(loaders: Any) -> bool:
    if isinstance(loaders, (list, tuple, dict)):
        parts = loaders.values() if isinstance(loaders, dict) else loaders
        return any(_has_scheduled_sampler(part) for part in parts)
    return isinstance(getattr(loaders, "batch_sampler", None), ScheduledBatchSampler)


def refuse_scheduled_validation(trainer: pl.Trainer) -> None:
    """Refuse a sampler that would cut validation into the micro-batches of training, and leave out the rest.

    Raises:
        MisconfigurationException: if a validation loader has a `ScheduledBatchSampler`.
    """
    if _has_scheduled_sampler(trainer.val_dataloaders):
        raise MisconfigurationException(
            "Expected a ScheduledBatchSampler in the training DataLoader only, got one for validation, whose"
            " batches would follow the sizes of training: use DataLoader(batch_size=...) there."
        )


def refresh_epoch_length(trainer: pl.Trainer) -> None:
    """Let Lightning read the length of the training loader again, as if the epoch were the first.

    It reads it once per `fit`. With a stale one it would skip validation and the last step of an epoch that
    got shorter, and leave out examples of one that got longer.

    Args:
        trainer: in `on_train_epoch_start`, with one training DataLoader that has a length.
    """
    length, limit = len(trainer.train_dataloader), trainer.limit_train_batches  # type: ignore[arg-type]
    # At least one, where the first epoch had one: without a batch Lightning ends the training.
    batches = min(length, limit) if isinstance(limit, int) else max(1, int(length * limit))
    combined = trainer.fit_loop._combined_loader
    assert combined is not None
    combined.limits = [batches]
    trainer.fit_loop.max_batches = batches
    interval = trainer.val_check_interval
    if isinstance(interval, int):
        # Lightning refuses an interval longer than the epoch, and would here never validate again.
        if trainer.check_val_every_n_epoch is not None:
            trainer.val_check_batch = min(interval, batches)
    elif isinstance(interval, float) and trainer.val_check_batch is not None:
        trainer.val_check_batch = max(1, int(batches * interval))
