"""What the figures of a run show, as numbers: the same for a picture and for a page.

Long runs are thinned to what a figure can show, without losing extremes. Nothing is smoothed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_surge.laws.base import Law
from lightning_surge.policy.reasons import Reason
from lightning_surge.runs.run_log import RunLog, RunLogError, Series

__all__ = [
    "Band",
    "LawCurve",
    "LawSnapshot",
    "Line",
    "RunCharts",
    "Span",
    "XAxis",
    "base_of",
    "law_curve",
    "law_snapshots",
    "run_charts",
]

FloatArray = NDArray[np.float64]
XAxis = Literal["steps", "examples"]
X_LABELS: dict[XAxis, str] = {"steps": "optimizer step", "examples": "examples trained"}

# Points per line, spans per row and marks of a changed batch size that a figure can show.
MOST_POINTS = 2000
MOST_MARKS = 40
# Moments at which the law is drawn, and points of each curve.
MOST_LAWS = 5
CURVE_POINTS = 121


class Line(NamedTuple):
    """A curve: `x` in steps or examples, `y` in the unit of its chart; NaN is a gap."""

    x: FloatArray
    y: FloatArray


class Band(NamedTuple):
    """One standard error on both sides of a line, inside the chart."""

    x: FloatArray
    low: FloatArray
    high: FloatArray


class Span(NamedTuple):
    """From where to where on the x axis."""

    begin: float
    end: float


class LawSnapshot(NamedTuple):
    """The law as it was estimated at one moment of training.

    Attributes:
        step: Optimizer step of the estimate.
        batch_sizes: Batch sizes at which the fitted law was evaluated, in examples, increasing.
        lrs: The fitted `lr(B)` there, same length, positive.
        measured_batch_sizes: Batch sizes at which alignment and curvature were measured, in examples.
        measured_lrs: The measured ratio `N(B)/D(B)` there, in the unit of `lrs`. May be negative or NaN.
        measured_standard_errors: Its standard error, in the same unit.
    """

    step: int
    batch_sizes: Sequence[float]
    lrs: Sequence[float]
    measured_batch_sizes: Sequence[float] = ()
    measured_lrs: Sequence[float] = ()
    measured_standard_errors: Sequence[float] = ()


class LawCurve(NamedTuple):
    """A snapshot relative to the fitted learning rate at the base batch size.

    Attributes:
        step: optimizer step.
        sizes: batch sizes, examples.
        ratios: `lr(B) / lr(base)`.
        peak: batch size and ratio where the ratio is largest; None if that is at an end of the curve.
        points: batch sizes that were measured, examples.
        point_ratios: the measured ratios there.
        point_errors: their standard errors, without that of the divisor.
    """

    step: int
    sizes: FloatArray
    ratios: FloatArray
    peak: tuple[float, float] | None
    points: FloatArray
    point_ratios: FloatArray
    point_errors: FloatArray


@dataclass(frozen=True)
class RunCharts:
    """The charts of one run.

    Attributes:
        x_label: what the x axis counts.
        rates: learning rate per step: `"scheduled"`, `"predicted"`, `"used"`.
        rate_top: upper end of their axis; a prediction that was out of bounds may leave it.
        batch: examples per step in force.
        changes: where it changed, and to what; none where there are too many to show.
        peak: peak batch size, NaN while it is infinite or unknown.
        peak_band: its standard error; the whole chart where it was not finite.
        no_peak: where the peak was infinite.
        critical: critical batch size.
        critical_band: its standard error.
        sizes: lower and upper end of the axis of batch sizes.
        reasons: what decided the factor, and where.
    """

    x_label: str
    rates: dict[str, Line]
    rate_top: float
    batch: Line
    changes: tuple[tuple[float, float], ...]
    peak: Line
    peak_band: Band
    no_peak: tuple[Span, ...]
    critical: Line
    critical_band: Band
    sizes: tuple[float, float]
    reasons: dict[Reason, tuple[Span, ...]]


def run_charts(run: RunLog, *, group: str | None = None, x: XAxis = "steps") -> RunCharts:
    """Prepare the charts of a run.

    Args:
        run: what it logged.
        group: the parameter group whose learning rates are shown, where there are several.
        x: what the x axis counts.

    Returns:
        The charts.

    Raises:
        RunLogError: if a key is missing.

    Example:
        >>> steps = np.array([1, 2, 3])
        >>> names = ("lr_scheduled", "lr_predicted", "lr_used", "batch_size", "peak_batch_size")
        >>> run = RunLog("", {f"surge/{name}": Series(steps, np.array([8.0, 8.0, np.inf])) for name in names})
        >>> charts = run_charts(run)
        >>> charts.peak.y.tolist(), charts.no_peak, charts.rate_top
        ([8.0, 8.0, nan], (Span(begin=2.5, end=3.5),), 8.96)
    """
    rates = {name: run.require(f"lr_{name}", group) for name in ("scheduled", "predicted", "used")}
    batch, peak, critical = (
        run.require("batch_size"),
        run.get("peak_batch_size"),
        run.get("critical_batch_size"),
    )
    sizes = _size_range(batch.values, critical.values, peak.values)

    def place(steps: NDArray[np.int64] | FloatArray) -> FloatArray:
        return run.examples_at(steps) if x == "examples" else np.asarray(steps, dtype=np.float64)

    def line(series: Series) -> Line:
        return Line(place(series.steps), series.values)

    def spans(steps: NDArray[np.int64], flags: NDArray[np.bool_]) -> tuple[Span, ...]:
        edges = place(np.array(_spans(steps, flags), dtype=np.float64).reshape(-1, 2))
        return tuple(Span(float(begin), float(end)) for begin, end in edges)

    def with_band(name: str, series: Series) -> tuple[Line, Band]:
        shown = _thinned(series)
        values = np.where(np.isfinite(shown.values) & (shown.values > 0), shown.values, np.nan)
        error = _aligned(run.get(f"{name}_standard_error"), shown.steps)
        # An unknown error next to a known value is drawn as the widest band there is, not as certainty.
        error = np.where(np.isnan(error), np.inf, error)
        at = place(shown.steps)
        return Line(at, values), Band(at, np.clip(values - error, *sizes), np.clip(values + error, *sizes))

    peak_line, peak_band = with_band("peak_batch_size", peak)
    critical_line, critical_band = with_band("critical_batch_size", critical)
    infinite = _coarse(Series(peak.steps, np.isposinf(peak.values).astype(np.float64)))
    codes = _coarse(run.get("held_because"))
    known = [reason for reason in Reason if (codes.values == reason).any()]
    changed = np.flatnonzero(np.diff(batch.values)) + 1
    changed = changed if changed.size <= MOST_MARKS else changed[:0]
    return RunCharts(
        x_label=X_LABELS[x],
        rates={name: line(_thinned(series)) for name, series in rates.items()},
        rate_top=_rate_top(rates),
        batch=line(_thinned(batch)),
        changes=tuple(zip(place(batch.steps[changed]).tolist(), batch.values[changed].tolist(), strict=True)),
        peak=peak_line,
        peak_band=peak_band,
        no_peak=spans(infinite.steps, infinite.values > 0.0),
        critical=critical_line,
        critical_band=critical_band,
        sizes=sizes,
        reasons={reason: spans(codes.steps, codes.values == reason) for reason in known},
    )


def law_snapshots(run: RunLog, most: int = MOST_LAWS) -> list[LawSnapshot]:
    """The law at some moments of a run, evenly over those at which it was estimated, the last one included.

    Args:
        run: what it logged.
        most: how many moments.

    Returns:
        Oldest first; empty if no law was logged.
    """
    steps = run.law_steps
    chosen = np.unique(np.linspace(0, steps.size - 1, min(most, steps.size)).round().astype(int))
    found = [(int(step), law) for step in steps[chosen] if (law := run.law_at(int(step))) is not None]
    if not found:
        return []
    known = [run.get(name).values for name in ("batch_size", "law/smallest_measured", "law/largest_measured")]
    sizes = _positive(np.concatenate([*known, [run.base_batch_size]]))
    curve = np.geomspace(sizes.min() / 4, sizes.max() * 8, CURVE_POINTS)
    return [_snapshot(step, law, curve) for step, law in found]


def _snapshot(step: int, law: Law, curve: FloatArray) -> LawSnapshot:
    # With the peak among the sizes, a curve's summit is the law's.
    peak = law.peak.batch_size
    sizes = np.union1d(curve, [peak]) if curve[0] < peak < curve[-1] else curve
    return LawSnapshot(step, sizes.tolist(), [law.lr(float(size)) for size in sizes])


def law_curve(snapshot: LawSnapshot, base: float) -> LawCurve:
    """A snapshot as it is drawn.

    Args:
        snapshot: the law at one moment.
        base: examples at which the scheduled learning rate was tuned.

    Returns:
        The curve.

    Raises:
        RunLogError: if lengths disagree, or the curve does not reach the base.

    Example:
        >>> curve = law_curve(LawSnapshot(7, [8.0, 16.0, 32.0], [0.1, 0.2, 0.1]), base=8.0)
        >>> curve.ratios.round(9).tolist(), curve.peak[0]
        ([1.0, 2.0, 1.0], 16.0)
    """
    sizes, lrs = _pair(snapshot, "batch_sizes", "lrs")
    points, measured = _pair(snapshot, "measured_batch_sizes", "measured_lrs")
    _, errors = _pair(snapshot, "measured_batch_sizes", "measured_standard_errors")
    divisor = _lr_at(base, snapshot.step, sizes, lrs)
    summit = int(np.argmax(lrs))
    inside = 0 < summit < lrs.size - 1
    ratios = lrs / divisor
    peak = (float(sizes[summit]), float(ratios[summit])) if inside else None
    return LawCurve(snapshot.step, sizes, ratios, peak, points, measured / divisor, errors / divisor)


def _pair(snapshot: LawSnapshot, x_name: str, y_name: str) -> tuple[FloatArray, FloatArray]:
    """Two fields of a snapshot as arrays of one length."""
    x, y = (np.asarray(getattr(snapshot, name), dtype=np.float64) for name in (x_name, y_name))
    if x.shape != y.shape or x.ndim != 1:
        raise RunLogError(
            f"Expected snapshots with {x_name} and {y_name} of one length, got {x.shape} and {y.shape} at "
            f"step {snapshot.step}: give one value per batch size."
        )
    return x, y


def _lr_at(base: float, step: int, sizes: FloatArray, lrs: FloatArray) -> float:
    """The curve's learning rate at the base batch size; a power law joins neighbouring points."""
    if sizes.size == 0 or not sizes[0] <= base <= sizes[-1]:
        reach = "no batch size" if sizes.size == 0 else f"batch_sizes from {sizes[0]:g} to {sizes[-1]:g}"
        raise RunLogError(
            f"Expected snapshots whose batch_sizes reach base_batch_size={base:g}, got {reach} at step "
            f"{step}: evaluate the law on a range that holds the base."
        )
    return float(np.exp(np.interp(np.log(base), np.log(sizes), np.log(lrs))))


