"""The best learning rate after a change of the batch size, found by a sweep."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.fidelity.ensemble import Ensemble, Snapshot, shared_batch
from benchmarks.fidelity.training import (
    CONTINUED_EXAMPLES,
    PHASES,
    continuation_seed,
    schedule,
    train_to,
)
from benchmarks.fidelity.workloads import BASE_BATCH_SIZE, WORKLOADS, Workload, draw

__all__ = ["BATCH_SIZES", "SEEDS", "beyond", "final_losses", "fixed_sample", "multipliers", "sweep"]

Array = NDArray[np.float64]

BATCH_SIZES = tuple(int(BASE_BATCH_SIZE * factor) for factor in (1 / 8, 1, 4, 16))
SEEDS = (0, 1, 2)
# A sweep whose lowest loss is at an end of its grid goes on beyond it, so many multipliers at a time.
MORE = 2
EXTENSIONS = 3


def fixed_sample(workload: Workload) -> tuple[torch.Tensor, ...]:
    """The examples on which all losses of a workload are compared."""
    return draw(workload.data(), workload.sample, torch.Generator().manual_seed(999))


def multipliers(batch_size: int) -> list[float]:
    """Seven to nine learning rates, that reach from below constant to linear scaling."""
    ratio = batch_size / BASE_BATCH_SIZE
    low = math.log2(min(ratio / 2, 0.5) if ratio < 1 else 0.25)
    high = math.log2(2.0 if ratio < 1 else 4.0 if ratio == 1 else 16.0)
    count = max(round(1.4 * (high - low)) + 1, 7)
    return [2.0 ** (low + (high - low) * index / (count - 1)) for index in range(count)]


def sweep(
    workload: str,
    beta_2: float,
    phase: str,
    batch_size: int,
    examples: int = CONTINUED_EXAMPLES,
) -> dict[str, Any]:
    """Final loss for every multiplier and seed; beyond the grid as long as the lowest mean is at its end.

    The batch size changes at a phase, and so many examples are trained after it.
    """

    def losses_at(factors: Sequence[float]) -> Array:
        constant = torch.tensor(factors)
        return np.array(final_losses(workload, beta_2, phase, batch_size, lambda step: constant, examples))

    factors = multipliers(batch_size)
    losses = losses_at(factors)
    for _ in range(EXTENSIONS):
        more = beyond(factors, losses)
        if not more:
            break
        order = np.argsort([*factors, *more])
        losses = np.hstack([losses, losses_at(more)])[:, order]
        factors = [[*factors, *more][index] for index in order]
    return {"multipliers": factors, "seeds": list(SEEDS), "losses": losses.tolist()}


def beyond(factors: Sequence[float], losses: Array) -> list[float]:
    """The next multipliers at the end of a grid where the lowest mean over seeds is, none if it is inside.

    Multipliers increase at equal ratios. A loss by seed and multiplier that is not finite ends the grid too.
    """
    means = np.where(np.isfinite(losses).all(axis=0), losses.mean(axis=0), np.inf)
    low, ratio = int(np.argmin(means)), factors[1] / factors[0]
    if low == len(factors) - 1:
        return [factors[-1] * ratio**index for index in range(1, MORE + 1)]
    return [factors[0] / ratio**index for index in range(MORE, 0, -1)] if low == 0 else []


@lru_cache(maxsize=len(SEEDS))
def snapshot(workload: str, beta_2: float, phase: str, seed: int) -> Snapshot:
    """A training at the moment of the change; kept, because several sizes and rules start from it."""
    return train_to(WORKLOADS[workload], beta_2=beta_2, phase=phase, seed=seed)[0].snapshot()


def final_losses(
    workload: str,
    beta_2: float,
    phase: str,
    batch_size: int,
    multipliers_at: Callable[[int], Tensor],
    examples: int = CONTINUED_EXAMPLES,
    betas: Sequence[tuple[float, float]] | None = None,
) -> list[list[float]]:
    """Final losses by seed and run, of runs that go on after a change of the batch size at a phase.

    Args:
        workload: Name of the workload.
        beta_2: Adam's decay rate of squared gradients.
        phase: When the batch size changes.
        batch_size: Examples per step after the change.
        multipliers_at: Gives the multipliers of the base learning rate, one for each run of a seed, by step
            since the change.
        examples: Number of examples to train after the change.
        betas: Adam's decay rates from the change on, for each run of a seed; None keeps those before it.
    """
    what = WORKLOADS[workload]
    runs = len(multipliers_at(0))
    snapshots = [snapshot(workload, beta_2, phase, seed) for seed in SEEDS]
    ensemble = Ensemble(what, [s for s in snapshots for _ in range(runs)], (0.9, beta_2))
    if betas is not None:
        ensemble.use_betas(*torch.tensor(betas).repeat(len(SEEDS), 1).T)
    steps = examples // batch_size
    lr_of = schedule(phase, steps)
    generators = [torch.Generator().manual_seed(continuation_seed(seed, batch_size)) for seed in SEEDS]
    for step in range(steps):
        batch = shared_batch(what.data(), batch_size, generators, runs)
        lr = what.lr * multipliers_at(step).repeat(len(SEEDS)) * lr_of(PHASES[phase] + step)
        ensemble.step(batch, lr)
    return ensemble.losses(fixed_sample(what)).view(len(SEEDS), runs).tolist()
