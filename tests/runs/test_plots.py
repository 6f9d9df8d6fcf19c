from __future__ import annotations

import builtins
import math
import sys

import numpy as np
import pytest

from lightning_surge.runs.charts import LawSnapshot
from lightning_surge.runs.pages import run_page
from lightning_surge.runs.plots import GREEN, ORANGE, VERMILION, plot_run
from lightning_surge.runs.run_log import RunLog, RunLogError, Series
from tests.logged_runs import as_log, rows, several_optimizers

STEPS = np.array([10, 20, 30, 40, 50])
NAMES = (
    "lr_scheduled",
    "lr_predicted",
    "lr_used",
    "batch_size",
    "peak_batch_size",
    "peak_batch_size_standard_error",
    "critical_batch_size",
)


def logged(**values):
    """A run whose every series is distinct; `values` replaces some."""
    series = {name: 10.0 * (index + 1) + np.arange(5.0) for index, name in enumerate(NAMES)}
    series["batch_size"] = np.array([8.0, 8.0, 16.0, 16.0, 32.0])
    series |= {name: np.array(value) for name, value in values.items()}
    return RunLog("", {f"surge/{name}": Series(STEPS, value) for name, value in series.items()})


def without(run, *names):
    return RunLog(
        "", {key: one for key, one in run.series.items() if key.removeprefix("surge/") not in names}
    )


def snapshot(step=100, **changes):
    # Theorem 3's shape with its peak at 32, in a unit that is not the scheduled learning rate's.
    sizes = np.array([2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0])
    lrs = 6e-4 / (np.sqrt(32 / sizes) + np.sqrt(sizes / 32))
    fields = {
        "step": step,
        "batch_sizes": sizes,
        "lrs": lrs,
        "measured_batch_sizes": [8.0, 16.0],
        "measured_lrs": [2.5e-4, 2.0e-4],
        "measured_standard_errors": [5e-5, 4e-5],
    }
    return LawSnapshot(**(fields | changes))


def panel(figure, title):
    (axes,) = [axes for axes in figure.axes if axes.get_title(loc="left") == title]
    return axes


def drawn(axes, label):
    (line,) = [line for line in axes.get_lines() if line.get_label() == label]
    return line.get_xdata(), line.get_ydata()


