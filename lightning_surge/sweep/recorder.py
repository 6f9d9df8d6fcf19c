"""Takes down the loss of one training of a sweep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer

from lightning_surge.callbacks.batch_counter import BatchCounter
from lightning_surge.callbacks.lightning_host import replicas_of
from lightning_surge.schedules.by_examples import ExamplesClock
from lightning_surge.sweep.cells import CellSpec, Reached, SweepError
from lightning_surge.sweep.config import imported

__all__ = ["Crossings", "DivergedError", "LossRecorder", "SmoothedLoss", "TargetsReachedError"]


# The name of what `training_step` returns; any other name is one that the module logs.
TRAINING_LOSS = "loss"
# A training loss is averaged over this share of a cell unless `smoothing` says otherwise.
SMOOTHED_SHARE = 1 / 50


class DivergedError(Exception):
    """The loss is no number any more."""


class TargetsReachedError(Exception):
    """Nothing is left to find out."""


class LossRecorder(pl.Callback):
    """Takes down a cell's loss, counts its examples, and ends it when the loss is no number any more.

    A loss from validation is taken as it is, one from training as an average over examples.

    Args:
        spec: of the cell.

    Attributes:
        crossings: when the targets were reached.
        steps: optimizer steps so far.
        examples: behind them, over all replicas.
        loss: the latest; None before the first.
        trains: whether the loss is one of training; None until that can be told.
        validated_at: the step of the latest validation that had it.
    """

    def __init__(self, spec: CellSpec) -> None:
        settings, cell = spec
        self._settings = settings
        self._batch_size = cell.batch_size
        function = settings.batch_size_fn
        self._count = BatchCounter(
            None if function is None else imported(function, "--batch-size-fn"), "A sweep"
        )
        smoothing = settings.smoothing or max(1.0, SMOOTHED_SHARE * settings.examples_of(cell.batch_size))
        self._smoothed = SmoothedLoss(smoothing)
        self.trains: bool | None = settings.metric == TRAINING_LOSS or None
        self.crossings = Crossings(settings.targets)
        self.steps = 0
        self.examples = 0
        self.loss: float | None = None
        self.validated_at = -1
        self._replicas = 1
        self._micro_batch = 0.0
        self._open_window()

    def _open_window(self) -> None:
        self._window = 0.0
        self._losses: list[tuple[Tensor, float]] = []
        self._announced = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the replicas; schedules that count examples learn that somebody counts."""
        self._replicas = replicas_of(trainer)
        if self._replicas != self._settings.replicas:
            raise MisconfigurationException(
                f"Expected a Trainer with {self._settings.replicas} data-parallel replicas, got "
                f"{self._replicas}: pass --replicas {self._replicas}, or --set trainer.devices=1."
            )
        for config in trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, ExamplesClock):
                config.scheduler.advance(0.0)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count the micro-batch."""
        self._micro_batch = self._count(batch)
        self._window += self._micro_batch

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Move the schedules that count examples, once per step."""
        if not self._announced:
            self._announced = True
            for config in trainer.lr_scheduler_configs:
                if isinstance(config.scheduler, ExamplesClock):
                    config.scheduler.advance(self._window * self._replicas)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take down the loss of the micro-batch, and of the step if it ended here."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            # Lightning has divided it by the accumulation.
            scale = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            self._losses.append((loss.detach() * scale, self._micro_batch))
        if trainer.global_step > self.steps:
            self._end_step(trainer)

    def _end_step(self, trainer: pl.Trainer) -> None:
        examples = self._window * self._replicas
        self._check_first_step(examples)
        self.steps = trainer.global_step
        self.examples += round(examples)
        loss = self._mean_over_replicas(trainer, self._window_loss())
        if loss is not None and not math.isfinite(loss):
            raise DivergedError(f"the training loss became {loss} at step {self.steps}")
        name = self._settings.metric
        if self.trains is None:
            # What is logged now comes from training: nothing was validated so far.
            self.trains = name in trainer.callback_metrics
        if self.trains and name != TRAINING_LOSS:
            loss = self._mean_over_replicas(trainer, trainer.callback_metrics[name])
        if self.trains and loss is not None:
            self._take(self._smoothed.add(loss, examples))
        self._open_window()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take down the loss of the validation."""
        loss = trainer.callback_metrics.get(self._settings.metric)
        if not self.trains and loss is not None:
            self.validated_at = self.steps
            mean = self._mean_over_replicas(trainer, loss)
            assert mean is not None
            self._take(mean)

    def _take(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise DivergedError(f"{self._settings.metric} became {loss} at step {self.steps}")
        self.loss = loss
        self.crossings.look(self.steps, self.examples, loss)
        if self._settings.stop_at_target and self.crossings.complete:
            raise TargetsReachedError

    def _window_loss(self) -> Tensor | None:
        """Mean over the examples of the window."""
        if not self._losses:
            return None
        total = sum(examples for _, examples in self._losses)
        return torch.stack([loss * (examples / total) for loss, examples in self._losses]).sum()

    def _mean_over_replicas(self, trainer: pl.Trainer, loss: Tensor | None) -> float | None:
        # All replicas must see the same number, or one would stop and the others wait for it.
        if loss is not None and self._replicas > 1:
            loss = trainer.strategy.reduce(loss, reduce_op="mean")
        return None if loss is None else float(loss)

    def _check_first_step(self, counted: float) -> None:
        if self.steps == 0 and counted != self._batch_size:
            raise ValueError(
                f"Expected {self._batch_size} examples in the first step, got {counted:g}: "
                f"{self._settings.batch_size_key} must reach the training DataLoader's batch_size, the "
                "training set must hold a batch, and --batch-size-fn names a function that counts the "
                "examples of batches without a leading dimension of examples."
            )

    def final_loss(self, metrics: dict[str, Tensor]) -> float:
        """The loss at the end.

        Args:
            metrics: what was logged last, in training or validation.

        Raises:
            SweepError: if there is none of that name.
        """
        if self.loss is None:
            name = self._settings.metric
            if name not in metrics:
                raise SweepError(
                    f"Expected the model to log {name!r} in training or validation, got "
                    f"{', '.join(sorted(metrics)) or 'nothing'}: pass one of them as --metric, or "
                    f"--metric {TRAINING_LOSS} for what training_step returns, averaged."
                )
            self._take(float(metrics[name]))
        assert self.loss is not None
        return self.loss


class SmoothedLoss:
    """An exponential average over examples, so that every batch size averages over equally much data.

    Args:
        examples: after so many a loss counts 1/e as much.

    Raises:
        ValueError: if that is not positive.

    Example:
        >>> loss = SmoothedLoss(100)
        >>> loss.add(2.0, examples=50), loss.add(2.0, examples=50)
        (2.0, 2.0)
    """

    def __init__(self, examples: float) -> None:
        if not 0 < examples < math.inf:
            raise ValueError(f"Expected 0 < smoothing < inf, got smoothing={examples}: count examples.")
        self._examples = examples
        self._sum = self._weight = 0.0

    @property
    def value(self) -> float | None:
        """The average; None before the first loss."""
        return self._sum / self._weight if self._weight else None

    def add(self, loss: float, examples: float) -> float:
        """Take a loss into account.

        Args:
            loss: mean over the examples of one step.
            examples: how many they are.

        Returns:
            The average now.
        """
        kept = math.exp(-examples / self._examples)
        # The weight is kept beside the sum, so that the zero at the beginning does not count.
        self._sum = kept * self._sum + (1 - kept) * loss
        self._weight = kept * self._weight + (1 - kept)
        return self._sum / self._weight


class Crossings:
    """Notes when a loss first is at most each of some targets.

    Between two looks at the loss a straight line is drawn, so that looking seldom does not mean counting too
    many steps.

    Args:
        targets: losses.

    Example:
        >>> crossings = Crossings([1.0, 0.1])
        >>> crossings.look(10, 160, 3.0)
        >>> crossings.look(20, 320, 0.5)
        >>> crossings.reached
        (Reached(target=1.0, steps=18, examples=288), Reached(target=0.1, steps=None, examples=None))
    """

    def __init__(self, targets: Sequence[float]) -> None:
        self._reached = {target: Reached(target, None, None) for target in targets}
        self._last: tuple[int, int, float] | None = None

    def look(self, steps: int, examples: int, loss: float) -> None:
        """Take note of a loss.

        Args:
            steps: optimizer steps taken so far.
            examples: behind them.
            loss: finite.
        """
        steps_before, examples_before, loss_before = self._last or (steps, examples, loss)
        for target, reached in self._reached.items():
            if reached.steps is None and loss <= target:
                # The loss before was above the target, or there was none.
                share = (loss_before - target) / (loss_before - loss) if self._last else 1.0
                # Whole steps, and the examples behind them.
                step = math.ceil(steps_before + share * (steps - steps_before))
                share = (step - steps_before) / max(1, steps - steps_before) if self._last else 1.0
                seen = round(examples_before + share * (examples - examples_before))
                self._reached[target] = Reached(target, step, seen)
        self._last = (steps, examples, loss)

    @property
    def reached(self) -> tuple[Reached, ...]:
        """One entry for each target."""
        return tuple(self._reached.values())

    @property
    def complete(self) -> bool:
        """Whether there are targets and all of them were reached."""
        return bool(self._reached) and all(entry.steps is not None for entry in self._reached.values())
