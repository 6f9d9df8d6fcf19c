"""Which secants measure the slope of the curvature best for their cost?

At a held point of training, every variant of a measurement is repeated on fresh examples. All variants of a
repetition share their examples, so that their scatter is compared and not their luck. What counts is the
scatter of `log R` after averaging: ten of the package's measurements, or as many others as cost the same.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from benchmarks.cells import Cell
from benchmarks.fidelity.markdown import table as markdown_table
from benchmarks.fidelity.training import PHASES, Study, train_to
from benchmarks.fidelity.workloads import BASE_BATCH_SIZE, WORKLOADS, Batch, Workload, draw

__all__ = ["VARIANTS", "cells", "secants", "table"]

Array = NDArray[np.float64]

EXAMPLES = 256
"""Of one measurement: the reference comes first, directions after it. 128 more serve the reference curve."""
SIZES = (BASE_BATCH_SIZE, 4 * BASE_BATCH_SIZE, 16 * BASE_BATCH_SIZE)
BASELINE = "16, 128 (package)"
REFERENCE = "16, 64, 256 (reference)"
AVERAGED = 10
RESAMPLES = 400
LARGEST_SCALE = 1e4 * EXAMPLES / 2
BETAS = (0.9, 0.95)
EFFORT = {"perceptron": (200, 32), "convnet": (60, 12), "autoencoder": (200, 32), "transformer": (50, 8)}
"""Repetitions, and directions per size of the line search."""


@dataclass(frozen=True)
class Secant:
    """A direction from examples `start` to `start + size`, and the examples whose gradients are compared."""

    start: int
    size: int
    low: int = 0
    high: int = 128
    factor: float = 1.0
    sides: int = 1


@dataclass(frozen=True)
class Variant:
    """One way to measure.

    Attributes:
        secants: values along directions of one size are averaged.
        chunk: examples in a chunk, for the norms.
        cross: size of independent directions with which secants are dotted, 0 for none. Their mean is
            taken for the part of the curvature that the signal pays.
    """

    secants: tuple[Secant, ...]
    chunk: int = 16
    cross: int = 0

    @property
    def cost(self) -> int:
        """Examples passed."""
        return EXAMPLES + sum((secant.high - secant.low) * secant.sides for secant in self.secants)

    @property
    def sizes(self) -> list[int]:
        """Of directions."""
        return sorted({secant.size for secant in self.secants})


def pair(small: int, large: int, start: int = 128, chunk: int = 16, **options: Any) -> Variant:
    """Two nested directions on the same examples."""
    return Variant((Secant(start, small, **options), Secant(start, large, **options)), chunk)


def smalls(count: int, parts: int, *, reference: int = 128, start: int = 128) -> tuple[Secant, ...]:
    """Directions of 16 examples each, on all of the reference or each on a part of it."""
    width = reference // parts
    lows = [index % parts * width for index in range(count)]
    return tuple(Secant(start + 16 * i, 16, low, low + width) for i, low in enumerate(lows))


LARGE = Secant(128, 128)
VARIANTS = {
    BASELINE: pair(16, 128),
    "8, 128, K = 32": pair(8, 128, chunk=8),
    "32, 128, K = 8": pair(32, 128, chunk=32),
    "64, 128, K = 4": pair(64, 128, chunk=64),
    "16, 64": pair(16, 64),
    "16, 48, 128": Variant((Secant(128, 16), Secant(128, 48), LARGE)),
    "directions of 1/4: 16, 64": pair(16, 64, start=192, high=192),
    "directions of 3/4: 16, 192": pair(16, 192, start=64, high=64),
    "directions of 7/8: 16, 224": pair(16, 224, start=32, high=32),
    "16, 128, on half the reference": pair(16, 128, high=64),
    "16, 128, on a quarter of it": pair(16, 128, high=32),
    "16, 128, on two different halves": Variant((Secant(128, 16, 0, 64), Secant(128, 128, 64, 128))),
    "16, 128, two-sided, on half": pair(16, 128, high=64, sides=2),
    "16, 112, separate directions": Variant((Secant(128, 16), Secant(144, 112))),
    "2 of 16, 128": Variant((*smalls(2, 1), LARGE)),
    "4 of 16, 128": Variant((*smalls(4, 1), LARGE)),
    "4 of 16 on quarters, 128": Variant((*smalls(4, 4), LARGE)),
    "8 of 16 on eighths, 128": Variant((*smalls(8, 8), LARGE)),
    "4 of 16 on eighths, 128 on half": Variant((*smalls(4, 4, reference=64), Secant(128, 128, 0, 64))),
    "of 3/4: 4 of 16 on parts, 192": Variant((*smalls(4, 4, reference=64, start=64), Secant(64, 192, 0, 64))),
    "of 7/8: 2 of 16 on parts, 224": Variant((*smalls(2, 2, reference=32, start=32), Secant(32, 224, 0, 32))),
    "16, 64, twice, on halves": Variant(
        (*pair(16, 64, high=64).secants, *pair(16, 64, start=192, low=64).secants)
    ),
    "16, 128, halves exchanged as well": Variant(
        (*pair(16, 128).secants, *pair(16, 128, start=0, low=128, high=256).secants)
    ),
    "16, 128, delta / 4": pair(16, 128, factor=0.25),
    "16, 128, delta * 2": pair(16, 128, factor=2.0),
    "16 x others of 16": Variant(smalls(1, 1), cross=16),
    "16 x another of 112": Variant(smalls(1, 1), cross=112),
    "8 of 16 on eighths x others of 16": Variant(smalls(8, 8), cross=16),
    REFERENCE: Variant(tuple(Secant(128, size) for size in SIZES)),
}


class Point:
    """A network as a function of one vector of parameters. Batches of a coupled loss are never joined or cut.

    Args:
        workload: what it is.
        network: used, and put back by `restore`.
    """

    def __init__(self, workload: Workload, network: nn.Module) -> None:
        self._workload, self._network = workload, network.train()
        self._parameters = list(network.parameters())
        self._buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
        self.start = parameters_to_vector(self._parameters).detach().clone()
        self.coupled = any(isinstance(module, nn.BatchNorm2d) for module in network.modules())

    def _pieces(self, batch: Batch) -> list[Batch]:
        size = BASE_BATCH_SIZE if self.coupled else len(batch[0])
        return list(zip(*(tensor.split(size) for tensor in batch), strict=True))

    def gradient(self, theta: Tensor, batch: Batch) -> Tensor:
        """Mean gradient of a batch."""
        vector_to_parameters(theta, self._parameters)
        pieces = self._pieces(batch)
        losses = (self._workload.loss(self._network, piece) for piece in pieces)
        found = [torch.cat([g.flatten() for g in torch.autograd.grad(x, self._parameters)]) for x in losses]
        return torch.stack(found).mean(0)

    @torch.no_grad()
    def loss(self, theta: Tensor, batch: Batch) -> float:
        """Mean loss of a batch."""
        vector_to_parameters(theta, self._parameters)
        return statistics.fmean(
            float(self._workload.loss(self._network, piece)) for piece in self._pieces(batch)
        )

    def restore(self) -> None:
        """Put parameters and buffers back."""
        vector_to_parameters(self.start.clone(), self._parameters)
        for name, buffer in self._network.named_buffers():
            buffer.copy_(self._buffers[name])


def dot(left: Tensor, right: Tensor) -> float:
    """Inner product in float64."""
    return float(torch.dot(left.double(), right.double()))


def repeat(
    point: Point, theta: Tensor, batch: Batch, delta: float, variants: dict[str, Variant]
) -> dict[str, list[float]]:
    """All variants once, on shared examples.

    Returns:
        By variant: `|G|^2`, `tr Sigma`, the curvature at each size and, if asked for, the crossed one.
        Beside them "alignments" at `SIZES`.
    """
    unit = BASE_BATCH_SIZE if point.coupled else 8
    parts = zip(*(tensor.split(unit) for tensor in batch), strict=True)
    rows = torch.stack([point.gradient(theta, part) for part in parts])

    def mean(low: int, high: int) -> Tensor:
        return rows[low // unit : high // unit].mean(0)

    def displaced(secant: Secant, side: float) -> Tensor:
        part = tuple(tensor[secant.low : secant.high] for tensor in batch)
        direction = mean(secant.start, secant.start + secant.size).sign()
        return point.gradient(theta - side * secant.factor * delta * direction, part)

    whole_sq = dot(mean(0, EXAMPLES), mean(0, EXAMPLES))
    # Hessian times direction, once for all variants that share a secant.
    products: dict[Secant, Tensor] = {}
    result = {}
    for name, variant in variants.items():
        chunks = rows[: EXAMPLES // unit].view(EXAMPLES // variant.chunk, -1, rows.shape[1]).mean(1)
        mean_sq = float(chunks.square().sum()) / len(chunks)
        trace = EXAMPLES * (mean_sq - whole_sq) / (len(chunks) - 1)
        along: dict[int, list[float]] = {}
        crossed = []
        for secant in variant.secants:
            if secant not in products:
                other = mean(secant.low, secant.high) if secant.sides == 1 else displaced(secant, -1.0)
                length = secant.sides * secant.factor * delta
                products[secant] = (other - displaced(secant, 1.0)) / length
            stop = secant.start + secant.size
            along.setdefault(secant.size, []).append(dot(mean(secant.start, stop).sign(), products[secant]))
            for start in range(128, EXAMPLES - variant.cross + 1, 16) if variant.cross else ():
                if start >= stop or start + variant.cross <= secant.start:
                    crossed.append(dot(mean(start, start + variant.cross).sign(), products[secant]))
        values = [statistics.fmean(along[size]) for size in variant.sizes]
        values += [statistics.fmean(crossed)] if crossed else []
        result[name] = [whole_sq - trace / EXAMPLES, trace, *values]
    result["alignments"] = [dot(mean(128, 128 + size).sign(), mean(0, 128)) for size in SIZES]
    return result


def saturation(scale: Array, size: float) -> Array:
    """`h(B)^2`."""
    return np.asarray(1.0 / (1.0 + scale / size))


def line(variant: Variant, values: Array, scale: Array) -> tuple[Array, Array, Array]:
    """Slope of `D` over `h^2`, and the centre and level of the line, from averages by size."""
    sizes = variant.sizes
    x = np.stack([saturation(scale, size) for size in sizes], -1)
    centre, level = x.mean(-1), values[..., : len(sizes)].mean(-1)
    if variant.cross:
        both = np.sqrt(saturation(scale, sizes[0]) * saturation(scale, variant.cross))
        return values[..., -1] / both, centre, level
    spread = x - centre[..., None]
    return (spread * values).sum(-1) / (spread**2).sum(-1), centre, level


def log_ratios(scale: Array, slope: Array, centre: Array, level: Array) -> Array:
    """`log R` at `SIZES[1:]`, with the package's limits on a slope; NaN where the level is not positive."""
    level = np.where(level > 0.0, level, np.nan)
    slope = np.minimum(np.maximum(slope, 0.0), level / centre)
    h_sq = np.stack([saturation(scale, size) for size in SIZES], -1)
    curvature = np.maximum((level - slope * centre)[..., None] + slope[..., None] * h_sq, 1e-300)
    log_lr = 0.5 * np.log(h_sq) - np.log(curvature)
    return np.asarray(log_lr[..., 1:] - log_lr[..., :1])