def labels(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


class TestLearningRates:
    @pytest.mark.parametrize(
        ("label", "name"),
        [("scheduled", "lr_scheduled"), ("predicted by the law", "lr_predicted"), ("used", "lr_used")],
    )
    def test_draws_what_was_logged(self, label, name):
        run = logged()
        steps, values = drawn(panel(plot_run(run, base_batch_size=8), "Learning rate"), label)
        np.testing.assert_array_equal(steps, STEPS)
        np.testing.assert_array_equal(values, run.series[f"surge/{name}"].values)

    def test_one_wild_prediction_does_not_flatten_the_rest(self):
        run = logged(lr_scheduled=[1.0] * 5, lr_used=[1.0] * 5, lr_predicted=[1.0, 1.0, 1e6, math.inf, 1.0])
        axes = panel(plot_run(run, base_batch_size=8), "Learning rate")
        assert axes.get_ylim() == (0.0, pytest.approx(1.68))

    def test_group_selects_the_suffixed_tags(self):
        run = RunLog("", {
            f"{key}/decay" if key.startswith("surge/lr_") else key: series
            for key, series in logged().series.items()
        })  # fmt: skip
        axes = panel(plot_run(run, base_batch_size=8, group="decay"), "Learning rate")
        np.testing.assert_array_equal(drawn(axes, "used")[1], run.series["surge/lr_used/decay"].values)

    def test_group_selects_one_of_several_optimizers(self):
        """Its batch size and peak too, beside those of another."""
        found = logged().series
        run = {f"{tag}/opt1": series for tag, series in found.items()}
        other = {f"{tag}/opt0": Series(series.steps, 2.0 * series.values) for tag, series in found.items()}
        figure = plot_run(RunLog("", run | other), base_batch_size=8, group="opt1")
        axes = panel(figure, "Learning rate")
        np.testing.assert_array_equal(drawn(axes, "used")[1], run["surge/lr_used/opt1"].values)
        axes = panel(figure, TestBatchSizes.TITLE)
        sizes = drawn(axes, "batch size in force")[1]
        np.testing.assert_array_equal(sizes, run["surge/batch_size/opt1"].values)

    def test_changes_of_the_batch_size_are_marked(self):
        axes = panel(plot_run(logged(), base_batch_size=8), "Learning rate")
        assert [(text.get_position()[0], text.get_text()) for text in axes.texts] == [(30, "16"), (50, "32")]


class TestBatchSizes:
    TITLE = "Batch size against the peak"

    @pytest.mark.parametrize(
        ("label", "name"),
        [
            ("batch size in force", "batch_size"),
            ("peak batch size", "peak_batch_size"),
            ("critical batch size", "critical_batch_size"),
        ],
    )
    def test_draws_what_was_logged(self, label, name):
        run = logged()
        steps, values = drawn(panel(plot_run(run, base_batch_size=8), self.TITLE), label)
        np.testing.assert_array_equal(steps, STEPS)
        np.testing.assert_array_equal(values, run.series[f"surge/{name}"].values)

    def band(self, run):
        axes = panel(plot_run(run, base_batch_size=8), self.TITLE)
        (band,) = [c for c in axes.collections if c.get_label() == "peak ± 1 standard error"]
        corners = np.concatenate([path.vertices for path in band.get_paths()])
        return axes, {
            step: (corners[corners[:, 0] == step, 1].min(), corners[corners[:, 0] == step, 1].max())
            for step in STEPS
        }

    def test_the_band_is_one_standard_error_wide(self):
        error = [5.0, 10.0, 15.0, 20.0, 25.0]
        _, band = self.band(logged(peak_batch_size=[50.0] * 5, peak_batch_size_standard_error=error))
        assert band == {step: pytest.approx((50 - e, 50 + e)) for step, e in zip(STEPS, error, strict=True)}

    @pytest.mark.parametrize("unknown", [math.inf, math.nan])
    def test_an_unknown_standard_error_is_the_widest_band(self, unknown):
        errors = [unknown] * 5
        self.assert_widest(
            *self.band(logged(peak_batch_size=[50.0] * 5, peak_batch_size_standard_error=errors))
        )

    def test_a_standard_error_that_was_not_logged_is_the_widest_band(self):
        run = without(logged(peak_batch_size=[50.0] * 5), "peak_batch_size_standard_error")
        self.assert_widest(*self.band(run))

    def assert_widest(self, axes, band):
        """From the bottom of the panel over all that it shows."""
        bottom, top = axes.get_ylim()
        for low, high in band.values():
            assert low == pytest.approx(bottom)
            assert 50 * 1.3 < high <= top

    def test_the_critical_batch_size_has_a_band_too(self):
        run = logged(critical_batch_size=[20.0] * 5, critical_batch_size_standard_error=[4.0] * 5)
        axes = panel(plot_run(run, base_batch_size=8), self.TITLE)
        (band,) = [c for c in axes.collections if c.get_label() == "critical ± 1 standard error"]
        heights = band.get_paths()[0].vertices[:, 1]
        assert (heights.min(), heights.max()) == pytest.approx((16.0, 24.0))

    def strips(self, run):
        axes = panel(plot_run(run, base_batch_size=8), self.TITLE)
        label = "no peak in reach (infinite)"
        found = [c for c in axes.collections if c.get_label() == label]
        assert (label in labels(axes)) == bool(found)
        return [
            (path.vertices[:, 0].min(), path.vertices[:, 0].max())
            for collection in found
            for path in collection.get_paths()
        ]

    def test_infinite_peaks_are_shown_as_a_strip_over_their_steps(self):
        run = logged(
            peak_batch_size=[math.inf, 40.0, math.inf, math.inf, 60.0],
            peak_batch_size_standard_error=[math.nan, 1.0, math.inf, math.inf, 1.0],
        )
        assert self.strips(run) == [(9.5, 15), (25, 45)]
        _, values = drawn(panel(plot_run(run, base_batch_size=8), self.TITLE), "peak batch size")
        np.testing.assert_array_equal(values, [math.nan, 40.0, math.nan, math.nan, 60.0])

    def test_a_run_without_any_finite_peak_is_all_strip(self):
        assert self.strips(logged(peak_batch_size=[math.inf] * 5)) == [(9.5, 50.5)]

    def test_finite_peaks_have_no_strip(self):
        assert self.strips(logged()) == []

    def test_a_peak_not_yet_estimated_is_a_gap_and_no_strip(self):
        assert self.strips(logged(peak_batch_size=[math.nan] * 5)) == []

    def test_every_batch_size_in_force_is_inside_the_panel(self):
        run = logged(peak_batch_size=[1e9] * 5)
        low, high = panel(plot_run(run, base_batch_size=8), self.TITLE).get_ylim()
        assert low < 8
        assert 32 < high < 1e5


class TestLaw:
    TITLE = "The law, measured"

    def test_curves_and_points_are_relative_to_the_base(self):
        shot = snapshot()
        axes = panel(plot_run(logged(), [shot], base_batch_size=8), self.TITLE)
        sizes, ratios = drawn(axes, "step 100: peak at B = 32")
        np.testing.assert_array_equal(sizes, shot.batch_sizes)
        np.testing.assert_allclose(ratios, shot.lrs / shot.lrs[2])
        (points,) = [c for c in axes.containers if c.get_label().startswith("_")]
        np.testing.assert_array_equal(points.lines[0].get_xdata(), [8, 16])
        np.testing.assert_allclose(points.lines[0].get_ydata(), np.array([2.5e-4, 2.0e-4]) / shot.lrs[2])
        bars = np.array(points.lines[2][0].get_segments())
        np.testing.assert_allclose(
            bars[:, :, 1], np.array([[2.0e-4, 3.0e-4], [1.6e-4, 2.4e-4]]) / shot.lrs[2]
        )

    def test_a_base_between_two_sizes_is_interpolated_along_a_power_law(self):
        shot = snapshot(lrs=np.array([2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0]))
        axes = panel(plot_run(logged(), [shot], base_batch_size=11), self.TITLE)
        _, ratios = drawn(axes, "step 100: no peak in this range")
        np.testing.assert_allclose(ratios, shot.lrs / 11)

    def test_a_ratio_that_is_not_positive_is_marked_and_not_dropped(self):
        shot = snapshot(measured_lrs=[2.5e-4, -1e-4])
        axes = panel(plot_run(logged(), [shot], base_batch_size=8), self.TITLE)
        assert "measured, not positive" in labels(axes)
        (marks,) = [line for line in axes.get_lines() if line.get_marker() == "v" and len(line.get_xdata())]
        assert marks.get_xdata().tolist() == [16]

    def test_early_and_late_are_both_in_the_legend(self):
        axes = panel(plot_run(logged(), [snapshot(100), snapshot(2000)], base_batch_size=8), self.TITLE)
        assert {"step 100: peak at B = 32", "step 2,000: peak at B = 32"} <= set(labels(axes))

    def test_no_snapshot_still_gives_a_figure(self):
        axes = panel(plot_run(logged(), base_batch_size=8), self.TITLE)
        assert "sqrt scaling" in labels(axes)


class TestReasons:
    TITLE = "What decided the factor on the learning rate"

    def drawn(self, codes):
        axes = panel(plot_run(logged(held_because=codes), base_batch_size=8), self.TITLE)
        names = [text.get_text() for text in axes.get_yticklabels()]
        bars = [
            (bar.get_facecolor()[0], [tuple(path.vertices[[0, 2], 0]) for path in bar.get_paths()])
            for bar in axes.collections
        ]
        return names, bars

    def test_each_reason_has_a_row_where_it_held(self):
        from matplotlib.colors import to_rgba

        names, bars = self.drawn([2.0, 0.0, 12.0, 12.0, 0.0])
        assert names == ["measured", "nothing measured", "measuring failed"]
        colours, spans = zip(*bars, strict=True)
        assert [tuple(colour) for colour in colours] == [to_rgba(c) for c in (GREEN, ORANGE, VERMILION)]
        assert list(spans) == [[(15, 25), (45, 50.5)], [(9.5, 15)], [(25, 45)]]

    def test_a_run_that_did_not_log_reasons_has_none(self):
        axes = panel(plot_run(logged(), base_batch_size=8), self.TITLE)
        assert not axes.collections


class TestFromLogsAlone:
    def test_the_laws_and_the_base_come_from_the_logs(self):
        table = rows()
        for step in (40, 50):
            table[step]["surge/law/noise_curvature"] = 2.0
        axes = panel(plot_run(as_log(table)), "The law, measured")
        # r = 4 and 2: the peak is at 300 / (r - 1).
        assert [label for label in labels(axes) if label.startswith("step")] == [
            "step 10: peak at B = 100",
            "step 40: peak at B = 300",
        ]
        assert "base batch size, B = 60" in labels(axes)
        assert "measured ± 1 standard error" not in labels(axes)

    def test_examples_on_the_x_axis(self):
        run = as_log(rows())
        figure = plot_run(run, x="examples")
        steps, _ = drawn(panel(figure, "Learning rate"), "used")
        np.testing.assert_array_equal(steps, 60.0 * STEPS)
        below = panel(figure, "What decided the factor on the learning rate")
        assert below.get_xlabel() == "examples trained"

    def test_a_rule_that_measures_nothing_has_no_law(self):
        series = {key: one for key, one in as_log(rows()).series.items() if "/law/" not in key}
        axes = panel(plot_run(RunLog("", series)), "The law, measured")
        assert labels(axes) == ["sqrt scaling", "base batch size, B = 60"]


class TestFigure:
    def test_is_written_without_pyplot(self, tmp_path):
        figure = plot_run(logged(), [snapshot()], base_batch_size=8, title="A run")
        figure.savefig(tmp_path / "run.png")
        assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
        assert figure.get_suptitle() == "A run"

    def test_every_axis_names_its_unit(self):
        figure = plot_run(logged(), [snapshot()], base_batch_size=8)
        assert {axes.get_ylabel() for axes in figure.axes} == {
            "learning rate (per step)",
            "batch size (examples)",
            "optimal learning rate over the one at B = 8 (ratio R)",
            "",
        }
        assert {axes.get_xlabel() for axes in figure.axes} == {
            "",
            "optimizer step",
            "batch size B (examples)",
        }


class TestErrors:
    @pytest.mark.parametrize("name", ["lr_scheduled", "lr_predicted", "lr_used", "batch_size"])
    def test_a_missing_tag_is_named_with_those_found(self, name):
        run = without(logged(), name)
        with pytest.raises(ValueError, match=f"'surge/{name}', got these surge keys: .*SurgeLRCallback"):
            plot_run(run, base_batch_size=8)

    def test_a_run_without_a_law_shows_its_batch_size_and_no_peak(self):
        run = without(logged(), "peak_batch_size", "peak_batch_size_standard_error", "critical_batch_size")
        axes = next(axes for axes in plot_run(run, base_batch_size=8).axes if "examples" in axes.get_ylabel())
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["batch size in force"]

    def test_a_run_without_the_callback_says_so(self):
        with pytest.raises(
            ValueError, match=r"got these surge keys: none\. Read a run that was trained with"
        ):
            plot_run(RunLog("", {"train_loss": Series(STEPS, np.ones(5))}), base_batch_size=8)

    @pytest.mark.parametrize("base", [0, -8, math.nan, math.inf])
    def test_a_base_that_is_no_size_is_refused(self, base):
        with pytest.raises(ValueError, match=f"finite base_batch_size, got base_batch_size={base}: pass"):
            plot_run(logged(), base_batch_size=base)

    def test_a_curve_that_misses_the_base_is_refused(self):
        with pytest.raises(
            ValueError, match="base_batch_size=256, got batch_sizes from 2 to 128 at step 100"
        ):
            plot_run(logged(), [snapshot()], base_batch_size=256)

    @pytest.mark.parametrize("name", ["lrs", "measured_lrs", "measured_standard_errors"])
    def test_lengths_that_disagree_are_refused(self, name):
        with pytest.raises(ValueError, match=f"and {name} of one length, got .* at step 100: give one"):
            plot_run(logged(), [snapshot(**{name: [1.0]})], base_batch_size=8)


class TestExtras:
    def without(self, monkeypatch, package):
        for module in [name for name in sys.modules if name.split(".")[0] == package]:
            monkeypatch.delitem(sys.modules, module)
        real_import = builtins.__import__

        def refusing_import(name, *args, **kwargs):
            if name.split(".")[0] == package:
                raise ModuleNotFoundError(f"No module named {package!r}")
            return real_import(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", refusing_import)

    def test_without_matplotlib_the_extra_is_named(self, monkeypatch):
        self.without(monkeypatch, "matplotlib")
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-surge\[plot\]'"):
            plot_run(logged(), base_batch_size=8)


class TestSeveralOptimizers:
    @pytest.mark.parametrize(("group", "size", "lr", "laws"), [("opt0", 60, 1e-3, 1), ("opt1", 120, 2e-3, 5)])
    def test_each_has_a_picture(self, group, size, lr, laws):
        figure = plot_run(as_log(several_optimizers()), group=group)
        assert set(drawn(panel(figure, "Batch size against the peak"), "batch size in force")[1]) == {size}
        assert set(drawn(panel(figure, "Learning rate"), "used")[1]) == {lr}
        steps = [label for label in labels(panel(figure, "The law, measured")) if label.startswith("step ")]
        assert len(steps) == laws

    @pytest.mark.parametrize("group", ["opt0", "opt1"])
    def test_each_has_a_page(self, group):
        assert "batch size in force" in run_page(as_log(several_optimizers()), group=group)

    @pytest.mark.parametrize("draw", [plot_run, run_page])
    def test_without_a_name_the_keys_are_listed(self, draw):
        with pytest.raises(RunLogError, match=r"opt0.* name the group|base_batch_size"):
            draw(as_log(several_optimizers()))
