"""The best length of one step, by line search, against what every law says of it.

A model trains to a point and is held there. The callback measures from batches of the active size; the truth
is found from scratch, with fresh batches for the directions and the loss on a large fixed sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.fidelity.switch import fixed_sample
from benchmarks.fidelity.training import Batches, Study, fit, train_to
from benchmarks.fidelity.workloads import BASE_BATCH_SIZE, WORKLOADS, Batch, draw
from lightning_surge import SurgeLRCallback
from lightning_surge.laws.base import Law
from lightning_surge.policy.estimates import EstimatedLaw, estimate, fit_sign_law
from lightning_surge.policy.history import NoiseHistory

__all__ = ["ACTIVE", "COUNTS", "SIZES", "best_step", "fresh_directions", "laws", "measure", "truths"]

ACTIVE = 64
SIZES = (1, 4, 16, 64, 256, 1024, 4096)
# Measurements behind each prediction; the last one is all that are taken.
COUNTS = (3, 6, 12, 25, 50)
HALF_LIFE = SurgeLRCallback().settings.half_life
THEOREM_MEASUREMENTS = 12
PROBE_EXAMPLES = 256
# The line search looks at this many octaves below and above the learning rate of the run.
OCTAVES = range(-9, 6)
# So many directions look at all octaves, the others only around the best one.
SCOUTS = 3
AROUND = 2
# Directions behind a true value: those of small batches scatter most.
DIRECTIONS = {1: 32, 4: 32, 16: 24, 64: 12, 256: 8, 1024: 4, 4096: 4}
# On these workloads the signs of small batches scatter so much that the best ratio of two sizes is known to
# some ten percent only, or there is no best step at all. Some ten times as many directions tell it.
SCATTERED = ("perceptron", "convnet")
MORE_DIRECTIONS = {16: 240, 64: 120, 256: 80}


def measure(study: Study, *, law: str, count: int, seed: int) -> SurgeLRCallback:
    """Let the callback measure so often at a point where the model is held."""
    study.optimizer.held = True
    callback = SurgeLRCallback(
        base_batch_size=BASE_BATCH_SIZE,
        law=law,  # type: ignore[arg-type]
        objective="step",  # that of the law
        dry_run=True,
        probe_every=1,
        probe_examples=PROBE_EXAMPLES,
        half_life=float(count),
    )
    steps = count * PROBE_EXAMPLES // ACTIVE
    fit(study, Batches(study.workload.data(), ACTIVE, steps, 77_000 + seed), [callback], steps=steps)
    return callback


def predictions(law: Law | None) -> dict[str, Any] | None:
    """A law's learning rates at all sizes, and standard errors of log2 of them and of their ratios."""
    if law is None:
        return None
    entry: dict[str, Any] = {"lr": [law.lr(size) for size in SIZES]}
    if isinstance(law, EstimatedLaw):
        for what, base in (("lr", None), ("ratio", BASE_BATCH_SIZE)):
            logs = [partial(_log2_lr, size=size, base=base) for size in SIZES]
            entry[f"{what}_error"] = [law.standard_error(log) for log in logs]
        entry["extrapolation"] = [law.extrapolation_error(size) / math.log(2.0) for size in SIZES]
    return entry


def _log2_lr(law: Law, size: float, base: float | None) -> float:
    return math.log2(law.lr(size) / (1.0 if base is None else law.lr(base)))


def laws(workload: str, beta_2: float, phase: str, seed: int) -> dict[str, Any]:
    """What every law predicts at one point of training, the measured one by number of measurements."""
    study, _ = train_to(WORKLOADS[workload], beta_2=beta_2, phase=phase, seed=seed)
    callback = measure(study, law="measured", count=COUNTS[-1], seed=seed)
    records = callback.history.state_dict()["records"]
    measured: dict[str, Any] = {}
    for count in COUNTS:
        history = NoiseHistory(HALF_LIFE)
        history.load_state_dict({"num_measurements": count, "records": records[:count]})
        measured[str(count)] = predictions(estimate(history, fit_sign_law))
    result: dict[str, Any] = {"measured": measured}
    for law in ("theorem2", "theorem3"):
        found = measure(study, law=law, count=THEOREM_MEASUREMENTS, seed=seed).law
        entry = predictions(found)
        result[law] = None if entry is None else {"lr": entry["lr"]}
    return result


