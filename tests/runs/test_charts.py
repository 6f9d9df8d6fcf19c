from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_surge.laws.objectives import OBJECTIVES, progress_ratio
from lightning_surge.policy.reasons import Reason
from lightning_surge.runs.charts import (
    MOST_MARKS,
    MOST_POINTS,
    _size_range,
    _thinned,
    number,
    run_charts,
)
from lightning_surge.runs.run_log import RunLog, RunLogError, Series
from tests.logged_runs import LAW, as_log, lawless, rows, several_optimizers

STEPS = np.array([10, 20, 30, 40, 50])


def logged(changes: dict[str, list[float]]) -> RunLog:
    """`rows` with other values of some keys."""
    run = as_log(rows())
    changed = {f"surge/{name}": Series(STEPS, np.array(values)) for name, values in changes.items()}
    return replace(run, series={**run.series, **changed})


def trace(panel, label):
    (found,) = [one for one in panel.traces if one.label == label]
    return found


def labels(panel):
    return [one.label for one in panel.traces if one.label]


class TestThinning:
    @settings(max_examples=30, deadline=None)
    @given(seed=st.integers(0, 1000), count=st.integers(1, 9000))
    def test_extremes_and_ends_stay(self, seed, count):
        values = np.random.default_rng(seed).normal(size=count)
        thin = _thinned(Series(np.arange(count), values))
        assert thin.steps.size <= MOST_POINTS + 4
        assert thin.steps.size == count or count > MOST_POINTS
        assert (np.diff(thin.steps) > 0).all()
        np.testing.assert_array_equal(values[thin.steps], thin.values)
        assert {0, count - 1, int(values.argmin()), int(values.argmax())} <= set(thin.steps.tolist())

    def test_a_short_gap_stays_a_gap(self):
        values = np.ones(50_000)
        values[31_415] = math.nan
        assert np.isnan(_thinned(Series(np.arange(50_000), values)).values).sum() == 1

    def test_one_failure_in_a_hundred_thousand_steps_is_shown(self):
        run, steps = as_log(rows()), np.arange(100_000)
        long = {key: Series(steps, np.full(steps.size, one.values[0])) for key, one in run.series.items()}
        long["surge/held_because"].values[50_000] = 12.0
        charts = run_charts(replace(run, series=long))
        assert set(charts.reasons) == {Reason.MEASURED, Reason.MEASURING_FAILED}
        assert charts.rates.traces[0].x.size <= MOST_POINTS


class TestRates:
    def test_are_what_was_logged(self):
        names = {"lr_scheduled": "scheduled", "lr_predicted": "predicted by the law", "lr_used": "used"}
        values = {name: (1.0 + index + np.arange(5.0)).tolist() for index, name in enumerate(names)}
        panel = run_charts(logged(values)).rates
        for name, label in names.items():
            np.testing.assert_array_equal(trace(panel, label).x, STEPS)
            np.testing.assert_array_equal(trace(panel, label).y, values[name])

    def test_one_wild_prediction_does_not_flatten_the_rest(self):
        ones = [1.0] * 5
        wild = {"lr_scheduled": ones, "lr_used": ones, "lr_predicted": [1.0, 1.0, 1e6, math.inf, 1.0]}
        assert run_charts(logged(wild)).rates.y_range == (0.0, pytest.approx(1.68))

    def test_examples_on_the_x_axis(self):
        charts = run_charts(as_log(rows()), x="examples")
        np.testing.assert_array_equal(trace(charts.rates, "used").x, 60.0 * STEPS)
        assert charts.x_label == "examples trained"
        with pytest.raises(RunLogError, match="'surge/examples'"):
            run_charts(as_log(rows(examples=None)), x="examples")

    @pytest.mark.parametrize("name", ["lr_scheduled", "lr_predicted", "lr_used", "batch_size"])
    def test_a_missing_key_is_named_with_those_found(self, name):
        with pytest.raises(RunLogError, match=f"'surge/{name}', got these surge keys: .*SurgeLRCallback"):
            run_charts(as_log(rows(**{name: None})))

    @pytest.mark.parametrize("base", [0, -8, math.nan, math.inf])
    def test_a_base_that_is_no_size_is_refused(self, base):
        with pytest.raises(ValueError, match=f"0 < base_batch_size < inf, got base_batch_size={base}: pass"):
            run_charts(as_log(rows()), base_batch_size=base)


