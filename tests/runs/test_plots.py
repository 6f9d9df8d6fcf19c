"""The picture of a run shows what was logged, and can be read."""

import itertools
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba

from lightning_surge.laws.objectives import OBJECTIVES, progress_ratio
from lightning_surge.policy.reasons import Reason
from lightning_surge.runs.plots import (
    GREEN,
    MOST_MARKS,
    MOST_POINTS,
    ORANGE,
    VERMILION,
    changes,
    plot_run,
    size_range,
    thinned,
)
from lightning_surge.runs.run_log import RunLog, RunLogError, Series
from tests.logged_runs import LAW, as_log, lawless, rows

STEPS = np.array([10, 20, 30, 40, 50])


def logged(changes: dict[str, list[float]]) -> RunLog:
    """`rows` with other values of some keys."""
    run = as_log(rows())
    changed = {f"surge/{name}": Series(STEPS, np.array(values)) for name, values in changes.items()}
    return replace(run, series={**run.series, **changed})


def panel(run, place, **options):
    return plot_run(run, **options).axes[("rates", "sizes", "reasons", "law").index(place)]


def lines(axes):
    """Points by label; those without a label are in no legend."""
    found = {line.get_label(): np.array(line.get_data()) for line in axes.get_lines()}
    return {label: points for label, points in found.items() if not label.startswith("_")}


def bars(axes):
    """From where to where each row of bars goes."""
    ends = [[(path.vertices[:, 0].min(), path.vertices[:, 0].max()) for path in one.get_paths()]
            for one in axes.collections if "PolyCollection" in type(one).__name__]  # fmt: skip
    return dict(zip([text.get_text() for text in axes.get_yticklabels()], ends, strict=True))


class TestThinning:
    @settings(max_examples=30, deadline=None)
    @given(seed=st.integers(0, 1000), count=st.integers(1, 9000))
    def test_extremes_and_ends_stay(self, seed, count):
        values = np.random.default_rng(seed).normal(size=count)
        thin = thinned(Series(np.arange(count), values))
        assert thin.steps.size <= MOST_POINTS + 4
        assert thin.steps.size == count or count > MOST_POINTS
        assert (np.diff(thin.steps) > 0).all()
        np.testing.assert_array_equal(values[thin.steps], thin.values)
        assert {0, count - 1, int(values.argmin()), int(values.argmax())} <= set(thin.steps.tolist())

    def test_a_short_gap_stays_a_gap(self):
        values = np.ones(50_000)
        values[31_415] = math.nan
        assert np.isnan(thinned(Series(np.arange(50_000), values)).values).sum() == 1

    def test_one_failure_in_a_hundred_thousand_steps_is_shown(self):
        run, steps = as_log(rows()), np.arange(100_000)
        long = {key: Series(steps, np.full(steps.size, one.values[0])) for key, one in run.series.items()}
        long["surge/held_because"].values[50_000] = 12.0
        figure = plot_run(replace(run, series=long))
        assert list(bars(figure.axes[2])) == [Reason.MEASURED.label, Reason.MEASURING_FAILED.label]
        assert lines(figure.axes[0])["used"].shape[1] <= MOST_POINTS


class TestRates:
    def test_are_what_was_logged(self):
        names = {"lr_scheduled": "scheduled", "lr_predicted": "predicted by the law", "lr_used": "used"}
        values = {name: (1.0 + index + np.arange(5.0)).tolist() for index, name in enumerate(names)}
        found = lines(panel(logged(values), "rates"))
        for name, label in names.items():
            np.testing.assert_array_equal(found[label], [STEPS, values[name]])

    def test_one_wild_prediction_does_not_flatten_the_rest(self):
        ones = [1.0] * 5
        wild = {"lr_scheduled": ones, "lr_used": ones, "lr_predicted": [1.0, 1.0, 1e6, math.inf, 1.0]}
        assert panel(logged(wild), "rates").get_ylim() == (0.0, pytest.approx(1.68))

    def test_examples_on_the_x_axis(self):
        found = lines(panel(as_log(rows()), "rates", x="examples"))["used"]
        np.testing.assert_array_equal(found[0], 60.0 * STEPS)
        with pytest.raises(RunLogError, match="'surge/examples'"):
            plot_run(as_log(rows(examples=None)), x="examples")


