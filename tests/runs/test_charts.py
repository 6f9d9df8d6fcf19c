from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_surge.policy.reasons import Reason
from lightning_surge.runs.charts import (
    MOST_MARKS,
    MOST_POINTS,
    LawSnapshot,
    Span,
    _thinned,
    law_curve,
    law_snapshots,
    run_charts,
)
from lightning_surge.runs.run_log import RunLog, RunLogError, Series
from tests.logged_runs import LAW, as_log, rows


def long_run(count: int) -> RunLog:
    steps = np.arange(count)
    generator = np.random.default_rng(0)
    series = {
        name: Series(steps, generator.lognormal(size=count))
        for name in ("lr_scheduled", "lr_predicted", "lr_used", "peak_batch_size", "critical_batch_size")
    }
    series["batch_size"] = Series(steps, 8.0 + steps % 7)
    series["held_because"] = Series(steps, np.zeros(count))
    series["held_because"].values[count // 2] = 12.0
    return RunLog("", {f"surge/{name}": one for name, one in series.items()})


class TestThinning:
    def test_a_million_points_are_drawn_in_seconds(self):
        run = long_run(1_000_000)
        begin = time.process_time()
        charts = run_charts(run)
        assert time.process_time() - begin < 3.0
        for line in (*charts.rates.values(), charts.batch, charts.peak, charts.critical):
            assert MOST_POINTS / 4 <= line.x.size <= MOST_POINTS
        assert charts.changes == ()
        # One step in a million at which measuring failed is still to be seen.
        assert set(charts.reasons) == {Reason.MEASURED, Reason.MEASURING_FAILED}

    @settings(max_examples=30, deadline=None)
    @given(seed=st.integers(0, 1000), count=st.integers(1, 9000))
    def test_extremes_and_ends_stay(self, seed, count):
        values = np.random.default_rng(seed).normal(size=count)
        thin = _thinned(Series(np.arange(count), values))
        assert thin.steps.size <= MOST_POINTS + 4
        assert (np.diff(thin.steps) > 0).all()
        np.testing.assert_array_equal(values[thin.steps], thin.values)
        assert {0, count - 1, int(values.argmin()), int(values.argmax())} <= set(thin.steps.tolist())

    def test_a_short_gap_stays_a_gap(self):
        values = np.ones(50_000)
        values[31_415] = math.nan
        assert np.isnan(_thinned(Series(np.arange(50_000), values)).values).sum() == 1

    def test_short_runs_are_drawn_as_they_are(self):
        series = Series(np.arange(MOST_POINTS), np.arange(float(MOST_POINTS)))
        assert _thinned(series) is series


class TestCharts:
    def test_changes_of_the_batch_size(self):
        table = rows()
        for step in (30, 40, 50):
            table[step]["surge/batch_size"] = 120.0
        assert run_charts(as_log(table)).changes == ((30.0, 120.0),)
        assert run_charts(as_log(table), x="examples").changes == ((1800.0, 120.0),)

    def test_changes_at_every_step_are_not_marked(self):
        run = as_log({step: rows((step,), batch_size=float(step))[step] for step in range(1, MOST_MARKS + 3)})
        assert run_charts(run).changes == ()

    def test_spans_reach_half_way_to_the_neighbours(self):
        table = rows()
        table[20]["surge/held_because"] = table[30]["surge/held_because"] = 11.0
        charts = run_charts(as_log(table))
        assert charts.reasons[Reason.NO_EDGE] == (Span(15.0, 35.0),)
        assert charts.reasons[Reason.MEASURED] == (Span(9.5, 15.0), Span(35.0, 50.5))

    def test_codes_of_later_versions_are_passed_over(self):
        assert run_charts(as_log(rows(held_because=99.0))).reasons == {}

    def test_examples_that_were_not_logged_are_asked_for(self):
        with pytest.raises(RunLogError, match="'surge/examples', got these"):
            run_charts(as_log(rows(examples=None)), x="examples")

    def test_a_run_of_a_single_step(self):
        charts = run_charts(as_log(rows((7,))))
        assert charts.peak.y.tolist() == [pytest.approx(100.0)]
        assert charts.reasons[Reason.MEASURED] == (Span(6.5, 7.5),)


class TestLaws:
    def test_moments_are_spread_over_the_run_with_the_last(self):
        table = rows(tuple(range(1, 101)))
        for step, row in table.items():
            row["surge/law/noise_curvature"] = 1.0 + step
        assert [one.step for one in law_snapshots(as_log(table))] == [1, 26, 51, 75, 100]
        assert [one.step for one in law_snapshots(as_log(table), 2)] == [1, 100]

    def test_curves_are_the_laws(self):
        (shot,) = law_snapshots(as_log(rows()))
        curve = law_curve(shot, 60.0)
        expected = [LAW.lr(size) / LAW.lr(60.0) for size in shot.batch_sizes]
        np.testing.assert_allclose(curve.ratios, expected, rtol=1e-3)
        assert curve.peak == (100.0, pytest.approx(LAW.peak.lr / LAW.lr(60.0), rel=1e-3))

    def test_no_law_no_curve(self):
        assert law_snapshots(as_log({1: {"surge/batch_size": 8.0}})) == []

    def test_a_curve_that_misses_the_base_is_refused(self):
        with pytest.raises(RunLogError, match="base_batch_size=5, got no batch size at step 3"):
            law_curve(LawSnapshot(3, [], []), 5.0)
