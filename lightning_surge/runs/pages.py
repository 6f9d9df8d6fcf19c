"""Draw a run as one HTML page to zoom in, with plotly: the charts of `plots`, in the same colours.

The page holds plotly's own code, so that it opens from a disk, without a network. plotly is imported when a
page is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_surge.runs.charts import VERMILION, Band, Panel, RunCharts, XAxis, reason_colour, run_charts
from lightning_surge.runs.run_log import RunLog

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["run_page"]

# Rows of the page, as shares of its height of so many pixels.
ROW_HEIGHTS = (0.27, 0.27, 0.12, 0.34)
PAGE_HEIGHT = 1500
RATES, SIZES, REASONS, LAW = 1, 2, 3, 4
# Where the legend of each row stands; the third row names its reasons on its axis.
LEGENDS = {RATES: "legend", SIZES: "legend2", LAW: "legend3"}
# Thousands with separators; small numbers as they are.
NUMBERS = ",.8~g"


def run_page(run: RunLog, *, group: str | None = None, title: str = "", x: XAxis = "steps") -> str:
    """One run as a page of HTML that needs nothing else.

    Args:
        run: what `read_run` returned.
        group: name of the optimizer or parameter group that is shown, where there are several.
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

    charts = run_charts(run, group=group, x=x)
    reasons = "What decided the factor on the learning rate"
    titles = (charts.rates.title, charts.sizes.title, reasons, charts.law.title)
    figure = make_subplots(
        rows=4, cols=1, row_heights=ROW_HEIGHTS, vertical_spacing=0.07, subplot_titles=titles
    )
    _add_panel(figure, charts.rates, RATES)
    _add_panel(figure, charts.sizes, SIZES, log=True)
    _add_panel(figure, charts.law, LAW, log=True)
    _add_marks(figure, charts)
    # The first three rows zoom along x together.
    for row in (RATES, SIZES, REASONS):
        matches = None if row == RATES else "x"
        figure.update_xaxes(matches=matches, title_text=charts.x_label, tickformat=NUMBERS, row=row, col=1)
    figure.update_xaxes(
        title_text="batch size B (examples)", type="log", range=np.log10(charts.law_range).tolist(),
        tickformat=NUMBERS, dtick=_log_ticks(*charts.law_range), row=LAW, col=1,
    )  # fmt: skip
    tops = {LEGENDS[row]: figure.layout[f"yaxis{row if row > 1 else ''}"].domain[1] for row in LEGENDS}
    places = {name: {"y": top, "yanchor": "top", "x": 1.01} for name, top in tops.items()}
    figure.update_layout(
        title_text=title, height=PAGE_HEIGHT, template="plotly_white", hovermode="x unified", **places
    )
    # Plotly can load maps and its logo from elsewhere; these charts have no maps.
    page: str = figure.to_html(include_plotlyjs=True, full_html=True, config={"displaylogo": False})
    return page


def _add_panel(figure: Figure, panel: Panel, row: int, *, log: bool = False) -> None:
    """Bands, lines and marks of one panel; gaps stay gaps."""
    common: dict[str, Any] = {"legend": LEGENDS[row], "row": row, "col": 1}
    for band in panel.bands:
        red, green, blue = (int(band.colour[at : at + 2], 16) for at in (1, 3, 5))
        figure.add_scatter(
            **_outline(band), fill="toself", fillcolor=f"rgba({red},{green},{blue},0.14)", mode="lines",
            line={"width": 0}, hoverinfo="skip", showlegend=False, **common,
        )  # fmt: skip
    for one in panel.traces:
        marks = one.style in ("star", "circle", "diamond")
        line = {"color": one.colour, "width": one.width, "shape": "hv" if one.style == "steps" else "linear"}
        line |= {"dash": one.style} if one.style in ("dash", "dot") else {}
        symbol = {"circle": "circle-open"}.get(one.style, one.style)
        look = {"marker": {"symbol": symbol, "size": 9, "color": one.colour}} if marks else {"line": line}
        figure.add_scatter(
            x=one.x, y=one.y, name=one.label or one.style, showlegend=bool(one.label),
            mode="markers" if marks else "lines", **look, **common,
        )  # fmt: skip
    ends = np.log10(panel.y_range).tolist() if log else list(panel.y_range)
    figure.update_yaxes(
        title_text=panel.y_label,
        range=ends,
        type="log" if log else "linear",
        tickformat=NUMBERS,
        row=row,
        col=1,
    )


def _outline(band: Band) -> dict[str, list[float]]:
    """Around each stretch of a band without gaps, there along its upper end and back along its lower one."""
    known = np.flatnonzero(np.isfinite(band.high))
    x: list[float] = []
    y: list[float] = []
    for part in np.split(known, np.flatnonzero(np.diff(known) > 1) + 1):
        x += [*band.x[part], *band.x[part[::-1]], np.nan]
        y += [*band.high[part], *band.low[part[::-1]], np.nan]
    return {"x": x, "y": y}


def _log_ticks(low: float, high: float) -> str | int:
    """1, 2 and 5 of every decade, or the decades alone where there are many."""
    return "D2" if high < 1e4 * low else 1


def _add_marks(figure: Figure, charts: RunCharts) -> None:
    """Changes of the batch size, infinite peaks, and a row of bars for each reason."""
    for place, _ in charts.changes:
        for row in (RATES, SIZES):
            figure.add_vline(place, line={"color": "#c8c8c8", "width": 0.7}, layer="below", row=row, col=1)
    for index, (begin, end) in enumerate(charts.no_peak):
        figure.add_vrect(begin, end, fillcolor=VERMILION, opacity=0.08, line_width=0, row=SIZES, col=1,
            name="no peak in reach (infinite)", showlegend=index == 0, legend=LEGENDS[SIZES])  # fmt: skip
    for reason, spans in charts.reasons.items():
        figure.add_bar(
            orientation="h", y=[reason.label] * len(spans), base=[begin for begin, _ in spans],
            x=[end - begin for begin, end in spans], hovertext=reason.text, hoverinfo="text",
            marker={"color": reason_colour(reason), "line_width": 0}, showlegend=False, row=REASONS, col=1,
        )  # fmt: skip
    figure.update_layout(barmode="overlay")
    figure.update_yaxes(autorange="reversed", type="category", row=REASONS, col=1)
