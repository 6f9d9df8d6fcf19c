"""Coordinate sums against the theorems built from the true moments."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_surge.measure.coordinates import CoordinateMeasurement
from lightning_surge.measure.records import CoordinateSums, Measurement
from lightning_surge.measure.replay import Chunk, Piece
from tests.drawn import HESSIAN, within
from tests.laws.closed_forms import Theorem2

MEAN = np.array([0.6, -0.4, 0.5, 0.2])
DEVIATION = np.array([2.0, 1.5, 2.5, 1.0])
CHUNKS, EXAMPLES = 16, 64.0


class Quadratic:
    """Loss `theta' H theta / 2 + x . theta` at theta = 0, so that an example's gradient is x."""

    def __init__(self, hessian: np.ndarray = HESSIAN) -> None:
        self.hessian = torch.from_numpy(hessian)
        self.theta = torch.zeros(4, dtype=torch.float64)
        self.passes = 0.0

    def replay(self, piece: Piece, weight: float) -> None:
        self.passes += piece.size
        gradient = weight * (self.hessian @ self.theta + piece.batch.mean(0))
        self.theta.grad = gradient if self.theta.grad is None else self.theta.grad + gradient

    def measure(
        self, batches: list[Tensor], law: str, *, seed: int = 0, sizes: tuple = (), scale: float = 1.0
    ) -> Measurement:
        return CoordinateMeasurement(
            [self.theta], replay=self.replay, delta=0.01, scales=[scale], sizes=sizes, law=law, seed=seed
        ).run([Chunk((Piece(batch, 0, float(len(batch))),)) for batch in batches])


def draw(rng: np.random.Generator, chunks: int = CHUNKS) -> list[Tensor]:
    size = int(EXAMPLES) // chunks
    return [torch.from_numpy(MEAN + DEVIATION * rng.normal(size=(size, 4))) for _ in range(chunks)]


@pytest.fixture(scope="module")
def theorem3() -> list[Measurement]:
    rng, quadratic = np.random.default_rng(1), Quadratic()
    return [quadratic.measure(draw(rng, 8), "theorem3", seed=seed) for seed in range(900)]


@pytest.fixture(scope="module")
def theorem2() -> list[Measurement]:
    rng, quadratic = np.random.default_rng(2), Quadratic()
    sizes = (4.0, EXAMPLES / 4)
    return [quadratic.measure(draw(rng), "theorem2", seed=seed, sizes=sizes) for seed in range(600)]


@pytest.mark.slow
class TestTheorem3:
    """Every sum is a plain mean over coordinates of unbiased terms, so 4 standard errors and no more."""

    def test_sums(self, theorem3: list[Measurement]) -> None:
        u = MEAN / DEVIATION
        within([m.statistics.grad_sq for m in theorem3], float(MEAN @ MEAN))
        within([m.statistics.trace_cov for m in theorem3], float(DEVIATION @ DEVIATION))
        coherent = u @ (HESSIAN - np.diag(np.diag(HESSIAN))) @ u
        truths = CoordinateSums(np.trace(HESSIAN), coherent, u @ MEAN)
        for name, truth in truths._asdict().items():
            within([getattr(m.coordinate_sums, name) for m in theorem3], float(truth))

    def test_noise_does_not_pass_for_signal(self) -> None:
        """Without a mean the slope is zero, though the deviation comes from the same few chunks."""
        rng, quadratic, slopes = np.random.default_rng(4), Quadratic(), []
        for _ in range(1000):
            batches = [torch.from_numpy(DEVIATION * rng.normal(size=(2, 4))) for _ in range(8)]
            slopes.append(quadratic.measure(batches, "theorem3").coordinate_sums.alignment_slope)
        within(slopes, 0.0)


@pytest.mark.slow
class TestTheorem2:
    LAW = Theorem2(MEAN, DEVIATION, HESSIAN)
    # erf of a mean in units of a deviation that comes from K chunks: the deviation's relative variance
    # 1 / (2 (K - 1)), times |x^2 erf''(x)| / 2 <= 0.6 of erf's scale, lowers E by less than 2 % at K = 16.
    SHARE = 0.6 / (2 * (CHUNKS - 1))

    @pytest.mark.parametrize("index", [0, 1])
    def test_alignments_and_curvatures(self, theorem2: list[Measurement], index: int) -> None:
        size = theorem2[0].curvatures[index].batch_size
        assert theorem2[0].statistics.alignments[index].batch_size == size
        truth = self.LAW.alignment(size)
        within([m.statistics.alignments[index].value for m in theorem2], truth, self.SHARE * truth)
        truth = self.LAW.curvature(size)
        coherent = truth - self.LAW.curvature(1e-9)
        within([m.curvatures[index].value for m in theorem2], truth, 2 * self.SHARE * abs(coherent))

    def test_a_direction_as_large_as_a_half_cannot_be_imitated(self) -> None:
        """Half of the examples stand behind each mean: their noise is that of a batch of that size."""
        with pytest.raises(ValueError, match=rf"below {EXAMPLES / 2:g}, half of the examples, got sizes="):
            Quadratic().measure(draw(np.random.default_rng(5)), "theorem2", sizes=(EXAMPLES / 2,))


