"""A gradual ramp of the batch size with every rule, over a short budget and a long one."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl

from benchmarks.fidelity.live import loss_of
from benchmarks.fidelity.training import Batches, Study, fit
from benchmarks.fidelity.workloads import BASE_BATCH_SIZE, WORKLOADS
from lightning_surge import BatchSizeWarmup, SurgeLRCallback
from lightning_surge.schedules.sizes import GeometricRamp
from lightning_surge.schedules.windows import AccumulatedSchedule, total_steps

__all__ = ["BUDGETS", "RULES", "ramp"]

BUDGETS = {"short": 16_384, "long": 65_536}
LARGEST = 16 * BASE_BATCH_SIZE
RULES = ("fixed batch", "constant", "sqrt", "linear", "step", "alignment", "progress", "edge")
FIXED_RULES = ("constant", "sqrt", "linear")
# Optimizer steps of the ramp, which leaves a sixtieth of them for the largest size.
RAMP_STEPS = {"short": 256, "long": 1024}


def ramp(
    workload: str, beta_2: float, budget: str, rule: str, seed: int, max_overhead: float
) -> dict[str, Any]:
    """Train over equal examples, from the base batch size to 16 times it, with a decay to zero.

    Args:
        workload: its name.
        beta_2: Adam's.
        budget: key of `BUDGETS`.
        rule: fixed rule or objective; `"fixed batch"` stays at the base batch size.
        seed: of the training.
        max_overhead: of the callback, where it measures.

    Returns:
        Final loss and optimizer steps.
    """
    what, examples = WORKLOADS[workload], BUDGETS[budget]
    schedule = GeometricRamp(start=BASE_BATCH_SIZE, end=LARGEST, duration=RAMP_STEPS[budget])
    sizes = AccumulatedSchedule(schedule, BASE_BATCH_SIZE, examples_per_epoch=examples)
    fixed = rule == "fixed batch"
    steps = examples // BASE_BATCH_SIZE if fixed else total_steps(sizes, examples)
    pl.seed_everything(seed, verbose=False)
    study = Study(what, (0.9, beta_2), lambda step: 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0))))
    callbacks: list[pl.Callback] = []
    if not fixed:
        measured = {"objective": rule, "max_overhead": max_overhead}
        settings: dict[str, Any] = {"law": rule} if rule in FIXED_RULES else measured
        surge = SurgeLRCallback(BASE_BATCH_SIZE, **settings)
        warmup = BatchSizeWarmup(
            BASE_BATCH_SIZE, LARGEST, RAMP_STEPS[budget], micro_batch_size=BASE_BATCH_SIZE
        )
        callbacks = [warmup, surge]
    batches = Batches(what.data(), BASE_BATCH_SIZE, examples // BASE_BATCH_SIZE, seed)
    trainer = fit(study, batches, callbacks, steps=-1)
    return {"loss": loss_of(study), "steps": trainer.global_step}
