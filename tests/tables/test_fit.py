"""Grids of runs made from known laws: what was put in comes out."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_surge.laws.base import ConstantLaw, Law, LinearLaw, MeasuredLaw, SGDLaw, SqrtLaw
from lightning_surge.laws.theorems import Theorem3Law
from lightning_surge.tables.bootstrap import estimate
from lightning_surge.tables.fit import FittedLaw, GridFit, fit_grid, split_targets
from lightning_surge.tables.law_fits import Optima, fit_law, hold_out
from lightning_surge.tables.optima import valleys
from lightning_surge.tables.read import RunTable, read_table

TABLES = Path(__file__).parents[2] / "examples" / "tables"
SIZES = (4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0)
MEASURED = MeasuredLaw(
    alignment_limit=1.0, alignment_scale=200.0, noise_curvature=100.0, signal_curvature=900.0
)
TRUE: dict[str, tuple[Law, dict[str, float]]] = {
    # lr as B -> inf is 1 / (100 + 900); r is 900 / 100, so that the peak is at 200 / (9 - 1) = 25.
    "measured": (MEASURED, {"lr_limit": 0.001, "alignment_scale": 200.0, "signal_share": 9.0}),
    "adam": (Theorem3Law(peak_lr=0.01, noise_scale=100.0), {"peak_lr": 0.01, "noise_scale": 100.0}),
    "sgd": (SGDLaw(max_lr=0.1, noise_scale=300.0), {"max_lr": 0.1, "noise_scale": 300.0}),
    "sgd_sqrt": (SGDLaw(max_lr=0.1, noise_scale=300.0, exponent=0.5), {"max_lr": 0.1, "noise_scale": 300.0}),
    "sqrt": (SqrtLaw(base_lr=0.001, base_batch_size=4.0), {"base_lr": 0.001}),
    "linear": (LinearLaw(base_lr=0.001, base_batch_size=4.0), {"base_lr": 0.001}),
    "constant": (ConstantLaw(base_lr=0.001, base_batch_size=4.0), {"base_lr": 0.001}),
}


def grid(
    law: Law,
    *,
    sizes: Sequence[float] = SIZES,
    seeds: int = 1,
    noise: float = 0.0,
    seed: int = 0,
    critical: float | None = None,
    width: float = 1.0,
) -> RunTable:
    """Seven learning rates in ratios of 2 around the law's, off by up to a factor of 1.4 from the grid.

    Losses are parabolas in the log of the learning rate; with `critical`, steps to a target are made so.
    """
    generator = np.random.default_rng(seed)
    batch, exponent, labels = (
        axis.ravel() for axis in np.meshgrid(sizes, np.arange(-3, 4), np.arange(seeds), indexing="ij")
    )
    best = np.array([law.lr(size) for size in batch.tolist()])
    lrs = 2.0 ** (np.round(np.log2(best)) + exponent)
    losses = 0.1 * width * np.log(lrs / best) ** 2 + noise * generator.standard_normal(batch.size)
    if critical is None:
        return RunTable("loss", batch, lrs, 2 + losses, labels)
    return RunTable("steps", batch, lrs, 1000 * (1 + critical / batch) * np.exp(losses), labels)


def parameters(law: FittedLaw) -> dict[str, float]:
    return {each.name: each.value for each in law.parameters}


def only(fit: GridFit, name: str) -> FittedLaw:
    (law,) = [law for law in fit.laws if law.name == name]
    return law


class TestExact:
    @pytest.mark.parametrize(
        ("name", "wrong"),
        list(zip(TRUE, ["adam", "sgd", "sqrt", "linear", "sgd", "adam", "sqrt"], strict=True)),
    )
    def test_every_law_comes_out_of_its_own_grid_and_predicts_best(self, name: str, wrong: str) -> None:
        law, expected = TRUE[name]
        fit = fit_grid(grid(law), laws=list(TRUE), bootstrap=0, at=[4194305.0, 2.0])
        found, other = only(fit, name), only(fit, wrong)
        assert parameters(found) == pytest.approx(expected, rel=1e-5)
        assert [each.value for each in found.at] == pytest.approx([law.lr(4194305), law.lr(2)], rel=1e-5)
        assert [float(each.name) for each in found.at] == [4194305.0, 2.0]
        assert found.peak_lr.value == pytest.approx(law.peak.lr, rel=1e-5)
        assert found.residual < 1e-6
        assert not found.limited
        # Laws that hold the true one as a limit tie with it; the others do not.
        assert fit.best == name or name in fit.ties
        assert found.held_out.error < 1e-5
        assert other.held_out.error > 0.1
        assert fit.tradeoff == ()

    def test_steps_give_eq_22_and_the_laws_with_its_scale(self) -> None:
        law = Theorem3Law(peak_lr=0.01, noise_scale=100.0)
        fit = fit_grid(grid(law, critical=100.0), bootstrap=0)
        line = {each.name: each.value for each in fit.tradeoff}
        expected = {"critical_batch_size": 100.0, "min_steps": 1000.0, "min_examples": 100_000.0}
        assert line == pytest.approx(expected, rel=1e-6)
        assert parameters(only(fit, "adam_eq22")) == pytest.approx({"peak_lr": 0.01, "noise_scale": 100.0})
        assert fit.best in ("adam", "adam_eq22", "measured")

    def test_a_line_that_does_not_fall_is_said(self) -> None:
        table = grid(MEASURED, critical=20.0)
        # Ten times the batch takes ten times the steps: no limit.
        fit = fit_grid(table._replace(outcomes=table.outcomes * table.batch_sizes), bootstrap=0)
        assert fit.tradeoff == ()
        assert any("Eq. 22" in note for note in fit.notes)

    def test_one_bad_optimum_bends_the_curve_less_than_least_squares(self) -> None:
        law = TRUE["adam"][0]
        logs = np.log([law.lr(size) for size in SIZES])
        logs[2] += math.log(8)
        robust = fit_law("adam", Optima(np.array(SIZES), logs))
        # Least squares in the amplitude alone would be off by 8^(1/6).
        assert robust.law.lr(4) == pytest.approx(law.lr(4), rel=0.25)
        assert robust.law.peak.lr == pytest.approx(0.01, rel=0.25)

    def test_missing_cells_and_failed_runs_do_no_harm(self) -> None:
        table = grid(MEASURED)
        order = np.argsort(table.outcomes)
        lost, failed = order[-6:-3], order[-3:]
        outcomes = table.outcomes.copy()
        outcomes[failed] = np.inf
        kept = np.setdiff1d(np.arange(outcomes.size), lost)
        thinner = RunTable("loss", table.batch_sizes[kept], table.lrs[kept], outcomes[kept], None)
        found = only(fit_grid(thinner, laws=["measured"], bootstrap=0), "measured")
        assert parameters(found) == pytest.approx(TRUE["measured"][1], rel=1e-5)


class TestOptima:
    def one(self, lrs: Sequence[float], losses: Sequence[float]) -> tuple[str, float]:
        table = RunTable("loss", np.full(len(lrs), 8.0), np.array(lrs), np.array(losses))
        optimum = valleys(table)[0].optimum
        return optimum.status, optimum.lr

    def test_the_bottom_of_a_parabola_off_the_grid(self) -> None:
        # (x - 0.25)^2 at x = -1, 0, 1 doublings.
        status, lr = self.one([1, 2, 4], [1.25**2, 0.25**2, 0.75**2])
        assert status == "inside"
        assert lr == pytest.approx(2 * 2**0.25)

    @pytest.mark.parametrize(
        ("losses", "status", "lr"),
        [
            ([1, 2, 3], "edge_low", 1),
            ([3, 2, 1], "edge_high", 4),
            ([3, 1, math.inf], "bracketed", 2),
            ([math.inf, 1, 3], "bracketed", 2),
            ([1, math.inf, math.inf], "edge_low", 1),
            ([2, 2, 2], "flat", 1),
            ([2, 2, 3], "edge_low", 1),
            ([math.inf] * 3, "failed", math.nan),
            ([1, 2], "few", 1),
        ],
    )
    def test_what_is_no_valley_is_named(self, losses: list[float], status: str, lr: float) -> None:
        found = self.one([1, 2, 4][: len(losses)], losses)
        assert found[0] == status
        assert found[1] == pytest.approx(lr, nan_ok=True)

    def test_a_valley_within_the_noise_of_its_seeds_is_flat(self) -> None:
        lrs = np.repeat([1.0, 2.0, 4.0], 2)
        noisy = np.array([1.1, 0.92, 0.9, 1.09, 1.12, 0.91])
        assert valleys(RunTable("loss", np.full(6, 8.0), lrs, noisy))[0].optimum.status == "flat"
        clear = noisy + np.repeat([1.0, 0.0, 1.0], 2)
        assert valleys(RunTable("loss", np.full(6, 8.0), lrs, clear))[0].optimum.status == "inside"

    def test_what_the_runs_of_a_seed_share_is_no_noise(self) -> None:
        lrs, seeds = np.repeat([1.0, 2.0, 4.0], 3), np.tile([0, 1, 2], 3)
        losses = np.repeat([1.1, 1.0, 1.2], 3) + np.tile([-1.0, 0.0, 1.0], 3)
        table = RunTable("loss", np.full(9, 8.0), lrs, losses, seeds)
        valley = valleys(table)[0]
        assert (valley.optimum.status, valley.freedom) == ("inside", 4)
        assert valley.noise == pytest.approx(0, abs=1e-12)
        assert valley.seed_noise == pytest.approx(1)
        assert valleys(table._replace(seeds=None))[0].optimum.status == "flat"

    def test_a_random_search_of_thousands_has_a_wide_parabola(self) -> None:
        """Neighbours differ by noise; the parabola spans a factor of 1.5 to both sides."""
        generator = np.random.default_rng(2)
        lrs = np.exp(generator.uniform(-3, 3, 5000))
        losses = 0.5 * np.log(lrs / 1.2) ** 2 + 0.1 * generator.standard_normal(5000)
        valley = valleys(RunTable("loss", np.full(5000, 8.0), lrs, losses))[0]
        assert valley.optimum.status == "inside"
        assert math.log(valley.optimum.lr / 1.2) == pytest.approx(0, abs=0.02)


class TestProperties:
    settings = settings(max_examples=6, deadline=None)

    @settings
    @given(st.floats(-12, 12).map(lambda exponent: 10.0**exponent))
    def test_the_unit_of_the_learning_rate_scales_it(self, factor: float) -> None:
        table = grid(MEASURED, seeds=2, noise=0.01, critical=20.0)
        laws = ["adam", "sgd_sqrt", "sqrt"]
        before = fit_grid(table, laws=laws, bootstrap=0)
        after = fit_grid(table._replace(lrs=table.lrs * factor), laws=laws, bootstrap=0)
        for law in before.laws:
            scaled = only(after, law.name)
            assert scaled.law.lr(100) == pytest.approx(law.law.lr(100) * factor, rel=1e-6)
            assert scaled.held_out.error == pytest.approx(law.held_out.error, rel=1e-5)
        assert [each.value for each in after.tradeoff] == pytest.approx(
            [each.value for each in before.tradeoff]
        )

    @settings
    @given(st.floats(-3, 3).map(lambda exponent: 10.0**exponent))
    def test_the_unit_of_the_batch_size_scales_its_scales(self, factor: float) -> None:
        table = grid(MEASURED, critical=20.0)
        scaled = table._replace(batch_sizes=table.batch_sizes * factor)
        before, after = (fit_grid(each, laws=["measured"], bootstrap=0).laws[0] for each in (table, scaled))
        assert after.peak_batch_size.value == pytest.approx(before.peak_batch_size.value * factor, rel=1e-4)
        assert after.peak_lr.value == pytest.approx(before.peak_lr.value, rel=1e-5)

    @pytest.mark.parametrize("seed", [0, 1])
    def test_the_order_of_the_rows_changes_nothing(self, seed: int) -> None:
        table = grid(MEASURED, sizes=SIZES[:4], seeds=3, noise=0.02)
        rows = np.random.default_rng(seed).permutation(table.lrs.size)
        shuffled = RunTable(
            "loss", table.batch_sizes[rows], table.lrs[rows], table.outcomes[rows], table.seeds[rows]
        )
        assert self.numbers(fit_grid(shuffled, laws=["adam"], bootstrap=25)) == self.numbers(
            fit_grid(table, laws=["adam"], bootstrap=25)
        )

    def numbers(self, fit: GridFit) -> object:
        return fit.laws[0].parameters, fit.laws[0].held_out, fit.lrs

    def test_duplicates_of_a_seed_are_averaged_before_the_seeds(self) -> None:
        lrs = np.repeat([1.0, 2.0, 4.0], 3)
        seeds = np.tile([0, 0, 1], 3)
        # Seed 0 ran twice, 1.0 and 3.0, seed 1 once, 4.0: the mean of 2 and 4, and not of all three.
        losses = np.tile([1.0, 3.0, 4.0], 3)
        valley = valleys(RunTable("loss", np.full(9, 8.0), lrs, losses, seeds))[0]
        assert valley.means.tolist() == [3.0] * 3
        assert valley.counts.tolist() == [2.0] * 3


@pytest.mark.slow
class TestStatistics:
    def test_parameters_lie_within_four_standard_errors(self) -> None:
        """Grids with noisy losses, twelve of them: the mean of each log parameter against the truth."""
        law, expected = TRUE["adam"]
        logs = []
        for seed in range(12):
            table = grid(law, seeds=3, noise=0.02, seed=seed)
            found = parameters(only(fit_grid(table, laws=["adam"], bootstrap=0), "adam"))
            logs.append([math.log(found[name] / expected[name]) for name in expected])
        errors = np.array(logs)
        standard = errors.std(0, ddof=1) / math.sqrt(len(errors))
        assert (np.abs(errors.mean(0)) < 4 * standard).all()
        # And they scatter by what the noise gives, not by more.
        assert (errors.std(0, ddof=1) < [0.1, 0.25]).all()

    def test_intervals_cover_what_they_say(self) -> None:
        """40 grids of three batch sizes, intervals at 95 %: at least 33 hold the truth (p < 0.01 below)."""
        law, expected = TRUE["sqrt"]
        inside, widths = 0, []
        for seed in range(40):
            table = grid(law, sizes=SIZES[:3], seeds=3, noise=0.02, seed=seed)
            fit = fit_grid(table, laws=["sqrt"], bootstrap=40, seed=seed)
            assert fit.from_seeds
            (found,) = fit.laws[0].parameters
            inside += found.low <= expected["base_lr"] <= found.high
            widths.append(math.log(found.high / found.low))
        assert inside >= 33
        # Not by being endless: under a factor of two.
        assert np.median(widths) < math.log(2)

    def test_without_a_second_seed_residuals_make_the_intervals(self) -> None:
        fit = fit_grid(grid(TRUE["adam"][0], noise=0.01), laws=["adam", "linear"], bootstrap=30)
        assert not fit.from_seeds
        assert all(math.isnan(lr.low) for lr in fit.lrs)
        width = {law.name: math.log(law.parameters[0].high / law.parameters[0].low) for law in fit.laws}
        # A law that misses its optima is uncertain by as much.
        assert width["linear"] > 3 * width["adam"] > 0

    def test_an_interval_may_have_no_end(self) -> None:
        drawn = [1.0] * 10 + [math.inf] * 10
        assert estimate("peak", 2.0, drawn)[2:] == (1.0, math.inf)
        assert math.isnan(estimate("peak", 2.0, drawn[:19]).low)


class TestTooLittle:
    def test_what_is_missing_is_said_by_batch_size(self) -> None:
        table = grid(MEASURED, sizes=SIZES[:4])
        for size, drop in ((16.0, np.less), (64.0, np.greater)):
            at = table.batch_sizes == size
            limit = MEASURED.lr(size) * (0.7 if drop is np.less else 1.4)
            kept = ~(at & drop(table.lrs, limit))
            table = RunTable("loss", table.batch_sizes[kept], table.lrs[kept], table.outcomes[kept])
        message = (
            r"Expected 3 batch sizes with an optimum inside their grid, got 2 of 4: "
            r"at B = 16 the best .* smallest one tried, .*: add smaller ones; "
            r"at B = 64 the best .* largest one tried, .*: add larger ones"
        )
        with pytest.raises(ValueError, match=message):
            fit_grid(table)

    def test_three_leave_a_law_of_three_parameters_without_a_held_out_error(self) -> None:
        fit = fit_grid(grid(MEASURED, sizes=SIZES[:3]), laws=["measured", "adam"], bootstrap=0)
        assert only(fit, "measured").held_out is None
        assert fit.best == "adam"
        assert hold_out("measured", Optima(np.array(SIZES[:3]), np.zeros(3))) is None

    def test_edges_take_no_part(self) -> None:
        table = grid(MEASURED)
        cut = (table.batch_sizes == 4096) & (table.lrs > 0.6 * MEASURED.lr(4096))
        table = RunTable("loss", table.batch_sizes[~cut], table.lrs[~cut], table.outcomes[~cut])
        fit = fit_grid(table, laws=["measured"], bootstrap=0)
        assert fit.valleys[-1].optimum.status == "edge_high"
        assert parameters(fit.laws[0]) == pytest.approx(TRUE["measured"][1], rel=1e-4)

    def test_arguments_are_checked(self) -> None:
        sizes = np.arange(1.0, 400.0)
        many = RunTable("loss", sizes, sizes, sizes)
        both = grid(MEASURED, critical=20.0)._replace(targets=np.repeat([2.5, 1.5], 21))
        for table, arguments, message in (
            (many, {}, "Expected at most 200 batch sizes, got 399: .*round them"),
            (both, {}, "Expected runs to one target, got 2 targets"),
            (grid(MEASURED, sizes=SIZES[:2]), {}, "got 2 of 2: add batch sizes, each with at least 3"),
            (many, {"laws": ["cubic"]}, "Expected laws among measured, .*, got 'cubic': choose"),
            (many, {"bootstrap": -1}, "whole number bootstrap >= 0, got bootstrap=-1: use 0"),
            (many, {"bootstrap": 19}, "whole number bootstrap >= 20, got bootstrap=19: use 0"),
        ):
            with pytest.raises(ValueError, match=message):
                fit_grid(table, **arguments)  # type: ignore[arg-type]


class TestCommittedTables:
    def test_with_adam_the_optima_level_off(self) -> None:
        """The page says at how many of the targets the form of SGD predicts best."""
        best = [
            fit_grid(part, laws=[*TRUE, "sgd_sqrt_eq22"], bootstrap=0).best
            for name in ("perceptron_adam.csv", "autoencoder_adam.csv")
            for _, part in split_targets(read_table(TABLES / name))
        ]
        assert (best.count("sgd"), len(best)) == (5, 6)


def tuned(law: Law, *, runs: int = 1, noise: float = 0.0, critical: float = 20.0) -> RunTable:
    """One learning rate for each batch size, the law's."""
    batch = np.repeat(SIZES, runs)
    steps = (
        1000 * (1 + critical / batch) * np.exp(noise * np.random.default_rng(0).standard_normal(batch.size))
    )
    return RunTable("steps", batch, np.array([law.lr(size) for size in batch.tolist()]), steps)


