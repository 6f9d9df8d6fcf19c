"""One measurement on a quadratic whose gradients, noise and curvature are known."""

import gc
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import erf
from scipy.stats import multivariate_normal, norm
from torch import Tensor

from lightning_surge.measure.direction import GRADIENT, SIGN, Direction
from lightning_surge.measure.distributed import ALONE
from lightning_surge.measure.gradients import debiased_norms
from lightning_surge.measure.measurement import LawMeasurement, NormMeasurement, Whole, slices_for
from lightning_surge.measure.records import CoordinateSums, Measurement, SizedValue
from lightning_surge.measure.replay import Chunk, Piece
from tests import drawn
from tests.drawn import record, within

HESSIAN = torch.from_numpy(drawn.HESSIAN)
THETA = torch.tensor([0.4, -0.2, 0.1, 0.3], dtype=torch.float64)
MEAN_GRADIENT = HESSIAN @ THETA


class Quadratic:
    """Loss of one example x: `theta' H theta / 2 + x . theta` with a Hessian `H` of its own.

    That is `HESSIAN + spread * diag(x)`, so that the examples behind a curvature show.
    """

    def __init__(self, spread: float = 0.0) -> None:
        self.theta = THETA.clone()
        self.spread = spread
        self.passes = 0.0

    def hessian(self, batch: Tensor) -> Tensor:
        return HESSIAN + self.spread * torch.diag(batch.mean(0))

    def gradient(self, batch: Tensor) -> Tensor:
        return self.hessian(batch) @ self.theta + batch.mean(0)

    def replay(self, piece: Piece, weight: float) -> None:
        self.passes += piece.size
        gradient = weight * self.gradient(piece.batch)
        self.theta.grad = gradient if self.theta.grad is None else self.theta.grad + gradient

    def measurement(
        self, *, direction: Direction = SIGN, delta: float = 0.01, scale: float = 1.0
    ) -> LawMeasurement:
        return LawMeasurement(
            [self.theta], replay=self.replay, delta=delta, scales=[scale], direction=direction
        )

    def slow_curvatures(self, batches: list[Tensor], direction: Direction, scale: float) -> list[SizedValue]:
        """From all examples at once, where they were drawn: the parameters at the start."""

        def curvature(first: Tensor, second: Tensor) -> tuple[float, float]:
            v = scale * direction.of(self.gradient(first))
            return float(len(first)), float(v @ self.hessian(second) @ v)

        pairs = list(zip(batches[::2], batches[1::2], strict=False))
        rows = [curvature(first, second) for first, second in pairs]
        size, value = np.average(rows, axis=0, weights=[len(second) for _, second in pairs])
        wanted = [SizedValue(float(size), float(value))]
        if len(batches) > 2:
            wanted.append(SizedValue(*curvature(torch.cat(batches[::2]), torch.cat(batches[1::2]))))
        return wanted


def noise(sizes: list[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 4, generator=generator, dtype=torch.float64) for size in sizes]


def chunk(batch: Tensor) -> Chunk:
    return Chunk((Piece(batch, 0, float(len(batch))),))


def assert_close(got: Sequence[SizedValue], wanted: Sequence[SizedValue]) -> None:
    assert len(got) == len(wanted)
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.batch_size == pytest.approx(theirs.batch_size, rel=1e-12)
        assert mine.value == pytest.approx(theirs.value, rel=1e-9)


