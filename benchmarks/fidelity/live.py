"""The callback through a change of the batch size: its ratio frozen at the change, and running live."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch

from benchmarks.cells import Store
from benchmarks.fidelity.analysis import POINT, pick
from benchmarks.fidelity.regrets import sweeps_of
from benchmarks.fidelity.switch import BATCH_SIZES, fixed_sample
from benchmarks.fidelity.training import CONTINUED_EXAMPLES, Study, continue_run, train_to
from benchmarks.fidelity.workloads import BASE_BATCH_SIZE, WORKLOADS
from lightning_surge import SurgeLRCallback
from lightning_surge.policy.policy import Decision

__all__ = ["best_multiplier", "live", "live_at_best_base", "loss_of"]

CHANGED_SIZES = tuple(size for size in BATCH_SIZES if size != BASE_BATCH_SIZE)


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
    multiplier: float = 1.0,
    batch_sizes: Sequence[int] = CHANGED_SIZES,
    examples: int = CONTINUED_EXAMPLES,
) -> dict[str, Any]:
    """One training up to the change of the batch size, and one continuation for each size.

    From the change on, learning rates get the multiplier and so many examples are trained.

    Returns:
        Measurements before the change; by batch size, the ratio predicted at the change and the one used in
        the first step, and the final loss and mean ratio of the live run.
    """
    what = WORKLOADS[workload]
    settings: dict[str, Any] = {"objective": objective, "max_overhead": max_overhead}
    callback = SurgeLRCallback(BASE_BATCH_SIZE, **settings)
    point: dict[str, Any] = {"beta_2": beta_2, "phase": phase, "seed": seed}
    point |= {"multiplier": multiplier, "examples": examples}
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


def best_multiplier(store: Store, **point: Any) -> float:
    """The best multiple of the base learning rate for the rest of a run that keeps its batch size.

    Raises:
        LookupError: If the sweep at the base batch size is not finished at the point.
    """
    sweeps = sweeps_of(pick(store.records("sweep"), batch_size=BASE_BATCH_SIZE, **point))
    if not sweeps:
        raise LookupError(f"A sweep at the base batch size has to come first, none is finished at {point}.")
    return float(2.0 ** next(iter(sweeps.values())).best)


def live_at_best_base(store: Store, **key: Any) -> dict[str, Any]:
    """`live` at the base learning rate that is best from the change on.

    A rule for ratios can only be as good as the learning rate that it carries over; this takes that error
    away. For a ratio without a callback the sweep does it.
    """
    multiplier = best_multiplier(store, **{name: key[name] for name in (*POINT, "examples")})
    return {"multiplier": multiplier} | live(**key, multiplier=multiplier)
