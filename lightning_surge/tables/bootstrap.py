"""Intervals for what was fitted to a grid, by fitting it again to runs that could as well have been found.

Every mean of the grid is drawn again from the scatter of its seeds, and everything that follows from the
means is done again. Where no learning rate was run twice nothing is known of that scatter, and of a learning
rate that somebody tuned it is not known how well: then each law's optima are drawn from its own residuals,
and a best learning rate has no interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from lightning_surge.laws.base import Law
from lightning_surge.laws.tradeoff import TradeoffFit
from lightning_surge.tables.law_fits import LAWS, FloatArray, LawFit, Optima, fit_law
from lightning_surge.tables.optima import Valley

CONFIDENCE = 0.95
FEWEST_REPETITIONS = 20  # behind an interval: the ends of fewer are the largest and the smallest of a handful


class Estimate(NamedTuple):
    """A number from the fit to all runs, with its interval at `CONFIDENCE`.

    `low` is NaN if there is none, `high` infinite where that many repetitions found no finite value.
    """

    name: str
    value: float
    low: float = math.nan
    high: float = math.nan


class Repetitions(NamedTuple):
    """What the repetitions found."""

    laws: Mapping[str, Sequence[Law]]
    logs: FloatArray  # of the best learning rate, by repetition and batch size; none without scatter of seeds
    lines: Sequence[TradeoffFit]  # Eq. 22 of those repetitions that have it
    from_seeds: bool  # whether the scatter of the seeds is behind the laws, or that of the optima around each


def estimate(name: str, value: float, drawn: Sequence[float]) -> Estimate:
    """Interval between the quantiles of repetitions."""
    if len(drawn) < FEWEST_REPETITIONS:
        return Estimate(name, value)
    tail = (1 - CONFIDENCE) / 2
    # Values that occurred, and no mean of two: one of them may be infinite.
    low, high = np.quantile(drawn, [tail, 1 - tail], method="inverted_cdf").tolist()
    return Estimate(name, value, low, high)


def repeat(
    used: Sequence[Valley],
    optima: Optima,
    fits: Mapping[str, LawFit],
    *,
    repetitions: int,
    seed: int,
    progress: Callable[[], object] | None = None,
) -> Repetitions:
    """Fit the laws of `fits` again and again, to optima drawn from the valleys that have one.

    A repetition whose law cannot be fitted is left out; `progress` is called after each one.
    """
    generator = np.random.default_rng(seed)
    known = [(valley.noise, valley.freedom) for valley in used if valley.freedom > 0]
    laws: dict[str, list[Law]] = {name: [] for name in fits}
    rows, lines = [], []
    # A batch size with one seed borrows the noise of the others.
    freedom = sum(each for _, each in known)
    pooled = math.sqrt(sum(noise**2 * each for noise, each in known) / freedom) if known else math.nan
    scatter = [(each.noise, each.freedom) if each.freedom else (pooled, freedom) for each in used]
    from_seeds = bool(known) and all(valley.optimum.status != "tuned" for valley in used)
    for _ in range(repetitions):
        drawn = optima
        if known:
            bottoms = [one.draw(generator, *how) for one, how in zip(used, scatter, strict=True)]
            steps = None if optima.steps is None else np.array([outcome for _, outcome in bottoms])
            drawn = replace(optima, steps=steps)
            if drawn.line is not None:
                lines.append(drawn.line)
        if from_seeds:
            drawn = replace(drawn, logs=np.array([x for x, _ in bottoms]))
            rows.append(drawn.logs)
            found = {name: fit_law(name, drawn, precise=False) for name in fits}
        else:
            found = {name: _from_residuals(name, fit, drawn, generator) for name, fit in fits.items()}
        for name, each in found.items():
            if each is not None:
                laws[name].append(each.law)
        if progress is not None:
            progress()
    return Repetitions(laws, np.array(rows).reshape(len(rows), len(used)), lines, from_seeds)


def _from_residuals(name: str, fit: LawFit, optima: Optima, generator: np.random.Generator) -> LawFit | None:
    """Fit to the law's own optima, scattered as those found are around it; None if they cannot scatter."""
    count = fit.residuals.size
    spare = count - LAWS[name].size
    if spare <= 0:
        return None
    # A fit leaves residuals smaller than the errors: by the share of what it had to spare.
    drawn = generator.choice(fit.residuals, count) * math.sqrt(count / spare)
    return fit_law(name, replace(optima, logs=optima.logs + fit.residuals + drawn), precise=False)