def noise_scale(norms: Array, weights: Array) -> Array:
    """`B_phi` from weighted measurements (second last axis), a signal below its standard error being that."""
    share = weights / weights.sum()
    mean = (share[:, None] * norms).sum(-2)
    count = len(share)
    scatter = ((share * (norms[..., 0] - mean[..., :1])) ** 2).sum(-1) * count / (count - 1)
    signal = np.maximum(np.maximum(mean[..., 0], np.sqrt(scatter)), 1e-300)
    return np.asarray(np.clip(mean[..., 1] / signal, 1e-6, LARGEST_SCALE))


def spread_of(values: Array) -> list[float]:
    """Standard deviation of each column, over what is finite."""
    return [float(entry) for entry in np.nanstd(values, axis=0, ddof=1)]


def summary(variant: Variant, rows: Array, scale: float, generator: np.random.Generator) -> dict[str, Any]:
    """What one variant's repetitions say, with `scale` the many-sample noise scale."""
    known = np.array(scale)
    slope, centre, level = line(variant, rows[:, 2:], known)
    level = level + slope * (saturation(known, SIZES[1]) - centre)
    count = max(2, round(AVERAGED * VARIANTS[BASELINE].cost / variant.cost))
    # Not as often as their costs' quotient exactly: the standard deviation is put to the same cost.
    exact = math.sqrt(count * variant.cost / (AVERAGED * VARIANTS[BASELINE].cost))
    drawn = rows[generator.integers(len(rows), size=(RESAMPLES, count))]
    averaged = drawn[..., 2:].mean(1)
    measured = noise_scale(drawn[..., :2], np.ones(count))
    found = log_ratios(measured, *line(variant, averaged, measured))
    given = np.full(RESAMPLES, scale)
    curvature_only = log_ratios(given, *line(variant, averaged, given))
    whole = log_ratios(known, *line(variant, rows[:, 2:].mean(0), known))
    sd, sd_known = spread_of(found), spread_of(curvature_only)
    return {
        "cost": variant.cost,
        "slope_mean": float(slope.mean()),
        "slope_sd": float(slope.std(ddof=1)),
        "level_mean": float(level.mean()),
        "level_sd": float(level.std(ddof=1)),
        "logR4_all": float(whole[0]),
        "logR16_all": float(whole[1]),
        "logR4_mean": float(np.nanmean(found[:, 0])),
        "logR16_mean": float(np.nanmean(found[:, 1])),
        "logR4_sd_at_equal_cost": sd[0] * exact,
        "logR16_sd_at_equal_cost": sd[1] * exact,
        "logR4_sd_known_scale": sd_known[0] * exact,
        "logR16_sd_known_scale": sd_known[1] * exact,
        "undetermined": float(np.isnan(found[:, 0]).mean()),
    }


