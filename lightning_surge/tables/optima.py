"""Best learning rate of each batch size, from a grid of runs.

Runs with one batch size form a valley over the log of the learning rate. Its bottom is that of a parabola
through the means around the smallest one: in the log because learning rates are tried in ratios, and only
around the smallest because a valley is steeper on the side where training diverges.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from lightning_surge.checking.arguments import switch
from lightning_surge.tables.read import FloatArray, RunTable

IntArray = npt.NDArray[np.int64]
Status = Literal["inside", "bracketed", "tuned", "edge_low", "edge_high", "flat", "few", "failed"]

SAME_LR = 1e-6  # relative difference up to which two learning rates are one, written with different digits
MIN_REACH = math.log(1.5)
"""A parabola reaches at least so far to both sides: on a fine grid the next neighbours differ by noise."""
CLEAR = 2.0  # a valley is one if its curvature is so many times its standard error
RESIDUALS = 3  # degrees of freedom that residuals of a parabola need to stand for the noise of single runs


class Optimum(NamedTuple):
    """Bottom of a valley.

    Its status is `inside` a parabola; `bracketed` between two learning rates of which one failed, so that the
    best one tried stands for the optimum; `tuned` by somebody who tells no others; at an edge of the grid;
    `flat`, with a curvature that does not stand out of the noise; `few` learning rates; every run `failed`.
    """

    batch_size: float
    lr: float  # at the bottom; the best one tried where there is no parabola. NaN where all failed
    outcome: float  # the loss, or the steps to the target, there, in the unit of the table
    status: Status

    @property
    def found(self) -> bool:
        """Whether the optimum lies between learning rates that were tried, here or by who tuned it."""
        return self.status in ("inside", "bracketed", "tuned")


class _Bottom(NamedTuple):
    """A parabola's lowest point; without a parabola, the smallest value, and NaN for its curvature.

    `per_noise` times the noise of a run is the curvature's standard error; `scatter` is the standard
    deviation of the residuals, with its degrees of freedom.
    """

    x: float
    y: float
    curvature: float = math.nan
    per_noise: float = math.nan
    scatter: float = math.nan
    freedom: int = 0


@dataclass(frozen=True)
class Valley:
    """Runs of one batch size, averaged over their seeds.

    `noise` is the standard deviation of one run around its mean, near the bottom, without what all learning
    rates of a seed share; NaN if unknown. A mean is infinite where a run failed: a learning rate at which
    some seeds fail is no candidate.
    """

    batch_size: float
    log_lrs: FloatArray  # increasing, shape (n,)
    means: FloatArray  # of the losses, or of the logs of the steps, shape (n,)
    counts: FloatArray  # runs behind each mean
    logarithmic: bool  # whether means are logs
    reach: float  # of the parabola to both sides, in log lr
    noise: float
    seed_noise: float  # standard deviation of what the learning rates of a seed share
    freedom: int  # degrees of freedom of the noise
    optimum: Optimum

    def draw(self, generator: np.random.Generator, noise: float, freedom: int) -> tuple[float, float]:
        """Log of the learning rate and outcome at the bottom if the runs were done again.

        Every mean is drawn around the one found, from Student's distribution: with two or three seeds the
        noise of a run, the valley's own or borrowed, is itself uncertain.
        """
        factor = math.sqrt(freedom / generator.chisquare(freedom))
        shift = self.seed_noise * generator.standard_normal() / math.sqrt(self.counts.max())
        scatter = noise * generator.standard_normal(self.means.size) / np.sqrt(self.counts)
        means = self.means + factor * (scatter + shift)
        bottom = _bottom(self.log_lrs, means, self.reach)
        log_lr = bottom.x
        if self.means.size > 1 and math.isnan(bottom.curvature):
            # Without a parabola the optimum is anywhere nearer to the best one tried than to its neighbours.
            best = int(np.argmin(means))
            steps = np.diff(self.log_lrs) / 2
            below, above = steps[max(best - 1, 0)], steps[min(best, steps.size - 1)]
            log_lr += float(generator.uniform(-below, above))
        return log_lr, _outcome(bottom.y, self.logarithmic)


def valleys(table: RunTable, *, tuned: bool = False) -> list[Valley]:
    """Group runs by batch size, in increasing order.

    Runs with the same batch size, learning rate and seed are averaged first, then the seeds. If `tuned`, a
    learning rate that is the only one of its batch size is the best one.

    Example:
        Steps fall from 400 to 200 and rise again: by symmetry the bottom is in the middle.

        >>> import numpy as np
        >>> lrs = np.array([1e-3, 2e-3, 4e-3])
        >>> table = RunTable("steps", np.full(3, 8.0), lrs, np.array([400.0, 200.0, 400.0]))
        >>> optimum = valleys(table)[0].optimum
        >>> round(optimum.lr, 9), round(optimum.outcome, 6), optimum.status
        (0.002, 200.0, 'inside')
    """
    switch("tuned", tuned)
    # One order whatever that of the rows, so that sums round alike.
    seeds = () if table.seeds is None else (table.seeds,)
    table = table.at(np.lexsort((table.outcomes, *seeds, table.lrs)))
    return [
        _valley(table.at(table.batch_sizes == size), size, tuned)
        for size in np.unique(table.batch_sizes).tolist()
    ]


def _valley(table: RunTable, size: float, tuned: bool) -> Valley:
    logarithmic = table.measure == "steps"
    with np.errstate(invalid="ignore"):
        y = np.log(table.outcomes) if logarithmic else table.outcomes
    x, seeds = np.log(table.lrs), table.seeds
    cell = np.concatenate([[0], np.cumsum(np.diff(x) > SAME_LR)])
    if seeds is not None:
        pairs, inverse = np.unique(cell * (seeds.max() + 1) + seeds, return_inverse=True)
        share = np.bincount(inverse)
        x, y = np.bincount(inverse, x) / share, np.bincount(inverse, y) / share
        cell, seeds = pairs // (seeds.max() + 1), pairs % (seeds.max() + 1)
    counts = np.bincount(cell).astype(np.float64)
    centres, means = np.bincount(cell, x) / counts, np.bincount(cell, y) / counts

    best, reach = int(np.argmin(means)), MIN_REACH
    noise, seed_noise, freedom = _noise(centres, means, cell, y, seeds)
    status: Status
    bottom = _Bottom(float(centres[best]), float(means[best]))
    if not math.isfinite(means[best]):
        status, bottom = "failed", _Bottom(math.nan, math.inf)
    elif centres.size < 3:
        status = "tuned" if tuned and centres.size == 1 else "few"
    elif (means == means[best]).all():
        status = "flat"
    elif best in (0, centres.size - 1):
        status = "edge_high" if best else "edge_low"
    elif not np.isfinite(means[best - 1 : best + 2]).all():
        status = "bracketed"
    else:
        bottom, reach, resolved = _parabola(centres, means, counts, noise)
        status = "inside" if resolved else "flat"
        if math.isnan(noise) and bottom.freedom >= RESIDUALS:
            noise, freedom = bottom.scatter, bottom.freedom
    outcome = _outcome(bottom.y, logarithmic) * (-1 if table.maximize else 1)
    optimum = Optimum(size, math.exp(bottom.x), outcome, status)
    return Valley(size, centres, means, counts, logarithmic, reach, noise, seed_noise, freedom, optimum)


def _outcome(mean: float, logarithmic: bool) -> float:
    # The largest count of a table is far below exp(700); infinite is that of a run that failed.
    return math.exp(mean if math.isinf(mean) else min(mean, 700.0)) if logarithmic else mean


def _parabola(
    x: FloatArray, means: FloatArray, counts: FloatArray, noise: float
) -> tuple[_Bottom, float, bool]:
    """Bottom of the narrowest parabola that stands out of the noise, its reach, and whether there is one."""
    reach, span = MIN_REACH, float(x[-1] - x[0])
    while True:
        bottom = _bottom(x, means, reach, counts)
        known = noise
        if math.isnan(known):
            known = bottom.scatter if bottom.freedom >= RESIDUALS else 0.0
        resolved = bottom.curvature > max(CLEAR * known * bottom.per_noise, 1e-12 * abs(bottom.y))
        if resolved or reach > span:
            return bottom, reach, resolved
        reach *= 2


def _bottom(x: FloatArray, y: FloatArray, reach: float, counts: FloatArray | None = None) -> _Bottom:
    """Bottom of the parabola through the smallest value and what lies around it, up to the first failure."""
    best = int(np.argmin(y))
    lone = _Bottom(float(x[best]), float(y[best]))
    if not math.isfinite(lone.y):
        return lone
    near = _near(x, best, reach)
    outside = np.flatnonzero(~(near & np.isfinite(y)))
    first, last = max([-1, *outside[outside < best]]) + 1, min([x.size, *outside[outside > best]]) - 1
    if best in (first, last):
        return lone
    inside = slice(first, last + 1)
    unit = max(x[last] - x[best], x[best] - x[first])
    t = (x[inside] - x[best]) / unit
    # From the smallest value up, so that a valley far above zero loses no digits.
    coefficients = np.linalg.pinv(np.stack([np.ones_like(t), t, t * t], axis=1))
    level, slope, bend = (coefficients @ (y[inside] - y[best])).tolist()
    if bend <= 0:
        return lone._replace(curvature=bend)
    vertex = min(max(-slope / (2 * bend), float(t[0])), float(t[-1]))
    residuals, freedom = y[inside] - y[best] - level - slope * t - bend * t * t, t.size - 3
    weights = np.ones_like(t) if counts is None else counts[inside]
    return _Bottom(
        x=float(x[best] + unit * vertex),
        y=float(y[best] + level + slope * vertex + bend * vertex * vertex),
        curvature=bend,
        per_noise=float(np.sqrt((coefficients[2] ** 2 / weights).sum())),
        scatter=float(np.sqrt((weights * residuals**2).sum() / freedom)) if freedom else math.nan,
        freedom=freedom,
    )


def _near(x: FloatArray, best: int, reach: float) -> npt.NDArray[np.bool_]:
    """What lies around the best one; its neighbours belong to it however far they are."""
    near: npt.NDArray[np.bool_] = (np.abs(x - x[best]) <= reach) | (np.abs(np.arange(x.size) - best) <= 1)
    return near


def _noise(
    x: FloatArray, means: FloatArray, cell: IntArray, y: FloatArray, seeds: IntArray | None
) -> tuple[float, float, int]:
    """Scatter of single runs near the bottom, of what a seed's runs share there, and degrees of freedom.

    Only near the bottom: runs that are about to diverge scatter far more.
    """
    near = _near(x, int(np.argmin(means)), MIN_REACH) & np.isfinite(means)
    rows = near[cell]
    residuals, cells = (y - np.where(near, means, 0.0)[cell])[rows], int(near.sum())
    freedom, seed_noise = residuals.size - cells, 0.0
    if seeds is not None and freedom > 0:
        codes, inverse = np.unique(seeds[rows], return_inverse=True)
        shared = np.bincount(inverse, residuals) / np.bincount(inverse)
        # With one learning rate nothing tells what a seed shares from what it does not.
        if codes.size > 1 and cells > 1:
            seed_noise = float(np.sqrt((shared**2).sum() / (codes.size - 1)))
            residuals, freedom = residuals - shared[inverse], freedom - (codes.size - 1)
    if freedom <= 0:
        return math.nan, 0.0, 0
    return float(np.sqrt((residuals**2).sum() / freedom)), seed_noise, freedom
