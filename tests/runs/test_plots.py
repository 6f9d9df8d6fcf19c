"""Charts as matplotlib draws them."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba

from lightning_surge.runs.charts import GREEN, ORANGE, VERMILION, run_charts
from lightning_surge.runs.plots import plot_run
from tests.logged_runs import as_log, rows


def ramp():
    """A long run at large batch sizes that change often, with all that a figure can show."""
    table = rows(tuple(range(1000, 100_001, 1000)), base_batch_size=4096.0, objective=2.0)
    for index, row in enumerate(table.values()):
        row["surge/batch_size"] = 4096.0 * 2 ** (index // 8)
        row["surge/law/noise_curvature"] = 1.0 + index / 100
        row["surge/peak_batch_size"] = np.inf if index > 80 else 5000.0
        row["surge/held_because"] = float((0, 2, 6, 12)[index % 4])
        row |= {f"surge/lr_{name}": 3e-5 for name in ("scheduled", "predicted", "used")}
    return as_log(table)


def panel(figure, title):
    (axes,) = [axes for axes in figure.axes if axes.get_title(loc="left") == title]
    return axes


@pytest.fixture(scope="module")
def figure():
    found = plot_run(ramp(), title="A run", x="examples")
    FigureCanvasAgg(found).draw()
    return found


def test_every_line_of_the_charts_is_drawn(figure):
    charts = run_charts(ramp(), x="examples")
    for chart in (charts.rates, charts.sizes, charts.law):
        axes = panel(figure, chart.title)
        lines = {line.get_label(): line for line in axes.get_lines()}
        named = [one for one in chart.traces if one.label]
        assert [text.get_text() for text in axes.get_legend().get_texts()][-len(named) :] == [
            one.label for one in named
        ]
        for one in named:
            np.testing.assert_array_equal(lines[one.label].get_xydata(), np.column_stack([one.x, one.y]))
    # The factor, the law of the next step and sqrt scaling are told apart, in the legend as well.
    dashes = [str(line._dash_pattern) for line in panel(figure, charts.law.title).get_legend().get_lines()]
    assert len(set(dashes[:3])) == 3


def test_words_do_not_overprint(figure):
    """Titles, axes, marks and legends, wherever they stand; and nothing leaves the figure."""
    renderer, boxes = FigureCanvasAgg(figure).get_renderer(), []
    for axes in figure.axes:
        ticks = [
            tick.label1
            for axis in (axes.xaxis, axes.yaxis)
            for tick in axis.get_major_ticks()
            if tick.label1.get_visible()
            and axis.get_view_interval()[0] <= tick.get_loc() <= axis.get_view_interval()[1]
        ]
        offsets = [axes.xaxis.get_offset_text(), axes.yaxis.get_offset_text()]
        legend = axes.get_legend()
        texts = [*ticks, *offsets, *axes.texts, axes.xaxis.label, axes.yaxis.label, axes._left_title]
        boxes += [(one.get_text(), one.get_window_extent(renderer)) for one in texts if one.get_text()]
        boxes += [("legend", legend.get_window_extent(renderer))] if legend else []
    assert len(boxes) > 50
    for (first, one), (second, other) in itertools.combinations(boxes, 2):
        assert not one.overlaps(other), (first, second)
    for words, box in boxes:
        assert box.x0 >= -1, words
        assert box.x1 <= figure.bbox.x1 + 1, words


def test_numbers_have_separators_and_axes_units(figure):
    words = {
        text.get_text() for axes in figure.axes for text in axes.get_xticklabels() + axes.get_yticklabels()
    }
    assert {"2,000,000", "4,096", "16,384", "2e-05"} <= words
    assert not [one for one in words if one.isdecimal() and len(one) > 3]
    assert {axes.get_ylabel() for axes in figure.axes} == {
        "learning rate (per step)", "batch size (examples)", "",
        "learning rate over the one at B = 4,096 (factor R)",
    }  # fmt: skip
    assert {axes.get_xlabel() for axes in figure.axes} == {"", "examples trained", "batch size B (examples)"}
    assert figure.get_suptitle() == "A run"


def test_each_reason_has_a_row_in_its_colour(figure):
    axes = panel(figure, "What decided the factor on the learning rate")
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names == ["measured", "nothing measured", "rising", "measuring failed"]
    colours = [tuple(bar.get_facecolor()[0]) for bar in axes.collections]
    assert colours == [to_rgba(one) for one in (GREEN, ORANGE, ORANGE, VERMILION)]


def test_infinite_peaks_are_a_strip(figure):
    axes = panel(figure, "Batch size against the peak")
    (strip,) = [one for one in axes.collections if one.get_label() == "no peak in reach (infinite)"]
    (path,) = strip.get_paths()
    assert (path.vertices[:, 0].min(), path.vertices[:, 0].max()) == (60 * 81_500, 6_000_000)
    assert not [
        one
        for one in panel(plot_run(as_log(rows())), axes.get_title(loc="left")).collections
        if one.get_hatch()
    ]


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-surge\[plot\]'"):
        plot_run(as_log(rows()))
