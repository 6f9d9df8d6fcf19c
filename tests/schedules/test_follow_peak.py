import math
import pickle
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_surge.laws.base import ConstantLaw, Law, MeasuredLaw, SGDLaw
from lightning_surge.measure.records import ChunkStatistics
from lightning_surge.policy.estimates import EstimatedLaw, estimate
from lightning_surge.policy.history import Measurement, NoiseHistory, NoiseStats
from lightning_surge.schedules.follow_peak import FollowPeak

FREE = {"minimum": 1, "growth_only": False}

# Student's factor for two measurements: the quantile of the Cauchy distribution, 1.84.
STUDENT = math.tan(math.pi / 2.0 * math.erf(1.0 / math.sqrt(2.0)))


def critical(target: float) -> Law:
    """A law with a critical batch size of so many examples."""
    return SGDLaw(max_lr=1.0, noise_scale=target)


def peaked(peak: float) -> MeasuredLaw:
    """A law whose learning rate is largest at so many examples; half the gain is at 2/3 of them."""
    surplus = 1.0 if math.isfinite(peak) else 0.0
    scale = peak if surplus else 100.0
    return MeasuredLaw(
        alignment_limit=1.0, alignment_scale=scale, noise_curvature=1.0, signal_curvature=1.0 + surplus
    )


def estimated(law: Law, *without: Law | None) -> EstimatedLaw:
    """A law, and what it would be without each of several measurements of equal weight."""
    return EstimatedLaw(law, tuple((other, 1.0 / len(without)) for other in without), len(without))


def sure(law: Law) -> EstimatedLaw:
    return estimated(law, law, law)


def from_reciprocals(reciprocals: Sequence[float]) -> EstimatedLaw:
    """The law of measurements of one over the critical batch size, which are averaged."""
    total, count = sum(reciprocals), len(reciprocals)

    def law(mean: float) -> Law:
        return critical(1.0 / max(mean, 1e-9))

    return estimated(law(total / count), *(law((total - one) / (count - 1)) for one in reciprocals))


def sizes_until_rest(rule: FollowPeak, law: EstimatedLaw, size: int) -> list[int]:
    sizes = [size]
    while (size := rule.next_size(sizes[-1], law)) != sizes[-1]:
        sizes.append(size)
        assert len(sizes) < 200, "goes to and fro"
    return sizes


class TestDecisions:
    @pytest.mark.parametrize(
        ("target", "sizes"),
        [(31.9, [16]), (32.0, [16, 32]), (100.0, [16, 32, 64]), (1e9, [16, 32, 64, 128, 256]), (1.0, [16])],
    )
    def test_growth_by_hand(self, target: float, sizes: list[int]) -> None:
        assert sizes_until_rest(FollowPeak(16, 256), sure(critical(target)), 16) == sizes

    @pytest.mark.parametrize(
        ("target", "sizes"),
        [(64.1, [128]), (64.0, [128, 64]), (7.0, [128, 64, 32, 16, 8]), (1e9, [128, 256])],
    )
    def test_shrinking_by_hand(self, target: float, sizes: list[int]) -> None:
        rule = FollowPeak(16, 256, minimum=8, growth_only=False)
        assert sizes_until_rest(rule, sure(critical(target)), 128) == sizes

    @pytest.mark.parametrize(("hysteresis", "size"), [(1.5, 16), (2.0, 16), (4.1, 64)])
    def test_hysteresis_is_how_far_too_large_a_size_may_be(self, hysteresis: float, size: int) -> None:
        rule = FollowPeak(1, 256, growth_only=False, hysteresis=hysteresis)
        assert sizes_until_rest(rule, sure(critical(16.0)), 64)[-1] == size

    def test_target_is_the_peak_or_the_critical_batch_size(self) -> None:
        law = sure(peaked(96.0))
        assert math.isclose(law.critical_batch_size, 32.0)
        assert FollowPeak(16, 256, target="critical").next_size(16, sure(peaked(97.0))) == 32
        assert sizes_until_rest(FollowPeak(16, 256, target="critical"), sure(peaked(97.0)), 16)[-1] == 32
        assert sizes_until_rest(FollowPeak(16, 256, target="peak"), law, 16)[-1] == 64

    def test_no_peak_is_a_reciprocal_of_zero(self) -> None:
        rule, law = FollowPeak(16, 256, target="peak"), peaked(math.inf)
        assert rule.reciprocal(law) == 0.0
        assert sizes_until_rest(rule, sure(law), 16) == [16, 32, 64, 128, 256]

    def test_one_measurement_with_a_peak_and_one_without_are_a_finite_doubt(self) -> None:
        # Reciprocals 1/64 and 1/192 at r = 2 and 4/3, and none at r = 1: their scatter is all that counts.
        rule, law = FollowPeak(16, 256, target="peak"), peaked(128.0)
        half = estimated(law, peaked(64.0), peaked(math.inf))
        assert rule.reciprocal(half) == 1 / 128
        assert half.standard_error(rule.reciprocal) == pytest.approx(STUDENT / 128)
        # 1/128 + 1/128 = 1/64, and 2.84 / 128 = 1/45.
        assert sizes_until_rest(replace(rule, confidence=1 / STUDENT), half, 16) == [16, 32, 64]
        assert sizes_until_rest(rule, half, 16) == [16, 32]

    @given(
        st.integers(1, 1000),
        st.floats(0.01, 1e5),
        st.floats(1.1, 5.0),
        st.floats(1.01, 5.0),
        st.floats(0.1, 5.0),
    )
    def test_comes_to_rest_where_it_should(
        self, size: int, target: float, max_change: float, hysteresis: float, factor: float
    ) -> None:
        rule = FollowPeak(
            16,
            1000,
            factor=factor,
            minimum=11,
            max_change=max_change,
            hysteresis=hysteresis,
            growth_only=False,
        )
        size = max(size, 11)
        *path, last = sizes_until_rest(rule, sure(critical(target)), size)
        assert [*path, last] in (sorted([*path, last]), sorted([*path, last], reverse=True))
        assert 11 <= last <= 1000
        wanted = factor * target
        assert last == 1000 or math.floor(last * max_change) * (1 + 1e-9) > wanted
        assert last == 11 or last < hysteresis * wanted * (1 + 1e-9)


