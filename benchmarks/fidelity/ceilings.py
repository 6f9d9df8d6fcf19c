"""How hot a run may get: the best ratio that is approached after a change, and what could tell it beforehand.

A ladder of ratios, each approached from 1 at the callback's `max_drift_per_step`, tells what every rule that
decides at the change would have lost. The state at the change, exactly: the noise scale, and Adam's edge of
stability at each batch size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.fidelity.analysis import POINT, Record, chosen_elsewhere, loss_of_run
from benchmarks.fidelity.ensemble import EPS
from benchmarks.fidelity.free import DECAYS, LARGER, REFERENCE, approached
from benchmarks.fidelity.markdown import number, table
from benchmarks.fidelity.one_step import gradient_of
from benchmarks.fidelity.switch import SEEDS, final_losses, fixed_sample
from benchmarks.fidelity.training import PHASES, Study, before, train_to
from benchmarks.fidelity.workloads import BASE_BATCH_SIZE, WORKLOADS, draw
from lightning_surge.policy.policy import MAX_DRIFT

__all__ = ["LONGEST", "ceilings", "ladder", "rule_gaps", "rules_at", "state"]

RATIOS = (1.0, 2.0, 4.0, 8.0, 16.0, 64.0, 256.0)
LONGEST = 8 * DECAYS[-1]
"""Examples after the change that are enough for a ladder up to 256 times the batch size."""
# Batches of the base size behind the exact statistics, and examples behind the curvature.
BATCHES = 512
EXAMPLES = 1024
# Steps of Adam with beta_1 = 0.9 and a preconditioner held still diverge above this over the sharpness.
STABLE = 38.0
CAPS = (1, 2, 4, 8, 16)
POWERS = (-0.5, 0.5, 1.0)
EDGES = (2.0, 3.0, 4.5, 6.0, 9.0)
BEST = "best ratio of the ladder"
LEAST_STEPS = 32


def ladder(
    workload: str, beta_2: float, phase: str, examples: int, sizes: Sequence[int] = LARGER
) -> dict[str, Any]:
    """Final losses after a change at a phase: by batch size and ratio approached, one for each seed."""
    losses = {}
    for size in sizes:
        ends = [ratio for ratio in RATIOS if ratio <= max(size / BASE_BATCH_SIZE, 8.0)]

        def multipliers_at(step: int, ends: Sequence[float] = ends) -> torch.Tensor:
            return torch.tensor([approached(end, MAX_DRIFT, step) for end in ends])

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
        shapes = [parameter.numel() for parameter in study.network.parameters()]
        damped = (damp(moment, shapes, 1.0 - beta_2) for moment in (signal, variance))
        edges.append(edge_lrs(curvature(study), *damped))
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


def damp(moment: torch.Tensor, shapes: Sequence[int], weight: float) -> torch.Tensor:
    """With the weight that Adam gives one more gradient, times the mean over each parameter.

    Coordinates without a gradient, of rare bytes and of units that are nearly dead, would set the edge.
    """
    return torch.cat([part + weight * part.mean() for part in moment.split(list(shapes))])


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


def mccandlish(noise_scale: float, batch_size: int) -> float:
    """log2 of sqrt((1 + B_s / base) / (1 + B_s / B)): square-root scaling where the scale is infinite."""
    if math.isinf(noise_scale):
        return 0.5 * math.log2(batch_size / BASE_BATCH_SIZE)
    return 0.5 * math.log2((1 + noise_scale / BASE_BATCH_SIZE) / (1 + noise_scale / batch_size))


def mixed(scale: float, size: float, power: float) -> float:
    """log2 of `sqrt(B / base)^(1 - g) R_progress^g`; g = 0 is sqrt, 1 progress."""
    octaves = math.log2(size / BASE_BATCH_SIZE)
    return 0.5 * octaves * (1.0 - power) + power * (octaves - mccandlish(scale, size))


def rules_at(scale: float, edge: Mapping[str, float], lr: float, size: int) -> dict[str, float]:
    """log2 of the ratio that every rule asks for at a change, by name.

    Args:
        scale: Noise scale, examples; infinite or negative without a signal.
        edge: Adam's edge of stability by batch size, a learning rate.
        lr: Scheduled learning rate at the change.
        size: Batch size after it.
    """
    scale = scale if scale > 0.0 else math.inf
    octaves = math.log2(size / BASE_BATCH_SIZE)
    found = {"constant": 0.0, REFERENCE: octaves / 2, "linear, approached": octaves}
    for count in CAPS:
        name = "alignment" if count == 1 else f"sqrt up to {count} noise scales"
        found[name] = mccandlish(count * scale, size)
    for power in POWERS:
        name = "progress" if power == 1.0 else f"sqrt and progress, g = {power:g}"
        found[name] = mixed(scale, size, power)
    for hot in (REFERENCE, "progress"):
        for multiple in EDGES:
            under = math.log2(multiple * edge[str(size)] / lr)
            found[f"{hot.partition(',')[0]} under {multiple:g} edges"] = min(found[hot], under)
    return found


def rule_gaps(records: Mapping[str, Sequence[Record]]) -> pd.DataFrame:
    """Final losses minus those of sqrt approached, a row for each experiment and rule.

    Each is read off the ladder, linear in log2 of the ratio; a ratio beyond its ends gets that of the end.
    `gap` is in nats, or in percent of the reference's mean where the loss is no cross-entropy.
    """
    states = {tuple(record[name] for name in POINT): record for record in records["state"]}
    rows = []
    for cell in records["ladder"]:
        at = states.get(tuple(cell[name] for name in POINT))
        if at is None or cell["examples"] not in DECAYS:
            continue
        workload = WORKLOADS[cell["workload"]]
        lr = workload.lr * before(PHASES[cell["phase"]])
        for size, by_ratio in cell["losses"].items():
            grid = [math.log2(float(ratio)) for ratio in by_ratio]
            losses = np.array([[loss_of_run(loss) for loss in found] for found in by_ratio.values()])
            middle = float(losses[grid.index(0.5 * math.log2(int(size) / BASE_BATCH_SIZE))].mean())
            unit = 1.0 if workload.cross_entropy else 100.0 / middle
            for seed in range(losses.shape[1]):
                asked = rules_at(at["noise_scale"][seed], at["edge_lr"][seed], lr, int(size))
                lost = {rule: float(np.interp(ratio, grid, losses[:, seed])) for rule, ratio in asked.items()}
                best = losses[:, seed].min()
                rows += [
                    {name: cell[name] for name in (*POINT, "examples")}
                    | {"batch_size": int(size), "seed": seed, "rule": rule}
                    | {"gap": unit * (loss - lost[REFERENCE])}
                    for rule, loss in (lost | {BEST: float(best)}).items()
                ]
    return pd.DataFrame(rows)


def chosen(found: pd.DataFrame) -> list[list[object]]:
    """For each workload: the rule that the others choose, on the mean and on the worst seed, and its gaps."""
    rules = found[found["rule"] != BEST]
    scale = rules[rules["rule"] == "constant"].groupby("workload")["gap"].apply(lambda gap: gap.abs().mean())
    of_seed = rules.groupby(["workload", "rule", "seed"])["gap"].mean()
    means = rules.groupby(["workload", "rule"])["gap"].mean()
    lines: list[list[object]] = []
    for how, costs in (("mean", means), ("worst seed", of_seed.groupby(level=[0, 1]).max())):
        shares = {name: (costs[name] / scale[name]).to_dict() for name in scale.index}
        for workload, rule, *_ in chosen_elsewhere(shares, REFERENCE):
            lines.append([workload, how, rule, number(means[workload, rule], 4)])
    return lines


def ceilings(records: Mapping[str, Sequence[Record]]) -> str:
    """What each rule loses to sqrt approached, by workload, and what a workload's others would choose."""
    found = rule_gaps(records)
    if found.empty:
        return "No cell is finished."
    # A larger batch for so few steps gives no rule the time to rise.
    found = found[found["examples"] // found["batch_size"] >= LEAST_STEPS]
    of_seed = found.groupby(["rule", "workload", "seed"], sort=False)["gap"].mean()
    means, worst = of_seed.groupby(level=[0, 1], sort=False).mean(), of_seed.groupby(level=[0, 1]).max()
    names = [name for name in WORKLOADS if name in set(found["workload"])]
    rows = [
        [rule, *(f"{number(means[rule, name], 4)} ({number(worst[rule, name], 4)})" for name in names)]
        for rule in dict.fromkeys(found["rule"])
    ]
    changes = len(found.groupby([*POINT, "examples", "batch_size"]))
    note = (
        f"{changes} changes of the batch size of at least {LEAST_STEPS} steps: final loss minus that of sqrt "
        "approached (mean of the worst seed), nats, for the autoencoder percent. Every rule decides once, at "
        f"the change, from exact statistics, and is approached at {100 * MAX_DRIFT:g} % a step."
    )
    headers = ["rule", *names]
    choice = table(["left out", "by the", "the others choose", "which costs here"], chosen(found))
    return "\n\n".join([note, table(headers, rows), choice])
