"""Draw a run as a picture, with matplotlib.

On the left, against steps or examples: the learning rate from the schedule, the one the law asks for and the
one written to the optimizer; the batch size in force beside the batch size at which the law's learning rate
peaks; and what decided the factor. On the right the law itself, `lr(B)` relative to `lr(base)`, at several
moments.

matplotlib is imported when a figure is drawn. Figures are built without pyplot: no window, no global state,
any backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lightning_surge.policy.reasons import Reason
from lightning_surge.runs.charts import (
    LawCurve,
    LawSnapshot,
    RunCharts,
    XAxis,
    base_of,
    law_curve,
    law_snapshots,
    run_charts,
)
from lightning_surge.runs.run_log import RunLog

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["LAW_COLOURS", "plot_run", "reason_colour"]

FloatArray = NDArray[np.float64]

# Okabe and Ito's palette, which stays apart under the common forms of colour blindness.
BLACK, GREY, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = (
    "#000000", "#8c8c8c", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
LAW_COLOURS = (SKY, VERMILION, GREEN, PURPLE, ORANGE, BLUE)

# The strip at the top of the batch-size panel, as fractions of the panel's height.
STRIP_BOTTOM, STRIP_HEIGHT = 0.92, 0.08
# Height of a reason's row, where the panels above are 3 high.
ROW_OF_REASON = 0.32
LEGEND: dict[str, Any] = {"fontsize": 8.5, "framealpha": 0.9, "edgecolor": "none"}


def reason_colour(reason: Reason) -> str:
    """Green where the measurements are followed, red where the last law was held, orange in between."""
    if reason in (Reason.MEASURED, Reason.RULE):
        return GREEN
    return VERMILION if reason.held else ORANGE


def plot_run(
    run: RunLog,
    snapshots: Sequence[LawSnapshot] | None = None,
    *,
    base_batch_size: float | None = None,
    group: str | None = None,
    title: str | None = None,
    x: XAxis = "steps",
) -> Figure:
    """Draw one run: its learning rates, its batch size against the peak, what decided, and the law.

    * *Learning rate*: scheduled, predicted and used, on a linear axis because schedules end at zero. The axis
      is scaled to the scheduled and the used one; a prediction that was out of bounds may leave the panel.
    * *Batch size*: the one in force, the peak and the critical batch size, each with a band of one standard
      error. Where the peak is infinite (the learning rate never falls), a hatched strip at the top says so.
      Where a standard error was not logged, which means that it was not finite, the band fills the panel.
    * *What decided the factor*: one row for each reason that occurred.
    * *Law*: each snapshot's curve `R(B) = lr(B)/lr(base)` and the measured points, if it has any, divided by
      the *fitted* `lr(base)`. Error bars are one standard error of the measured ratio and do not include that
      of the divisor. A measured ratio that is not positive has no place on a log axis and is drawn as a
      triangle at the bottom.

    Args:
        run: What `read_run` returned.
        snapshots: The law at some moments, oldest first; None takes up to five from the logs.
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
        RunLogError: If a key is missing, or if a snapshot's arrays disagree in length or do not reach the
            base batch size.

    Example:
        >>> from lightning_surge.runs.run_log import Series
        >>> steps, values = np.array([1, 2]), np.array([8.0, 16.0])
        >>> names = ("lr_scheduled", "lr_predicted", "lr_used", "batch_size", "held_because")
        >>> run = RunLog("", {f"surge/{name}": Series(steps, values) for name in names})
        >>> [axes.get_xlabel() for axes in plot_run(run, base_batch_size=8).axes]
        ['', '', 'optimizer step', 'batch size B (examples)']
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Drawing a run needs matplotlib: pip install 'lightning-surge[plot]'."
        ) from error

    run = run.of_group(group)
    base = base_of(run, base_batch_size)
    charts = run_charts(run, group=group, x=x)
    curves = [law_curve(one, base) for one in (law_snapshots(run) if snapshots is None else snapshots)]
    figure = Figure(figsize=(11.0, 7.2), dpi=150, layout="constrained")
    # Two figures side by side, so that the legend under one makes no gap in the other.
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[1.25, 1.0]).flat
    rows = max(1.0, ROW_OF_REASON * len(charts.reasons))
    panels = left.subplot_mosaic([["lr"], ["batch"], ["why"]], height_ratios=[3.0, 3.0, rows])
    panels["law"] = right.subplots()
    _draw_learning_rates(panels["lr"], charts)
    _draw_batch_sizes(panels["batch"], charts)
    _draw_reasons(panels["why"], charts)
    _draw_law(panels["law"], curves, base)
    for name in ("lr", "batch"):
        panels[name].sharex(panels["why"])
        panels[name].tick_params(labelbottom=False)
    panels["why"].set_xlabel(charts.x_label)
    for axes in panels.values():
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color="#e6e6e6", linewidth=0.6)
        axes.set_axisbelow(True)
    if title is not None:
        figure.suptitle(title, fontsize=12)
    return figure