def search(
    point: Point, data: Batch, lr: float, sample: Batch, directions: int, generator: torch.Generator
) -> dict[str, Any]:
    """The true best steps along signs of fresh gradients, from line searches on a fixed sample."""
    grid = math.log(lr) + math.log(2.0) * np.arange(-16, 5) / 2
    losses = np.zeros((directions, len(SIZES), len(grid)))
    for row in losses:
        total = torch.zeros_like(point.start)
        done = 0
        for index, size in enumerate(SIZES):
            total += (size - done) * point.gradient(point.start, draw(data, size - done, generator))
            done, direction = size, total.sign()
            row[index] = [point.loss(point.start - math.exp(x) * direction, sample) for x in grid]

    def bottoms(mean: Array) -> Array:
        found = []
        for curve in mean:
            at = int(np.clip(np.argmin(curve), 1, len(grid) - 2))
            square, linear, _ = np.polyfit(grid[at - 1 : at + 2], curve[at - 1 : at + 2], 2)
            found.append(-linear / (2.0 * square))
        return np.array(found)

    random = np.random.default_rng(0)
    best = bottoms(losses.mean(0))
    again = [bottoms(losses[random.integers(directions, size=directions)].mean(0)) for _ in range(100)]
    errors = np.std([entry[1:] - entry[0] for entry in again], axis=0)
    return {
        "lrs": [float(value) for value in np.exp(best)],
        "logR": [float(value) for value in best[1:] - best[0]],
        "logR_error": [float(value) for value in errors],
    }