class TestTunedLearningRates:
    def test_they_are_the_optima(self) -> None:
        fit = fit_grid(tuned(MEASURED), laws=["measured", "sqrt"], tuned=True, bootstrap=0)
        assert {valley.optimum.status for valley in fit.valleys} == {"tuned"}
        assert parameters(only(fit, "measured")) == pytest.approx(TRUE["measured"][1], rel=1e-3)
        assert [each.value for each in fit.tradeoff] == pytest.approx([20, 1000, 20_000])

    def test_only_if_that_is_said(self) -> None:
        with pytest.raises(ValueError, match=r"at B = 4 fewer than 3 learning rates: .* or pass --tuned"):
            fit_grid(tuned(MEASURED))

    def test_runs_say_how_certain_the_steps_are_but_not_the_learning_rates(self) -> None:
        laws = ["adam", "linear"]
        fit = fit_grid(tuned(TRUE["adam"][0], runs=4, noise=0.01), laws=laws, tuned=True, bootstrap=30)
        assert not fit.from_seeds
        assert all(math.isnan(lr.low) for lr in fit.lrs)
        scale = fit.tradeoff[0]
        assert 0.8 * scale.value < scale.low < 20 < scale.high < 1.2 * scale.value
        widths = {law.name: math.log(law.parameters[0].high / law.parameters[0].low) for law in fit.laws}
        assert widths["adam"] < 1e-6  # its optima lie on it
        assert widths["linear"] > 0.5

    def test_a_failed_one_is_no_optimum(self) -> None:
        table = tuned(MEASURED)
        outcomes = np.where(table.batch_sizes == 4, np.inf, table.outcomes)
        first = valleys(table._replace(outcomes=outcomes), tuned=True)[0].optimum
        assert (first.status, first.outcome) == ("failed", math.inf)


class TestPublishedTables:
    def test_the_law_of_the_paper_predicts_best_where_the_learning_rate_falls(self) -> None:
        """RetinaNet: the learning rate rises to B = 2560 and falls; Eq. 22 places Adam's peak by steps."""
        fit = fit_grid(read_table(TABLES / "mlperf_retinanet.csv"), tuned=True, bootstrap=0)
        assert fit.best == "adam_eq22"
        assert 1024 < only(fit, "adam_eq22").peak_batch_size.value < 2048
        assert 1024 < only(fit, "adam").peak_batch_size.value < 2048
