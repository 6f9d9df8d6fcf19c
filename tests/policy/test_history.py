"""Averages of measurements against sums written out."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_surge.measure.records import CoordinateSums, Measurement
from lightning_surge.policy.history import NoiseHistory, NoiseStats
from tests.drawn import history_of, many, record, through_a_checkpoint


class TestAverages:
    @many
    @given(
        rows=st.lists(st.tuples(st.floats(-5, 5), st.floats(-50, 50)), min_size=1, max_size=12),
        half_life=st.floats(2, 50),
    )
    def test_weights_halve_every_half_life(self, rows: list[tuple[float, float]], half_life: float) -> None:
        stats = history_of([record(*row) for row in rows], half_life).stats()
        ages = np.arange(len(rows))[::-1]
        weights = 0.5 ** (ages / half_life)
        table = np.array(rows)
        assert stats.num_measurements == len(rows)
        assert stats.grad_sq == pytest.approx(np.average(table[:, 0], weights=weights), abs=1e-9)
        assert stats.trace_cov == pytest.approx(np.average(table[:, 1], weights=weights), abs=1e-9)

    def test_old_records_are_dropped(self) -> None:
        history = history_of([record(float(k)) for k in range(20)], half_life=2.0)
        assert len(history) == 12
        assert history.num_measurements == 20
        assert history.latest == record(19.0)
        kept = np.arange(8, 20)
        assert history.stats().grad_sq == pytest.approx(np.average(kept, weights=0.5 ** ((19 - kept) / 2.0)))

    def test_bins_hold_sizes_within_a_factor_of_root_two(self) -> None:
        rows = [record(alignments=((10.0, 1.0), (30.0, 5.0))), record(alignments=((9.0, 3.0), (36.0, 7.0)))]
        stats = history_of(rows, half_life=1.0).stats()
        small, large = stats.alignments
        # The newer one weighs 1, the older one 1/2.
        assert small.value == pytest.approx((0.5 * 1 + 3) / 1.5)
        assert small.batch_size == pytest.approx(10 ** (1 / 3) * 9 ** (2 / 3))
        assert small.weight == pytest.approx(1.5)
        assert large.value == pytest.approx((0.5 * 5 + 7) / 1.5)
        assert large.batch_size == pytest.approx(30 ** (1 / 3) * 36 ** (2 / 3))

    @pytest.mark.parametrize(("weight", "kept"), [(0.3, True), (0.2, False)])
    def test_a_size_that_a_ramp_has_left_behind_is_dropped(self, weight: float, kept: bool) -> None:
        """Below a quarter of the heaviest bin's weight; the newest record weighs 1."""
        rows = [record(alignments=((8.0, 1.0),)), record(alignments=((64.0, 2.0),))]
        stats = history_of(rows, half_life=-1.0 / math.log2(weight)).stats()
        assert [round(entry.batch_size) for entry in stats.alignments] == ([8, 64] if kept else [64])

    def test_the_mean_of_a_bin_has_the_variance_of_a_mean(self) -> None:
        values = [1.0, 4.0, 2.0, 7.0]
        stats = history_of([record(v, curvatures=((8.0, v),)) for v in values], half_life=1e9).stats()
        (entry,) = stats.curvatures
        assert entry.variance == pytest.approx(np.var(values, ddof=1) / 4, rel=1e-6)
        assert stats.grad_sq_error == pytest.approx(math.sqrt(np.var(values, ddof=1) / 4), rel=1e-6)
        (alone,) = history_of([record(curvatures=((8.0, 3.0),))]).stats().curvatures
        assert alone.variance == 0.0

    def test_coordinate_sums_are_averaged_if_every_record_has_them(self) -> None:
        first, second = CoordinateSums(1.0, 2.0, 3.0), CoordinateSums(3.0, 6.0, 9.0)
        history = history_of([record(sums=first), record(sums=second)], half_life=1.0)
        assert history.stats().coordinate_sums == pytest.approx([(0.5 * v + 3 * v) / 1.5 for v in first])
        history.add(record())
        assert history.stats().coordinate_sums is None

    def test_an_empty_history(self) -> None:
        history = NoiseHistory()
        assert history.latest is None
        assert history.replicates() == history_of([record()]).replicates() == []
        stats = history.stats()
        assert stats.num_measurements == 0
        assert math.isnan(stats.grad_sq)
        assert stats.alignments == stats.curvatures == ()