class TestDoubt:
    def test_nothing_is_decided_without_two_measurements(self) -> None:
        law = critical(1e9)
        for unsure in (estimated(law), estimated(law, law), estimated(law, law, None)):
            assert FollowPeak(16, 256).next_size(16, unsure) == 16
            assert FollowPeak(16, 256, **FREE).next_size(16, unsure) == 16

    def test_without_confidence_one_measurement_is_enough(self) -> None:
        assert FollowPeak(16, 256, confidence=0.0).next_size(16, estimated(critical(1e9))) == 32

    @pytest.mark.parametrize(
        ("reciprocal", "error", "size"),
        # 1/64 + error <= 1/32 to grow, (1/4 - error) * 16 >= 2 to shrink.
        [
            (1 / 64, 0.0156, 32),
            (1 / 64, 0.0157, 16),
            (1 / 4, 0.1249, 8),
            (1 / 4, 0.1251, 16),
            (1 / 16, 0.0, 16),
        ],
    )
    def test_by_hand(self, reciprocal: float, error: float, size: int) -> None:
        # For two measurements of equal weight: Student's factor times the distance from their mean.
        away = error / STUDENT
        around = (critical(1.0 / max(reciprocal + sign * away, 1e-9)) for sign in (-1, 1))
        law = estimated(critical(1.0 / reciprocal), *around)
        rule = FollowPeak(16, 256, **FREE)
        if error < reciprocal:
            assert law.standard_error(rule.reciprocal) == pytest.approx(error)
        assert rule.next_size(16, law) == size

    @pytest.mark.parametrize("law", [ConstantLaw(base_lr=1.0, base_batch_size=16), critical(0.0)])
    def test_a_target_of_zero_is_no_reason_to_change(self, law: Law) -> None:
        # Nothing but rounding, or a failed fit, puts it there.
        rule = FollowPeak(16, 256, **FREE)
        assert rule.reciprocal(law) == math.inf
        assert rule.next_size(16, sure(law)) == 16
        assert replace(rule, confidence=0.0).next_size(16, sure(law)) == 16

    def test_reciprocals_overflow_to_no_decision(self) -> None:
        rule = FollowPeak(16, 256, factor=1e-200)
        assert rule.reciprocal(critical(1e-200)) == math.inf
        assert rule.next_size(16, sure(critical(1e-200))) == 16

    @given(st.floats(1.0, 1e4), st.floats(1.0, 1e4), st.floats(0.0, 3.0), st.integers(1, 500))
    def test_more_confidence_never_changes_more(
        self, one: float, other: float, confidence: float, size: int
    ) -> None:
        law = from_reciprocals([1 / one, 1 / other])
        rule = FollowPeak(16, 1000, confidence=confidence, **FREE)
        cautious = replace(rule, confidence=confidence + 0.5).next_size(size, law)
        assert cautious in (size, rule.next_size(size, law))


