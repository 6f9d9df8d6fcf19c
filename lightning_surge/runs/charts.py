"""What the charts of a run show: numbers, words and colours, the same for a picture and for a page.

Long runs are thinned to what a chart can show, without losing extremes. Nothing is smoothed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from lightning_surge.checking import arguments
from lightning_surge.laws.base import Law
from lightning_surge.policy.reasons import Reason
from lightning_surge.runs.run_log import RunLog, Series, wanted_factor

__all__ = ["Band", "Panel", "RunCharts", "Spans", "Trace", "XAxis", "number", "reason_colour", "run_charts"]

FloatArray = NDArray[np.float64]
Spans = tuple[tuple[float, float], ...]
"""From where to where on the x axis."""
XAxis = Literal["steps", "examples"]
Style = Literal["solid", "dash", "dot", "steps", "star", "circle", "diamond"]
Place = Callable[[NDArray[np.int64]], FloatArray]
X_LABELS: dict[XAxis, str] = {"steps": "optimizer step", "examples": "examples trained"}

# Okabe and Ito's palette, which stays apart under the common forms of colour blindness.
BLACK, GREY, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = (
    "#000000", "#8c8c8c", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
# Moments at which the law is drawn: more of them hide each other.
LAW_COLOURS = (SKY, VERMILION, PURPLE)

# Points per line, spans per row and marks of a changed batch size that a chart can show; the share of its
# width that a letter beside a mark takes.
MOST_POINTS = 2000
MOST_MARKS = 40
LETTER_WIDTH = 0.014
# Points of a law's curve, and room around what a logarithmic axis shows: so that there is a power of two.
CURVE_POINTS = 121
ROOM = 1.5


class Trace(NamedTuple):
    """One line, or some marks: `x` and `y` in the units of its panel; NaN is a gap.

    Attributes:
        label: its words in the legend; none if empty.
        x: shape `(n,)`.
        y: shape `(n,)`.
        colour: as `"#0072B2"`.
        style: of the line, `"steps"` for one that keeps each value until the next; else the kind of mark.
        width: of the line, points.
    """

    label: str
    x: FloatArray
    y: FloatArray
    colour: str
    style: Style = "solid"
    width: float = 1.5


class Band(NamedTuple):
    """One standard error on both sides of a line, inside the panel."""

    x: FloatArray
    low: FloatArray
    high: FloatArray
    colour: str


class Panel(NamedTuple):
    """Lines that share their axes.

    Attributes:
        title: what the panel is about.
        y_label: quantity and unit.
        y_range: lower and upper end of the y axis.
        traces: the lines, the last one on top.
        bands: behind them.
    """

    title: str
    y_label: str
    y_range: tuple[float, float]
    traces: tuple[Trace, ...]
    bands: tuple[Band, ...] = ()


@dataclass(frozen=True)
class RunCharts:
    """The charts of one run.

    Attributes:
        x_label: what the x axis of the first panels counts.
        rates: learning rates from the schedule, as predicted, and as used.
        sizes: batch size in force, peak and critical batch size; its y axis is logarithmic.
        no_peak: where the peak was infinite.
        changes: where the batch size changed, and to what, empty where there is no room for the words; none
            where there are too many to show.
        reasons: what decided the factor, and where.
        law: the factor that the objective asks for, and the law of the next step, over the batch size; both
            axes are logarithmic.
        law_range: lower and upper end of its x axis, examples.
    """

    x_label: str
    rates: Panel
    sizes: Panel
    no_peak: Spans
    changes: tuple[tuple[float, str], ...]
    reasons: dict[Reason, Spans]
    law: Panel
    law_range: tuple[float, float]


def number(value: float) -> str:
    """A number for an axis or a legend.

    Example:
        >>> number(16384.0), number(0.25), number(1234.5)
        ('16,384', '0.25', '1,234')
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def reason_colour(reason: Reason) -> str:
    """Green where the measurements are followed, red where the last law was held, orange in between."""
    if reason in (Reason.MEASURED, Reason.RULE):
        return GREEN
    return VERMILION if reason.held else ORANGE


