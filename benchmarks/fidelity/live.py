"""The callback running through a change of the batch size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.fidelity.switch import fixed_sample
from benchmarks.fidelity.training import CONTINUED_EXAMPLES, Study, continue_run, train_to
from benchmarks.fidelity.workloads import BASE_BATCH_SIZE, WORKLOADS
from lightning_surge import SurgeLRCallback

__all__ = ["live", "loss_of"]


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
    """One training up to the change of the batch size, and one continuation over so many examples for each.

    Returns:
        Measurements before the change; by batch size the final loss, and what measuring cost after it.
    """
    what = WORKLOADS[workload]
    settings: dict[str, Any] = {"objective": objective, "max_overhead": max_overhead}
    callback = SurgeLRCallback(BASE_BATCH_SIZE, **settings)
    point: dict[str, Any] = {"beta_2": beta_2, "phase": phase, "seed": seed, "examples": examples}
    _, trainer = train_to(what, **point, callback=callback)
    result: dict[str, Any] = {"measurements": callback.history.num_measurements, "by_batch_size": {}}
    for batch_size in batch_sizes:
        after = SurgeLRCallback(BASE_BATCH_SIZE, **settings)
        study = continue_run(what, trainer, **point, batch_size=batch_size, callbacks=[after])
        result["by_batch_size"][batch_size] = {"loss": loss_of(study), "overhead": after.overhead}
    return result
