"""Logs what an optimizer's steps were taken with, where Lightning keeps what is logged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import lightning.pytorch as pl
from torch.optim import Optimizer

from lightning_surge.callbacks.checks import served_optimizer, trained_optimizers
from lightning_surge.callbacks.logging import add_tensorboard_layout, group_suffixes, lr_metrics
from lightning_surge.policy import Decision

__all__ = ["StepLog", "StepRecord", "add_layout", "logs_now", "optimizer_suffix"]


class StepRecord(NamedTuple):
    """What is logged of one optimizer step.

    Attributes:
        decision: of the policy.
        batch_size: examples behind the step.
        scheduled: learning rate of each parameter group from the schedule.
        used: and with the factor.
    """

    decision: Decision
    batch_size: float
    scheduled: list[float]
    used: list[float]


class StepLog:
    """Keeps the latest step until it can be logged.

    Args:
        optimizer: the one that is served.
        suffix: of the optimizer, with which keys end.
        prog_bar: whether to show the learning rate used in the progress bar.

    Attributes:
        optimizer: the one that is served.
        suffix: of the optimizer, with which keys end.
        unlogged: the latest step; None once it has been logged.
    """

    def __init__(self, optimizer: Optimizer, suffix: str, *, prog_bar: bool) -> None:
        self.optimizer = optimizer
        self.suffix = suffix
        self._prog_bar = prog_bar
        self.unlogged: StepRecord | None = None

    def note(self, decision: Decision, batch_size: float, scheduled: list[float]) -> None:
        """Keep a step whose learning rates are written. Reading these back may wait for the device.

        Args:
            decision: of the policy.
            batch_size: examples behind the step.
            scheduled: learning rate of each parameter group from the schedule.
        """
        used = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.unlogged = StepRecord(decision, batch_size, scheduled, used)

    def write(self, pl_module: pl.LightningModule, metrics: dict[str, float]) -> None:
        """Log the step that was kept.

        Args:
            pl_module: the module that trains.
            metrics: what is to be logged besides its learning rates, by names without the suffix.
        """
        record, self.unlogged = self.unlogged, None
        assert record is not None
        logged = {name + self.suffix: value for name, value in metrics.items()}
        logged |= lr_metrics(
            group_suffixes(self.optimizer, self.suffix),
            self.suffix,
            scheduled=record.scheduled,
            used=record.used,
            decision=record.decision,
        )
        pl_module.log_dict(logged, on_step=True, on_epoch=False, batch_size=1)
        if self._prog_bar:
            name = f"lr_used{self.suffix}"
            pl_module.log(name, record.used[0], prog_bar=True, logger=False, batch_size=1)


def logs_now(trainer: pl.Trainer) -> bool:
    """Whether Lightning keeps what is logged in this batch; what is logged in others is dropped."""
    return bool(trainer._logger_connector.should_update_logs or trainer.fast_dev_run)  # type: ignore[attr-defined]


def optimizer_suffix(trainer: pl.Trainer, index: int | None) -> str:
    """What keys end with where there are several optimizers; else nothing.

    Args:
        trainer: in training.
        index: of the optimizer.
    """
    return f"/opt{index}" if len(trained_optimizers(trainer.optimizers)) > 1 else ""


def add_layout(
    trainer: pl.Trainer, pl_module: pl.LightningModule, name: str, indices: Sequence[int | None]
) -> None:
    """Give TensorBoard its charts of every optimizer that is served.

    Args:
        trainer: in training.
        pl_module: the module that trains.
        name: of the callback, for messages.
        indices: of the optimizers; a single None for the only one.
    """
    groups = {}
    for index in indices:
        suffix = optimizer_suffix(trainer, index)
        groups[suffix] = group_suffixes(served_optimizer(trainer, pl_module, name, index), suffix)
    add_tensorboard_layout(trainer.loggers, groups)
