"""The edge of stability as a law of the batch size, its fit, and the objective that it caps."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_surge.laws.base import ConstantLaw, MeasuredLaw
from lightning_surge.laws.edge import EdgeLaw
from lightning_surge.laws.objectives import edge_ratio, progress_ratio
from lightning_surge.laws.theorems import Theorem3Law
from lightning_surge.measure.records import ChunkStatistics, Measurement, SizedValue
from lightning_surge.policy.estimates import EstimatedLaw, estimate, fit_edge_law, fit_sign_law
from lightning_surge.policy.history import NoiseHistory
from lightning_surge.policy.policy import Policy

many = settings(max_examples=80, deadline=None)
BASE = 16.0
STABILITY = 38.0
sizes = st.floats(0, 12).map(lambda exponent: 2.0**exponent)


def decades(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high).map(lambda exponent: 10.0**exponent)


edge_laws = st.builds(
    EdgeLaw,
    alignment_limit=decades(-2, 2),
    alignment_scale=st.one_of(st.just(0.0), decades(-2, 6)),
    noise_curvature=decades(-3, 3),
    signal_curvature=st.one_of(st.just(0.0), decades(-3, 3)),
    edge_limit=decades(-4, 1),
    edge_sq_slope=st.one_of(st.just(0.0), decades(-4, 4)),
)


def noise_alone(edge_at_base: float) -> EdgeLaw:
    return EdgeLaw(
        alignment_limit=1.0,
        alignment_scale=1e14,
        noise_curvature=1.0,
        signal_curvature=0.0,
        edge_limit=0.0,
        edge_sq_slope=edge_at_base**2 * BASE,
    )


class TestLaw:
    @many
    @given(law=edge_laws, batch_size=sizes)
    def test_falls_to_its_limit(self, law: EdgeLaw, batch_size: float) -> None:
        assert law.edge_lr(batch_size) >= law.edge_lr(2 * batch_size) >= law.edge_limit
        # By no more than the square root.
        assert law.edge_lr(batch_size) <= math.sqrt(2.0) * law.edge_lr(2 * batch_size) * (1 + 1e-12)

    def test_falls_like_the_inverse_root_where_noise_is_all(self) -> None:
        law = noise_alone(0.1)
        assert law.edge_lr(BASE) == pytest.approx(0.1)
        assert law.edge_lr(100 * BASE) == pytest.approx(0.01)

    @many
    @given(law=edge_laws, batch_size=sizes)
    def test_is_otherwise_the_measured_law(self, law: EdgeLaw, batch_size: float) -> None:
        plain = MeasuredLaw(
            **{name: getattr(law, name) for name in MeasuredLaw.__dataclass_fields__}  # the four numbers
        )
        assert law.lr(batch_size) == plain.lr(batch_size)
        assert law.gain(batch_size) == plain.gain(batch_size)
        assert law.peak == plain.peak
        assert math.isnan(plain.edge_lr(batch_size))

    @pytest.mark.parametrize("numbers", [(0.0, 0.0), (-1.0, 1.0), (1.0, math.nan), (math.inf, 1.0)])
    def test_refuses(self, numbers: tuple[float, float]) -> None:
        with pytest.raises(ValueError, match=r"edge_limit|edge_sq_slope"):
            EdgeLaw(
                alignment_limit=1.0,
                alignment_scale=1.0,
                noise_curvature=1.0,
                signal_curvature=1.0,
                edge_limit=numbers[0],
                edge_sq_slope=numbers[1],
            )

    def test_round_trip_of_the_state(self) -> None:
        law = EstimatedLaw(noise_alone(0.1), ((noise_alone(0.2), 0.5), (None, 0.5)), 2, (8.0, 16.0))
        assert EstimatedLaw.from_state_dict(law.state_dict()) == law


def measured(*sharpness: tuple[float, float]) -> Measurement:
    """Alignments `2 h(b)` and curvatures `1 + 3 h(b)^2` with a noise scale of 48 examples."""
    h = {b: 1.0 / math.sqrt(1.0 + 48.0 / b) for b in (16.0, 48.0)}
    return Measurement(
        ChunkStatistics(96.0, 1.0, 48.0, tuple(SizedValue(b, 2.0 * h[b]) for b in h)),
        tuple(SizedValue(b, 1.0 + 3.0 * h[b] ** 2) for b in h),
        passes=192.0,
        sharpness=tuple(SizedValue(*pair) for pair in sharpness),
    )


def history_of(measurements: list[Measurement], half_life: float = 1e6) -> NoiseHistory:
    history = NoiseHistory(half_life)
    for measurement in measurements:
        history.add(measurement)
    return history


def sharpness_at(batch_size: float, share: float, level: float = 380.0) -> tuple[float, float]:
    """380 at the base, where the signal has a share of `v`."""
    return batch_size, level / math.sqrt(share + (1.0 - share) * BASE / batch_size)


class TestFit:
    @many
    @given(
        share=st.floats(0, 1),
        others=st.lists(st.floats(1.5, 6), min_size=1, max_size=6),
        seed=st.integers(0, 99),
    )
    def test_recovers_the_edge_at_any_size_while_the_level_drifts(
        self, share: float, others: list[float], seed: int
    ) -> None:
        rng = np.random.default_rng(seed)
        levels = np.exp(rng.normal(size=len(others)))
        # Exact only if bins hold equal sizes: steps of a ramp in whole powers of two.
        rows = [
            measured(*(sharpness_at(size, share, level) for size in (BASE, BASE * 2.0 ** round(other))))
            for other, level in zip(others, levels, strict=True)
        ]
        law = fit_edge_law(history_of(rows).stats(), STABILITY)
        assert isinstance(law, EdgeLaw)
        mean = float(np.mean(levels))
        for size in (4.0, BASE, 64.0, 1000.0):
            assert law.edge_lr(size) == pytest.approx(
                STABILITY / sharpness_at(size, share, mean)[1], rel=1e-3
            )

    @pytest.mark.parametrize(("at_64", "share"), [(100.0, 1.0), (380.0, 1.0), (760.0, 0.0), (3000.0, 0.0)])
    def test_shares_stay_between_nothing_and_all(self, at_64: float, share: float) -> None:
        law = fit_edge_law(history_of([measured((BASE, 380.0), (64.0, at_64))]).stats(), STABILITY)
        assert law is not None
        assert law.edge_lr(256.0) == pytest.approx(STABILITY / sharpness_at(256.0, share)[1])

    def test_pairs_of_another_base_are_passed_over(self) -> None:
        rows = [
            measured((32.0, 1.0), (64.0, 1.0)),
            measured(sharpness_at(BASE, 0.3), sharpness_at(64.0, 0.3)),
        ]
        law = fit_edge_law(history_of(rows).stats(), STABILITY)
        assert law is not None
        assert law.edge_lr(64.0) == pytest.approx(STABILITY / sharpness_at(64.0, 0.3)[1])

    def test_its_numbers_are_plain(self) -> None:
        law = fit_edge_law(history_of([measured((BASE, 380.0), (64.0, 500.0))]).stats(), STABILITY)
        assert {type(number) for number in vars(law).values()} == {float}

    def test_the_rest_is_the_sign_law(self) -> None:
        stats = history_of([measured((BASE, 380.0), (64.0, 500.0))]).stats()
        law, plain = fit_edge_law(stats, STABILITY), fit_sign_law(stats)
        assert law is not None
        assert plain is not None
        assert law.lr(64.0) == plain.lr(64.0)

    @pytest.mark.parametrize("rows", [[()], [((BASE, -3.0), (64.0, 5.0))], [((BASE, 0.0), (64.0, 5.0))]])
    def test_no_positive_sharpness_is_no_edge(self, rows: list[tuple[tuple[float, float], ...]]) -> None:
        law = fit_edge_law(history_of([measured(*row) for row in rows]).stats(), STABILITY)
        assert type(law) is MeasuredLaw

    def test_records_without_sharpness_are_passed_over(self) -> None:
        pair = (sharpness_at(BASE, 0.25), sharpness_at(64.0, 0.25))
        law = fit_edge_law(history_of([measured(), measured(*pair), measured()]).stats(), STABILITY)
        assert law is not None
        assert law.edge_lr(BASE) == pytest.approx(0.1)

    def test_standard_errors_agree_with_the_scatter(self) -> None:
        """Of the log of the edge: mean jackknife error against the scatter of 200 histories."""
        rng = np.random.default_rng(0)
        answers, errors = [], []
        for _ in range(200):
            rows = []
            for _ in range(24):
                common, own = rng.normal(size=2) * (0.3, 0.1)
                level = 380.0 * (1.0 + common)
                (small, at_small), (large, at_large) = (sharpness_at(b, 0.3, level) for b in (BASE, 64.0))
                rows.append(measured((small, at_small), (large, at_large * (1.0 + own))))
            law = estimate(history_of(rows), lambda stats: fit_edge_law(stats, STABILITY))
            assert law is not None
            answers.append([math.log(law.edge_lr(b)) for b in (8.0, BASE, 256.0)])
            errors.append(
                [law.standard_error(lambda law, b=b: math.log(law.edge_lr(b))) for b in (8.0, BASE, 256.0)]
            )
        truth = [math.log(STABILITY / sharpness_at(b, 0.3)[1]) for b in (8.0, BASE, 256.0)]
        scatter = np.std(answers, axis=0)
        assert np.all(np.abs(np.mean(answers, axis=0) - truth) < 4 * scatter / math.sqrt(200) + 0.02)
        assert np.mean(errors, axis=0) == pytest.approx(scatter, rel=0.2)


class TestObjective:
    @many
    @given(law=edge_laws, lr=st.one_of(st.just(0.0), decades(-8, 2)), base=sizes)
    def test_is_one_at_the_base(self, law: EdgeLaw, lr: float, base: float) -> None:
        assert edge_ratio(law, base, base, lr) == 1.0

    @many
    @given(law=edge_laws, batch_size=sizes, lr=decades(-6, 2))
    def test_is_parallel_limits(self, law: EdgeLaw, batch_size: float, lr: float) -> None:
        def h(size: float) -> float:
            return 1.0 / (1.0 / (lr * progress_ratio(law, size, BASE)) + 1.0 / law.edge_lr(size))

        assert edge_ratio(law, batch_size, BASE, lr) == pytest.approx(h(batch_size) / h(BASE), rel=1e-9)

    @many
    @given(law=edge_laws, batch_size=sizes)
    def test_becomes_progress_as_the_schedule_decays(self, law: EdgeLaw, batch_size: float) -> None:
        progress = progress_ratio(law, batch_size, BASE)
        assert edge_ratio(law, batch_size, BASE, 0.0) == pytest.approx(progress, rel=1e-12)
        gaps = [abs(edge_ratio(law, batch_size, BASE, lr) / progress - 1.0) for lr in (1e-2, 1e-6, 1e-12)]
        assert gaps[0] >= gaps[1] - 1e-12 >= gaps[2] - 2e-12
        assert gaps[2] < 1e-3

    @many
    @given(law=edge_laws, batch_size=sizes)
    def test_becomes_the_ratio_of_edges_far_above_them(self, law: EdgeLaw, batch_size: float) -> None:
        ratio = edge_ratio(law, batch_size, BASE, 1e12)
        assert ratio == pytest.approx(law.edge_lr(batch_size) / law.edge_lr(BASE), rel=1e-3)

    @many
    @given(at_base=decades(-2, 2), lr=decades(-3, 2), batch_size=sizes)
    def test_has_the_form_of_theorem_3_where_noise_is_all(
        self, at_base: float, lr: float, batch_size: float
    ) -> None:
        theorem = Theorem3Law(noise_scale=BASE * at_base / lr, peak_lr=1.0)
        ratio = edge_ratio(noise_alone(at_base), batch_size, BASE, lr)
        assert ratio == pytest.approx(theorem.lr(batch_size) / theorem.lr(BASE), rel=1e-6)

    def test_a_law_without_an_edge_has_no_ratio(self) -> None:
        law = ConstantLaw(base_lr=1.0, base_batch_size=1.0)
        assert math.isnan(edge_ratio(law, 64.0, BASE, 0.1))


def sure(law: MeasuredLaw) -> EstimatedLaw:
    return EstimatedLaw(law, ((law, 0.5), (law, 0.5)), num_measurements=2)


class TestPolicy:
    def policy(self, **options: object) -> Policy:
        return Policy(base_batch_size=BASE, objective="edge", max_drift_per_step=1e9, **options)  # type: ignore[arg-type]

    def test_follows_the_schedule_between_measurements(self) -> None:
        policy, law = self.policy(), noise_alone(0.1)
        policy.update(sure(law), 64.0, 0.1)
        for lr in (0.1, 0.05, 0.05, 0.0, 0.1):
            decision = policy.decide(64.0, lr)
            assert decision.used == pytest.approx(edge_ratio(law, 64.0, BASE, lr))
            assert decision.used == policy.lr_scale(64.0, lr)
            assert decision.reason == "measured"
        assert policy.lr_scale(BASE, 0.1) == 1.0

    def test_other_objectives_do_not_ask_again_as_the_schedule_moves(self) -> None:
        policy = Policy(base_batch_size=BASE, objective="progress")
        policy.update(sure(noise_alone(0.1)), 64.0, 0.1)
        for step in range(50):
            policy.decide(64.0, 0.1 / (1 + step))
        assert len(policy._answers) == 1

    def test_answers_are_forgotten_as_the_schedule_moves(self) -> None:
        policy = self.policy()
        policy.update(sure(noise_alone(0.1)), 64.0, 0.1)
        for step in range(500):
            policy.decide(64.0, 0.1 / (1 + step))
        assert len(policy._answers) < 100

    def test_holds_until_an_edge_is_known_and_says_so(self) -> None:
        policy = self.policy()
        plain = MeasuredLaw(
            alignment_limit=1.0, alignment_scale=48.0, noise_curvature=1.0, signal_curvature=0.0
        )
        policy.update(sure(plain), 64.0, 0.1)
        decision = policy.decide(64.0, 0.1)
        assert decision.used == 2.0
        assert decision.reason == "held: the measurements do not determine an edge of stability"
        policy.update(sure(noise_alone(0.1)), 64.0, 0.1)
        known = policy.decide(64.0, 0.1)
        policy.update(sure(plain), 64.0, 0.1)
        assert policy.decide(64.0, 0.1)[:3] == known[:3]
        assert policy.decide(64.0, 0.1).reason.startswith("held: ")

    def test_an_unsure_edge_stays_near_the_square_root(self) -> None:
        policy = self.policy()
        # Half of the groups see an edge far above the learning rate, half far below.
        law = EstimatedLaw(noise_alone(0.1), ((noise_alone(1e3), 0.5), (noise_alone(1e-5), 0.5)), 2)
        policy.update(law, 64.0, 0.1)
        decision = policy.decide(64.0, 0.1)
        assert decision.predicted == pytest.approx(edge_ratio(law, 64.0, BASE, 0.1))
        assert decision.predicted < decision.used < 2.0

    def test_a_learning_rate_that_is_not_known_is_no_number(self) -> None:
        policy = self.policy()
        policy.update(sure(noise_alone(0.1)), 64.0, 0.1)
        assert policy.decide(64.0).reason == "sqrt: no law at this batch size"
