"""The best learning rate after a change of the batch size, found by a sweep."""

from __future__ import annotations

import math
from typing import Any

import torch

from benchmarks.fidelity.ensemble import Ensemble, shared_batch
from benchmarks.fidelity.training import (
    CONTINUED_EXAMPLES,
    PHASES,
    continuation_seed,
    schedule,
    train_to,
)
from benchmarks.fidelity.workloads import BASE_BATCH_SIZE, WORKLOADS, Workload, draw

__all__ = ["BATCH_SIZES", "SEEDS", "fixed_sample", "multipliers", "sweep"]

BATCH_SIZES = tuple(int(BASE_BATCH_SIZE * factor) for factor in (1 / 8, 1, 4, 16))
SEEDS = (0, 1, 2)


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
    workload: str, beta_2: float, phase: str, batch_size: int, correct_lag: bool = False
) -> dict[str, Any]:
    """Final loss for every multiplier and seed.

    Args:
        workload: its name.
        beta_2: Adam's.
        phase: at which the batch size changes.
        batch_size: after the change.
        correct_lag: also undo the lag of Adam's `v` after the change, as far as noise makes `v`: the step is
            divided by `sqrt(EMA[1/B] B)`, the size it has relative to that of a steady state.

    Returns:
        Multipliers, and losses by seed and multiplier.
    """
    what = WORKLOADS[workload]
    factors = multipliers(batch_size)
    snapshots = [train_to(what, beta_2=beta_2, phase=phase, seed=seed)[0].snapshot() for seed in SEEDS]
    ensemble = Ensemble(what, [s for s in snapshots for _ in factors], (0.9, beta_2))
    steps = CONTINUED_EXAMPLES // batch_size
    lr_of = schedule(phase, steps)
    generators = [torch.Generator().manual_seed(continuation_seed(seed, batch_size)) for seed in SEEDS]
    peak_lr = what.lr * torch.tensor(factors * len(SEEDS))
    inverse_size = 1.0 / BASE_BATCH_SIZE
    for step in range(steps):
        batch = shared_batch(what.data(), batch_size, generators, len(factors))
        lr = peak_lr * lr_of(PHASES[phase] + step)
        if correct_lag:
            inverse_size = beta_2 * inverse_size + (1.0 - beta_2) / batch_size
            lr = lr * math.sqrt(inverse_size * batch_size)
        ensemble.step(batch, lr)
    losses = ensemble.losses(fixed_sample(what)).view(len(SEEDS), len(factors))
    return {"multipliers": factors, "seeds": list(SEEDS), "losses": losses.tolist()}