class TestChanges:
    def test_are_marked_in_steps_and_examples(self):
        run = logged({"batch_size": [60.0, 60.0, 1200.0, 1200.0, 1200.0]})
        assert run_charts(run).changes == ((30.0, "1,200"),)
        assert run_charts(run, x="examples").changes == ((1800.0, "1,200"),)

    def test_words_that_would_run_into_each_other_are_left_out(self):
        table = rows((0, 10, 12, 14, 100))
        for step, size in ((10, 64.0), (12, 96.0), (14, 128.0), (100, 256.0)):
            table[step]["surge/batch_size"] = size
        assert run_charts(as_log(table)).changes == ((10, "64"), (12, ""), (14, ""), (100, "256"))

    def test_changes_at_every_step_are_not_marked(self):
        run = as_log({step: rows((step,), batch_size=float(step))[step] for step in range(1, MOST_MARKS + 3)})
        assert run_charts(run).changes == ()


class TestSizes:
    def band(self, run, index=0):
        panel = run_charts(run).sizes
        return panel, panel.bands[index]

    @pytest.mark.parametrize(("index", "name"), [(0, "peak"), (1, "critical")])
    def test_bands_are_one_standard_error_wide(self, index, name):
        error = np.array([5.0, 6.0, 7.0, 8.0, 9.0])
        values = {f"{name}_batch_size": [50.0] * 5, f"{name}_batch_size_standard_error": error.tolist()}
        panel, band = self.band(logged(values), index)
        np.testing.assert_allclose([band.low, band.high], [50 - error, 50 + error])
        np.testing.assert_array_equal(trace(panel, f"{name} batch size ± 1 standard error").y, [50.0] * 5)

    @pytest.mark.parametrize("unknown", [math.inf, math.nan, None])
    def test_an_unknown_standard_error_is_the_widest_band(self, unknown):
        panel, band = self.band(as_log(rows(peak_batch_size=50.0, peak_batch_size_standard_error=unknown)))
        assert {*band.low, *band.high} == set(panel.y_range)

    def test_infinite_and_unknown_peaks_are_gaps(self):
        charts = run_charts(logged({"peak_batch_size": [math.inf, 40.0, math.inf, math.nan, 60.0]}))
        assert charts.no_peak == ((9.5, 15.0), (25.0, 35.0))
        shown = trace(charts.sizes, "peak batch size ± 1 standard error").y
        np.testing.assert_array_equal(shown, [math.nan, 40.0, math.nan, math.nan, 60.0])

    def test_every_batch_size_in_force_is_inside(self):
        low, high = run_charts(logged({"peak_batch_size": [1e9] * 5})).sizes.y_range
        assert low < 60
        assert 60 < high < 1e4
        assert run_charts(as_log(rows())).no_peak == ()

    @given(st.floats(1.0, 1e6))
    def test_there_is_a_power_of_two_on_the_axis(self, size):
        low, high = _size_range(*[np.array([size])] * 3)
        assert math.floor(math.log2(high)) > math.log2(low)


class TestReasons:
    def test_reach_half_way_to_the_neighbours(self):
        charts = run_charts(logged({"held_because": [2.0, 0.0, 12.0, 12.0, 99.0]}))
        assert charts.reasons == {
            Reason.MEASURED: ((15.0, 25.0),),
            Reason.NOTHING_MEASURED: ((9.5, 15.0),),
            Reason.MEASURING_FAILED: ((25.0, 45.0),),
        }


