"""Runs that go on after a change of the batch size, many at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from benchmarks.fidelity.ensemble import Ensemble, Snapshot, shared_batch
from benchmarks.fidelity.training import CONTINUED_EXAMPLES, PHASES, continuation_seed, schedule, train_to
from benchmarks.fidelity.workloads import WORKLOADS, Workload, draw

__all__ = ["SEEDS", "final_losses", "fixed_sample"]

SEEDS = (0, 1, 2)


def fixed_sample(workload: Workload) -> tuple[torch.Tensor, ...]:
    """The examples on which all losses of a workload are compared."""
    return draw(workload.data(), workload.sample, torch.Generator().manual_seed(999))


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