def _rate_top(rates: dict[str, Series]) -> float:
    """Room for ordinary excursions of the prediction; one wild value must not flatten everything else."""
    kept = _positive(np.concatenate([rates["scheduled"].values, rates["used"].values]))
    top = float(kept.max()) if kept.size else 1.0
    asked = _positive(rates["predicted"].values)
    return 1.12 * max(top, min(float(asked.max()) if asked.size else top, 1.5 * top))


def _size_range(batch: FloatArray, critical: FloatArray, peak: FloatArray) -> tuple[float, float]:
    """Ends of a log axis; decades above the largest batch size say nothing a reader can use."""
    shown = _positive(np.concatenate([batch, critical, peak]))
    largest = float(np.nanmax(batch, initial=1.0))
    low, high = (float(shown.min()), float(shown.max())) if shown.size else (1.0, 2.0)
    return max(low, largest / 1e4) / 1.4, min(high, 100.0 * largest) * 1.4


def _thinned(series: Series) -> Series:
    """As many points as a figure shows: of each bucket the first, smallest and largest one, the first gap."""
    size = series.steps.size
    if size <= MOST_POINTS:
        return series
    width = -(-size * 4 // MOST_POINTS)
    kept = {size - 1}
    for begin in range(0, size, width):
        part = series.values[begin : begin + width]
        finite = np.isfinite(part)
        kept |= {begin, begin + int(np.argmin(finite))}
        kept |= {begin + int(np.argmin(np.where(finite, part, np.inf)))}
        kept |= {begin + int(np.argmax(np.where(finite, part, -np.inf)))}
    index = np.array(sorted(kept))
    return Series(series.steps[index], series.values[index])


def _coarse(series: Series) -> Series:
    """The largest value of each bucket, at its first step: a short hold stays visible."""
    size = series.steps.size
    begins = np.arange(0, size, max(1, -(-size // MOST_POINTS)))
    if not size:
        return series
    return Series(series.steps[begins], np.maximum.reduceat(series.values, begins))


def _spans(steps: NDArray[np.int64], flags: NDArray[np.bool_]) -> list[tuple[float, float]]:
    """Begin and end of each run of set flags; a sample reaches half way to its neighbours."""
    if not flags.any():
        return []
    middles = (steps[1:] + steps[:-1]) / 2
    edges = np.concatenate([[steps[0] - 0.5], middles, [steps[-1] + 0.5]])
    padded = np.concatenate([[False], flags, [False]]).astype(np.int8)
    starts, ends = np.flatnonzero(np.diff(padded) == 1), np.flatnonzero(np.diff(padded) == -1)
    return [(float(edges[a]), float(edges[b])) for a, b in zip(starts, ends, strict=True)]


def _aligned(series: Series, steps: NDArray[np.int64]) -> FloatArray:
    """The series' values at the given steps, NaN where it has none."""
    if not series.steps.size:
        return np.full(steps.shape, np.nan)
    index = np.minimum(np.searchsorted(series.steps, steps), series.steps.size - 1)
    return np.where(series.steps[index] == steps, series.values[index], np.nan)


def _positive(values: FloatArray) -> FloatArray:
    """The values that a log axis can show."""
    return values[np.isfinite(values) & (values > 0)]


def base_of(run: RunLog, base_batch_size: float | None = None) -> float:
    """The base batch size given, or else the one that was logged.

    Args:
        run: what it logged.
        base_batch_size: examples; None to look it up.

    Returns:
        Examples, positive and finite.

    Raises:
        RunLogError: if it is not known, or no batch size.
    """
    base = run.base_batch_size if base_batch_size is None else float(base_batch_size)
    if not 0.0 < base < math.inf:
        raise RunLogError(
            f"Expected a positive, finite base_batch_size, got base_batch_size={base:g}: pass the batch size "
            "at which the learning rate was tuned."
        )
    return base