class Mover:
    """Sign steps, or Adam's with the averages of a run, on a vector of parameters."""

    def __init__(self, study: Study, point: Point, lr: float, *, adam: bool) -> None:
        states = [study.optimizer.state[parameter] for parameter in study.network.parameters()]
        self._first = torch.cat([state["exp_avg"].flatten() for state in states])
        self._second = torch.cat([state["exp_avg_sq"].flatten() for state in states])
        self.theta, self.lr, self._adam = point.start.clone(), lr, adam

    def step(self, gradient: Tensor) -> Tensor:
        """Move, and return the direction."""
        update = gradient.sign()
        if self._adam:
            self._first = torch.lerp(gradient, self._first, BETAS[0])
            self._second = torch.lerp(gradient.square(), self._second, BETAS[1])
            update = self._first / (self._second.sqrt() + 1e-8)
        self.theta = self.theta - self.lr * update
        return update


def free(point: Point, mover: Mover, data: Batch, steps: int, generator: torch.Generator) -> dict[str, float]:
    """Curvature from the gradients of consecutive steps, against that of 512 other examples on the same way.

    `own` is `u_t . (g_t - g_t+1) / lr`, with `g_t` from the examples that made `u_t`. `lagged` is
    `u_t-1 . (g_t - g_t+1) / lr`, which no example enters twice: it is the crossed curvature of two steps.
    """
    sample = draw(data, 512, generator)
    gradient = point.gradient(mover.theta, draw(data, BASE_BATCH_SIZE, generator))
    mean = point.gradient(mover.theta, sample)
    before, rows = None, []
    for _ in range(steps):
        update = mover.step(gradient)
        after = point.gradient(mover.theta, draw(data, BASE_BATCH_SIZE, generator))
        mean_after = point.gradient(mover.theta, sample)
        if before is not None:
            pairs = [(update, gradient - after), (update, mean - mean_after)]
            pairs += [(before, gradient - after), (before, mean - mean_after)]
            rows.append([dot(u, difference) / mover.lr for u, difference in pairs])
        before, gradient, mean = update, after, mean_after
    own, true, lagged, lagged_true = np.array(rows).T
    return {
        "own_mean": float(own.mean()),
        "own_error_sd": float((own - true).std(ddof=1)),
        "true_mean": float(true.mean()),
        "lagged_mean": float(lagged.mean()),
        "lagged_error_sd": float((lagged - lagged_true).std(ddof=1)),
        "lagged_true_mean": float(lagged_true.mean()),
    }