class TestExact:
    @pytest.mark.parametrize(
        "sizes", [[4, 4, 4, 4], [3, 1, 8, 2, 5], [2, 6], [1, 2, 3], [2] * 8, [3, 1, 8, 2, 5, 4, 1]], ids=str
    )
    @pytest.mark.parametrize("direction", [SIGN, GRADIENT])
    @pytest.mark.parametrize("delta", [1e-4, 0.3])
    def test_curvatures_are_quadratic_forms_on_the_examples_of_the_next_chunk(
        self, sizes: list[int], direction: Direction, delta: float
    ) -> None:
        quadratic, batches = Quadratic(spread=2.0), noise(sizes)
        measurement = quadratic.measurement(direction=direction, delta=delta, scale=0.5)
        got = measurement.run([chunk(batch) for batch in batches])
        assert_close(got.curvatures, quadratic.slow_curvatures(batches, direction, 0.5))
        assert got.num_chunks == len(sizes)
        assert got.statistics.batch_size == sum(sizes)
        # All once; the reference again in pairs, and if there are several again as a whole.
        secants = 2 if len(sizes) > 2 else 1
        assert got.passes == quadratic.passes == sum(sizes) + secants * sum(sizes[1::2])
        assert torch.equal(quadratic.theta, THETA)
        assert quadratic.theta.grad is None

    def test_a_chunk_of_several_pieces_is_their_weighted_mean(self) -> None:
        batches = noise([3, 1, 2, 4, 5, 1, 2, 2])
        pieces = [Piece(batch, 0, float(len(batch))) for batch in batches]
        grouped = [Chunk(tuple(pieces[k : k + 2])) for k in range(0, 8, 2)]
        whole = [chunk(torch.cat(batches[k : k + 2])) for k in range(0, 8, 2)]
        first, second = (Quadratic().measurement().run(chunks) for chunks in (grouped, whole))
        assert [*first.statistics[:3]] == pytest.approx([*second.statistics[:3]], rel=1e-12)
        for field in (lambda m: m.statistics.alignments, lambda m: m.curvatures):
            for mine, theirs in zip(field(first), field(second), strict=True):
                assert mine == pytest.approx(theirs, rel=1e-9)


def alive(nbytes: int) -> int:
    """Tensors of that size that Python can reach, views of the same memory counted once."""
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    return len({t.data_ptr() for t in tensors if t.untyped_storage().nbytes() == nbytes and t.numel() > 0})


