"""Which batch sizes the training loader at hand allows, and what they do to learning-rate schedules.

A loader may be another one in every epoch (``reload_dataloaders_every_n_epochs``,
``fit_loop.setup_data()``), so it is read again where an epoch begins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities import rank_zero_info
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_surge.callbacks.checks import check_accumulated_sizes, check_sampled_sizes
from lightning_surge.callbacks.lightning_host import (
    loader_batch_size,
    refuse_scheduled_validation,
    scheduled_sampler,
    warn,
)
from lightning_surge.schedules.batch_sampler import ScheduledBatchSampler
from lightning_surge.schedules.by_examples import ExamplesClock, share_of_peak
from lightning_surge.schedules.seesaw import Seesaw, SeesawSchedule
from lightning_surge.schedules.sizes import Schedule
from lightning_surge.schedules.windows import (
    AccumulatedSchedule,
    SampledSchedule,
    accumulation_for,
    total_steps,
)


@dataclass(frozen=True)
class MicroBatches:
    """What the user said about micro-batches, and who asks.

    Attributes:
        owner: Name of the callback, for messages.
        size: Examples per micro-batch on one replica; None reads the loader.
        largest: Examples that a micro-batch may have; None for no bound.
        replicas: Number of data-parallel replicas.
        in_tokens: Whether batches are counted by a function of the user's.
    """

    owner: str
    size: int | None
    largest: int | None
    replicas: int
    in_tokens: bool


@dataclass(frozen=True)
class TrainingLoader:
    """A training loader, as read.

    Attributes:
        loader: The loader, or the collection of them.
        sampler: Its `ScheduledBatchSampler`; None where batches are accumulated as they come.
        micro_batch_size: Examples per micro-batch on one replica; the largest, if a sampler cuts them.
        batches: Micro-batches in an epoch; None if that is not known.
        stated: The batch size that the loader itself states, beside ``micro_batch_size=``.
    """

    loader: Any
    sampler: ScheduledBatchSampler | None
    micro_batch_size: int
    batches: int | None
    stated: int | None

    @classmethod
    def read(cls, trainer: pl.Trainer, micro: MicroBatches) -> TrainingLoader:
        """Read the loader that the Trainer has now."""
        loader, count = trainer.train_dataloader, trainer.num_training_batches
        # An IterableDataset without a length counts as infinitely many.
        batches = count if isinstance(count, int) else None
        sampler = scheduled_sampler(loader, micro.owner)
        if sampler is not None:
            return cls(loader, sampler, sampler.largest_micro_batch, batches, None)
        try:
            stated = loader_batch_size(loader, micro.owner)
        except MisconfigurationException:
            if micro.size is None:
                raise
            stated = None
        size = micro.size or stated or 1
        if micro.largest is not None and size > micro.largest:
            raise MisconfigurationException(
                f"Expected micro-batches of at most max_micro_batch_size={micro.largest}, got"
                f" {size}: use a DataLoader with batch_size={micro.largest}."
            )
        return cls(loader, None, size, batches, stated)

    def admit(
        self, trainer: pl.Trainer, rule: Schedule, micro: MicroBatches, known: TrainingLoader | None
    ) -> None:
        """Refuse sizes that steps cannot have with this loader, and report the mechanism."""
        if known is not None and self._key(rule, micro) == known._key(rule, micro):
            return
        if self.sampler is not None:
            refuse_scheduled_validation(trainer)
            check_sampled_sizes(rule, self.sampler, micro.replicas, counts_tokens=micro.in_tokens)
            rank_zero_info(
                "Batch sizes are set by the batch sampler, exactly: micro-batches of at most"
                f" {self.micro_batch_size} examples on each replica, the rest by accumulation."
            )
            return
        if known is not None and micro.size is not None and known.stated and known.stated != self.stated:
            raise MisconfigurationException(
                f"Expected training loaders of batch_size={known.stated}, for which micro_batch_size="
                f"{micro.size} was given, got one of batch_size={self.stated} in mid-run: keep the batch size"
                " of the loader, or leave micro_batch_size= out."
            )
        check_accumulated_sizes(rule, self.micro_batch_size, micro.replicas)
        if self.batches is None and rule.unit == "epochs":
            raise MisconfigurationException(
                "Expected a schedule in steps or examples for a loader without a length, got unit='epochs':"
                " the share of an epoch is not known. Use unit='examples'."
            )
        unit = self.micro_batch_size * micro.replicas
        name, largest = max(reversed(rule.named_sizes.items()), key=itemgetter(1))
        longest = accumulation_for(largest, unit)
        if self.batches is not None and self.batches < longest and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            capped = accumulation_for(largest, unit, limit=self.batches)
            warn(
                f"{name}={largest} needs {longest} micro-batches per optimizer step, got an epoch of"
                f" {self.batches}: the size stays at {capped * unit} or below."
                f" Use a smaller {name}, or a larger DataLoader batch_size."
            )
        rank_zero_info(
            f"Batch sizes are set by accumulation, in powers of two of micro-batch {self.micro_batch_size} x"
            f" replicas {micro.replicas}."
        )

    def _key(self, rule: Schedule, micro: MicroBatches) -> tuple[Any, ...]:
        """What the checks depend on."""
        if self.sampler is not None:
            return (self.micro_batch_size, len(self.sampler.sampler), self.sampler.drop_last)  # type: ignore[arg-type]
        longest = accumulation_for(max(rule.named_sizes.values()), self.micro_batch_size * micro.replicas)
        return (self.micro_batch_size, self.stated, min(self.batches or longest, longest))

    def replay(self, schedule: Schedule, replicas: int) -> AccumulatedSchedule | SampledSchedule | None:
        """The sizes that steps will have; None if an epoch cannot be counted beforehand."""
        if not self.batches:
            return None
        if self.sampler is None:
            examples = self.batches * self.micro_batch_size * replicas
            return AccumulatedSchedule(schedule, self.micro_batch_size, replicas, examples)
        if self.batches < len(self.sampler):  # limit_train_batches= cuts epochs short
            return None
        examples = len(self.sampler.sampler) * replicas  # type: ignore[arg-type]
        return SampledSchedule(schedule, self.micro_batch_size, examples, replicas, self.sampler.drop_last)


def plan_along(
    trainer: pl.Trainer, pl_module: pl.LightningModule, rule: Seesaw, owner: str
) -> SeesawSchedule:
    """The sizes of a `Seesaw` for the training's learning-rate schedule, before a checkpoint moves that."""
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    clock = schedulers[0] if len(schedulers) == len(trainer.optimizers) == 1 else None
    if not isinstance(clock, ExamplesClock):
        names = ", ".join(type(one).__name__ for one in schedulers) or "no scheduler"
        raise MisconfigurationException(
            "Expected one optimizer and one learning-rate schedule that counts examples for Seesaw, got"
            f" {len(trainer.optimizers)} and {names}: return {{'scheduler': by_examples(scheduler,"
            f" examples_per_step={rule.start}), 'interval': 'step'}} from configure_optimizers."
        )
    try:
        shared = [trainer, pl_module, *pl_module.modules(), *pl_module.parameters()]
        plan = rule.along(clock, shared=shared, most=math.inf)
    except Exception as error:
        raise MisconfigurationException(
            "Expected a learning-rate schedule for Seesaw whose copy can be replayed before the training, got"
            f" {type(error).__name__}: {error} Use a torch scheduler, as LambdaLR(optimizer, ...)."
        ) from error
    if scheduled_sampler(trainer.train_dataloader, owner) is not None:
        # Made by trainer.estimated_stepping_batches in configure_optimizers, for batches of one size.
        trainer.fit_loop._combined_loader = None
    return plan


