"""Draw a run as a picture, with matplotlib: over time on the left, over the batch size on the right.

Built without pyplot: no window, no global state, any backend. Nothing is smoothed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from lightning_surge.checking import arguments
from lightning_surge.checking.libraries import needed
from lightning_surge.policy.reasons import Reason
from lightning_surge.runs.run_log import FloatArray, RunLog, Series, wanted_factor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_surge.laws.base import Law

XAxis = Literal["steps", "examples"]
Place = Callable[[NDArray[Any]], FloatArray]
"""From optimizer steps to the x axis."""
X_LABELS: dict[XAxis, str] = {"steps": "optimizer step", "examples": "examples trained"}
# Okabe and Ito's palette, which stays apart under the common forms of colour blindness.
BLACK, GREY, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = (
    "#000000", "#8c8c8c", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
# Points per line, spans per row and marks of a changed batch size that a chart can show; the share of its
# width that a letter beside a mark takes.
MOST_POINTS, MOST_MARKS, LETTER_WIDTH = 2000, 40, 0.014
# Room around what a logarithmic axis shows: so that there is a power of two.
ROOM = 1.5
DASHES, DOTS = (0, (4, 2)), (0, (1, 1.5))
RATES: dict[str, dict[str, Any]] = {
    "predicted": {"label": "predicted by the law", "color": ORANGE, "linewidth": 1.0},
    "used": {"label": "used", "color": BLUE, "linewidth": 1.8},
    "scheduled": {"label": "scheduled", "color": BLACK, "linewidth": 1.2, "linestyle": DASHES},
}
SIZES: dict[str, dict[str, Any]] = {
    "peak": {"color": VERMILION},
    "critical": {"color": GREEN, "linestyle": DASHES},
}
# Moments at which the law is drawn: more of them hide each other. Points of its curve.
LAW_COLOURS, CURVE_POINTS = (SKY, VERMILION, PURPLE), 121
# The strip at the top of the batch-size panel, as fractions of the panel's height.
STRIP_BOTTOM, STRIP_HEIGHT = 0.92, 0.08
# Height of a reason's row, where the panels above are 3 high.
ROW_OF_REASON = 0.32
MOST_TICKS = 6


def plot_run(
    run: RunLog,
    *,
    base_batch_size: float | None = None,
    group: str | None = None,
    title: str | None = None,
    x: XAxis = "steps",
) -> Figure:
    """Draw one run: its learning rates, its batch size against the peak, what decided, and the law.

    docs/reading-a-run.md explains the panels. A prediction that was out of bounds may leave its panel; where
    a standard error was not logged, which means that it was not finite, its band fills the panel.

    Args:
        run: What `read_run` returned.
        base_batch_size: The batch size at which the scheduled learning rate was tuned, in examples; None
            takes the one that was logged.
        group: The suffix of the learning rates' tags, where there are several parameter groups or
            optimizers, as `"1"`, `"opt0"` or `"opt0/1"`.
        title: A line above the figure.
        x: What the x axis counts.

    Returns:
        A figure for `figure.savefig`.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        RunLogError: If a key is missing.
        ValueError: If the base batch size is not positive and finite.

    Example:
        >>> import numpy as np
        >>> from lightning_surge.runs.run_log import Series
        >>> steps, values = np.array([1, 2]), np.array([8.0, 16.0])
        >>> names = ("lr_scheduled", "lr_predicted", "lr_used", "batch_size", "held_because")
        >>> run = RunLog("", {f"surge/{name}": Series(steps, values) for name in names})
        >>> [axes.get_xlabel() for axes in plot_run(run, base_batch_size=8).axes]
        ['', '', 'optimizer step', 'batch size B (examples)']
    """
    with needed("Drawing a run needs matplotlib", "'lightning-surge[plot]'"):
        from matplotlib.figure import Figure

    run = run.of_group(group)
    arguments.choice("x", x, get_args(XAxis))
    base = run.base_batch_size if base_batch_size is None else base_batch_size
    remedy = "pass the batch size at which the learning rate was tuned"
    base = float(arguments.number("base_batch_size", base, remedy))

    def place(steps: NDArray[Any]) -> FloatArray:
        return run.examples_at(steps) if x == "examples" else np.asarray(steps, dtype=np.float64)

    codes = coarse(run.get("held_because"))
    reasons = [reason for reason in Reason if (codes.values == reason).any()]
    figure = Figure(figsize=(11.6, 8.2), dpi=150, layout="constrained")
    # Two figures side by side, so that the legend under one makes no gap in the other.
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[1.2, 1.0]).flat
    rows = max(1.0, ROW_OF_REASON * len(reasons))
    panels = left.subplot_mosaic([["lr"], ["batch"], ["why"]], height_ratios=[3.0, 3.0, rows])
    panels["law"] = right.subplots()
    _draw_rates(panels["lr"], run, group, place)
    _draw_sizes(panels["batch"], run, place)
    _draw_reasons(panels["why"], codes, reasons, place)
    _draw_law(panels["law"], run, base)
    batch = run.require("batch_size")
    marks = changes(batch, place(batch.steps))
    for name in ("lr", "batch"):
        _mark_changes(panels[name], marks, labelled=name == "lr")
        panels[name].sharex(panels["why"])
        panels[name].tick_params(labelbottom=False)
    panels["why"].set_xlabel(X_LABELS[x])
    for axes in panels.values():
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color="#e6e6e6", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_formatter(lambda value, _: number(value))
        # Room for numbers of millions.
        count = "numticks" if axes is panels["law"] else "nbins"
        axes.xaxis.get_major_locator().set_params(**{count: MOST_TICKS})
        axes.tick_params(axis="x", labelsize=8.5)
    if title is not None:
        figure.suptitle(title, fontsize=12)
    return figure


def _finish(axes: Axes, title: str, y_label: str, *, columns: int, low: float = -0.03, pad: int = 6) -> None:
    """Words of a panel, and its legend below, where it hides nothing."""
    axes.set_ylabel(y_label)
    axes.yaxis.set_major_formatter(lambda value, _: number(value))
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=pad)
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, low), ncols=columns, columnspacing=1.0, fontsize=8.5,
        framealpha=0.9, edgecolor="none",
    )  # fmt: skip


def _draw_rates(axes: Axes, run: RunLog, group: str | None, place: Place) -> None:
    rates = {name: run.require(f"lr_{name}", group) for name in RATES}
    for name, series in rates.items():
        shown = thinned(series)
        axes.plot(place(shown.steps), shown.values, **RATES[name])
    axes.set_ylim(0.0, rate_top(*(series.values for series in rates.values())))
    _finish(axes, "Learning rate", "learning rate (per step)", columns=3, pad=16)


def _draw_sizes(axes: Axes, run: RunLog, place: Place) -> None:
    """Batch size in force, peak and critical batch size with their bands; infinite peaks as a strip."""
    axes.set_yscale("log", base=2)
    batch, logged = run.require("batch_size"), {name: run.get(f"{name}_batch_size") for name in SIZES}
    low, high = size_range(batch.values, *(series.values for series in logged.values()))
    peak = logged["peak"]
    infinite = coarse(Series(peak.steps, np.isposinf(peak.values).astype(np.float64)))
    if strips := bars(infinite.steps, infinite.values > 0.0, place):
        axes.broken_barh(
            strips, (STRIP_BOTTOM, STRIP_HEIGHT), transform=axes.get_xaxis_transform(),
            facecolor="#fbe3d3", edgecolor=VERMILION, hatch="////", linewidth=0,
            label="no peak in reach (infinite)",
        )  # fmt: skip
    for name, look in SIZES.items():
        shown = thinned(logged[name])
        if shown.steps.size:
            # NaN is a gap in a line.
            drawable = np.isfinite(shown.values) & (shown.values > 0)
            at, values = place(shown.steps), np.where(drawable, shown.values, np.nan)
            error = run.get(f"{name}_batch_size_standard_error").at(shown.steps)
            # An unknown error next to a known value is drawn as the widest band there is, not as certainty.
            error = np.where(np.isnan(error), np.inf, error)
            low_end, high_end = (np.clip(values + sign * error, low, high) for sign in (-1, 1))
            axes.fill_between(at, low_end, high_end, color=look["color"], alpha=0.14, linewidth=0)
            axes.plot(at, values, label=f"{name} batch size ± 1 standard error", **look)
    shown = thinned(batch)
    look = {"color": BLACK, "linewidth": 1.8, "drawstyle": "steps-post"}
    axes.plot(place(shown.steps), shown.values, label="batch size in force", **look)
    axes.set_ylim(low, low * (high / low) ** (1.0 / (STRIP_BOTTOM - 0.03)))
    _finish(axes, "Batch size against the peak", "batch size (examples)", columns=2)


def _draw_reasons(axes: Axes, codes: Series, reasons: list[Reason], place: Place) -> None:
    """One row for each reason: where the law was followed, and where and why it was not."""
    for row, reason in enumerate(reasons):
        spans = bars(codes.steps, codes.values == reason, place)
        # Measurements followed, the last law held, and in between.
        followed = reason in (Reason.MEASURED, Reason.RULE)
        colour = GREEN if followed else VERMILION if reason.held else ORANGE
        axes.broken_barh(spans, (row - 0.4, 0.8), facecolor=colour, linewidth=0)
    axes.set_yticks(range(len(reasons)), [reason.label for reason in reasons], fontsize=8)
    axes.set_ylim(max(len(reasons), 1) - 0.4, -0.6)
    axes.set_title("What decided the factor on the learning rate", loc="left", fontsize=11, fontweight="bold")


def _draw_law(axes: Axes, run: RunLog, base: float) -> None:
    """The factor and the law of the next step, at moments evenly over those at which it changed."""
    moments = run.law_steps if run.law_steps.size else run.require("batch_size").steps
    count = min(len(LAW_COLOURS), moments.size)
    steps = [int(one) for one in moments[np.linspace(0, moments.size - 1, count).round().astype(int)]]
    laws = {step: law for step in steps if (law := run.law_at(step)) is not None}
    names = ("batch_size", "law/smallest_measured", "law/largest_measured")
    known = positive(np.concatenate([*(run.get(name).values for name in names), [base]]))
    # Far enough to the right for the law's fall, where it has one.
    ends = (known.min() / 4, known.max() * 8) if laws else (known.min() / ROOM, known.max() * ROOM)
    sizes = np.union1d(np.geomspace(*ends, CURVE_POINTS), [base])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.plot(sizes, np.sqrt(sizes / base), label="sqrt scaling", color=GREY, linewidth=1.1, linestyle=DOTS)
    for colour, (step, law) in zip(LAW_COLOURS, laws.items(), strict=False):
        _draw_moment(axes, run, step, law, sizes, base, colour)
    label = f"base batch size, B = {number(base)}"
    axes.plot([base], [1.0], "D", label=label, color=BLACK, markersize=5)
    used = np.array([(run.at("batch_size", step), run.at("lr_scale", step)) for step in steps]).T
    if np.isfinite(used).all():
        look: dict[str, Any] = {"color": BLACK, "markerfacecolor": "none", "markersize": 10}
        axes.plot(*used, "o", label="factor used in these steps", **look)
    # Square roots go where they go; the panel is around what was asked for.
    heights = positive(np.concatenate([np.asarray(line.get_ydata()) for line in axes.get_lines()[1:]]))
    axes.set_xlim(sizes[0], sizes[-1])
    axes.set_ylim(heights.min() / ROOM, heights.max() * ROOM)
    axes.set_xlabel("batch size B (examples)")
    y_label = f"learning rate over the one at B = {number(base)} (factor R)"
    _finish(axes, "The factor and the law", y_label, columns=1, low=-0.085)


def _draw_moment(
    axes: Axes, run: RunLog, step: int, law: Law, sizes: FloatArray, base: float, hue: str
) -> None:
    """What the objective asks for at one moment, and what is best for the next step alone."""
    objective, peak = run.objective_at(step), law.peak
    inside = sizes[0] < peak.batch_size < sizes[-1]
    words = f"peak at B = {peak.batch_size:,.0f}" if inside else "no peak in this range"
    # With the peak among the sizes, a curve's summit is the law's.
    at = np.union1d(sizes, [peak.batch_size]) if inside else sizes
    next_step = np.array([law.lr(float(size)) for size in at]) / law.lr(base)
    if objective is not None:
        factor = np.array([wanted_factor(objective, law, float(size), base) for size in at])
        label = f"step {step:,}: factor for objective={objective!r}" + f", {words}" * (objective == "step")
        axes.plot(at, factor, label=label, color=hue, linewidth=2.0)
    if objective != "step":
        label = f"step {step:,}: law of the next step, {words}"
        axes.plot(at, next_step, label=label, color=hue, linewidth=1.3, linestyle=DASHES)
    if inside:
        look: dict[str, Any] = {"markersize": 14, "markeredgecolor": "white", "markeredgewidth": 0.8}
        axes.plot(peak.batch_size, next_step[at == peak.batch_size], "*", color=hue, label="_peak", **look)


def _mark_changes(axes: Axes, marks: list[tuple[float, str]], *, labelled: bool) -> None:
    """A thin line wherever the batch size in force changed."""
    for place, words in marks:
        axes.axvline(place, color="#c8c8c8", linewidth=0.7, zorder=0.5)
        if labelled and words:
            axes.text(
                place, 1.015, words, transform=axes.get_xaxis_transform(), fontsize=7.5, color="#606060",
                horizontalalignment="center", verticalalignment="bottom",
            )  # fmt: skip


def number(value: float) -> str:
    """A number for an axis or a legend."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def thinned(series: Series) -> Series:
    """As many points as a chart shows: of each bucket the first, smallest and largest one, the first gap."""
    size = series.steps.size
    if size <= MOST_POINTS:
        return series
    width = -(-size * 4 // MOST_POINTS)
    buckets = np.pad(series.values, (0, -size % width), mode="edge").reshape(-1, width)
    finite, begins = np.isfinite(buckets), np.arange(0, size, width)
    ranked = (finite, *(np.where(finite, sign * buckets, np.inf) for sign in (1, -1)))
    kept = [[size - 1], begins, *(begins + np.argmin(each, axis=1) for each in ranked)]
    index = np.unique(np.minimum(np.concatenate(kept), size - 1))
    return Series(series.steps[index], series.values[index])


def coarse(series: Series) -> Series:
    """The largest value of each bucket, at its first step: a short hold stays visible."""
    size = series.steps.size
    begins = np.arange(0, size, max(1, -(-size // MOST_POINTS)))
    return Series(series.steps[begins], np.maximum.reduceat(series.values, begins)) if size else series


def bars(steps: NDArray[np.int64], flags: NDArray[np.bool_], place: Place) -> list[tuple[float, float]]:
    """Begin and length of each run of set flags; a sample reaches half way to its neighbours."""
    if not flags.any():
        return []
    edges = np.concatenate([[steps[0] - 0.5], (steps[1:] + steps[:-1]) / 2, [steps[-1] + 0.5]])
    turns = np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8))
    begins, ends = place(edges[turns == 1]), place(edges[turns == -1])
    return list(zip(begins.tolist(), (ends - begins).tolist(), strict=True))


def positive(values: FloatArray) -> FloatArray:
    """The values that a log axis can show."""
    return values[np.isfinite(values) & (values > 0)]


def changes(batch: Series, places: FloatArray) -> list[tuple[float, str]]:
    """Where the batch size changed, and to what as long as the words do not run into each other."""
    changed = np.flatnonzero(np.diff(batch.values)) + 1
    letter, free, marks = LETTER_WIDTH * (places[-1] - places[0]), -math.inf, []
    for index in changed if changed.size <= MOST_MARKS else ():
        place, words = float(places[index]), number(batch.values[index])
        half = letter * (len(words) + 1) / 2
        words = words if place - half >= free else ""
        free = place + half if words else free
        marks.append((place, words))
    return marks


def rate_top(predicted: FloatArray, *others: FloatArray) -> float:
    """Room for ordinary excursions of the prediction; one wild value must not flatten everything else."""
    kept, asked = positive(np.concatenate(others)), positive(predicted)
    top = float(kept.max()) if kept.size else 1.0
    return 1.12 * max(top, min(float(asked.max()) if asked.size else top, 1.5 * top))


def size_range(batch: FloatArray, *others: FloatArray) -> tuple[float, float]:
    """Ends of a log axis; decades above the largest batch size say nothing a reader can use."""
    shown = positive(np.concatenate([batch, *others]))
    largest = float(np.nanmax(batch, initial=1.0))
    low, high = (float(shown.min()), float(shown.max())) if shown.size else (1.0, 2.0)
    return max(low, largest / 1e4) / ROOM, min(high, 100.0 * largest) * ROOM
