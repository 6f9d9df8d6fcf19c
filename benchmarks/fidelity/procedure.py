"""The paper's own procedure: grids of batch size and learning rate, run to a target loss.

From runs with constant learning rates come the steps S and examples E to a loss, the best learning rate on
the way there for every batch size, and B_noise from the line of 1/S against 1/E (Li et al., arXiv:2405.14578,
Eq. 22, Figures 2 and 3). From a point of a training come the best learning rate over the steps that follow,
and what the callback says there. The paper claims that the optimum rises and falls with the batch size, and
that its peak moves to larger batch sizes as the loss falls.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from benchmarks.cells import Cell
from benchmarks.fidelity.ensemble import Ensemble, Snapshot, shared_batch
from benchmarks.fidelity.switch import fixed_sample
from benchmarks.fidelity.training import Batches, Study, fit
from benchmarks.fidelity.workloads import BASE_BATCH_SIZE, WORKLOADS, Workload
from lightning_surge import SurgeLRCallback
from lightning_surge.laws.base import Law

__all__ = ["BATCH_SIZES", "BETAS", "TARGETS", "cells", "following", "grid"]

BATCH_SIZES = (4, 16, 64, 256, 1024)
BETAS = ((0.0, 0.0), (0.9, 0.999))
SIGN_FACTOR = 0.5
"""On a workload's learning rate if the step is the sign of the gradient, which no average makes calmer."""
REFERENCE_STEPS = {"transformer": 384}
DEFAULT_REFERENCE_STEPS = 512
TARGETS = (0.15, 0.4, 1.0)
"""Parts of the reference run after which its losses are the targets."""
GRID_FACTORS = tuple(2.0**exponent for exponent in range(-3, 5))
FOLLOWING_FACTORS = tuple(2.0**exponent for exponent in range(-4, 4))
FOLLOWING_STEPS = 16
MEASUREMENTS = 40
PROBE_EXAMPLES = 256
DOUBLED_AT = {"transformer": 256}
DEFAULT_DOUBLED_AT = 128
"""Batch size at which a grid goes on for twice the examples of a small batch."""
PATIENCE = 1.6
"""A grid goes on for so many times the steps in which its first learning rate has reached the last target."""


def prepared(name: str, beta_1: float) -> Workload:
    """The workload with the learning rate of its reference run."""
    what = WORKLOADS[name]
    return what if beta_1 > 0 else replace(what, lr=what.lr * SIGN_FACTOR)


def seeds_of(name: str) -> range:
    """Two seeds where a step is expensive, else three."""
    return range(2 if name == "transformer" else 3)


def train(
    what: Workload,
    betas: tuple[float, float],
    starts: Sequence[Snapshot],
    lrs: Sequence[float],
    batch_size: int,
    marks: Sequence[int],
    seed: int = 0,
) -> Iterator[Ensemble]:
    """Every start with every constant learning rate; yields the copies, by start and rate, at the marks.

    Args:
        what: the workload.
        betas: Adam's.
        starts: each has batches of its own, the same for all its learning rates.
        lrs: learning rates.
        batch_size: examples.
        marks: increasing numbers of steps.
        seed: of the batches, plus the start's index.
    """
    ensemble = Ensemble(what, [start for start in starts for _ in lrs], betas)
    generators = [
        torch.Generator().manual_seed(20_000 + 100 * batch_size + seed + i) for i in range(len(starts))
    ]
    rates = torch.tensor(list(lrs) * len(starts))
    for step in range(1, marks[-1] + 1):
        ensemble.step(shared_batch(what.data(), batch_size, generators, len(lrs)), rates)
        if step in marks:
            yield ensemble


def fresh(what: Workload, seed: int) -> Snapshot:
    """Untrained."""
    torch.manual_seed(seed)
    return Snapshot.fresh(what.network())


@cache
def reference(name: str, betas: tuple[float, float]) -> tuple[tuple[float, ...], tuple[Snapshot, ...]]:
    """Target losses, averaged over seeds, and the first seed's snapshots at the same steps."""
    what = prepared(name, betas[0])
    steps = REFERENCE_STEPS.get(name, DEFAULT_REFERENCE_STEPS)
    marks = [round(part * steps) for part in TARGETS]
    starts = [fresh(what, seed) for seed in seeds_of(name)]
    losses, snapshots = [], []
    for ensemble in train(what, betas, starts, [what.lr], BASE_BATCH_SIZE, marks):
        losses.append(float(ensemble.losses(small_sample(what)).mean()))
        snapshots.append(ensemble.snapshot(0))
    return tuple(losses), tuple(snapshots)