class TestChanges:
    @pytest.mark.parametrize(("x", "place"), [("steps", 30.0), ("examples", 1800.0)])
    def test_are_marked_in_steps_and_examples(self, x, place):
        (words,) = panel(logged({"batch_size": [60.0, 60.0, 1200.0, 1200.0, 1200.0]}), "rates", x=x).texts
        assert (words.get_position()[0], words.get_text()) == (place, "1,200")

    def test_words_that_would_run_into_each_other_are_left_out(self):
        steps = np.array([0, 10, 12, 14, 100])
        found = changes(Series(steps, np.array([60.0, 64.0, 96.0, 128.0, 256.0])), steps.astype(float))
        assert found == [(10, "64"), (12, ""), (14, ""), (100, "256")]

    def test_changes_at_every_step_are_not_marked(self):
        steps = np.arange(MOST_MARKS + 2)
        assert changes(Series(steps, steps.astype(float)), steps.astype(float)) == []


class TestSizes:
    @pytest.mark.parametrize(("index", "name"), [(0, "peak"), (1, "critical")])
    def test_bands_are_one_standard_error_wide(self, index, name):
        error = np.array([5.0, 6.0, 7.0, 8.0, 9.0])
        values = {f"{name}_batch_size": [50.0] * 5, f"{name}_batch_size_standard_error": error.tolist()}
        axes = panel(logged(values), "sizes")
        (path,) = axes.collections[index].get_paths()
        corners = {(at, 50 + sign * one) for at, one in zip(STEPS, error, strict=True) for sign in (-1, 1)}
        assert set(map(tuple, path.vertices.tolist())) == corners
        assert set(lines(axes)[f"{name} batch size ± 1 standard error"][1]) == {50.0}

    @pytest.mark.parametrize("unknown", [math.inf, math.nan, None])
    def test_an_unknown_standard_error_is_the_widest_band(self, unknown):
        run = as_log(rows(peak_batch_size=50.0, peak_batch_size_standard_error=unknown))
        (path,) = panel(run, "sizes").collections[0].get_paths()
        expected = size_range(*[np.array([one]) for one in (60.0, 50.0, 60.0)])
        assert set(path.vertices[:, 1]) == set(expected)

    def test_infinite_and_unknown_peaks_are_gaps_and_a_strip(self):
        axes = panel(logged({"peak_batch_size": [math.inf, 40.0, math.inf, math.nan, 60.0]}), "sizes")
        (strip,) = [one for one in axes.collections if one.get_label() == "no peak in reach (infinite)"]
        ends = [(path.vertices[:, 0].min(), path.vertices[:, 0].max()) for path in strip.get_paths()]
        assert ends == [(9.5, 15.0), (25.0, 35.0)]
        shown = lines(axes)["peak batch size ± 1 standard error"][1]
        np.testing.assert_array_equal(shown, [math.nan, 40.0, math.nan, math.nan, 60.0])
        assert not [one for one in panel(as_log(rows()), "sizes").collections if one.get_hatch()]

    def test_every_batch_size_in_force_is_inside(self):
        low, high = panel(logged({"peak_batch_size": [1e9] * 5}), "sizes").get_ylim()
        assert low < 60 < high < 1e5

    @given(st.floats(1.0, 1e6))
    def test_there_is_a_power_of_two_on_the_axis(self, size):
        low, high = size_range(*[np.array([size])] * 3)
        assert math.floor(math.log2(high)) > math.log2(low)


def test_reasons_reach_half_way_to_the_neighbours():
    axes = panel(logged({"held_because": [2.0, 0.0, 12.0, 12.0, 99.0]}), "reasons")
    assert bars(axes) == {
        Reason.MEASURED.label: [(15.0, 25.0)],
        Reason.NOTHING_MEASURED.label: [(9.5, 15.0)],
        Reason.MEASURING_FAILED.label: [(25.0, 45.0)],
    }