def shrinkage(points: Sequence[Array], slots: int, generator: np.random.Generator) -> dict[str, float]:
    """Root-mean-square errors of `log R(16 base)` when the slope, or all curvatures, are averaged longer.

    Args:
        points: measurements of the package's kind at consecutive points of training.
        slots: how often a run would measure around each of them.
        generator: picks the measurements of each run.
    """
    variant = VARIANTS[BASELINE]
    last = points[-1].mean(0)
    scale = np.array(last[1] / last[0])
    truth = log_ratios(scale, *line(variant, last[2:], scale))[1]
    sequence = [p[generator.integers(len(p), size=(RESAMPLES, slots))] for p in points]
    records = np.concatenate(sequence, axis=1)
    age = np.arange(records.shape[1])[::-1]
    short = 2.0 ** (-age / 8.0)
    measured = noise_scale(records[..., :2], short)
    centre, level = line(variant, np.average(records, axis=1, weights=short)[:, 2:], measured)[1:]
    result = {}
    for half_life in (8, 16, 32):
        longer = np.average(records, axis=1, weights=2.0 ** (-age / half_life))[:, 2:]
        slope, _, level_longer = line(variant, longer, measured)
        for name, used in (("slope", level), ("all", level_longer)):
            error = log_ratios(measured, slope, centre, used)[:, 1] - truth
            result[f"{name}_{half_life}"] = float(np.sqrt(np.nanmean(error**2)))
    return result


