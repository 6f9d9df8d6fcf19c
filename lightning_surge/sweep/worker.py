"""The process of one cell: the user's training, with a callback that takes down the loss.

python -m lightning_surge.sweep.worker ORDER
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer

from lightning_surge.callbacks.batch_counter import BatchCounter
from lightning_surge.callbacks.batch_size_scheduler import clocks_of
from lightning_surge.callbacks.lightning_host import replicas_of
from lightning_surge.sweep.cells import Cell, Outcome, Reached, SweepError, SweepSettings
from lightning_surge.sweep.config import cell_cli, files_digest, imported
from lightning_surge.sweep.study import SweepStudy, patiently

# The name of what `training_step` returns; any other name is one that the module logs.
TRAINING_LOSS = "loss"
# A training loss is averaged over this share of a cell unless `smoothing` says otherwise.
SMOOTHED_SHARE = 1 / 50


class CellEnd(Exception):
    """Carries the outcome of a cell whose loss is infinite or NaN, or has reached all targets."""


class LossRecorder(pl.Callback):
    """Takes down a cell's loss, counts its examples, and ends it when the loss is infinite or NaN.

    A loss from validation is taken as it is. One from training is averaged exponentially over examples, so
    that every batch size averages over equally much data.
    """

    def __init__(self, settings: SweepSettings, cell: Cell) -> None:
        self._settings = settings
        self._batch_size = cell.batch_size
        function = settings.batch_size_fn and imported(settings.batch_size_fn, "--batch-size-fn")
        self._count = BatchCounter(function or None, "A sweep")
        share = SMOOTHED_SHARE * settings.examples_of(cell.batch_size)
        self._smoothing = settings.smoothing or max(1.0, share)
        self._sum = self._weight = 0.0
        # Whether the loss is one of training; None until that can be told.
        self.trains: bool | None = settings.metric == TRAINING_LOSS or None
        # Steps, examples over all replicas, and the loss, whenever there was one.
        self.looks: list[tuple[int, int, float]] = []
        self.steps = self.examples = 0
        self.validated_at = -1  # step
        self._replicas = 1
        self._open_window()

    def _open_window(self) -> None:
        self._window, self._announced = 0.0, False
        self._losses: list[tuple[Tensor, float]] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the replicas; schedules that count examples learn that somebody counts."""
        self._replicas = replicas_of(trainer)
        if self._replicas != self._settings.replicas:
            raise MisconfigurationException(
                f"Expected a Trainer with {self._settings.replicas} data-parallel replicas, got "
                f"{self._replicas}: pass --replicas {self._replicas}, or --set trainer.devices=1."
            )
        for clock in clocks_of(trainer):
            clock.advance(0.0)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count the micro-batch."""
        self._micro_batch = self._count.first(batch, trainer.train_dataloader)
        self._window += self._micro_batch

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Move the schedules that count examples, once per step."""
        if not self._announced:
            self._announced = True
            for clock in clocks_of(trainer):
                clock.advance(self._window * self._replicas)

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
        if self.steps == 0 and examples != self._batch_size:
            raise ValueError(
                f"Expected {self._batch_size} examples in the first step, got {examples:g}: "
                f"{self._settings.batch_size_key} must reach the training DataLoader's batch_size, the "
                "training set must hold a batch, and --batch-size-fn names a function that counts the "
                "examples of batches without a leading dimension of examples."
            )
        self.steps = trainer.global_step
        self.examples += round(examples)
        loss, name = None, self._settings.metric
        if self._losses:
            total = sum(count for _, count in self._losses)
            mean = torch.stack([loss * (count / total) for loss, count in self._losses]).sum()
            loss = self._over_replicas(trainer, mean)
            if not math.isfinite(loss):
                self._diverge("the training loss", loss)
        if self.trains is None:
            # What is logged now comes from training: nothing was validated so far.
            self.trains = name in trainer.callback_metrics
        if self.trains and name != TRAINING_LOSS:
            loss = self._over_replicas(trainer, trainer.callback_metrics[name])
        if self.trains and loss is not None:
            # The weight is kept beside the sum, so that the zero at the beginning does not count.
            kept = math.exp(-examples / self._smoothing)
            self._sum = kept * self._sum + (1 - kept) * loss
            self._weight = kept * self._weight + (1 - kept)
            self._take(self._sum / self._weight)
        self._open_window()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take down the loss of the validation."""
        loss = trainer.callback_metrics.get(self._settings.metric)
        if not self.trains and loss is not None:
            self.validated_at = self.steps
            self._take(self._over_replicas(trainer, loss))

    def _take(self, loss: float) -> None:
        if not math.isfinite(loss):
            self._diverge(self._settings.metric, loss)
        self.looks.append((self.steps, self.examples, loss))
        if self._settings.stop_at_target and all(entry.steps is not None for entry in self.reached()):
            raise CellEnd(Outcome("finished", loss))

    def _diverge(self, what: str, loss: float) -> NoReturn:
        raise CellEnd(Outcome("diverged", message=f"{what} became {loss} at step {self.steps}"))

    def _over_replicas(self, trainer: pl.Trainer, loss: Tensor) -> float:
        # All replicas must see the same number, or one would stop and the others wait for it.
        return float(trainer.strategy.reduce(loss, reduce_op="mean") if self._replicas > 1 else loss)

    def reached(self) -> tuple[Reached, ...]:
        """When the targets were reached."""
        settings = self._settings
        return tuple(first_reached(self.looks, each, maximize=settings.maximize) for each in settings.targets)

    def final_loss(self, metrics: dict[str, Tensor]) -> float:
        """The loss at the end, if need be from what was logged last; a SweepError if it never was."""
        if not self.looks:
            name = self._settings.metric
            if name not in metrics:
                raise SweepError(
                    f"Expected the model to log {name!r} in training or validation, got "
                    f"{', '.join(sorted(metrics)) or 'nothing'}: pass one of them as --metric, or "
                    f"--metric {TRAINING_LOSS} for what training_step returns, averaged."
                )
            self._take(float(metrics[name]))
        return self.looks[-1][2]


def first_reached(
    looks: Iterable[tuple[int, int, float]], target: float, *, maximize: bool = False
) -> Reached:
    """When a loss first reached a target, on straight lines between looks (steps, examples, loss)."""
    before = None
    for steps, examples, loss in looks:
        if loss >= target if maximize else loss <= target:
            if before is None or before[0] == steps:
                return Reached(target, steps, examples)
            # Whole steps, and the examples behind them.
            step = math.ceil(before[0] + (target - before[2]) / (loss - before[2]) * (steps - before[0]))
            share = (step - before[0]) / (steps - before[0])
            return Reached(target, step, round(before[1] + share * (examples - before[1])))
        before = (steps, examples, loss)
    return Reached(target, None, None)


def run_cell(settings: SweepSettings, cell: Cell) -> Outcome:
    """Train a cell in this process: what it said, or a SweepError if no cell of the sweep can run."""
    if files_digest(settings.configs) != settings.files_digest:
        raise SweepError(
            f"Expected {', '.join(settings.configs)} as it was when the sweep began, got an edited "
            "file: put it back, or start a sweep with another --output."
        )
    recorder = LossRecorder(settings, cell)
    try:
        cli = cell_cli(settings, cell, recorder)
        trained = dict(cli.trainer.callback_metrics)
        if not recorder.trains and recorder.validated_at != recorder.steps and cli.trainer.enable_validation:
            cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
        outcome = Outcome("finished", recorder.final_loss(trained | cli.trainer.callback_metrics))
    except CellEnd as end:
        outcome = end.args[0]
    except (MisconfigurationException, SweepError) as error:
        raise SweepError(str(error)) from error
    except (Exception, SystemExit) as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning exits after one
            raise KeyboardInterrupt from error
        traceback.print_exc()
        memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "t allocate memory" in str(error)
        first = (str(error) or "no message").splitlines()[0]
        outcome = Outcome("out_of_memory" if memory else "failed", message=f"{type(error).__name__}: {first}")
    return replace(outcome, steps=recorder.steps, examples=recorder.examples, reached=recorder.reached())


def _end_with_the_sweep() -> None:
    """Wait for the end of standard input, which the sweep holds open while it lives."""
    sys.stdin.buffer.read()
    if hasattr(os, "killpg") and os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def main(order: dict[str, Any]) -> None:
    """Run the cell of a trial and tell the study."""
    threading.Thread(target=_end_with_the_sweep, daemon=True).start()
    outcome, refusal = None, ""
    try:
        outcome = run_cell(SweepSettings(**order["settings"]), Cell(*order["cell"]))
    except SweepError as error:
        refusal = str(error)
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        study = patiently(lambda: SweepStudy(order["where"], order["name"]))
        patiently(lambda: study.tell(order["trial"], outcome, refusal))
    sys.stdout.flush()
    sys.stderr.flush()
    # Not the ordinary way: threads and handlers of the user's libraries may keep a process for ever.
    os._exit(0)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