class TestNorms:
    """From norms alone: what the law's measurement says of the same chunks, and no parameter moves."""

    @pytest.mark.parametrize("sizes", [[4, 4, 4, 4], [3, 1, 8, 2, 5]], ids=str)
    def test_are_those_of_the_law(self, sizes: list[int]) -> None:
        quadratic, chunks = Quadratic(spread=2.0), [chunk(batch) for batch in noise(sizes)]
        law = quadratic.measurement().run(chunks)
        norms = NormMeasurement([quadratic.theta], quadratic.replay, ALONE).run(chunks)
        assert norms.statistics[:3] == pytest.approx(law.statistics[:3], rel=1e-9)
        assert norms.pairs == law.pairs == sum(sizes) ** 2 - sum(size**2 for size in sizes)
        assert (norms.curvatures, norms.passes, norms.num_chunks) == ((), sum(sizes), len(sizes))

    @pytest.mark.parametrize("ratio", [1.0, 4.0])
    def test_of_a_slice_against_the_rest_of_a_batch_take_no_pass_for_the_rest(self, ratio: float) -> None:
        quadratic, batches = Quadratic(spread=2.0), noise([3, 1, 8])
        whole = Whole([quadratic.gradient(torch.cat(batches)) / ratio], 12.0, ratio)
        chunks = [chunk(batch) for batch in batches]
        wanted = NormMeasurement([quadratic.theta], quadratic.replay, ALONE).run(chunks)
        got = NormMeasurement([quadratic.theta], quadratic.replay, ALONE).run(chunks[:2], whole)
        assert got.statistics[:3] == pytest.approx(wanted.statistics[:3], rel=1e-9)
        assert (got.passes, got.num_chunks, got.pairs) == (4.0, 3, wanted.pairs)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_of_16_bit_parameters(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        theta = torch.zeros(4096, dtype=dtype)
        rows = [0.1 + torch.randn(4096, generator=generator) for _ in range(64)]

        def replay(piece: Piece, weight: float) -> None:
            theta.grad = (weight * piece.batch).to(dtype)

        got = NormMeasurement([theta], replay, ALONE).run([Chunk((Piece(row, 0, 1.0),)) for row in rows])
        exact = debiased_norms([1.0] * 64, [float(row.square().sum()) for row in rows],
                               float(torch.stack(rows).mean(0).square().sum()))  # fmt: skip
        assert got.statistics[:3] == pytest.approx(exact[:3], rel=0.01)
        assert not theta.any()


@pytest.mark.slow
class TestMemory:
    @pytest.mark.parametrize("count", [2, 4, 5, 8])
    @pytest.mark.parametrize("curvature", [True, False])
    def test_is_four_buffers_for_any_number_of_chunks(self, count: int, curvature: bool) -> None:
        """The gradient, and three more beside the parameters at every pass; one more for norms alone."""
        parameters = [torch.full((1009,), share, dtype=torch.float64) for share in (0.5, -0.5)]
        nbytes = parameters[0].untyped_storage().nbytes()
        seen = []

        def replay(piece: Piece, weight: float) -> None:
            held = parameters[0].grad is not None
            seen.append((alive(nbytes) - before) / len(parameters) - held)
            for parameter in parameters:
                if held:
                    parameter.grad.add_(parameter * weight)  # type: ignore[union-attr]
                else:
                    parameter.grad = parameter * weight

        before = alive(nbytes)
        measurement: Any = NormMeasurement(parameters, replay, ALONE)
        if curvature:
            measurement = LawMeasurement(parameters, replay=replay, delta=0.1, scales=[1.0, 1.0])
        got = measurement.run([Chunk((Piece(None, 0, 1.0),)) for _ in range(count)])
        assert [value for _, value in got.curvatures] == pytest.approx([2018.0] * len(got.curvatures))
        assert len(seen) == got.passes
        assert max(seen) == (3 if curvature else 1)


class TestRandomStreams:
    def test_a_mask_repeats_at_the_displaced_point_and_later_chunks_draw_afresh(self) -> None:
        """Loss `sum_i m_i theta_i^2 / 2` with a random mask m per pass, as dropout makes."""
        theta = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
        masks: list[Tensor] = []

        def replay(piece: Piece, weight: float) -> None:
            masks.append(torch.rand(3, dtype=torch.float64))
            gradient = weight * masks[-1] * theta
            theta.grad = gradient if theta.grad is None else theta.grad + gradient

        torch.manual_seed(0)
        measurement = LawMeasurement([theta], replay=replay, delta=1e-3, scales=[1.0])
        got = measurement.run([Chunk((Piece(None, 0, 1.0),)) for _ in range(7)])
        # Passes: three times a direction, its partner and the partner again; a direction; all partners again.
        assert len(masks) == 13
        partners = [1, 4, 7]
        for first, again in zip(partners * 2, [2, 5, 8, 10, 11, 12], strict=True):
            assert torch.equal(masks[first], masks[again])
        own = [masks[k] for k in (0, 1, 3, 4, 6, 7, 9)]
        assert all(not torch.equal(own[j], own[k]) for j in range(7) for k in range(j))
        # sign(theta) is every direction, so D is the sum of the mean mask.
        wanted = float(torch.stack([masks[k] for k in partners]).mean(0).sum())
        assert [value for _, value in got.curvatures] == pytest.approx([wanted, wanted], rel=1e-9)
        # The streams stand where the chunks left them: nothing was drawn for the replays, or is drawn again.
        after = torch.rand(3, dtype=torch.float64)
        torch.manual_seed(0)
        for mask in (*own, after):
            assert torch.equal(torch.rand(3, dtype=torch.float64), mask)


@pytest.mark.slow
class TestStatistical:
    MEAN = MEAN_GRADIENT.numpy()
    # One factor moves all coordinates together, along the direction of largest curvature.
    COVARIANCE = np.diag([1.0, 2.0, 1.5, 0.5]) + 9.0 * np.outer([1, -1, 1, 1], [1, -1, 1, 1])
    ROOT = np.linalg.cholesky(COVARIANCE)

    def measurements(self, count: int, direction: Direction, sizes: list[int]) -> list[Measurement]:
        rng = np.random.default_rng(11)
        quadratic, result = Quadratic(spread=0.5), []
        # An example's own Hessian, 0.5 diag(x) above the mean one, adds to its gradient.
        share = 1.0 + 0.5 * THETA
        for _ in range(count):
            batches = [torch.from_numpy(rng.normal(size=(size, 4)) @ self.ROOT.T) / share for size in sizes]
            measurement = quadratic.measurement(direction=direction)
            result.append(measurement.run([chunk(batch) for batch in batches]))
        return result

    def expected_sign_products(self, batch_size: float) -> np.ndarray:
        """`E[sign(g_i) sign(g_j)]` of correlated Gaussians, from the orthant probabilities."""
        deviation = np.sqrt(np.diag(self.COVARIANCE))
        shift = self.MEAN * math.sqrt(batch_size) / deviation
        correlation = self.COVARIANCE / np.outer(deviation, deviation)
        products = np.ones((4, 4))
        for i in range(4):
            for j in range(i):
                matrix = [[1.0, correlation[i, j]], [correlation[i, j], 1.0]]
                both = multivariate_normal.cdf([shift[i], shift[j]], cov=matrix)
                value = 4 * both - 2 * norm.cdf(shift[i]) - 2 * norm.cdf(shift[j]) + 1
                products[i, j] = products[j, i] = value
        return products

    def test_sign_directions_under_correlated_noise(self) -> None:
        measurements = self.measurements(600, SIGN, [6, 6, 6, 6])
        within([m.statistics.grad_sq for m in measurements], float(self.MEAN @ self.MEAN))
        within([m.statistics.trace_cov for m in measurements], float(np.trace(self.COVARIANCE)))
        deviation = np.sqrt(np.diag(self.COVARIANCE))
        for b in (6.0, 12.0):
            truth = float(np.sum(erf(math.sqrt(b / 2) * self.MEAN / deviation) * self.MEAN))
            within(
                [np.mean([v for size, v in m.statistics.alignments if size == b]) for m in measurements],
                truth,
            )
            curvature = float(np.sum(HESSIAN.numpy() * self.expected_sign_products(b)))
            within([v for m in measurements for size, v in m.curvatures if size == b], curvature)
            # Independent coordinates, as Theorem 2 assumes, would give another number.
            signs = erf(math.sqrt(b / 2) * self.MEAN / deviation)
            independent = float(
                np.sum((1 - signs**2) * np.diag(HESSIAN.numpy())) + signs @ HESSIAN.numpy() @ signs
            )
            assert independent < 0.9 * curvature


class TestProperties:
    @pytest.mark.parametrize(("direction", "alignment", "curvature"), [(SIGN, 4, 8), (GRADIENT, 16, 128)])
    def test_unscaled_undoes_a_scaled_loss(
        self, direction: Direction, alignment: float, curvature: float
    ) -> None:
        """H, mu and sigma have the loss's unit, mu / sigma has none; along gradients steps have it too."""
        sums = CoordinateSums(4.0, 8.0, 12.0)
        scaled = record(16.0, 32.0, [(2.0, alignment)], [(2.0, curvature)], sums)
        plain = record(1.0, 2.0, [(2.0, 1.0)], [(2.0, 2.0)], CoordinateSums(1.0, 2.0, 3.0))
        assert scaled.unscaled(4.0, direction=direction) == plain

    @given(batch_size=st.floats(1, 1e6), base=st.floats(1, 1e6))
    def test_slices_are_a_power_of_two_near_the_ratio(self, batch_size: float, base: float) -> None:
        slices = slices_for(batch_size, base)
        assert slices in (4, 8, 16)
        if 4 < slices < 16:
            assert 2**-0.5 <= slices * base / batch_size <= 2**0.5
        assert slices == 16 or slices * base >= batch_size / 2**0.5 * (1 - 1e-12)