def _draw_learning_rates(axes: Axes, charts: RunCharts) -> None:
    """Scheduled, predicted and used learning rate."""
    _mark_changes(axes, charts, labelled=True)
    axes.plot(*charts.rates["predicted"], color=ORANGE, linewidth=1.0, label="predicted by the law")
    axes.plot(*charts.rates["used"], color=BLUE, linewidth=1.8, label="used")
    axes.plot(
        *charts.rates["scheduled"], color=BLACK, linewidth=1.2, linestyle=(0, (4, 2)), label="scheduled"
    )
    axes.set_ylim(0.0, charts.rate_top)
    axes.set_ylabel("learning rate (per step)")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    axes.set_title("Learning rate", loc="left", fontsize=11, fontweight="bold", pad=16)
    axes.legend(loc="best", **LEGEND)


def _draw_batch_sizes(axes: Axes, charts: RunCharts) -> None:
    """Batch size in force, peak and critical batch size with their bands; infinite peaks as a strip."""
    low, high = charts.sizes
    decades = np.log10(high / low)
    axes.set_yscale("log")
    axes.set_ylim(low, low * 10 ** (decades / (STRIP_BOTTOM - 0.03)))
    _mark_changes(axes, charts, labelled=False)
    quantities = (
        ("peak", charts.peak, charts.peak_band, VERMILION, "-"),
        ("critical", charts.critical, charts.critical_band, GREEN, (0, (5, 1.5))),
    )
    for name, line, band, colour, style in quantities:
        if line.x.size:
            axes.fill_between(
                *band, color=colour, alpha=0.14, linewidth=0, label=f"{name} ± 1 standard error"
            )
            axes.plot(*line, color=colour, linewidth=1.4, linestyle=style, label=f"{name} batch size")
    axes.plot(*charts.batch, color=BLACK, linewidth=1.8, drawstyle="steps-post", label="batch size in force")
    if charts.no_peak:
        widths = [(begin, end - begin) for begin, end in charts.no_peak]
        axes.broken_barh(
            widths, (STRIP_BOTTOM, STRIP_HEIGHT), transform=axes.get_xaxis_transform(), facecolor="#fbe3d3",
            edgecolor=VERMILION, hatch="////", linewidth=0, label="no peak in reach (infinite)",
        )  # fmt: skip
        axes.set_ylim(low, low * 10 ** (decades / (STRIP_BOTTOM - 0.03)))
    axes.set_ylabel("batch size (examples)")
    axes.set_title("Batch size against the peak", loc="left", fontsize=11, fontweight="bold")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.04), ncols=3, columnspacing=1.0, **LEGEND)


def _draw_reasons(axes: Axes, charts: RunCharts) -> None:
    """One row for each reason: where the law was followed, and where and why it was not."""
    for row, (reason, spans) in enumerate(charts.reasons.items()):
        widths = [(begin, end - begin) for begin, end in spans]
        axes.broken_barh(widths, (row - 0.4, 0.8), facecolor=reason_colour(reason), linewidth=0)
    names = [reason.label for reason in charts.reasons]
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(max(len(names), 1) - 0.4, -0.6)
    axes.set_title("What decided the factor on the learning rate", loc="left", fontsize=11, fontweight="bold")


