import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from lightning_surge.laws.base import ConstantLaw, Law, LinearLaw, MeasuredLaw, Peak, SGDLaw, SqrtLaw
from lightning_surge.laws.theorems import Theorem3Law
from tests.drawn import HESSIAN, decades, many, measured_law
from tests.laws.closed_forms import Theorem2, theorem3

MU = np.array([0.5, -0.3, 0.8, 0.1])
SIGMA = np.array([2.0, 1.5, 3.0, 0.7])


@st.composite
def measured_laws(draw: st.DrawFn, share: st.SearchStrategy[float]) -> MeasuredLaw:
    """Law with given r = signal_curvature alignment_limit^2 / noise_curvature."""
    limit, noise = draw(decades(-4, 4)), draw(decades(-4, 4))
    return measured_law(limit, draw(decades(-1, 6)), noise, draw(share) * noise / limit**2)


EVERY_LAW: list[Law] = [
    measured_law(2, 300, 1, 1),
    Theorem3Law(noise_scale=100, peak_lr=0.5),
    Theorem3Law(noise_scale=math.inf, peak_lr=math.inf, sqrt_coefficient=0.1),
    SGDLaw(max_lr=0.1, noise_scale=300),
    SGDLaw(max_lr=0.1, noise_scale=300, exponent=0.5),
    ConstantLaw(base_lr=0.001, base_batch_size=16),
    SqrtLaw(base_lr=0.001, base_batch_size=16),
    LinearLaw(base_lr=0.001, base_batch_size=16),
]


@pytest.mark.parametrize("law", EVERY_LAW, ids=lambda law: type(law).__name__)
class TestEveryLaw:
    def test_peak_bounds_every_lr_and_is_reached(self, law: Law) -> None:
        peak = law.peak
        rates = [law.lr(batch_size) for batch_size in np.geomspace(1e-3, 1e9, 200)]
        assert max(rates) <= peak.lr * (1 + 1e-12)
        if math.isfinite(peak.batch_size):
            assert law.lr(peak.batch_size) == pytest.approx(peak.lr, rel=1e-9)
        elif math.isfinite(peak.lr):
            assert law.lr(1e15) == pytest.approx(peak.lr, rel=1e-6)
        else:
            assert law.lr(1e30) > 1e9 * law.lr(1)

    def test_critical_batch_size_halves_the_gain(self, law: Law) -> None:
        critical = law.critical_batch_size
        if critical == 0:
            assert law.gain(1e-9) == law.gain(1e15)
        elif math.isinf(critical):
            assert law.gain(1e15) == pytest.approx(1e14 * law.gain(10))
        else:
            assert law.gain(critical) == pytest.approx(0.5 * law.gain(1e15), rel=1e-9)

    def test_laws_are_frozen(self, law: Law) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(law, dataclasses.fields(law)[0].name, 1.0)  # type: ignore[arg-type]