class TestReplicates:
    @many
    @given(count=st.integers(2, 40), half_life=st.floats(8, 100), groups=st.integers(2, 16))
    def test_groups_partition_the_weight(self, count: int, half_life: float, groups: int) -> None:
        values = np.random.default_rng(count).normal(size=count)
        history = history_of([record(float(v)) for v in values], half_life)
        replicates = history.replicates(groups)
        assert len(replicates) == min(groups, count)
        shares = [share for _, share in replicates]
        assert sum(shares) == pytest.approx(1.0)
        # Putting a group back gives the average over all: sum of (1 - share) theta_(g) = (m - 1) theta.
        total = sum((1 - share) * stats.grad_sq for stats, share in replicates)
        assert total == pytest.approx((len(replicates) - 1) * history.stats().grad_sq, abs=1e-9)
        assert sum(count - stats.num_measurements for stats, _ in replicates) == count

    def test_groups_are_consecutive(self) -> None:
        history = history_of([record(float(k)) for k in range(6)], half_life=1e9)
        left_out = [15.0 - 4 * stats.grad_sq for stats, _ in history.replicates(3)]
        assert left_out == pytest.approx([0 + 1, 2 + 3, 4 + 5], abs=1e-6)


@pytest.mark.parametrize(
    ("grad_sq", "scale", "resolved"),
    # Noise hides the signal, or it is no larger than its own standard error of 0.5, or resolved.
    [(0.0, math.inf, 20.0), (-1.0, math.inf, 20.0), (0.4, 25.0, 20.0), (1.0, 10.0, 10.0)],
)
def test_noise_scales(grad_sq: float, scale: float, resolved: float) -> None:
    stats = NoiseStats(3, grad_sq, 10.0, (), (), grad_sq_error=0.5)
    assert (stats.noise_scale, stats.resolved_noise_scale) == (pytest.approx(scale), resolved)


class TestErrors:
    @pytest.mark.parametrize(
        "measurement",
        [
            record(math.nan),
            record(1.0, math.inf),
            record(alignments=((8.0, math.nan),)),
            record(curvatures=((8.0, -math.inf),)),
            record(sums=CoordinateSums(1.0, math.nan, 1.0)),
        ],
    )
    def test_numbers_that_are_not_finite_are_left_out(self, measurement: Measurement) -> None:
        history = history_of([record()])
        with pytest.raises(ValueError, match="finite gradient statistics and sizes"):
            history.add(measurement)
        assert (len(history), history.num_measurements) == (1, 1)
        assert history.latest == record()


class TestState:
    def test_round_trip_through_a_checkpoint(self) -> None:
        rows = [
            record(
                0.1 * k,
                2.0,
                alignments=((8.0, 0.3 * k), (16.0, 1.0)),
                curvatures=((8.0, 1.0), (16.0, 1.0 / (k + 1))),
                sums=CoordinateSums(1.0 * k, 2.0, 3.0) if k % 2 else None,
            )
            for k in range(15)
        ]
        history = history_of(rows, half_life=2.0)
        other = history_of([record(99.0)], half_life=2.0)
        state = through_a_checkpoint(history.state_dict())
        for damage in ({"records": [*state["records"][:3], {}]}, {"num_measurements": 2}):
            with pytest.raises((ValueError, KeyError)):
                other.load_state_dict(state | damage)
            assert (len(other), other.num_measurements, other.latest) == (1, 1, record(99.0))
        other.load_state_dict(state)
        assert other.stats() == history.stats()
        assert other.replicates() == history.replicates()
        assert (len(other), other.num_measurements, other.latest) == (12, 15, rows[-1])
        for each in (history, other):
            each.add(record(5.0))
        assert other.stats() == history.stats()
        assert other.state_dict() == history.state_dict()
