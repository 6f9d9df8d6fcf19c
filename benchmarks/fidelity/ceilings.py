"""How hot a run may get: the best ratio that is approached after a change, and what could tell it beforehand.

A ladder of ratios, each approached from 1 at the callback's `max_drift_per_step`, tells what every rule that
decides at the change would have lost. The state at the change, exactly: the noise scale, and Adam's edge of
stability at each batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.fidelity.free import DRIFT, LARGER, approached
from benchmarks.fidelity.one_step import gradient_of
from benchmarks.fidelity.switch import SEEDS, final_losses, fixed_sample
from benchmarks.fidelity.training import Study, train_to
from benchmarks.fidelity.workloads import BASE_BATCH_SIZE, WORKLOADS, draw

__all__ = ["ladder", "state"]

RATIOS = (1.0, 2.0, 4.0, 8.0, 16.0, 64.0)
# Batches of the base size behind the exact statistics, and examples behind the curvature.
BATCHES = 512
EXAMPLES = 1024
# Steps of Adam with beta_1 = 0.9 and a preconditioner held still diverge above this over the sharpness.
STABLE = 38.0
EPS = 1e-8


def ladder(workload: str, beta_2: float, phase: str, examples: int) -> dict[str, Any]:
    """Final losses after a change at a phase: by batch size and ratio approached, one for each seed."""
    losses = {}
    for size in LARGER:
        ends = [ratio for ratio in RATIOS if ratio <= max(size / BASE_BATCH_SIZE, 8.0)]

        def multipliers_at(step: int, ends: Sequence[float] = ends) -> torch.Tensor:
            return torch.tensor([approached(end, DRIFT, step) for end in ends])

        found = final_losses(workload, beta_2, phase, size, multipliers_at, examples)
        losses[str(size)] = dict(zip(map(str, ends), map(list, zip(*found, strict=True)), strict=True))
    return {"seeds": list(SEEDS), "losses": losses}


def state(workload: str, beta_2: float, phase: str) -> dict[str, Any]:
    """By seed at a phase: the noise scale, and the edge of stability by batch size, a learning rate."""
    scales, edges = [], []
    for seed in SEEDS:
        study, _ = train_to(WORKLOADS[workload], beta_2=beta_2, phase=phase, seed=seed)
        study.network.train()
        generator = torch.Generator().manual_seed(44_000 + seed)
        total, squares = _sums(study, generator)
        mean_sq = (total / BATCHES).square()
        variance = (squares / BATCHES - mean_sq).mul_(BATCHES / (BATCHES - 1))
        signal = (mean_sq - variance / BATCHES).clamp_(min=0.0)
        scales.append(float(BASE_BATCH_SIZE * variance.sum() / (mean_sq.sum() - variance.sum() / BATCHES)))
        edges.append(edge_lrs(curvature(study), signal, variance))
    return {"seeds": list(SEEDS), "noise_scale": scales, "edge_lr": edges}


def _sums(study: Study, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Of gradients of batches of the base size, and of their squares; float64.

    Batches are of the fixed sample: a coordinate that only an example outside of it reaches has no scale.
    """
    sample = fixed_sample(study.workload)
    total = squares = torch.zeros((), dtype=torch.float64)
    for _ in range(BATCHES):
        batch = draw(sample, BASE_BATCH_SIZE, generator)
        flat = torch.cat([entry.flatten() for entry in gradient_of(study, batch)]).double()
        total, squares = total + flat, squares + flat.square()
    return total, squares


def curvature(study: Study) -> Callable[[torch.Tensor], torch.Tensor]:
    """The Hessian of the loss on the first examples of the fixed sample, as a product with flat vectors."""
    parameters = list(study.network.parameters())
    batch = tuple(tensor[:EXAMPLES] for tensor in fixed_sample(study.workload))
    with sdpa_kernel(SDPBackend.MATH):  # the one that can be differentiated twice
        loss = study.workload.loss(study.network, batch)
        gradient = torch.autograd.grad(loss, parameters, create_graph=True)
    flat = torch.cat([entry.flatten() for entry in gradient])

    def product(vector: torch.Tensor) -> torch.Tensor:
        found = torch.autograd.grad(flat, parameters, vector.to(flat.dtype), retain_graph=True)
        return torch.cat([entry.flatten() for entry in found]).double()

    return product


def edge_lrs(
    product: Callable[[torch.Tensor], torch.Tensor], signal: torch.Tensor, variance: torch.Tensor
) -> dict[str, float]:
    """By batch size, from the squared mean and the variance, at the base size, of every coordinate.

    The sharpness is the largest eigenvalue of `P^-1/2 H P^-1/2`, `P` the root of Adam's averaged squares.
    """
    found, start = {}, np.random.default_rng(0).standard_normal(len(signal))
    for size in (BASE_BATCH_SIZE, *LARGER):
        square = signal + variance * (BASE_BATCH_SIZE / size)
        root = square.sqrt().add_(EPS).rsqrt_()

        def matvec(vector: np.ndarray, root: torch.Tensor = root) -> np.ndarray:
            return (root * product(root * torch.from_numpy(vector.ravel()))).numpy()

        operator = LinearOperator((len(root), len(root)), matvec=matvec, dtype=np.float64)
        values, vectors = eigsh(operator, k=1, which="LA", v0=start, tol=0.02, ncv=10)
        found[str(size)], start = STABLE / float(values[0]), vectors[:, 0]
    return found
