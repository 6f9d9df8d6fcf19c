"""Draw a run as one HTML page to zoom in, with plotly: the charts of `plots`, in the same colours.

The page holds plotly's own code, so that it opens from a disk, without a network. plotly is imported when a
page is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_surge.runs.charts import (
    Band,
    LawCurve,
    Line,
    RunCharts,
    XAxis,
    base_of,
    law_curve,
    law_snapshots,
    run_charts,
)
from lightning_surge.runs.plots import BLACK, BLUE, GREEN, GREY, LAW_COLOURS, ORANGE, VERMILION, reason_colour
from lightning_surge.runs.run_log import RunLog

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["run_page"]

# Rows of the page, as shares of its height of so many pixels.
ROW_HEIGHTS = (0.27, 0.27, 0.12, 0.34)
PAGE_HEIGHT = 1500
# Where the legend of each row stands; the third row names its reasons on its axis.
LEGENDS = {1: "legend", 2: "legend2", 4: "legend3"}


def run_page(run: RunLog, *, group: str | None = None, title: str = "", x: XAxis = "steps") -> str:
    """One run as a page of HTML that needs nothing else.

    Args:
        run: what `read_run` returned.
        group: the optimizer or parameter group that is shown, where there are several, as in `plot_run`.
        title: a line above the charts.
        x: what the x axis counts.

    Returns:
        The text of the page, about 5 MB, nearly all of it plotly.

    Raises:
        ModuleNotFoundError: if plotly is not installed.
        RunLogError: if a key is missing.
    """
    try:
        from plotly.subplots import make_subplots
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Making a page needs plotly: pip install 'lightning-surge[html]'."
        ) from error

    run = run.of_group(group)
    base = base_of(run)
    charts = run_charts(run, group=group, x=x)
    curves = [law_curve(one, base) for one in law_snapshots(run)]
    titles = (
        "Learning rate",
        "Batch size against the peak",
        "What decided the factor on the learning rate",
        "The law, measured",
    )
    figure = make_subplots(
        rows=4, cols=1, row_heights=ROW_HEIGHTS, vertical_spacing=0.07, subplot_titles=titles
    )
    _add_learning_rates(figure, charts)
    _add_batch_sizes(figure, charts)
    _add_reasons(figure, charts)
    _add_law(figure, curves, base)
    # The first three rows zoom along x together.
    for row in (1, 2, 3):
        figure.update_xaxes(matches=None if row == 1 else "x", title_text=charts.x_label, row=row, col=1)
    tops = {LEGENDS[row]: figure.layout[f"yaxis{row if row > 1 else ''}"].domain[1] for row in LEGENDS}
    places = {name: {"y": top, "yanchor": "top", "x": 1.01} for name, top in tops.items()}
    figure.update_layout(
        title_text=title, height=PAGE_HEIGHT, template="plotly_white", hovermode="x unified", **places
    )
    # Plotly can load maps and its logo from elsewhere; these charts have no maps.
    page: str = figure.to_html(include_plotlyjs=True, full_html=True, config={"displaylogo": False})
    return page


def _add_learning_rates(figure: Figure, charts: RunCharts) -> None:
    styles = {
        "predicted": ("predicted by the law", ORANGE, 1.0, "solid"),
        "used": ("used", BLUE, 2.0, "solid"),
        "scheduled": ("scheduled", BLACK, 1.2, "dash"),
    }
    for name, (label, colour, width, dash) in styles.items():
        _add_line(figure, charts.rates[name], 1, label, {"color": colour, "width": width, "dash": dash})
    for place, _ in charts.changes:
        for row in (1, 2):
            figure.add_vline(place, line={"color": "#c8c8c8", "width": 0.7}, layer="below", row=row, col=1)
    figure.update_yaxes(title_text="learning rate (per step)", range=[0.0, charts.rate_top], row=1, col=1)


def _add_batch_sizes(figure: Figure, charts: RunCharts) -> None:
    in_force = {"color": BLACK, "width": 2.0, "shape": "hv"}
    quantities = (
        ("peak", charts.peak, charts.peak_band, VERMILION, "solid"),
        ("critical", charts.critical, charts.critical_band, GREEN, "dash"),
    )
    for name, line, band, colour, dash in quantities:
        if line.x.size:
            _add_band(figure, band, f"{name} ± 1 standard error", colour)
            _add_line(figure, line, 2, f"{name} batch size", {"color": colour, "width": 1.5, "dash": dash})
    _add_line(figure, charts.batch, 2, "batch size in force", in_force)
    for index, (begin, end) in enumerate(charts.no_peak):
        figure.add_vrect(begin, end, fillcolor=VERMILION, opacity=0.08, line_width=0, row=2, col=1,
            name="no peak in reach (infinite)", showlegend=index == 0, legend=LEGENDS[2])  # fmt: skip
    low, high = np.log10(charts.sizes)
    figure.update_yaxes(title_text="batch size (examples)", type="log", range=[low, high], row=2, col=1)


def _add_reasons(figure: Figure, charts: RunCharts) -> None:
    """One row for each reason, as bars that begin where it began."""
    for reason, spans in charts.reasons.items():
        figure.add_bar(
            orientation="h", y=[reason.label] * len(spans), base=[span.begin for span in spans],
            x=[span.end - span.begin for span in spans], hovertext=reason.text, hoverinfo="text",
            marker={"color": reason_colour(reason), "line_width": 0}, showlegend=False, row=3, col=1,
        )  # fmt: skip
    figure.update_layout(barmode="overlay")
    figure.update_yaxes(autorange="reversed", type="category", row=3, col=1)


def _add_law(figure: Figure, curves: Sequence[LawCurve], base: float) -> None:
    for index, curve in enumerate(curves):
        colour = LAW_COLOURS[index % len(LAW_COLOURS)]
        peak = "no peak in this range" if curve.peak is None else f"peak at B = {curve.peak[0]:,.0f}"
        name = f"step {curve.step:,}: {peak}"
        _add_line(figure, Line(curve.sizes, curve.ratios), 4, name, {"color": colour, "width": 2.0})
        if curve.peak is not None:
            star = Line(*(np.array([one]) for one in curve.peak))
            _add_line(figure, star, 4, name, {"color": colour}, "markers", named=False)
    sizes = np.concatenate([[base], *(curve.sizes for curve in curves)])
    ends = np.array([sizes.min(), sizes.max()])
    _add_line(figure, Line(ends, np.sqrt(ends / base)), 4, "sqrt scaling", {"color": GREY, "dash": "dot"})
    at_base = Line(np.array([base]), np.array([1.0]))
    _add_line(figure, at_base, 4, f"base batch size, B = {base:g}", {"color": BLACK}, "markers")
    heights = np.concatenate([[1.0], *(curve.ratios for curve in curves)])
    low, high = np.log10(heights.min() / 1.5), np.log10(heights.max() * 1.5)
    figure.update_xaxes(title_text="batch size B (examples)", type="log", row=4, col=1)
    label = f"learning rate over the one at B = {base:g} (ratio R)"
    figure.update_yaxes(title_text=label, type="log", range=[low, high], row=4, col=1)


def _add_line(
    figure: Figure,
    line: Line,
    row: int,
    name: str,
    style: dict[str, Any],
    mode: str = "lines",
    *,
    named: bool = True,
) -> None:
    """One curve, or one diamond; gaps stay gaps."""
    figure.add_scatter(
        x=line.x, y=line.y, name=name, mode=mode, line=style, legend=LEGENDS[row], row=row, col=1,
        showlegend=named,
        marker={"symbol": "diamond", "size": 9, "color": style["color"]},
    )  # fmt: skip


def _add_band(figure: Figure, band: Band, name: str, colour: str) -> None:
    """The lower edge, unseen, and the upper one filled down to it."""
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    common: dict[str, Any] = {"mode": "lines", "line": {"width": 0}, "legend": LEGENDS[2], "row": 2, "col": 1}
    figure.add_scatter(x=band.x, y=band.low, showlegend=False, hoverinfo="skip", name=name, **common)
    figure.add_scatter(
        x=band.x, y=band.high, fill="tonexty", fillcolor=f"rgba({red},{green},{blue},0.14)", name=name,
        hoverinfo="skip", **common,
    )  # fmt: skip
