"""Streamed chunk statistics against slow references, and against known distributions."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from scipy.special import erf
from torch import Tensor, nn

from lightning_surge.measure import gradients
from lightning_surge.measure.direction import GRADIENT, SIGN, Direction
from lightning_surge.measure.gradients import ChunkStream
from lightning_surge.measure.records import ChunkStatistics, SizedValue
from tests.drawn import within

SHAPES = [(3, 2), (4,), ()]
SCALES = [1.0, 0.5, 0.25]
EQUAL, UNEQUAL = [4, 4, 4, 4], [3, 1, 8, 2, 5]


def chunk_gradients(num_chunks: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    draw = [
        [torch.randn(shape, generator=generator, dtype=torch.float64) + 0.3 for shape in SHAPES]
        for _ in range(num_chunks)
    ]
    return [[tensor.to(dtype) for tensor in chunk] for chunk in draw]


def streamed(
    chunks: list[list[Tensor | None]],
    sizes: list[float],
    direction: Direction = SIGN,
    scales: list[float] = SCALES,
    parameters: list[Tensor] | None = None,
) -> ChunkStatistics:
    if parameters is None:
        parameters = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
    stream = ChunkStream(parameters, scales=scales, direction=direction)
    for gradient, size in zip(chunks, sizes, strict=True):
        stream.add(gradient, size)
    return stream.statistics()


def slow_statistics(
    chunks: list[list[Tensor]], sizes: list[float], direction: Direction = SIGN
) -> ChunkStatistics:
    """All chunks held at once; the covariance from differences of pairs of chunks."""
    flat = [torch.cat([g.double().reshape(-1) for g in chunk]) for chunk in chunks]
    weights = torch.cat(
        [torch.full((math.prod(s),), c, dtype=torch.float64) for s, c in zip(SHAPES, SCALES, strict=True)]
    )
    n, count = sum(sizes), len(sizes)
    squares = [
        sizes[k] * sizes[j] * (flat[k] - flat[j]).square().sum() for k in range(count) for j in range(k)
    ]
    trace_cov = float(sum(squares)) / (n * (count - 1))

    def size(indices: Sequence[int]) -> float:
        return float(sum(sizes[k] for k in indices))

    def mean(indices: Sequence[int]) -> Tensor:
        return sum(sizes[k] * flat[k] for k in indices) / size(indices)

    def aligned(indices: Sequence[int], target: Sequence[int]) -> float:
        return float((weights * direction.of(mean(indices))) @ mean(target))

    prefix, reference = range(0, count, 2), range(1, count, 2)
    alignments = [(size(prefix), aligned(prefix, reference)), (size(reference), aligned(reference, prefix))]
    if count > 2:
        rows = np.array([(sizes[k], aligned([k], [k + 1])) for k in range(0, count - 1, 2)])
        averaged = np.average(rows, axis=0, weights=[sizes[k] for k in reference])
        alignments.append((float(averaged[0]), float(averaged[1])))
    mean_sq = float(mean(range(count)).square().sum())
    return ChunkStatistics(
        n, mean_sq - trace_cov / n, trace_cov, tuple(SizedValue(*pair) for pair in alignments)
    )


def assert_equal_statistics(got: ChunkStatistics, wanted: ChunkStatistics, rel: float = 1e-12) -> None:
    assert got.batch_size == wanted.batch_size
    assert got.grad_sq == pytest.approx(wanted.grad_sq, rel=rel, abs=rel)
    assert got.trace_cov == pytest.approx(wanted.trace_cov, rel=rel)
    assert len(got.alignments) == len(wanted.alignments)
    for mine, theirs in zip(sorted(got.alignments), sorted(wanted.alignments), strict=True):
        assert mine.batch_size == pytest.approx(theirs.batch_size, rel=1e-12)
        assert mine.value == pytest.approx(theirs.value, rel=rel, abs=rel)


class TestExact:
    @pytest.mark.parametrize("sizes", [EQUAL, UNEQUAL, [2, 6], [1, 2, 3]], ids=str)
    @pytest.mark.parametrize("direction", [SIGN, GRADIENT], ids=lambda each: each.name)
    @pytest.mark.parametrize("block", [4, 1 << 20])
    def test_streaming_equals_holding_everything(
        self, sizes: list[float], direction: Direction, block: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gradients, "BLOCK_ELEMENTS", block)
        chunks = chunk_gradients(len(sizes))
        wanted = slow_statistics(chunks, sizes, direction=direction)
        assert_equal_statistics(streamed(chunks, sizes, direction=direction), wanted)

    def test_none_counts_as_zero(self) -> None:
        chunks = chunk_gradients(4)
        missing: list[list[Tensor | None]] = [list(chunk) for chunk in chunks]
        for index, parameter in ((0, 1), (1, 1), (2, 1), (2, 0), (3, 1)):
            chunks[index][parameter] = torch.zeros_like(chunks[index][parameter])
            missing[index][parameter] = None
        assert_equal_statistics(streamed(missing, EQUAL), slow_statistics(chunks, EQUAL))

    def test_sparse_gradients_of_an_embedding(self) -> None:
        embedding = nn.Embedding(6, 2, sparse=True, dtype=torch.float64)
        sparse, plain = [], []
        for rows in ([0, 1, 1], [2, 5, 0], [1, 1, 1], [3, 4, 5]):
            loss = embedding(torch.tensor(rows)).pow(2).sum(-1).mean()
            (gradient,) = torch.autograd.grad(loss, [embedding.weight])
            assert gradient.is_sparse
            assert not gradient.is_coalesced()
            sparse.append([gradient])
            plain.append([gradient.to_dense()])
        parameters = [embedding.weight]
        got = streamed(sparse, EQUAL, scales=[1.0], parameters=parameters)
        wanted = streamed(plain, EQUAL, scales=[1.0], parameters=parameters)
        assert_equal_statistics(got, wanted)
        assert wanted.trace_cov > 0

    @pytest.mark.parametrize("layout", ["parameter", "gradient", "both"])
    def test_non_contiguous_layouts(self, layout: str) -> None:
        generator = torch.Generator().manual_seed(1)
        chunks = [[torch.randn(2, 3, 2, 2, generator=generator, dtype=torch.float64)] for _ in range(4)]
        parameter = torch.zeros(2, 3, 2, 2, dtype=torch.float64)
        wanted = streamed(chunks, EQUAL, scales=[1.0], parameters=[parameter])
        if layout != "gradient":
            parameter = parameter.contiguous(memory_format=torch.channels_last)
        if layout != "parameter":
            chunks = [[g.contiguous(memory_format=torch.channels_last)] for (g,) in chunks]
        got = streamed(chunks, EQUAL, scales=[1.0], parameters=[parameter])
        assert_equal_statistics(got, wanted)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_gradients_are_summed_in_float32(self, dtype: torch.dtype) -> None:
        # 300^2 and sums over 64 chunks of it overflow float16; bfloat16 sums would stop growing.
        chunks = [[g * 300 for g in chunk] for chunk in chunk_gradients(64)]
        halves = [[g.to(dtype) for g in chunk] for chunk in chunks]
        parameters = [torch.zeros(shape, dtype=dtype) for shape in SHAPES]
        got = streamed(halves, [1.0] * 64, parameters=parameters)
        wanted = slow_statistics([[g.double() for g in chunk] for chunk in halves], [1.0] * 64)
        assert_equal_statistics(got, wanted, rel=2e-4)

    def test_gradients_are_read_not_kept(self) -> None:
        chunks = chunk_gradients(4)
        wanted = streamed(chunks, EQUAL)
        before = [[g.clone() for g in chunk] for chunk in chunks]
        stream = ChunkStream([torch.zeros(s, dtype=torch.float64) for s in SHAPES], scales=SCALES)
        for chunk, original, size in zip(chunks, before, EQUAL, strict=True):
            stream.add(chunk, size)
            for g, kept in zip(chunk, original, strict=True):
                assert torch.equal(g, kept)
                g.fill_(math.nan)
        assert stream.statistics() == wanted

    def test_a_pair_is_a_chunk_and_the_next_one(self) -> None:
        """Directions are scaled; `add` says when a chunk has told what one is worth."""
        sizes = [1, 3, 2, 6, 5]
        chunks = chunk_gradients(len(sizes))
        parameters = [torch.zeros(s, dtype=torch.float64) for s in SHAPES]
        stream = ChunkStream(parameters, scales=SCALES, direction=GRADIENT)

        def check(walk: Iterator[Tensor], made_of: Sequence[int]) -> None:
            total = sum(sizes[k] for k in made_of)
            for index, got in enumerate(walk):
                wanted = sum(SCALES[index] * sizes[k] * chunks[k][index] for k in made_of) / total
                torch.testing.assert_close(got, wanted.reshape(-1), rtol=1e-12, atol=0.0)

        for index, (chunk, size) in enumerate(zip(chunks, sizes, strict=True)):
            assert stream.add(chunk, size) == (index % 2 == 1)
            check(stream.latest_direction(), [index // 2 * 2])
        check(stream.prefix_direction(), [0, 2, 4])

    def test_sums_over_blocks_are_in_float64(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gradients, "BLOCK_ELEMENTS", 1)
        stream = ChunkStream([torch.zeros(3)])
        stream.add([torch.ones(3)], 1)
        # In float32 the ones would vanish beside 2^30.
        stream.add([torch.tensor([2.0**30, 1.0, 1.0])], 1)
        assert stream.statistics().alignments[0].value == 2.0**30 + 2


class TestErrors:
    @pytest.mark.parametrize("size", [0, -1, math.inf, math.nan])
    def test_sizes_are_checked_and_nothing_is_folded_in(self, size: float) -> None:
        stream = ChunkStream([torch.zeros(1)])
        with pytest.raises(ValueError, match=f"got size={size}: check batch_size_fn"):
            stream.add([torch.ones(1)], size)
        assert stream.sizes == []

    @pytest.mark.parametrize("added", [0, 1])
    def test_too_few_chunks(self, added: int) -> None:
        stream = ChunkStream([torch.zeros(1)])
        for _ in range(added):
            assert not stream.add([torch.ones(1)], 1)
        with pytest.raises(ValueError, match=f"at least 2 chunks, got {added}: .* pool 2 batches"):
            stream.statistics()


class TestStatistical:
    @pytest.mark.parametrize("sizes", [EQUAL, UNEQUAL], ids=str)
    def test_norms_and_alignments_are_unbiased(self, sizes: list[int]) -> None:
        """Correlated Gaussian noise that dominates: |G|^2 = 0.51, tr Sigma = 19.6."""
        rng = np.random.default_rng(3)
        mean = np.array([0.5, -0.4, 0.3, 0.1, 0.0])
        root = np.tril(rng.normal(size=(5, 5)), -1) + np.diag([2.0, 1.5, 1.0, 2.0, 1.0])
        covariance = root @ root.T
        deviation = np.sqrt(np.diag(covariance))
        scales = np.array([1.0, 1.0, 0.5, 0.5, 0.5])
        parameters = [torch.zeros(2, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)]
        norms, aligned = [], []
        for _ in range(700):
            stream = ChunkStream(parameters, scales=[1.0, 0.5])
            for size in sizes:
                g = torch.from_numpy(mean + root @ rng.normal(size=5) / math.sqrt(size))
                stream.add([g[:2], g[2:]], size)
            statistics = stream.statistics()
            norms.append(statistics[1:3])
            aligned.append([value for _, value in statistics.alignments])

        def expected(b: float) -> float:
            # The mean of a Gaussian coordinate's sign is exact, correlated or not.
            return float(np.sum(scales * erf(math.sqrt(b / 2) * mean / deviation) * mean))

        grad_sq, trace_cov = zip(*norms, strict=True)
        within(grad_sq, float(mean @ mean))
        within(trace_cov, float(np.trace(covariance)))
        pairs = list(zip(sizes[::2], sizes[1::2], strict=False))
        small = np.average([expected(b) for b, _ in pairs], weights=[partner for _, partner in pairs])
        truths = [float(small), expected(sum(sizes[::2])), expected(sum(sizes[1::2]))]
        for samples, truth in zip(zip(*aligned, strict=True), truths, strict=True):
            within(samples, truth)
            # A direction dotted with a gradient that holds it would give this much more; it must be seen.
            error = np.std(samples, ddof=1) / math.sqrt(len(samples))
            assert float(np.sum(scales * deviation)) * math.sqrt(2 / math.pi / sum(sizes)) > 8 * error
