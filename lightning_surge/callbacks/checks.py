"""What cannot be combined with the callbacks: refused with a remedy, before any time is spent on training."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.optim import Optimizer

from lightning_surge.callbacks.lightning_host import (
    callbacks_of,
    is_accumulation_scheduler,
    overrides,
    replicas_of,
    warn,
)
from lightning_surge.callbacks.settings import REFERENCE_RULES, SurgeSettings
from lightning_surge.measure.direction import SIGN
from lightning_surge.measure.distributed import Ranks
from lightning_surge.optimizers.families import decay_follows_lr, optimizer_family
from lightning_surge.schedules.batch_sampler import ScheduledBatchSampler
from lightning_surge.schedules.sizes import BatchSizeRule, Schedule
from lightning_surge.schedules.windows import accumulation_for


def check_trainer(
    trainer: pl.Trainer, pl_module: pl.LightningModule, name: str, settings: SurgeSettings, repeats_step: bool
) -> None:
    """Refuse a Trainer or module that the callback cannot serve."""
    probes = settings.needs_curvature or not pl_module.automatic_optimization
    check_processes(trainer, name, measures=settings.measures, probes=probes)
    if not pl_module.automatic_optimization and repeats_step:
        raise MisconfigurationException(
            f"{name} cannot repeat the training_step of {type(pl_module).__name__}, which optimizes "
            "manually: pass loss_fn=, a function of (module, batch) that returns the mean loss which the "
            "optimizer minimises."
        )
    if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
        raise MisconfigurationException(
            f"{name} must see every batch, got training_step(dataloader_iter) in "
            f"{type(pl_module).__name__}: take the batch as an argument."
        )


def served_optimizer(
    trainer: pl.Trainer, pl_module: pl.LightningModule, name: str, index: int | None
) -> Optimizer:
    """The optimizer whose learning rate the callback sets."""
    trained = trained_optimizers(trainer.optimizers)
    found = f"{len(trained)} from configure_optimizers of {type(pl_module).__name__}"
    if index is None and len(trained) > 1:
        raise MisconfigurationException(
            f"{name} needs to know which optimizer it serves, got {found}: pass one "
            f"{name}(optimizer=i, loss_fn=...) for each that is to be served, i counting from 0, with the "
            "loss that this optimizer minimises."
        )
    if not trained:
        raise MisconfigurationException(
            f"{name} needs an optimizer, got {found}: return one that holds the parameters to train."
        )
    if index is None:
        return trained[0]
    if not 0 <= index < len(trainer.optimizers) or trainer.optimizers[index] not in trained:
        raise MisconfigurationException(
            f"Expected 0 <= optimizer < {len(trainer.optimizers)} of one with parameters, got "
            f"optimizer={index} and {found}: use its place in what configure_optimizers returns."
        )
    return trainer.optimizers[index]


def check_optimizer(
    trainer: pl.Trainer, module: pl.LightningModule, optimizer: Optimizer, name: str, settings: SurgeSettings
) -> None:
    """Refuse optimizers that the law does not describe, and name one that is not known."""
    law, curvature, family = settings.law, settings.needs_curvature, optimizer_family(optimizer)
    direction, why = family.direction, family.why
    for index, group in enumerate(optimizer.param_groups):
        if group.get("relative_step", False) or group.get("lr") is None:
            raise MisconfigurationException(
                f"{name} multiplies the learning rate, got parameter group {index} of "
                f"{type(optimizer).__name__} with lr={group.get('lr')} and relative_step="
                f"{group.get('relative_step', False)}, which leaves it to the optimizer: pass lr= (and "
                "relative_step=False, warmup_init=False) and a scheduler."
            )
    if not family.scalable:
        raise MisconfigurationException(
            f"{name} writes a learning rate for one step, got {type(optimizer).__name__}, which {why}: use "
            "another optimizer, as SGD or AdamW."
        )
    if law in REFERENCE_RULES:
        return
    if direction is None:
        raise MisconfigurationException(
            f"law={law!r} measures along the sign of the gradient or along the gradient, got "
            f"{type(optimizer).__name__}, which {why}: pass law='sqrt', 'linear' or 'constant', which "
            "measure nothing, or use another optimizer, as AdamW or SGD."
        )
    if not family.known:
        warn(
            f"{name} does not know {type(optimizer).__name__}: it is treated as an Adam-style optimizer, "
            "whose steps do not grow with the gradient. If they do, pass law='sqrt' or another rule."
        )
    if direction is not SIGN and law.startswith("theorem"):
        raise MisconfigurationException(
            f"law={law!r} is about sign-like updates, got {type(optimizer).__name__}: use "
            "law='measured', which takes the gradient-noise law for it."
        )
    if curvature and direction.of is None:
        raise MisconfigurationException(
            "Expected an optimizer along whose step curvature can be measured, got "
            f"{type(optimizer).__name__}, which {why}: use objective='progress' or "
            "'alignment', without log_peak=True."
        )
    clips = trainer.gradient_clip_val or overrides(module, "configure_gradient_clipping")
    if direction.loss_power and clips:
        warn(
            f"law={law!r} takes the steps of {type(optimizer).__name__} to be the gradient's, got clipping: "
            "while most steps are clipped their length is the same at every batch size, and the factor too "
            "large. Pass law='sqrt' if they are."
        )
    _check_parameters(optimizer, name, curvature=curvature)


def check_weight_decay(optimizer: Optimizer, name: str, setting: bool | str) -> None:
    """Refuse to write the decay where `lr * weight_decay` is not what decays per step."""
    for index, group in enumerate(optimizer.param_groups):
        decay = group.get("weight_decay", 0.0)
        if decay == 0.0 or decay_follows_lr(optimizer, group):
            continue
        raise MisconfigurationException(
            f"scale_weight_decay={setting!r} sets lr * weight_decay, which is the decay per step only where "
            f"that is decoupled, got parameter group {index} of {type(optimizer).__name__} with weight_decay="
            f"{float(decay):g}, whose decay is part of the gradient: {name} cannot take the factor off again "
            "after averages, momentum or a division. Use AdamW, SGD without momentum, or an option such as "
            "decoupled_weight_decay=True, or leave scale_weight_decay=True."
        )


def _check_parameters(optimizer: Optimizer, name: str, *, curvature: bool) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.device.type == "mps":
                raise MisconfigurationException(
                    f"{name} sums in float64, which device 'mps' does not have: use accelerator='cpu', or "
                    "law='sqrt', which measures nothing."
                )
            if parameter.is_complex():
                raise MisconfigurationException(
                    f"{name} measures real parameters, got dtype {parameter.dtype}: train "
                    "torch.view_as_real of them, or pass law='sqrt', which measures nothing."
                )
            if curvature and torch.finfo(parameter.dtype).eps > torch.finfo(torch.float32).eps:
                raise MisconfigurationException(
                    f"Expected float32 parameters, got dtype {parameter.dtype}, which cannot hold the "
                    "small moves that measure curvature: use an objective that needs none ('progress', "
                    "'alignment'), keep float32 parameters (precision='bf16-mixed' or '16-mixed' does, which "
                    "computes in 16 bits all the same), or pass law='sqrt', law='linear' or law='constant', "
                    "which measure nothing."
                )


def trained_optimizers(optimizers: Sequence[Optimizer]) -> list[Optimizer]:
    """Those with parameters: Lightning adds one without any to a module that has no optimizer."""
    return [optimizer for optimizer in optimizers if any(group["params"] for group in optimizer.param_groups)]


def check_host(trainer: pl.Trainer, pl_module: pl.LightningModule, name: str) -> None:
    """Refuse what a changing accumulation cannot be combined with."""
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
    for other in callbacks_of(trainer, object):
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
    """Refuse sizes that are not a power of two of micro-batches."""
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
    """Refuse sizes that the batch sampler cannot make."""
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


def check_processes(trainer: pl.Trainer, name: str, *, measures: bool, probes: bool) -> None:
    """Refuse strategies whose gradients cannot be read process by process."""
    strategy = trainer.strategy
    if strategy.handles_gradient_accumulation:
        raise MisconfigurationException(
            f"{name} needs the gradients that autograd leaves, got {type(strategy).__name__}, "
            "which keeps its own: use strategy='auto', 'ddp', or ModelParallelStrategy with fully_shard."
        )
    if trainer.world_size == 1 or not measures:
        return
    if not isinstance(strategy, (DDPStrategy, ModelParallelStrategy)):
        raise MisconfigurationException(
            f"{name} measures under strategy='ddp' and ModelParallelStrategy (FSDP2), got "
            f"{type(strategy).__name__} with {trainer.world_size} processes: use one of them; a module "
            "sharded with fully_shard in configure_model takes the place of FSDPStrategy."
        )
    replicas = replicas_of(trainer)
    if isinstance(strategy, ModelParallelStrategy) and replicas != trainer.world_size:
        raise MisconfigurationException(
            f"{name} measures data-parallel processes only, got {trainer.world_size} processes for "
            f"{replicas} replicas of the data: use ModelParallelStrategy(data_parallel_size="
            f"{trainer.world_size}, tensor_parallel_size=1)."
        )
    if not isinstance(strategy, DDPStrategy):
        if probes:
            raise MisconfigurationException(
                f"{name} measures sharded parameters from the norms of accumulation windows alone, got "
                f"{type(strategy).__name__} with manual optimization, or an objective, law or schedule that "
                "needs curvature: use objective='progress' or 'alignment', strategy='ddp', or law='sqrt'."
            )
        return
    if strategy._model_averaging_period is not None:
        raise MisconfigurationException(
            f"{name} needs equal parameters on all processes, got DDPStrategy with model_averaging_period="
            f"{strategy._model_averaging_period}, which lets them drift apart: leave it out."
        )
    if probes and strategy._ddp_kwargs.get("static_graph", False):
        raise MisconfigurationException(
            f"{name} runs backward passes of its own for curvature and in manual optimization, got "
            "DDPStrategy(static_graph=True), which counts every pass in the first step: leave it out."
        )


def ranks_of(trainer: pl.Trainer) -> Ranks:
    """The processes that measure together."""
    if trainer.world_size == 1:
        return Ranks()
    return Ranks(
        trainer.strategy.root_device,
        count=trainer.world_size,
        rank=trainer.global_rank,
        replicas=replicas_of(trainer),
        sharded=isinstance(trainer.strategy, ModelParallelStrategy),
    )
