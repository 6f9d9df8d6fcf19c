"""The callback through a change of the batch size: its ratio frozen at the change, and running live."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch

from benchmarks.fidelity.switch import fixed_sample
from benchmarks.fidelity.training import CONTINUED_EXAMPLES, Study, continue_run, train_to
from benchmarks.fidelity.workloads import BASE_BATCH_SIZE, WORKLOADS
from lightning_surge import SurgeLRCallback
from lightning_surge.policy.policy import Decision

__all__ = ["live", "loss_of"]


class Decisions(pl.Callback):
    """Remembers what was decided at every step."""

    def __init__(self, surge: SurgeLRCallback) -> None:
        self._surge = surge
        self.seen: list[Decision] = []

    def on_train_batch_end(self, *args: Any) -> None:
        if self._surge.decision is not None:
            self.seen.append(self._surge.decision)


def loss_of(study: Study) -> float:
    """Loss on the fixed sample, with BatchNorm's running statistics."""
    study.network.eval()
    with torch.no_grad():
        return float(study.workload.loss(study.network, fixed_sample(study.workload)))


def live(
    workload: str,
    beta_2: float,
    phase: str,
    seed: int,
    max_overhead: float,
    objective: str,
    batch_sizes: Sequence[int],
    examples: int = CONTINUED_EXAMPLES,
) -> dict[str, Any]:
    """One training up to the change of the batch size, and one continuation for each size.

    From the change on, so many examples are trained.

    Returns:
        Measurements before the change; by batch size, the ratio predicted at the change and the one used in
        the first step, and the final loss and mean ratio of the live run.
    """
    what = WORKLOADS[workload]
    settings: dict[str, Any] = {"objective": objective, "max_overhead": max_overhead}
    callback = SurgeLRCallback(BASE_BATCH_SIZE, **settings)
    point: dict[str, Any] = {"beta_2": beta_2, "phase": phase, "seed": seed, "examples": examples}
    _, trainer = train_to(what, **point, callback=callback)
    result: dict[str, Any] = {"measurements": callback.history.num_measurements, "by_batch_size": {}}
    if result["measurements"]:
        result["noise_scale"] = callback.history.stats().resolved_noise_scale
    for batch_size in batch_sizes:
        after = SurgeLRCallback(BASE_BATCH_SIZE, **settings)
        decisions = Decisions(after)
        study = continue_run(what, trainer, **point, batch_size=batch_size, callbacks=[after, decisions])
        first = decisions.seen[0]
        result["by_batch_size"][batch_size] = {
            "predicted": first.predicted,
            "used": first.used,
            "reason": first.reason,
            "loss": loss_of(study),
            "mean_log2_ratio": statistics.fmean(math.log2(decision.used) for decision in decisions.seen),
            "overhead": after.overhead,
        }
    return result