class TestLaw:
    @pytest.mark.parametrize("objective", ["alignment", "progress"])
    def test_the_factor_in_use_is_told_from_the_law_of_the_next_step(self, objective):
        run = as_log(rows(objective=float(list(OBJECTIVES).index(objective)), lr_scale=1.25))
        axes = panel(run, "law")
        found = lines(axes)
        sizes, factor = found[f"step 10: factor for objective={objective!r}"]
        np.testing.assert_allclose(factor, [OBJECTIVES[objective](LAW, size, 60.0) for size in sizes])
        sizes, law = found["step 10: law of the next step, peak at B = 100"]
        np.testing.assert_allclose(law, [LAW.lr(size) / LAW.lr(60.0) for size in sizes])
        assert found["factor used in these steps"].tolist() == [[60.0], [1.25]]
        (star,) = [line for line in axes.get_lines() if line.get_marker() == "*"]
        assert np.array(star.get_data()).tolist() == [[100.0], [LAW.peak.lr / LAW.lr(60.0)]]
        # sqrt scaling, the factor and the law are told apart in the legend as well.
        dashes = [str(line._dash_pattern) for line in axes.get_legend().get_lines()[:3]]
        assert len(set(dashes)) == 3

    def test_of_the_objective_step_they_are_one(self):
        assert list(lines(panel(as_log(rows()), "law"))) == [
            "sqrt scaling", "step 10: factor for objective='step', peak at B = 100",
            "base batch size, B = 60", "factor used in these steps",
        ]  # fmt: skip

    def test_moments_are_spread_over_the_run_with_the_last(self):
        table = rows(tuple(range(1, 101)), batch_size=2048.0, base_batch_size=1024.0)
        for step, row in table.items():
            row["surge/law/noise_curvature"] = 1.0 + step
        labels = list(lines(panel(as_log(table), "law")))
        assert [label.partition(":")[0] for label in labels[1:-2]] == ["step 1", "step 51", "step 100"]
        assert "base batch size, B = 1,024" in labels

    def test_an_objective_of_a_later_version_leaves_the_law(self):
        labels = list(lines(panel(as_log(rows(objective=99.0)), "law")))
        assert labels[1] == "step 10: law of the next step, peak at B = 100"

    @pytest.mark.parametrize("changes", [{}, {"lr_scale": None}])
    def test_a_rule_that_measures_nothing_has_no_law(self, changes):
        used = [] if changes else ["factor used in these steps"]
        expected = ["sqrt scaling", "base batch size, B = 60", *used]
        assert list(lines(panel(as_log(lawless(**changes)), "law"))) == expected

    def test_the_axes_hold_the_factor(self):
        axes = panel(as_log(rows(objective=2.0)), "law")
        low, high = axes.get_xlim()
        assert axes.get_ylim()[1] == pytest.approx(1.5 * progress_ratio(LAW, high, 60.0))
        assert low < 30 / 3 < 120 * 3 < high


@pytest.fixture(scope="module")
def figure():
    """A long run at large batch sizes that change often, with all that a figure can show."""
    table = rows(tuple(range(1000, 100_001, 1000)), base_batch_size=4096.0, objective=2.0)
    for index, row in enumerate(table.values()):
        row["surge/batch_size"] = 4096.0 * 2 ** (index // 8)
        row["surge/law/noise_curvature"] = 1.0 + index / 100
        row["surge/peak_batch_size"] = np.inf if index > 80 else 5000.0
        row["surge/held_because"] = float((0, 2, 6, 12)[index % 4])
        row |= {f"surge/lr_{name}": 3e-5 for name in ("scheduled", "predicted", "used")}
    found = plot_run(as_log(table), title="A run", x="examples")
    FigureCanvasAgg(found).draw()
    return found


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
    axes = figure.axes[2]
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names == ["measured", "nothing measured", "rising", "measuring failed"]
    colours = [tuple(bar.get_facecolor()[0]) for bar in axes.collections]
    assert colours == [to_rgba(one) for one in (GREEN, ORANGE, ORANGE, VERMILION)]


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-surge\[plot\]'"):
        plot_run(as_log(rows()))