def warn_of_no_decay(trainer: pl.Trainer, plan: SeesawSchedule, examples_per_epoch: int | None) -> None:
    """Say so where the learning rate never falls, and the batch size stays what it is."""
    epochs, steps = trainer.max_epochs or -1, trainer.max_steps
    ends = [steps * plan.first_size] if steps > 0 else []
    if epochs > 0 and examples_per_epoch is not None:
        ends.append(epochs * examples_per_epoch)
    if ends and not trainer.fast_dev_run and not plan.grows_within(min(ends)):  # type: ignore[attr-defined]
        warn(
            f"Seesaw expected a learning-rate schedule that falls within the {min(ends)} examples of the"
            f" training, got one that never does: the batch size stays at {plan.first_size}. Use a schedule"
            " with a decay, or ConstantSize."
        )


def warn_of_schedules_cut_short(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    sizes: AccumulatedSchedule | SampledSchedule,
    owner: str,
) -> None:
    """Say where a learning-rate schedule stops that counts steps, if the training will have fewer.

    ``trainer.estimated_stepping_batches`` takes every micro-batch for a step, and a schedule sized by it, or
    by hand in the same way, is left far from its end as the batch size grows.
    """
    if trainer.fast_dev_run or not trainer.max_epochs or trainer.max_epochs < 0:  # type: ignore[attr-defined]
        return
    configs = [
        config
        for config in trainer.lr_scheduler_configs
        if config.interval == "step"
        and not config.reduce_on_plateau
        and not isinstance(config.scheduler, ExamplesClock)
    ]
    if not configs or (planned := trainer.estimated_stepping_batches) == math.inf:
        return
    assert sizes.examples_per_epoch is not None
    examples = trainer.max_epochs * sizes.examples_per_epoch
    try:
        steps = total_steps(sizes, examples)
    except ValueError:  # too many to count, or an epoch without a step
        return
    for config in configs:
        share = share_of_peak(
            config.scheduler,
            planned=int(planned) // config.frequency,
            taken=steps // config.frequency,
            shared=[pl_module, *pl_module.modules(), *pl_module.parameters()],
        )
        if share is not None:
            warn(
                "Expected a learning-rate schedule that reaches its end, got"
                f" {type(config.scheduler).__name__}, which counts optimizer steps: under {owner} the"
                f" training takes {steps} steps where the Trainer estimates {planned:g}, and ends at"
                f" {share:.2f} of the peak learning rate. Count examples instead:"
                f" by_examples(scheduler, examples_per_step={max(1, round(examples / planned))})."
            )
            return
