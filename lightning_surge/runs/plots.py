"""Draw a run as a picture, with matplotlib: over time on the left, over the batch size on the right.

matplotlib is imported when a figure is drawn. Figures are built without pyplot: no window, no global state,
any backend.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_surge.policy.reasons import Reason
from lightning_surge.runs.charts import (
    VERMILION,
    Panel,
    RunCharts,
    Spans,
    XAxis,
    number,
    reason_colour,
    run_charts,
)
from lightning_surge.runs.run_log import RunLog

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_run"]

LINES: dict[str, Any] = {
    "solid": {},
    "steps": {"drawstyle": "steps-post"},
    "dash": {"linestyle": (0, (4, 2))},
    "dot": {"linestyle": (0, (1, 1.5))},
    "star": {"marker": "*", "markersize": 14, "markeredgecolor": "white", "markeredgewidth": 0.8},
    "circle": {"marker": "o", "linestyle": "", "markerfacecolor": "none", "markersize": 10},
    "diamond": {"marker": "D", "linestyle": "", "markersize": 5},
}
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

    * *Learning rate*: scheduled, predicted and used, on a linear axis because schedules end at zero. The axis
      is scaled to the scheduled and the used one; a prediction that was out of bounds may leave the panel.
    * *Batch size*: the one in force, the peak and the critical batch size, each with a band of one standard
      error. Where the peak is infinite (the learning rate never falls), a hatched strip at the top says so.
      Where a standard error was not logged, which means that it was not finite, the band fills the panel.
    * *What decided the factor*: one row for each reason that occurred.
    * *The factor and the law*, at up to three moments: solid the factor R(B) that the run's objective asks
      for, dashed the law of the next step, `lr(B) / lr(base)`, and as circles the factors that were used.

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

    Example:
        >>> import numpy as np
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

    charts = run_charts(run, group=group, x=x, base_batch_size=base_batch_size)
    figure = Figure(figsize=(11.6, 8.2), dpi=150, layout="constrained")
    # Two figures side by side, so that the legend under one makes no gap in the other.
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[1.2, 1.0]).flat
    rows = max(1.0, ROW_OF_REASON * len(charts.reasons))
    panels = left.subplot_mosaic([["lr"], ["batch"], ["why"]], height_ratios=[3.0, 3.0, rows])
    panels["law"] = right.subplots()
    _draw_panel(panels["lr"], charts.rates, columns=3)
    panels["lr"].set_title(charts.rates.title, loc="left", fontsize=11, fontweight="bold", pad=16)
    _draw_batch_sizes(panels["batch"], charts)
    _draw_reasons(panels["why"], charts.reasons)
    _draw_law(panels["law"], charts)
    for name in ("lr", "batch"):
        _mark_changes(panels[name], charts, labelled=name == "lr")
        panels[name].sharex(panels["why"])
        panels[name].tick_params(labelbottom=False)
    panels["why"].set_xlabel(charts.x_label)
    for axes in panels.values():
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color="#e6e6e6", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_formatter(lambda value, _: number(value))
        # Room for numbers of millions.
        axes.xaxis.get_major_locator().set_params(
            **{"numticks" if axes is panels["law"] else "nbins": MOST_TICKS}
        )
        axes.tick_params(axis="x", labelsize=8.5)
    if title is not None:
        figure.suptitle(title, fontsize=12)
    return figure


def _draw_panel(axes: Axes, panel: Panel, *, columns: int, legend_at: float = -0.03) -> None:
    """Lines, bands, and the legend below them, where it hides nothing."""
    for band in panel.bands:
        axes.fill_between(band.x, band.low, band.high, color=band.colour, alpha=0.14, linewidth=0)
    for one in panel.traces:
        look: dict[str, Any] = {"color": one.colour, "linewidth": one.width} | LINES[one.style]
        axes.plot(one.x, one.y, label=one.label or "_unnamed", **look)
    axes.set_ylim(*panel.y_range)
    axes.set_ylabel(panel.y_label)
    axes.yaxis.set_major_formatter(lambda value, _: number(value))
    axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold")
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, legend_at), ncols=columns, columnspacing=1.0, fontsize=8.5,
        framealpha=0.9, edgecolor="none",
    )  # fmt: skip


def _draw_batch_sizes(axes: Axes, charts: RunCharts) -> None:
    """Batch size in force, peak and critical batch size with their bands; infinite peaks as a strip."""
    low, high = charts.sizes.y_range
    axes.set_yscale("log", base=2)
    if charts.no_peak:
        axes.broken_barh(
            _bars(charts.no_peak), (STRIP_BOTTOM, STRIP_HEIGHT), transform=axes.get_xaxis_transform(),
            facecolor="#fbe3d3", edgecolor=VERMILION, hatch="////", linewidth=0,
            label="no peak in reach (infinite)",
        )  # fmt: skip
    top = low * (high / low) ** (1.0 / (STRIP_BOTTOM - 0.03))
    _draw_panel(axes, charts.sizes._replace(y_range=(low, top)), columns=2)


def _draw_reasons(axes: Axes, reasons: dict[Reason, Spans]) -> None:
    """One row for each reason: where the law was followed, and where and why it was not."""
    for row, (reason, spans) in enumerate(reasons.items()):
        axes.broken_barh(_bars(spans), (row - 0.4, 0.8), facecolor=reason_colour(reason), linewidth=0)
    names = [reason.label for reason in reasons]
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(max(len(names), 1) - 0.4, -0.6)
    axes.set_title("What decided the factor on the learning rate", loc="left", fontsize=11, fontweight="bold")


def _draw_law(axes: Axes, charts: RunCharts) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlim(*charts.law_range)
    _draw_panel(axes, charts.law, columns=1, legend_at=-0.085)
    axes.set_xlabel("batch size B (examples)")


def _bars(spans: Spans) -> list[tuple[float, float]]:
    return [(begin, end - begin) for begin, end in spans]


def _mark_changes(axes: Axes, charts: RunCharts, *, labelled: bool) -> None:
    """A thin line wherever the batch size in force changed."""
    for place, words in charts.changes:
        axes.axvline(place, color="#c8c8c8", linewidth=0.7, zorder=0.5)
        if labelled and words:
            axes.text(
                place, 1.015, words, transform=axes.get_xaxis_transform(), fontsize=7.5, color="#606060",
                horizontalalignment="center", verticalalignment="bottom",
            )  # fmt: skip
