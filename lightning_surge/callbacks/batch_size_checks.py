"""What `BatchSizeScheduler` refuses, before the first step is taken."""

from __future__ import annotations

import inspect

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_surge.callbacks.hosts import is_accumulation_scheduler
from lightning_surge.sampling import ScheduledBatchSampler
from lightning_surge.schedules import BatchSizeRule, Schedule
from lightning_surge.windows import accumulation_for

__all__ = ["check_accumulated_sizes", "check_host", "check_sampled_sizes"]


def check_host(trainer: pl.Trainer, pl_module: pl.LightningModule, name: str) -> None:
    """Refuse a Trainer, a strategy, another callback or a module that a changing accumulation cannot go with.

    Args:
        trainer: that is set up.
        pl_module: that it will train.
        name: of the callback that asks.

    Raises:
        MisconfigurationException: with what was found, and the remedy.
    """
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            f"{name} needs automatic optimization, got automatic_optimization=False in"
            f" {type(pl_module).__name__}: Lightning accumulates no gradients in manual optimization."
            " Remove the callback, or set automatic_optimization=True."
        )
    if trainer.strategy.handles_gradient_accumulation:
        raise MisconfigurationException(
            f"{name} needs a strategy that lets Lightning accumulate gradients, got"
            f" strategy={type(trainer.strategy).__name__}, which fixes the accumulation when it starts:"
            " use strategy='ddp', or remove the callback."
        )
    if trainer.accumulate_grad_batches != 1:
        raise MisconfigurationException(
            f"{name} sets the accumulation itself and needs Trainer(accumulate_grad_batches=1), got"
            f" accumulate_grad_batches={trainer.accumulate_grad_batches}: remove it from the Trainer;"
            " the schedule sets the first size."
        )
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for other in callbacks:
        if is_accumulation_scheduler(other):
            raise MisconfigurationException(
                f"Expected one callback that changes the accumulation, got {name} and"
                f" {type(other).__name__}: remove one of the two."
            )
    if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
        # Lightning knows the index of such a batch only after the step, so it zeroes gradients
        # one micro-batch late and drops the first of every window.
        raise MisconfigurationException(
            f"{name} needs training_step(batch, batch_idx), got training_step(dataloader_iter) in"
            f" {type(pl_module).__name__}, where Lightning accumulates wrongly: take the batch as an"
            " argument."
        )


def check_accumulated_sizes(schedule: BatchSizeRule, micro_batch_size: int, replicas: int) -> None:
    """Refuse sizes that are no power of two of micro-batches.

    Args:
        schedule: of which the named sizes are looked at.
        micro_batch_size: examples, on one replica.
        replicas: data-parallel ones.

    Raises:
        MisconfigurationException: with the nearest sizes that are.
    """
    unit = micro_batch_size * replicas
    for name, size in schedule.named_sizes.items():
        below = unit * accumulation_for(size, unit)
        if size != below:
            remedy = f"{name}={below}" if size < unit else f"{name}={below} or {name}={2 * below}"
            raise MisconfigurationException(
                f"Expected {name} to be micro-batch size x replicas ({micro_batch_size} x"
                f" {replicas}) times a power of two, got {name}={size}: use {remedy}, or change the"
                " DataLoader's batch_size. A ScheduledBatchSampler in the DataLoader, and no"
                " micro_batch_size=, allow any size."
            )


def check_sampled_sizes(
    schedule: Schedule, sampler: ScheduledBatchSampler, replicas: int, *, counts_tokens: bool
) -> None:
    """Refuse sizes that the batch sampler cannot give.

    Args:
        schedule: of which the named sizes are looked at.
        sampler: of the training loader.
        replicas: data-parallel ones.
        counts_tokens: whether batches are counted by a function of the user's.

    Raises:
        MisconfigurationException: with what was found, and the remedy.
    """
    if counts_tokens and schedule.unit == "examples":
        raise MisconfigurationException(
            "Expected a schedule in steps or epochs with a ScheduledBatchSampler and batch_size_fn=, got"
            " unit='examples': a sampler cannot know how many tokens an example will have. Use"
            " unit='steps', or DataLoader(batch_size=...), whose batches are accumulated."
        )
    epoch = len(sampler.sampler) * replicas  # type: ignore[arg-type]
    for name, size in schedule.named_sizes.items():
        if size % replicas:
            below = max(size // replicas, 1) * replicas
            raise MisconfigurationException(
                f"Expected {name} to be a multiple of the {replicas} data-parallel replicas, got"
                f" {name}={size}: use {name}={below}."
            )
        if sampler.drop_last and size > epoch:
            raise MisconfigurationException(
                f"Expected {name} to be at most the {epoch} examples of an epoch, which drop_last=True"
                f" would leave without a step, got {name}={size}: use drop_last=False, or {name}={epoch}."
            )