def run_charts(
    run: RunLog, *, group: str | None = None, x: XAxis = "steps", base_batch_size: float | None = None
) -> RunCharts:
    """Prepare the charts of a run.

    Args:
        run: what it logged.
        group: name of the parameter group or optimizer that is shown, where there are several.
        x: what the x axis counts.
        base_batch_size: examples at which the scheduled learning rate was tuned; None takes what was logged.

    Returns:
        The charts.

    Raises:
        RunLogError: if a key is missing.
        ValueError: if the base batch size is not positive and finite.

    Example:
        >>> steps = np.array([1, 2, 3])
        >>> names = ("lr_scheduled", "lr_predicted", "lr_used", "batch_size", "peak_batch_size")
        >>> run = RunLog("", {f"surge/{name}": Series(steps, np.array([8.0, 8.0, np.inf])) for name in names})
        >>> charts = run_charts(run, base_batch_size=8)
        >>> charts.sizes.traces[0].y.tolist(), charts.no_peak, charts.rates.y_range
        ([8.0, 8.0, nan], ((2.5, 3.5),), (0.0, 8.96))
    """
    arguments.choice("x", x, get_args(XAxis))
    run = run.of_group(group)
    base = run.base_batch_size if base_batch_size is None else base_batch_size
    remedy = "pass the batch size at which the learning rate was tuned"
    base = float(arguments.number("base_batch_size", base, remedy))
    rates = {name: run.require(f"lr_{name}", group) for name in ("predicted", "used", "scheduled")}
    batch = run.require("batch_size")

    def place(steps: NDArray[np.int64] | FloatArray) -> FloatArray:
        return run.examples_at(steps) if x == "examples" else np.asarray(steps, dtype=np.float64)

    def spans(steps: NDArray[np.int64], flags: NDArray[np.bool_]) -> Spans:
        edges = place(np.array(_spans(steps, flags), dtype=np.float64).reshape(-1, 2))
        return tuple((float(begin), float(end)) for begin, end in edges)

    def trace(label: str, series: Series, colour: str, style: Style, width: float) -> Trace:
        shown = _thinned(series)
        return Trace(label, place(shown.steps), shown.values, colour, style, width)

    peak, codes = run.get("peak_batch_size"), _coarse(run.get("held_because"))
    infinite = _coarse(Series(peak.steps, np.isposinf(peak.values).astype(np.float64)))
    known = [reason for reason in Reason if (codes.values == reason).any()]
    law, law_range = _law_panel(run, group, base)
    return RunCharts(
        x_label=X_LABELS[x],
        rates=Panel(
            "Learning rate",
            "learning rate (per step)",
            (0.0, _rate_top(rates)),
            (
                trace("predicted by the law", rates["predicted"], ORANGE, "solid", 1.0),
                trace("used", rates["used"], BLUE, "solid", 1.8),
                trace("scheduled", rates["scheduled"], BLACK, "dash", 1.2),
            ),
        ),
        sizes=_sizes_panel(run, place, trace("batch size in force", batch, BLACK, "steps", 1.8)),
        no_peak=spans(infinite.steps, infinite.values > 0.0),
        changes=_changes(batch, place(batch.steps)),
        reasons={reason: spans(codes.steps, codes.values == reason) for reason in known},
        law=law,
        law_range=law_range,
    )


def _sizes_panel(run: RunLog, place: Place, in_force: Trace) -> Panel:
    names: dict[str, tuple[str, Style]] = {"peak": (VERMILION, "solid"), "critical": (GREEN, "dash")}
    series = {name: run.get(f"{name}_batch_size") for name in names}
    batch = run.require("batch_size").values
    low, high = _size_range(batch, *(one.values for one in series.values()))
    traces, bands = [], []
    for name, (colour, style) in names.items():
        shown = _thinned(series[name])
        if not shown.steps.size:
            continue
        at = place(shown.steps)
        values = np.where(np.isfinite(shown.values) & (shown.values > 0), shown.values, np.nan)
        error = _aligned(run.get(f"{name}_batch_size_standard_error"), shown.steps)
        # An unknown error next to a known value is drawn as the widest band there is, not as certainty.
        error = np.where(np.isnan(error), np.inf, error)
        bands.append(Band(at, np.clip(values - error, low, high), np.clip(values + error, low, high), colour))
        label = f"{name} batch size ± 1 standard error"
        traces.append(Trace(label, at, values, colour, style))
    label = "batch size (examples)"
    return Panel("Batch size against the peak", label, (low, high), (*traces, in_force), tuple(bands))