class TestMeasuredLaw:
    @many
    @given(measured_laws(decades(0.05, 4)))
    def test_peak_is_the_numerical_maximum(self, law: MeasuredLaw) -> None:
        center = math.log(law.alignment_scale)
        found = minimize_scalar(
            lambda log_b: -law.lr(math.exp(log_b)), bounds=(center - 15, center + 15), method="bounded"
        )
        assert law.peak.lr == pytest.approx(-found.fun, rel=1e-9)
        assert math.log(law.peak.batch_size) == pytest.approx(found.x, abs=1e-3)
        assert law.lr(law.peak.batch_size) == pytest.approx(law.peak.lr, rel=1e-9)

    @pytest.mark.parametrize(("share", "expected"), [(0.9, math.inf), (1, math.inf), (1.125, 800), (2, 100)])
    def test_peak_runs_to_infinity_as_coherent_curvature_falls_to_that_of_noise(
        self, share: float, expected: float
    ) -> None:
        assert measured_law(1, 100, 1, share).peak.batch_size == expected

    @many
    @given(measured_laws(decades(-4, 4)), decades(-4, 8))
    def test_gain_is_exactly_of_eq_18_form(self, law: MeasuredLaw, batch_size: float) -> None:
        limit = law.alignment_limit
        gain_max = limit**2 / (2 * (law.noise_curvature + law.signal_curvature * limit**2))
        gain = law.alignment(batch_size) ** 2 / (2 * law.curvature(batch_size))
        assert law.gain(batch_size) == pytest.approx(gain, rel=1e-12)
        assert gain == pytest.approx(gain_max / (1 + law.critical_batch_size / batch_size), rel=1e-12)
        ratio = law.alignment(batch_size) / law.curvature(batch_size)
        assert law.lr(batch_size) == pytest.approx(ratio, rel=1e-12)

    def test_small_batches_follow_theorem_3(self) -> None:
        law = measured_law(3.0, 1e8, 0.5, 0.5e6 / 9)
        noise_scale = 1e8 * 0.5 / (0.5e6 / 9 * 3.0**2)
        peak_lr = 3.0 / 0.5 / math.sqrt(1e8) * math.sqrt(noise_scale) / 2
        limit = Theorem3Law(noise_scale=noise_scale, peak_lr=peak_lr)
        assert noise_scale == pytest.approx(100)
        for batch_size in (1, 25, 100, 400, 10_000):
            assert law.lr(batch_size) == pytest.approx(limit.lr(batch_size), rel=batch_size / 1e8)
            ratios = law.gain(batch_size) / law.gain(100), limit.gain(batch_size) / limit.gain(100)
            assert ratios[0] == pytest.approx(ratios[1], rel=1e-4)
        assert law.peak == pytest.approx(limit.peak, rel=1e-5)
        assert law.critical_batch_size == pytest.approx(noise_scale, rel=1e-5)
        # Outside the limit they must part: the measured law keeps its plateau.
        assert law.lr(1e9) > 3 * limit.lr(1e9)

    @many
    @given(measured_laws(st.just(0.0)), decades(-2, 8))
    def test_without_signal_curvature_it_is_the_sgd_law_with_a_root(
        self, law: MeasuredLaw, batch_size: float
    ) -> None:
        guess = SGDLaw(
            max_lr=law.alignment_limit / law.noise_curvature, noise_scale=law.alignment_scale, exponent=0.5
        )
        assert law.lr(batch_size) == pytest.approx(guess.lr(batch_size), rel=1e-12)
        assert law.peak == pytest.approx(guess.peak, rel=1e-12)
        assert law.critical_batch_size == pytest.approx(guess.critical_batch_size, rel=1e-12)
        gains = law.gain(batch_size) / law.gain(1), guess.gain(batch_size) / guess.gain(1)
        assert gains[0] == pytest.approx(gains[1], rel=1e-12)

    @many
    @given(law=measured_laws(decades(-3, 3)), factor=decades(-3, 3), batch_size=decades(-2, 6))
    # Of alignment, both curvatures, learning rate and gain: the loss multiplied, or the parameters.
    @pytest.mark.parametrize("powers", [(1, 1, -1, 0, 1), (-1, -2, 0, 1, 0)], ids=["loss", "parameters"])
    def test_units(self, powers: tuple[int, ...], law: MeasuredLaw, factor: float, batch_size: float) -> None:
        limit, noise, signal, lr, gain = (factor**power for power in powers)
        scaled = measured_law(
            limit * law.alignment_limit,
            law.alignment_scale,
            noise * law.noise_curvature,
            signal * law.signal_curvature,
        )
        assert scaled.peak.lr == pytest.approx(lr * law.peak.lr, rel=1e-9)
        # r - 1, which vanishes where the peak moves to infinity.
        excess = law.alignment_scale / law.peak.batch_size
        assert scaled.alignment_scale / scaled.peak.batch_size == pytest.approx(excess, rel=1e-9, abs=1e-9)
        assert scaled.lr(batch_size) == pytest.approx(lr * law.lr(batch_size), rel=1e-9)
        assert scaled.gain(batch_size) == pytest.approx(gain * law.gain(batch_size), rel=1e-9)

    def test_without_noise_everything_is_constant(self) -> None:
        law = measured_law(2, 0, 1, 4)
        assert law.lr(1) == law.lr(1e6) == pytest.approx(2 / 17)
        assert law.peak == Peak(math.inf, pytest.approx(2 / 17))
        assert law.critical_batch_size == 0
        assert law.gain(1) == law.gain(1e6) == pytest.approx(4 / 34)

    def test_without_noise_curvature_the_lr_only_falls(self) -> None:
        law = measured_law(2, 300, 0, 4)
        assert law.peak == Peak(0.0, math.inf)
        assert law.lr(100) == pytest.approx(2 / 8)
        assert law.lr(1e-12) > 1e5 * law.lr(100) > 1e5 * law.lr(1e12)
        assert law.critical_batch_size == 0
        assert law.gain(1) == pytest.approx(law.gain(1e9)) == pytest.approx(1 / 8)