class TestExact:
    @pytest.mark.parametrize("law", ["theorem2", "theorem3"])
    def test_scales_multiply_the_direction(self, law: str) -> None:
        batches = draw(np.random.default_rng(0))
        plain, scaled = (
            Quadratic().measure(batches, law, sizes=(4.0, 8.0), scale=scale) for scale in (1.0, 0.5)
        )
        for mine, theirs in zip(scaled.curvatures, plain.curvatures, strict=True):
            assert mine.value == pytest.approx(0.25 * theirs.value, rel=1e-9)
        for mine, theirs in zip(scaled.statistics.alignments, plain.statistics.alignments, strict=True):
            assert mine.value == pytest.approx(0.5 * theirs.value, rel=1e-9)
        if law == "theorem3":
            for name, factor in (
                ("trace_hessian", 0.25),
                ("coherent_curvature", 0.25),
                ("alignment_slope", 0.5),
            ):
                got, wanted = (getattr(m.coordinate_sums, name) for m in (scaled, plain))
                assert got == pytest.approx(factor * wanted, rel=1e-9), name

    def test_a_diagonal_hessian_needs_no_averaging_over_signs(self) -> None:
        batches = draw(np.random.default_rng(0))
        measurements = [
            Quadratic(hessian=np.diag([1.0, 2.0, 3.0, 4.0])).measure(batches, "theorem3", seed=seed)
            for seed in (0, 1)
        ]
        for measurement in measurements:
            assert measurement.coordinate_sums.trace_hessian == pytest.approx(10.0)
            assert measurement.coordinate_sums.coherent_curvature == pytest.approx(0.0, abs=1e-9)

    def test_random_numbers_repeat_at_the_displaced_point(self) -> None:
        """Loss `sum_i m_i theta_i^2 / 2` with a mask per pass: fresh masks would swamp the curvature."""
        theta = torch.ones(50, dtype=torch.float64)

        def replay(piece: Piece, weight: float) -> None:
            gradient = weight * (torch.rand(50, dtype=torch.float64) * theta + piece.batch)
            theta.grad = gradient if theta.grad is None else theta.grad + gradient

        torch.manual_seed(0)
        chunks = [Chunk((Piece(torch.randn(50, dtype=torch.float64), 0, 1.0),)) for _ in range(8)]
        got = CoordinateMeasurement(
            [theta], replay=replay, delta=1e-3, scales=[1.0], sizes=(), law="theorem3", seed=0
        ).run(chunks)
        # Each diagonal entry is a mean of four uniform numbers.
        assert got.coordinate_sums.trace_hessian == pytest.approx(25.0, abs=4 * math.sqrt(50 / 12 / 4))

    @pytest.mark.parametrize("law", ["theorem2", "theorem3"])
    def test_cost_is_what_is_passed(self, law: str) -> None:
        quadratic = Quadratic()
        got = quadratic.measure(draw(np.random.default_rng(0)), law, sizes=(4.0, 8.0))
        assert got.passes == quadratic.passes == CoordinateMeasurement.cost(EXAMPLES, law)
        assert got.num_chunks == CHUNKS
        assert got.statistics.batch_size == EXAMPLES
        assert quadratic.theta.grad is None
        assert not quadratic.theta.any()

    def test_half_precision_and_missing_gradients(self) -> None:
        theta, frozen = torch.zeros(3, dtype=torch.bfloat16), torch.zeros(2)

        def replay(piece: Piece, weight: float) -> None:
            gradient = (weight * (theta.float() + piece.batch)).bfloat16()
            theta.grad = gradient if theta.grad is None else theta.grad + gradient

        torch.manual_seed(0)
        chunks = [Chunk((Piece(torch.randint(-2, 4, (3,)).float(), 0, 1.0),)) for _ in range(8)]
        got = CoordinateMeasurement(
            [theta, frozen], replay=replay, delta=0.5, scales=[1.0, 1.0], sizes=(2.0,), law="theorem3", seed=0
        ).run(chunks)
        table = np.stack([chunk.pieces[0].batch.numpy() for chunk in chunks])
        assert got.statistics.trace_cov == pytest.approx(np.trace(np.cov(table.T)), rel=1e-5)
        assert got.statistics.grad_sq == pytest.approx(
            np.sum(table.mean(0) ** 2) - np.trace(np.cov(table.T)) / 8, rel=1e-5
        )

    def test_unequal_chunks(self) -> None:
        """Sample moments of chunks of 1 to 4 examples, weighted by their sizes."""
        rng, sizes = np.random.default_rng(3), np.array([1, 3, 2, 4, 2, 1, 4, 3])
        batches = [torch.from_numpy(rng.normal(size=(size, 4)) + MEAN) for size in sizes]
        got = Quadratic().measure(batches, "theorem3").statistics
        means = np.stack([batch.mean(0).numpy() for batch in batches])
        mean = sizes @ means / 20
        trace = float(np.sum(sizes[:, None] * (means - mean) ** 2)) / 7
        assert got.batch_size == 20
        assert got.trace_cov == pytest.approx(trace, rel=1e-9)
        assert got.grad_sq == pytest.approx(float(mean @ mean) - trace / 20, rel=1e-9)

    def test_eight_chunks_are_the_least(self) -> None:
        with pytest.raises(ValueError, match=r"at least 8 chunks, got 7: .* probe_examples="):
            Quadratic().measure(draw(np.random.default_rng(0))[:7], "theorem3")