class TestLaw:
    @pytest.mark.parametrize("objective", ["alignment", "progress"])
    def test_the_factor_in_use_is_told_from_the_law_of_the_next_step(self, objective):
        run = as_log(rows(objective=float(list(OBJECTIVES).index(objective)), lr_scale=1.25))
        panel = run_charts(run).law
        factor = trace(panel, f"step 10: factor for objective={objective!r}")
        law = trace(panel, "step 10: law of the next step, peak at B = 100")
        expected = [OBJECTIVES[objective](LAW, size, 60.0, 1e-3) for size in factor.x]
        np.testing.assert_allclose(factor.y, expected)
        np.testing.assert_allclose(law.y, [LAW.lr(size) / LAW.lr(60.0) for size in law.x])
        assert (factor.style, law.style, factor.colour == law.colour) == ("solid", "dash", True)
        used = trace(panel, "factor used in these steps")
        assert (used.x.tolist(), used.y.tolist()) == ([60.0], [1.25])
        (star,) = [one for one in panel.traces if one.style == "star"]
        assert (star.x.tolist(), star.y.tolist()) == ([100.0], [LAW.peak.lr / LAW.lr(60.0)])

    def test_of_the_objective_step_they_are_one(self):
        panel = run_charts(as_log(rows())).law
        assert labels(panel) == [
            "sqrt scaling", "step 10: factor for objective='step', peak at B = 100",
            "base batch size, B = 60", "factor used in these steps",
        ]  # fmt: skip

    def test_moments_are_spread_over_the_run_with_the_last(self):
        table = rows(tuple(range(1, 101)), batch_size=2048.0, base_batch_size=1024.0)
        for step, row in table.items():
            row["surge/law/noise_curvature"] = 1.0 + step
        panel = run_charts(as_log(table)).law
        assert [label.partition(":")[0] for label in labels(panel)[1:-2]] == ["step 1", "step 51", "step 100"]
        assert "base batch size, B = 1,024" in labels(panel)

    def test_an_objective_of_a_later_version_leaves_the_law(self):
        panel = run_charts(as_log(rows(objective=99.0))).law
        assert labels(panel)[1] == "step 10: law of the next step, peak at B = 100"

    @pytest.mark.parametrize("changes", [{}, {"lr_scale": None}])
    def test_a_rule_that_measures_nothing_has_no_law(self, changes):
        panel = run_charts(as_log(lawless(**changes))).law
        used = [] if changes else ["factor used in these steps"]
        assert labels(panel) == ["sqrt scaling", "base batch size, B = 60", *used]

    def test_the_axes_hold_the_factor(self):
        run = as_log(rows(objective=2.0))
        charts = run_charts(run)
        low, high = charts.law_range
        assert charts.law.y_range[1] == pytest.approx(1.5 * progress_ratio(LAW, high, 60.0))
        assert low < 30 / 3 < 120 * 3 < high


class TestSeveralOptimizers:
    @pytest.mark.parametrize(("group", "size", "lr"), [("opt0", 60, 1e-3), ("opt1", 120, 2e-3)])
    def test_each_has_its_charts(self, group, size, lr):
        charts = run_charts(as_log(several_optimizers()), group=group)
        assert set(trace(charts.sizes, "batch size in force").y) == {size}
        assert set(trace(charts.rates, "used").y) == {lr}

    def test_without_a_name_the_base_is_not_known(self):
        with pytest.raises(ValueError, match="base_batch_size=nan"):
            run_charts(as_log(several_optimizers()))


@pytest.mark.parametrize(
    ("value", "words"),
    [(1024.0, "1,024"), (16384.0, "16,384"), (1e6, "1,000,000"), (0.25, "0.25"), (0.0, "0")],
)
def test_thousands_have_separators(value, words):
    assert number(value) == words