class TestTheorem2:
    @pytest.mark.parametrize("batch_size", [1, 4, 16, 64])
    def test_predicts_simulated_sign_steps_on_a_quadratic(self, batch_size: int) -> None:
        rng = np.random.default_rng(batch_size)
        samples = 20_000
        steps = np.sign(rng.normal(MU, SIGMA, (samples, batch_size, 4)).mean(axis=1))
        # The loss (x - x0)' H (x - x0) / 2, with x - x0 such that its gradient is MU.
        offset = np.linalg.solve(HESSIAN, MU)

        def losses(lr: float) -> np.ndarray:
            moved = offset - lr * steps
            return 0.5 * ((moved @ HESSIAN) * moved).sum(axis=1)

        def error(values: np.ndarray) -> float:
            return float(values.std(ddof=1)) / math.sqrt(samples)

        law = Theorem2(MU, SIGMA, HESSIAN)
        gains, costs = steps @ MU, ((steps @ HESSIAN) * steps).sum(axis=1)
        assert abs(gains.mean() - law.alignment(batch_size)) < 4 * error(gains)
        assert abs(costs.mean() - law.curvature(batch_size)) < 4 * error(costs)

        best = minimize_scalar(lambda lr: losses(lr).mean(), bounds=(0, 2), method="bounded")
        slope_error = error(gains - best.x * costs)
        assert abs(best.x - law.lr(batch_size)) < 4 * slope_error / costs.mean()
        decrease = 0.5 * MU @ offset - losses(best.x)
        assert abs(decrease.mean() - law.gain(batch_size)) < 4 * error(decrease)


class TestTheorem3Law:
    def test_approximates_theorem_2_far_below_the_scale_of_every_sign(self) -> None:
        rng = np.random.default_rng(0)
        size = 300
        mean = rng.uniform(0.5, 1.5, size) * rng.choice([-1, 1], size)
        statistics = mean, 40 * rng.uniform(0.8, 1.2, size), np.diag(rng.uniform(0, 1, size))
        statistics[2][:] += np.outer(np.sign(mean), np.sign(mean))
        exact, law = Theorem2(*statistics), theorem3(*statistics)
        limit = (math.pi * statistics[1] ** 2 / (2 * mean**2)).min()
        # Coherence over many parameters puts the peak inside the regime of the theorem.
        assert law.noise_scale < 0.02 * limit
        for fraction in (0.01, 0.3, 1, 2):
            batch_size = fraction * law.noise_scale
            # erf(x) = 2 x / sqrt(pi) (1 - x^2 / 3 + ..), x^2 at most (pi / 4) (B / limit).
            tolerance = 2 * math.pi / 12 * batch_size / limit
            assert law.lr(batch_size) == pytest.approx(exact.lr(batch_size), rel=tolerance)
            gains = exact.gain(batch_size) / exact.gain(law.noise_scale)
            assert 2 * law.gain(batch_size) == pytest.approx(gains, rel=0.02)
        rates = {size: exact.lr(size) for size in law.noise_scale * np.geomspace(0.5, 2.0, 141)}
        assert max(rates.values()) == pytest.approx(law.peak_lr, rel=0.01)
        assert max(rates, key=rates.__getitem__) == pytest.approx(law.noise_scale, rel=0.05)
        assert law.lr(1e6 * limit) < 0.1 * exact.lr(1e6 * limit)

    @many
    @given(decades(-2, 6), decades(-6, 0), decades(-3, 3))
    def test_symmetric_about_the_peak(self, noise_scale: float, peak_lr: float, factor: float) -> None:
        law = Theorem3Law(noise_scale=noise_scale, peak_lr=peak_lr)
        assert law.lr(noise_scale) == pytest.approx(peak_lr, rel=1e-12)
        assert law.lr(factor * noise_scale) == pytest.approx(law.lr(noise_scale / factor), rel=1e-9)
        slope = 2 * peak_lr / math.sqrt(noise_scale)
        tiny = 1e-9 * noise_scale
        assert law.lr(tiny) == pytest.approx(slope * math.sqrt(tiny), rel=1e-8)

    @pytest.mark.parametrize("coupling", [0.0, -0.5], ids=["independent", "opposed"])
    def test_without_coherent_cost_there_is_no_peak(self, coupling: float) -> None:
        hessian = np.array([[2.0, coupling], [coupling, 3.0]])
        mean, deviation = np.array([1.0, 2.0]), np.array([100.0, 400.0])
        law = theorem3(mean, deviation, hessian)
        assert law.peak == Peak(math.inf, math.inf)
        assert law.critical_batch_size == math.inf
        # sqrt(2 / pi) (1 / 100 + 4 / 400) / (2 + 3)
        assert law.sqrt_coefficient == pytest.approx(math.sqrt(2 / math.pi) * 0.004, rel=1e-12)
        assert law.lr(16) == pytest.approx(4 * law.sqrt_coefficient, rel=1e-12)
        assert law.lr(4) == pytest.approx(Theorem2(mean, deviation, hessian).lr(4), rel=1e-3)