def small_sample(what: Workload) -> tuple[torch.Tensor, ...]:
    """A quarter of the fixed sample."""
    return tuple(tensor[: what.sample // 4] for tensor in fixed_sample(what))


def grid(workload: str, beta_1: float, beta_2: float, batch_size: int) -> dict[str, Any]:
    """Losses on the way, from fresh networks at constant learning rates.

    Larger batches get more examples, and a grid ends early once the last target is well behind.

    Args:
        workload: its name.
        beta_1: Adam's.
        beta_2: Adam's.
        batch_size: examples.

    Returns:
        Targets, learning rates, seeds, steps, and losses by seed, learning rate and step.
    """
    what = prepared(workload, beta_1)
    targets = reference(workload, (beta_1, beta_2))[0]
    lrs = [what.lr * factor for factor in GRID_FACTORS]
    seeds = seeds_of(workload)
    length = REFERENCE_STEPS.get(workload, DEFAULT_REFERENCE_STEPS) * BASE_BATCH_SIZE
    growth = 1.0 + batch_size / DOUBLED_AT.get(workload, DEFAULT_DOUBLED_AT)
    last = round(2 * length * growth / batch_size)
    marks = sorted({round(step) for step in np.geomspace(max(1, last / 100), last, 28)})
    sample = small_sample(what)
    losses: list[list[list[float]]] = []
    done = math.inf
    starts = [fresh(what, seed) for seed in seeds]
    for mark, ensemble in zip(
        marks, train(what, (beta_1, beta_2), starts, lrs, batch_size, marks, seed=10), strict=False
    ):
        found = ensemble.losses(sample).view(len(seeds), len(lrs))
        losses.append([[round(loss, 5) for loss in row] for row in found.tolist()])
        if math.isinf(done) and bool((found.mean(0) <= targets[-1]).any()):
            done = mark
        if mark >= PATIENCE * done:
            break
    return {
        "targets": targets,
        "lrs": lrs,
        "seeds": list(seeds),
        "steps": marks[: len(losses)],
        "losses": np.transpose(losses, (1, 2, 0)).tolist(),
    }


def following(workload: str, beta_1: float, beta_2: float, target: int) -> dict[str, Any]:
    """The best learning rate over the steps that follow a point, and what the callback says there.

    Adam's averages start anew, so that their lag behind the batch size has no part in it.

    Args:
        workload: its name.
        beta_1: Adam's.
        beta_2: Adam's.
        target: which of the targets.

    Returns:
        The loss there, and for every batch size the losses by seed and learning rate; the callback's answers.
    """
    what = prepared(workload, beta_1)
    targets, snapshots = reference(workload, (beta_1, beta_2))
    snapshot = snapshots[target]
    zeros = {name: torch.zeros_like(tensor) for name, tensor in snapshot.exp_avg.items()}
    start = snapshot._replace(exp_avg=zeros, exp_avg_sq=zeros, step=0)
    lrs = [what.lr * factor for factor in FOLLOWING_FACTORS]
    losses = {}
    for size in BATCH_SIZES:
        starts = [start] * (4 if size <= 64 else 2)
        (ensemble,) = train(what, (beta_1, beta_2), starts, lrs, size, [FOLLOWING_STEPS], seed=50)
        losses[str(size)] = ensemble.losses(fixed_sample(what)).view(len(starts), len(lrs)).tolist()
    return {
        "loss": targets[target],
        "steps": FOLLOWING_STEPS,
        "lrs": lrs,
        "losses": losses,
        "callback": predictions(what, (beta_1, beta_2), snapshot),
    }


def predictions(what: Workload, betas: tuple[float, float], snapshot: Snapshot) -> dict[str, Any]:
    """The callback's law at a point that is held, each value with its standard error."""
    pl.seed_everything(0, verbose=False)
    study = Study(what, betas)
    study.network.load_state_dict(snapshot.weights)
    study.optimizer.held = True
    callback = SurgeLRCallback(
        base_batch_size=BASE_BATCH_SIZE,
        objective="step",
        dry_run=True,
        probe_every=1,
        probe_examples=PROBE_EXAMPLES,
        half_life=MEASUREMENTS,
    )
    fit(study, Batches(what.data(), PROBE_EXAMPLES, MEASUREMENTS, 70), [callback], steps=MEASUREMENTS)
    if not callback.law_history:
        return {}
    law = callback.law_history[-1].law

    def lr_at(size: int) -> Any:
        return lambda law: law.lr(size)

    def peak(law: Law) -> float:
        return law.peak.batch_size

    def critical(law: Law) -> float:
        return law.critical_batch_size

    return {
        "lrs": {str(size): [law.lr(size), law.standard_error(lr_at(size))] for size in BATCH_SIZES},
        "peak_batch_size": [peak(law), law.standard_error(peak)],
        "critical_batch_size": [critical(law), law.standard_error(critical)],
        "measurements": law.num_measurements,
    }


def cells() -> list[Cell]:
    """The perceptron and the transformer first."""
    found = []
    for name in WORKLOADS:
        priority = 4 if name in ("perceptron", "transformer") else 8
        for beta_1, beta_2 in BETAS:
            key = {"workload": name, "beta_1": beta_1, "beta_2": beta_2}
            found += [Cell("procedure_grid", {**key, "batch_size": b}, grid, priority) for b in BATCH_SIZES]
            found += [
                Cell("procedure_following", {**key, "target": index}, following, priority)
                for index in range(len(TARGETS))
            ]
    return found
