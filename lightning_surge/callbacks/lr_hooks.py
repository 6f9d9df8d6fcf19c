"""The factor on an optimizer's learning rate: on for its steps, off for everybody else."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities import rank_zero_warn
from torch.optim import Optimizer

from lightning_surge.callbacks.lightning_host import overrides
from lightning_surge.callbacks.settings import SurgeSettings
from lightning_surge.optimizers.families import decay_follows_lr, largest_lr
from lightning_surge.optimizers.lr_writer import LearningRateWriter

__all__ = ["LearningRateHooks"]

StepHook = Callable[[Optimizer, Any, Any], None]


class LearningRateHooks:
    """Writes the factor, and has hooks of its own where Lightning calls no callback in time.

    Args:
        optimizer: the one that is served.
        settings: the callback's.

    Attributes:
        optimizer: the one that is served.
        writer: of its learning rates.
    """

    def __init__(self, optimizer: Optimizer, settings: SurgeSettings) -> None:
        self.optimizer = optimizer
        keeps_decay = None if settings.scale_weight_decay else partial(decay_follows_lr, optimizer)
        self.writer = LearningRateWriter(optimizer, keeps_decay)
        self._dry_run = settings.dry_run
        self._cap_reached = False
        self._undo: list[Callable[[], object]] = []

    def around_steps(self, *, before: StepHook | None, after: StepHook) -> None:
        """Have functions called around every step of the optimizer.

        Args:
            before: None for none.
            after: called when the step has been taken.
        """
        self._undo.append(self.optimizer.register_step_post_hook(after).remove)
        if before is not None:
            self._undo.append(self.optimizer.register_step_pre_hook(before).remove)

    def watch(self, pl_module: pl.LightningModule, *, manual: bool, ended: Callable[[], None]) -> None:
        """Take the factor off where Lightning calls the user's code and then no callback hook in time.

        When the module's own hook ends an epoch by returning -1, Lightning moves the schedulers at once. In
        manual optimization the user's `training_step` moves them.

        Args:
            pl_module: the module that trains.
            manual: whether the user calls the optimizer's steps.
            ended: called where the module has ended an epoch.
        """
        name = "on_train_batch_start"
        if not manual and not overrides(pl_module, name):
            return
        hook = pl_module.on_train_batch_start

        @wraps(hook)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if manual:
                self.writer.restore()
            response = hook(*args, **kwargs)
            if response == -1:
                self.writer.restore()
                ended()
            return response

        vars(pl_module)[name] = watched
        self._undo.append(partial(vars(pl_module).pop, name, None))

    def apply(self, factor: float) -> None:
        """Write the scheduled learning rates times a factor, unless this is a dry run.

        Args:
            factor: positive.
        """
        if not self._dry_run:
            self.writer.apply(factor)

    def warn_of_a_cap(self) -> None:
        """Say once if the optimizer cuts off the learning rates that are written."""
        optimizer = self.optimizer
        cap = largest_lr(optimizer)
        used = max(float(group["lr"]) for group in optimizer.param_groups) if cap < math.inf else 0.0
        if used > cap and not self._cap_reached:
            self._cap_reached = True
            rank_zero_warn(
                f"{type(optimizer).__name__} uses min(lr, 1 / sqrt(step)): the learning rate written, "
                f"{used:g}, is above {cap:g} and has no effect beyond it, nor has the factor. Use a smaller "
                "learning rate."
            )

    def release(self) -> None:
        """Leave the optimizer and the module as they were found."""
        self.writer.restore()
        for undo in self._undo:
            undo()
        self._undo.clear()