class TestSGDLaw:
    def test_is_the_best_step_of_noisy_gradients_on_a_quadratic(self) -> None:
        # V = g_B has E[V . G] = |G|^2 and E[V' H V] = G' H G + tr(H Sigma) / B.
        coherent, noise = MU @ HESSIAN @ MU, np.diag(HESSIAN) @ SIGMA**2
        law = SGDLaw(max_lr=MU @ MU / coherent, noise_scale=noise / coherent)
        for batch_size in (1, 10, 1000):
            top, bottom = MU @ MU, coherent + noise / batch_size
            assert law.lr(batch_size) == pytest.approx(top / bottom, rel=1e-12)
            gain_max = (MU @ MU) ** 2 / (2 * coherent)
            assert gain_max * law.gain(batch_size) == pytest.approx(top**2 / (2 * bottom), rel=1e-12)
        # Any exponent: 1 + 300 / 100 is 4.
        assert SGDLaw(max_lr=1, noise_scale=300, exponent=0.25).lr(100) == pytest.approx(4**-0.25, rel=1e-12)


class TestReferenceRules:
    @pytest.mark.parametrize(
        ("rule", "factor", "gain", "peak_lr", "critical"),
        [
            (ConstantLaw, 1, 1, 0.001, 0.0),
            (SqrtLaw, 3, 9, math.inf, math.inf),
            (LinearLaw, 9, 9, math.inf, math.inf),
        ],
    )
    def test_nine_times_the_batch(
        self, rule: type[Law], factor: float, gain: float, peak_lr: float, critical: float
    ) -> None:
        law = rule(base_lr=0.001, base_batch_size=16)
        assert law.lr(16) == 0.001
        assert law.gain(16) == 1
        assert law.lr(144) == pytest.approx(factor * 0.001, rel=1e-12)
        assert law.gain(144) == pytest.approx(gain, rel=1e-12)
        assert law.peak == Peak(math.inf, peak_lr)
        assert law.critical_batch_size == critical

    def test_each_is_the_limit_it_claims(self) -> None:
        adam = measured_law(2, 1e6, 1, 1)
        sgd = SGDLaw(max_lr=0.1, noise_scale=1e6)
        cases = [
            (SqrtLaw, adam, 1e-3),
            (LinearLaw, sgd, 1e-3),
            (ConstantLaw, adam, 1e12),
            (ConstantLaw, sgd, 1e12),
        ]
        for rule, law, base in cases:
            limit = rule(base_lr=law.lr(base), base_batch_size=base)
            assert law.lr(64 * base) == pytest.approx(limit.lr(64 * base), rel=1e-5)
            assert law.gain(64 * base) / law.gain(base) == pytest.approx(limit.gain(64 * base), rel=1e-5)


ONES = dict.fromkeys(["alignment_limit", "alignment_scale", "noise_curvature", "signal_curvature"], 1)
THEOREM_3 = {"noise_scale": 1, "peak_lr": 1}
INFINITE = {"noise_scale": math.inf, "peak_lr": math.inf}
REFUSED: dict[Callable[..., Any], tuple[dict[str, Any], list[tuple[dict[str, Any], str]]]] = {
    MeasuredLaw: (ONES, [
            ({"alignment_limit": 0}, "0 < alignment_limit < inf, got alignment_limit=0: a zero gradient"),
            (
                {"noise_curvature": 0, "signal_curvature": 0},
                "noise_curvature=0 and signal_curvature=0: without",
            ),
    ]),
    Theorem3Law: (THEOREM_3, [
        ({"noise_scale": 0}, "0 < noise_scale <= inf, got noise_scale=0: use inf for both"),
        ({"peak_lr": math.inf}, "got peak_lr=inf: use inf for both"),
        ({"sqrt_coefficient": 2}, "got sqrt_coefficient=2, noise_scale=1.0: peak_lr already"),
        ({"noise_scale": math.inf, "sqrt_coefficient": 2}, "got noise_scale=inf: use inf for both"),
        (INFINITE, "got sqrt_coefficient=None: with noise_scale=inf pass"),
        (INFINITE | {"sqrt_coefficient": -1}, "0 < sqrt_coefficient < inf, got sqrt_coefficient=-1: with"),
    ]),
    SGDLaw: ({"max_lr": 1.0, "noise_scale": 1.0}, [
        ({"max_lr": 0}, "got max_lr=0: pass"), ({"exponent": 1.5}, "got exponent=1.5: use 1"),
    ]),
    SqrtLaw: ({"base_lr": 0.1, "base_batch_size": 16}, [
        ({"base_lr": 0}, "got base_lr=0: pass"), ({"base_batch_size": 0}, "got base_batch_size=0: pass"),
    ]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("make", "valid", "change", "message"),
    [(make, valid, *case) for make, (valid, cases) in REFUSED.items() for case in cases],
)
def test_values_are_checked(
    make: Callable[..., Any], valid: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**valid | change)