def secants(workload: str, phase: str, seed: int, repetitions: int | None = None) -> dict[str, Any]:
    """All variants at one point of training.

    Args:
        workload: its name.
        phase: where to hold.
        seed: of the training.
        repetitions: of every variant; `EFFORT` if not given.

    Returns:
        "variants", by name; "reference": the noise scale, alignments and curvatures at `SIZES` and what
        follows from them, and the line searches; "free" for sign steps and Adam's; "shrinkage" held and
        moving.
    """
    what = WORKLOADS[workload]
    count, directions = EFFORT[workload]
    count = repetitions or count
    study, _ = train_to(what, beta_2=BETAS[1], phase=phase, seed=seed)
    data, generator = what.data(), torch.Generator().manual_seed(20_000 + seed)
    point = Point(what, study.network)
    sample = draw(data, min(what.sample, 32 * directions), generator)
    truth = search(point, data, what.lr, sample, directions, generator)
    # As the callback: the best step at the batch size of the run, at most the one scheduled.
    delta = min(truth["lrs"][0], what.lr)
    usable = {k: v for k, v in VARIANTS.items() if not point.coupled or v.chunk >= BASE_BATCH_SIZE}

    def repeated(theta: Tensor, variants: dict[str, Variant], times: int) -> dict[str, Array]:
        found = [repeat(point, theta, draw(data, 384, generator), delta, variants) for _ in range(times)]
        return {name: np.array([entry[name] for entry in found]) for name in found[0]}

    rows = repeated(point.start, usable, count)
    grad_sq, trace = rows[BASELINE][:, :2].mean(0)
    scale = trace / max(grad_sq, 1e-300)
    alignments, curvatures = rows.pop("alignments").mean(0), rows[REFERENCE][:, 2:].mean(0)
    log_lr = np.log(np.maximum(alignments, 1e-300)) - np.log(np.maximum(curvatures, 1e-300))
    random = np.random.default_rng(seed)
    movers = {
        "sign": Mover(study, point, delta, adam=False),
        "adam": Mover(study, point, what.lr, adam=True),
    }
    moving = {name: free(point, mover, data, 200, generator) for name, mover in movers.items()}
    walk, along = Mover(study, point, what.lr, adam=True), [rows[BASELINE]]
    for times in (count // 5, count // 5, count // 2):
        for _ in range(64):
            walk.step(point.gradient(walk.theta, draw(data, BASE_BATCH_SIZE, generator)))
        along.append(repeated(walk.theta, {BASELINE: VARIANTS[BASELINE]}, times)[BASELINE])
    point.restore()
    return {
        "reference": {
            "noise_scale": float(scale),
            "delta": delta,
            "lr": what.lr,
            "alignments": alignments.tolist(),
            "curvatures": curvatures.tolist(),
            "logR_from_points": (log_lr[1:] - log_lr[0]).tolist(),
            "search": truth,
        },
        "repetitions": count,
        "variants": {name: summary(usable[name], values, scale, random) for name, values in rows.items()},
        "free": moving,
        "shrinkage": {
            "held": shrinkage([rows[BASELINE]], 48, random),
            "moving": shrinkage(along, 12, random),
        },
    }


def cells() -> list[Cell]:
    """Every workload, early and late."""
    first = ("perceptron", "autoencoder")
    return [
        Cell("secants", {"workload": name, "phase": phase, "seed": 0}, secants, 3 + int(name not in first))
        for phase in PHASES
        if phase in ("early", "late")
        for name in WORKLOADS
    ]


def table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: variance of `log R` times cost, relative to the package's, and bias of `log R(16 base)`."""
    headers = [f"{record['workload']} {record['phase']}" for record in records]
    lines = [
        "Each entry: variance x cost of log R at 4 and 16 times the base, relative to the package's; "
        "many-sample log R(16 base) minus that of the line search.",
        "",
        "| variant | cost | worst at 16 | " + " | ".join(headers) + " |",
        "|---|---|---|" + "---|" * len(headers),
    ]
    for name, variant in VARIANTS.items():
        if name == REFERENCE:
            continue
        entries, worst = [], 0.0
        for record in records:
            found, base = record["variants"].get(name), record["variants"][BASELINE]
            if found is None:
                entries.append("-")
                continue
            keys = [f"logR{factor}_sd_at_equal_cost" for factor in (4, 16)]
            four, sixteen = ((found[key] / base[key]) ** 2 for key in keys)
            worst = max(worst, sixteen)
            bias = found["logR16_all"] - record["reference"]["search"]["logR"][1]
            entries.append(f"{four:.2f}, {sixteen:.2f}; {bias:+.2f}")
        shown = f"{worst:.2f}" if worst else "-"
        lines.append(f"| {name} | {variant.cost} | {shown} | " + " | ".join(entries) + " |")
    return "\n".join([*lines, "", shrinkage_table(records)])


def shrinkage_table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: errors when the slope of the curvature, or all of it, is averaged longer than the rest."""
    windows = ("all_8", "slope_16", "slope_32", "all_16", "all_32")
    lines = []
    for how in ("held", "moving"):
        for record in records:
            errors = [f"{record['shrinkage'][how][window]:.3f}" for window in windows]
            lines.append([f"{record['workload']} {record['phase']}", how, *errors])
    note = (
        "Root mean square error of log R at 16 times the base, by half-lives in measurements: of the slope "
        "`c` of the curvature alone, the rest staying at 8, or of all curvatures. The model held, and moving."
    )
    headers = ["point", "model", *(window.replace("_", " ") for window in windows)]
    return f"{note}\n\n{markdown_table(headers, lines)}"