def _draw_law(axes: Axes, curves: Sequence[LawCurve], base: float) -> None:
    """Each snapshot's `lr(B)/lr(base)` with its measured points, beside sqrt scaling."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    drawn: list[FloatArray] = [np.array([1.0])]
    sizes: list[FloatArray] = [np.array([base])]
    outside = False
    for index, curve in enumerate(curves):
        colour = LAW_COLOURS[index % len(LAW_COLOURS)]
        peak = "no peak in this range" if curve.peak is None else f"peak at B = {curve.peak[0]:,.0f}"
        axes.plot(
            curve.sizes, curve.ratios, color=colour, linewidth=2.0, label=f"step {curve.step:,}: {peak}"
        )
        if curve.peak is not None:
            axes.plot(
                *curve.peak, "*", color=colour, markersize=14, markeredgecolor="white", markeredgewidth=0.8
            )
        shown = curve.point_ratios > 0
        # Snapshots share batch sizes: the older ones are drawn larger, so that they show behind the newer.
        older = len(curves) - 1 - index
        # An unknown error is drawn as the widest bar there is, not as certainty.
        bars = np.clip(np.nan_to_num(curve.point_errors[shown], nan=np.inf), 0.0, 1e6)
        if curve.points.size:
            axes.errorbar(
                curve.points[shown], curve.point_ratios[shown], yerr=bars, color=colour, fmt="o",
                markersize=5.5 + 2 * older, elinewidth=1.2 + 1.6 * older, capsize=2.5 + 1.5 * older,
                markeredgecolor="white", markeredgewidth=0.7,
            )  # fmt: skip
        axes.plot(
            curve.points[~shown], np.full((~shown).sum(), 0.025), "v", color=colour, markersize=7,
            transform=axes.get_xaxis_transform(),
        )  # fmt: skip
        outside |= not shown.all()
        drawn += [curve.ratios, curve.point_ratios[shown]]
        sizes += [curve.sizes, curve.points]
    _finish_law(axes, np.concatenate(sizes), np.concatenate(drawn), base)
    # Entries for what every snapshot shares, in a colour of none of them.
    if any(curve.points.size for curve in curves):
        axes.errorbar([], [], yerr=[], color=GREY, fmt="o", capsize=2.5, label="measured ± 1 standard error")
    if outside:
        axes.plot([], [], "v", color=GREY, label="measured, not positive")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.085), ncols=2, **LEGEND)


def _finish_law(axes: Axes, sizes: FloatArray, heights: FloatArray, base: float) -> None:
    """Sqrt scaling, the base, and axes around all that was drawn."""
    reach, heights = sizes[sizes > 0], heights[np.isfinite(heights) & (heights > 0)]
    ends = np.array([reach.min() / 1.15, reach.max() * 1.15])
    axes.plot(
        ends, np.sqrt(ends / base), color=GREY, linewidth=1.1, linestyle=(0, (1, 1.5)), label="sqrt scaling"
    )
    axes.plot([base], [1.0], "D", color=BLACK, markersize=5, label=f"base batch size, B = {base:g}")
    axes.set_xlim(*ends)
    axes.set_ylim(heights.min() / 1.5, heights.max() * 1.5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,.4g}")
    axes.set_xlabel("batch size B (examples)")
    axes.set_ylabel(f"optimal learning rate over the one at B = {base:g} (ratio R)")
    axes.set_title("The law, measured", loc="left", fontsize=11, fontweight="bold", pad=16)


def _mark_changes(axes: Axes, charts: RunCharts, *, labelled: bool) -> None:
    """A thin line wherever the batch size in force changed."""
    for place, size in charts.changes:
        axes.axvline(place, color="#c8c8c8", linewidth=0.7, zorder=0.5)
        if labelled:
            axes.text(
                place, 1.015, f"{size:g}", transform=axes.get_xaxis_transform(), fontsize=7.5,
                color="#606060", horizontalalignment="center", verticalalignment="bottom",
            )  # fmt: skip
