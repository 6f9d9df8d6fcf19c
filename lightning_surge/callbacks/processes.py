"""Which processes train together, and which of their strategies gradients can be measured under."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from lightning_surge.callbacks.loaders import replicas_of
from lightning_surge.ranks import Ranks

__all__ = ["check_processes", "ranks_of"]


def check_processes(trainer: pl.Trainer, name: str, *, measures: bool) -> None:
    """Refuse strategies whose gradients cannot be told process by process.

    Args:
        trainer: at `setup`.
        name: of the callback, for messages.
        measures: whether gradients will be measured; a rule only needs to count examples.

    Raises:
        MisconfigurationException: with the rule, what was found, and the remedy.
    """
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
    if isinstance(strategy, DDPStrategy):
        _check_ddp(strategy, name)


def _check_ddp(strategy: DDPStrategy, name: str) -> None:
    if strategy._model_averaging_period is not None:
        raise MisconfigurationException(
            f"{name} needs equal parameters on all processes, got DDPStrategy with model_averaging_period="
            f"{strategy._model_averaging_period}, which lets them drift apart: leave it out."
        )
    if strategy._ddp_kwargs.get("static_graph", False):
        raise MisconfigurationException(
            f"{name} runs backward passes of its own, got DDPStrategy(static_graph=True), which counts every "
            "pass in the first step: leave it out."
        )


def ranks_of(trainer: pl.Trainer) -> Ranks:
    """The processes that measure together.

    Args:
        trainer: with its processes started.
    """
    if trainer.world_size == 1:
        return Ranks()
    return Ranks(
        trainer.strategy.root_device,
        count=trainer.world_size,
        rank=trainer.global_rank,
        replicas=replicas_of(trainer),
        reduces=isinstance(trainer.strategy, ModelParallelStrategy),
    )
