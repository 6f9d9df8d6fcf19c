"""One run: a constant batch size, or one that grows."""

from __future__ import annotations

import time
import warnings
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from benchmarks.batch_warmup.rules import (
    APPROACHED,
    BASE_BATCH_SIZE,
    FIXED_RULES,
    LARGE_BATCH_SIZE,
    RAMPS,
    SEESAW,
)
from benchmarks.batch_warmup.workloads import WORKLOADS
from benchmarks.trainer import quiet_trainer
from lightning_surge import SurgeLRCallback
from lightning_surge.callbacks import BatchSizeScheduler
from lightning_surge.policy.policy import MAX_DRIFT
from lightning_surge.schedules.batch_sampler import ScheduledBatchSampler
from lightning_surge.schedules.seesaw import Seesaw
from lightning_surge.schedules.sizes import ConstantSize, GeometricRamp

__all__ = ["constant", "ramp"]


class StepSizes(pl.Callback):
    """The examples behind every optimizer step, counted apart from what the package counts."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self._window = 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._window += len(batch[0] if isinstance(batch, (list, tuple)) else batch)

    def on_before_optimizer_step(self, *args: Any) -> None:
        self.sizes.append(self._window)
        self._window = 0


def constant(workload: str, budget: str, batch_size: int, multiplier: float, seed: int) -> dict[str, Any]:
    """Train at one batch size, at a multiple of the example's learning rate: loss, optimizer steps, times."""
    sampler = WORKLOADS[workload].sampler(budget, seed)
    loader = DataLoader(WORKLOADS[workload].data()[0], batch_size=batch_size, sampler=sampler)
    return _run(workload, budget, multiplier, seed, loader, BatchSizeScheduler(ConstantSize(batch_size)))


def ramp(
    workload: str, budget: str, ramp: str, rule: str, max_overhead: float, multiplier: float, seed: int
) -> dict[str, Any]:
    """Train with a growing batch size: loss, steps, times, what was measured, and the factor at the end."""
    what = WORKLOADS[workload]
    batches = ScheduledBatchSampler(what.sampler(budget, seed), LARGE_BATCH_SIZE, drop_last=False)
    loader = DataLoader(what.data()[0], batch_sampler=batches)
    if ramp == SEESAW:
        scheduler = BatchSizeScheduler(Seesaw(BASE_BATCH_SIZE, LARGE_BATCH_SIZE))
    else:
        duration = RAMPS[ramp] * what.examples[budget]
        schedule = GeometricRamp(BASE_BATCH_SIZE, LARGE_BATCH_SIZE, duration, unit="examples")
        scheduler = BatchSizeScheduler(schedule)
    settings: dict[str, Any] = {"objective": rule, "max_overhead": max_overhead}
    if rule in FIXED_RULES:
        settings = {"law": rule.removesuffix(APPROACHED)}
        settings |= {"max_drift_per_step": MAX_DRIFT} if rule.endswith(APPROACHED) else {}
    # The rule that leaves the learning rate alone is what there is without the callback.
    surge = None if rule == "constant" else SurgeLRCallback(BASE_BATCH_SIZE, **settings)
    return _run(workload, budget, multiplier, seed, loader, scheduler, surge)


def _run(
    workload: str,
    budget: str,
    multiplier: float,
    seed: int,
    loader: DataLoader[Any],
    scheduler: BatchSizeScheduler,
    surge: SurgeLRCallback | None = None,
) -> dict[str, Any]:
    what, examples = WORKLOADS[workload], WORKLOADS[workload].examples[budget]
    pl.seed_everything(seed, verbose=False)
    module = what.module(multiplier * what.base_lr, examples)
    counted = StepSizes()
    callbacks = [scheduler, counted] if surge is None else [scheduler, surge, counted]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = quiet_trainer(callbacks, max_epochs=what.epochs(budget))
        wall, processor = time.perf_counter(), time.process_time()
        trainer.fit(module, loader)
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        validation = quiet_trainer([], limit_val_batches=1.0)
        (metrics,) = validation.validate(module, what.data()[1], verbose=False)
    if sum(counted.sizes) != examples:
        raise RuntimeError(
            f"Expected {examples} examples, got {sum(counted.sizes)}: rows would not be comparable."
        )
    result = {
        "val_loss": metrics["val_loss"],
        "steps": trainer.global_step,
        "fit_seconds": round(wall, 2),
        "processor_seconds": round(processor, 2),
    }
    if surge is not None and surge.decision is not None:
        result |= {"final_factor": surge.decision.used, "reason": surge.decision.reason}
    if surge is not None and surge.settings.law == "measured":
        result |= {"measurements": surge.history.num_measurements, "overhead": surge.overhead}
    return result