NOISE = 0.5  # of one measurement of the reciprocal, as a share of it


def measured_reciprocals(rng: np.random.Generator, target: float, count: int = 16) -> list[float]:
    return list((1.0 + NOISE * rng.standard_normal(count)) / target)


class TestNoisyMeasurements:
    @pytest.mark.parametrize(("confidence", "chance"), [(1.0, 1 / 6), (2.0, 1 / 31), (3.0, 1 / 220)])
    def test_a_change_that_nothing_warrants_is_as_rare_as_confidence_says(
        self, confidence: float, chance: float
    ) -> None:
        # The true target is the next size itself, within rounding: the odds are those of Student's t with
        # 15 degrees of freedom, a little larger than those of a normal error.
        rng, rule = np.random.default_rng(1), FollowPeak(16, 1024, confidence=confidence)
        trials = 1500
        grown = sum(
            rule.next_size(64, from_reciprocals(measured_reciprocals(rng, 127.999))) == 128
            for _ in range(trials)
        )
        assert abs(grown - trials * chance) <= 4 * math.sqrt(trials * chance)

    @pytest.mark.parametrize("seed", range(5))
    def test_shrinking_does_not_undo_growth_under_noise(self, seed: int) -> None:
        rng, rule = np.random.default_rng(seed), FollowPeak(16, 1024, minimum=4, growth_only=False)
        size, changes = 16, 0
        for _ in range(200):
            new = rule.next_size(size, from_reciprocals(measured_reciprocals(rng, 100.0)))
            size, changes = new, changes + (new != size)
        assert size == 64
        assert changes == 2

    @pytest.mark.parametrize("seed", range(3))
    def test_with_the_history_and_the_jackknife_that_training_uses(self, seed: int) -> None:
        def noise_law(stats: NoiseStats) -> Law:
            return critical(stats.resolved_noise_scale)

        rng, rule, history, size = np.random.default_rng(seed), FollowPeak(8, 4096), NoiseHistory(), 8
        for _ in range(40):
            # tr Sigma = 100 and |G|^2 = 1 with an error half as large.
            grad_sq = 1.0 + 0.5 * float(rng.standard_normal())
            history.add(Measurement(ChunkStatistics(8.0, grad_sq, 100.0, ()), (), passes=16.0))
            law = estimate(history, noise_law)
            if len(history) < 2:
                assert rule.next_size(size, law) == size
            size = rule.next_size(size, law)
        assert size in (64, 128)


class TestRule:
    def test_says_what_its_sizes_are(self) -> None:
        rule = FollowPeak(16, 256)
        assert (rule.first_size, rule.smallest) == (16, 16)
        assert rule.named_sizes == {"start": 16, "minimum": 16, "maximum": 256}
        assert FollowPeak(16, 256, minimum=4).named_sizes == {"start": 16, "minimum": 4, "maximum": 256}

    def test_is_a_value(self) -> None:
        rule = FollowPeak(16, 256, target="peak")
        other = pickle.loads(pickle.dumps(rule))
        assert (other, hash(other)) == (rule, hash(rule))
        assert rule != FollowPeak(16, 256)
        assert eval(repr(rule)) == rule
        with pytest.raises(FrozenInstanceError):
            rule.start = 32  # type: ignore[misc]

    @pytest.mark.parametrize(("minimum", "start", "maximum"), [(None, 32, 16), (32, 16, 64), (1, 128, 64)])
    def test_refuses_a_start_outside_its_bounds(self, minimum: int | None, start: int, maximum: int) -> None:
        message = (
            rf"minimum <= start <= maximum, got minimum={minimum or start}, start={start}, maximum={maximum}"
        )
        with pytest.raises(ValueError, match=message):
            FollowPeak(start, maximum, minimum=minimum)

    def test_refuses_a_change_too_small_to_add_an_example(self) -> None:
        with pytest.raises(ValueError, match=r"smallest size, 4, got max_change=1\.2: it could never grow"):
            FollowPeak(16, 256, minimum=4, max_change=1.2)
        assert FollowPeak(16, 256, max_change=1.0625).next_size(16, sure(critical(1e9))) == 17
        assert FollowPeak(16, 16, max_change=1.01).first_size == 16