def truths(workload: str, beta_2: float, phase: str, seed: int) -> dict[str, Any]:
    """By batch size, at one point of training: the best sign step, and the mean squared norm of gradients."""
    study, _ = train_to(WORKLOADS[workload], beta_2=beta_2, phase=phase, seed=seed)
    generator = torch.Generator().manual_seed(55_000 + seed)
    sample = fixed_sample(study.workload)
    study.network.train()
    full = gradient_of(study, sample)
    signs, grad_sq = {}, {}
    for size, count in DIRECTIONS.items():
        batches = [gradient_of(study, draw(study.workload.data(), size, generator)) for _ in range(count)]
        grad_sq[size] = float(np.mean([_dot(g, g) for g in batches]))
        steps = [[g.sign() for g in gradient] for gradient in batches]
        if workload in SCATTERED and size in MORE_DIRECTIONS:
            steps = fresh_directions(study, size, MORE_DIRECTIONS[size], 66_000 + 1000 * seed + size)
        signs[size] = searched(study, steps, sample, full)
    return {"sign": signs, "grad_sq_of_batches": grad_sq}


def searched(
    study: Study, directions: Sequence[list[Tensor]], sample: Batch, full: Sequence[Tensor]
) -> dict[str, Any]:
    """The best step along directions, their alignment with the sample's gradient, and the errors of both."""
    alignment = [_dot(direction, full) for direction in directions]
    lr, error = best_step(study, directions, sample)
    return {
        "lr": lr,
        "log2_error": error,
        "alignment": float(np.mean(alignment)),
        "alignment_error": float(np.std(alignment, ddof=1) / math.sqrt(len(directions))),
    }


def fresh_directions(study: Study, size: int, count: int, seed: int) -> list[list[Tensor]]:
    """Signs of the gradients of fresh batches."""
    generator = torch.Generator().manual_seed(seed)
    batches = [draw(study.workload.data(), size, generator) for _ in range(count)]
    return [[g.sign() for g in gradient_of(study, batch)] for batch in batches]


def gradient_of(study: Study, batch: Batch) -> list[Tensor]:
    """Gradient of a batch's mean loss."""
    return list(
        torch.autograd.grad(study.workload.loss(study.network, batch), list(study.network.parameters()))
    )


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    return float(sum(torch.sum(a.double() * b.double()) for a, b in zip(left, right, strict=True)))


@torch.no_grad()
def best_step(
    study: Study, directions: Sequence[list[Tensor]], sample: Batch
) -> tuple[float | None, float | None]:
    """The learning rate that lowers the sample's loss most on average, and the jackknife error of its log2.

    Octaves first, then a parabola. None if every step raises the loss. The study is left as it was.
    """
    parameters = list(study.network.parameters())
    start = [parameter.detach().clone() for parameter in parameters]
    lrs = study.workload.lr * 2.0 ** np.array(OCTAVES)

    def loss_at(direction: list[Tensor], lr: float) -> float:
        for parameter, origin, step in zip(parameters, start, direction, strict=True):
            torch.add(origin, step, alpha=-lr, out=parameter)
        return float(study.workload.loss(study.network, sample))

    scouts = [[loss_at(direction, lr) for lr in lrs] for direction in directions[:SCOUTS]]
    valley = int(np.argmin(np.mean(scouts, axis=0)))
    lrs = lrs[max(valley - AROUND, 0) : valley + AROUND + 1]
    losses = np.array([[loss_at(direction, lr) for lr in lrs] for direction in directions])
    for parameter, origin in zip(parameters, start, strict=True):
        parameter.copy_(origin)
    origin_loss = float(study.workload.loss(study.network, sample))
    best = _vertex(lrs, losses.mean(0), origin_loss)
    count = len(directions)
    left_out = [_vertex(lrs, np.delete(losses, index, 0).mean(0), origin_loss) for index in range(count)]
    if best is None or any(value is None for value in left_out):
        return best, None
    logs = np.log2(np.array(left_out, dtype=float))
    return best, float(math.sqrt((count - 1) * np.mean((logs - logs.mean()) ** 2)))


def _vertex(lrs: np.ndarray, losses: np.ndarray, origin: float) -> float | None:
    """Minimum of the parabola through the lowest loss and its neighbours, at the low end the origin."""
    index = int(np.argmin(losses))
    if losses[index] >= origin or index == len(lrs) - 1:
        return None
    left = (0.0, origin) if index == 0 else (lrs[index - 1], losses[index - 1])
    x = np.array([left[0], lrs[index], lrs[index + 1]])
    y = np.array([left[1], losses[index], losses[index + 1]])
    a, b, _ = np.polyfit(x / x[1], y - y[1], 2)
    return float(-b / (2 * a) * x[1])