def _law_panel(run: RunLog, group: str | None, base: float) -> tuple[Panel, tuple[float, float]]:
    """The factor and the law of the next step, at moments evenly over those at which it changed."""
    moments = run.law_steps if run.law_steps.size else run.require("batch_size").steps
    count = min(len(LAW_COLOURS), moments.size)
    steps = [int(one) for one in moments[np.linspace(0, moments.size - 1, count).round().astype(int)]]
    laws = {step: law for step in steps if (law := run.law_at(step)) is not None}
    names = ("batch_size", "law/smallest_measured", "law/largest_measured")
    known = _positive(np.concatenate([*(run.get(name).values for name in names), [base]]))
    # Far enough to the right for the law's fall, where it has one.
    ends = (known.min() / 4, known.max() * 8) if laws else (known.min() / ROOM, known.max() * ROOM)
    sizes = np.union1d(np.geomspace(*ends, CURVE_POINTS), [base])
    traces = [Trace("sqrt scaling", sizes, np.sqrt(sizes / base), GREY, "dot", 1.1)]
    for colour, (step, law) in zip(LAW_COLOURS, laws.items(), strict=False):
        traces += _law_traces(run, group, step, law, sizes, base, colour)
    base_words = number(base)
    at_base = sizes[sizes == base]
    traces.append(Trace(f"base batch size, B = {base_words}", at_base, np.ones(1), BLACK, "diamond"))
    used = np.array([(run.at("batch_size", step), run.at("lr_scale", step)) for step in steps]).T
    if np.isfinite(used).all():
        traces.append(Trace("factor used in these steps", used[0], used[1], BLACK, "circle"))
    # Square roots go where they go; the panel is around what was asked for.
    heights = _positive(np.concatenate([[1.0], *(trace.y for trace in traces[1:])]))
    y_range = (float(heights.min()) / ROOM, float(heights.max()) * ROOM)
    y_label = f"learning rate over the one at B = {base_words} (factor R)"
    return Panel("The factor and the law", y_label, y_range, tuple(traces)), (
        float(sizes[0]),
        float(sizes[-1]),
    )


def _law_traces(
    run: RunLog, group: str | None, step: int, law: Law, sizes: FloatArray, base: float, colour: str
) -> Iterator[Trace]:
    """One moment: what the objective asks for, and what is best for the next step alone."""
    objective, lr = run.objective_at(step), run.at("lr_scheduled", step, group)
    peak = law.peak
    inside = sizes[0] < peak.batch_size < sizes[-1]
    words = f"peak at B = {peak.batch_size:,.0f}" if inside else "no peak in this range"
    # With the peak among the sizes, a curve's summit is the law's.
    at = np.union1d(sizes, [peak.batch_size]) if inside else sizes
    next_step = np.array([law.lr(float(size)) for size in at]) / law.lr(base)
    same = objective == "step"
    label = f"step {step:,}: factor for objective={objective!r}"
    if objective is not None:
        factor = np.array([wanted_factor(objective, law, float(size), base, lr) for size in at])
        yield Trace(f"{label}, {words}" if same else label, at, factor, colour, "solid", 2.0)
    if not same:
        yield Trace(f"step {step:,}: law of the next step, {words}", at, next_step, colour, "dash", 1.3)
    if inside:
        summit = int(np.argmax(at == peak.batch_size))
        yield Trace("", at[[summit]], next_step[[summit]], colour, "star")


def _changes(batch: Series, places: FloatArray) -> tuple[tuple[float, str], ...]:
    """Where the batch size changed, with words as long as they do not run into each other."""
    changed = np.flatnonzero(np.diff(batch.values)) + 1
    letter, free, marks = LETTER_WIDTH * (places[-1] - places[0]), -math.inf, []
    for index in changed if changed.size <= MOST_MARKS else ():
        place, words = float(places[index]), number(batch.values[index])
        half = letter * (len(words) + 1) / 2
        words = words if place - half >= free else ""
        free = place + half if words else free
        marks.append((place, words))
    return tuple(marks)


def _rate_top(rates: dict[str, Series]) -> float:
    """Room for ordinary excursions of the prediction; one wild value must not flatten everything else."""
    kept = _positive(np.concatenate([rates["scheduled"].values, rates["used"].values]))
    top = float(kept.max()) if kept.size else 1.0
    asked = _positive(rates["predicted"].values)
    return 1.12 * max(top, min(float(asked.max()) if asked.size else top, 1.5 * top))


def _size_range(batch: FloatArray, peak: FloatArray, critical: FloatArray) -> tuple[float, float]:
    """Ends of a log axis; decades above the largest batch size say nothing a reader can use."""
    shown = _positive(np.concatenate([batch, critical, peak]))
    largest = float(np.nanmax(batch, initial=1.0))
    low, high = (float(shown.min()), float(shown.max())) if shown.size else (1.0, 2.0)
    return max(low, largest / 1e4) / ROOM, min(high, 100.0 * largest) * ROOM


def _thinned(series: Series) -> Series:
    """As many points as a chart shows: of each bucket the first, smallest and largest one, the first gap."""
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
