"""One measurement: chunks of examples in, noise and curvature at one point of training out.

`NormMeasurement` takes norms only, in one buffer, and moves no parameter. `LawMeasurement` takes alignment
and curvature too. The order of its work keeps the memory at four gradient-sized buffers:

1. a chunk makes a direction: it is kept (buffer 1) and added to the prefix (buffer 2);
2. the next one is added to the reference (buffer 3) while its gradient passes by (buffer 4), and tells the
   slope along that direction; then its gradient is recomputed at a displaced point (the parameters' copy
   takes the place of buffer 1), which tells the curvature: a secant;
3. in the end the same is done once for the direction of the whole prefix, on the whole reference.

Two sizes of direction, measured on the same examples, separate the curvature that noise pays from
the curvature of the signal. The small ones scatter most, so there are as many of them as chunks allow, each
on examples of its own: that costs no more passes than a single one on all examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_surge.measure.curvature import Displacement, realised_slope, secant_curvature
from lightning_surge.measure.direction import SIGN, Direction
from lightning_surge.measure.distributed import ALONE, Ranks
from lightning_surge.measure.gradients import (
    ChunkStream,
    add_scaled,
    blocks,
    debiased_norms,
    dense,
    pairs_of,
    require_size,
    squared_norm,
    weighted_mean,
    zeros,
)
from lightning_surge.measure.records import Measurement, SizedValue
from lightning_surge.measure.replay import Chunk, Piece, RandomState

Replay = Callable[[Piece, float], None]
"""Adds `weight` times the mean gradient of a piece, at the parameters as they are, to `.grad`."""


class Whole(NamedTuple):
    """The mean gradient of a batch, which is at hand without a pass.

    Attributes:
        gradient: times a factor on the loss.
        size: examples in the batch.
        ratio: the factor of replayed gradients over that one.
    """

    gradient: Sequence[Tensor | None]
    size: float
    ratio: float = 1.0


MAX_SLICES = 16
MIN_SLICES = 4


def slices_for(batch_size: float, base_batch_size: float, fewest: int = MIN_SLICES) -> int:
    """Into how many slices to cut a batch, so that directions span base batch size to half a batch.

    A ratio of learning rates needs the law at both ends. Powers of two keep the halves equal.

    Example:
        >>> slices_for(128, base_batch_size=16), slices_for(16, base_batch_size=16)
        (8, 4)
    """
    wanted = 2 ** round(math.log2(max(batch_size / base_batch_size, 1.0)))
    return int(min(max(wanted, fewest), MAX_SLICES))


class Passes:
    """Computes the gradients of chunks, and counts the examples passed."""

    def __init__(
        self, parameters: Sequence[Tensor], replay: Replay, ranks: Ranks = ALONE, delta: float = math.nan
    ) -> None:
        self._parameters = parameters
        self._replay = replay
        self._ranks = ranks
        self._delta = delta
        self._passes = 0.0

    def _pass(self, chunk: Chunk, weight: float = 1.0) -> Chunk:
        """Add a chunk's mean gradient to `.grad`, with the random numbers that it was made with before."""
        self._passes += chunk.size
        pieces = []
        for piece in chunk.pieces:
            if piece.random_state is None:
                piece = piece._replace(random_state=RandomState.capture())
            else:
                piece.random_state.restore()
            self._replay(piece, weight * piece.size / chunk.size)
            pieces.append(piece)
        return chunk._replace(pieces=tuple(pieces))

    def _pass_all(self, chunks: Sequence[Chunk], sign: float = 1.0) -> None:
        """Add the mean gradient of chunks, or take it off."""
        size = sum(chunk.size for chunk in chunks)
        for chunk in chunks:
            self._pass(chunk, sign * chunk.size / size)

    def _each(self, chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk, list[Tensor | None]]]:
        """Every chunk with its mean gradient over all processes, which is dropped after use."""
        for chunk in chunks:
            passed = self._pass(chunk)
            yield passed, self._gradients()
            self._drop_gradients()

    def _gradients(self) -> list[Tensor | None]:
        """What all processes have added."""
        self._ranks.sum_gradients(self._parameters)
        return [parameter.grad for parameter in self._parameters]

    def _drop_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None


class NormMeasurement(Passes):
    """Measures `|G|^2` and `tr Sigma` from norms: no parameter moves, so they may have 16 bits."""

    def run(self, chunks: Sequence[Chunk], whole: Whole | None = None) -> Measurement:
        """Measure from chunks whose gradients have yet to be computed.

        Where training has just computed the gradient of the batch that they are slices of, what they leave
        of it is one more chunk, `(n g - sum_k n_k g_k) / (n - sum_k n_k)`, without a pass.
        """
        total = [zeros(parameter) for parameter in self._parameters]
        sizes: list[float] = []
        squares: list[Tensor] = []
        for chunk, gradient in self._each(chunks):
            require_size(chunk.size)
            add_scaled(total, gradient, chunk.size)
            squares.append(squared_norm(gradient))
            sizes.append(chunk.size)
            del gradient  # the next pass makes another one
        if whole is None:
            mean_sq = float(squared_norm(total).item()) / sum(sizes) ** 2
        else:
            rest = whole.size - sum(sizes)
            squares.append(self._rest_squared(total, whole) / rest**2)
            mean_sq = float(squared_norm(whole.gradient).item()) * whole.ratio**2
            sizes.append(rest)
        statistics = debiased_norms(sizes, [float(square.item()) for square in squares], mean_sq)
        return Measurement(statistics, (), self._passes, len(sizes), pairs=pairs_of(sizes))

    def _rest_squared(self, total: Sequence[Tensor], whole: Whole) -> Tensor:
        """`|n g - sum_k n_k g_k|^2`."""
        square = torch.zeros((), dtype=torch.float64, device=total[0].device)
        for part, gradient in zip(total, whole.gradient, strict=True):
            other = torch.zeros_like(part) if gradient is None else dense(gradient)
            for mine, all_ in blocks(part, other):
                rest = all_.to(mine.dtype) * (whole.size * whole.ratio) - mine
                square += torch.dot(rest, rest)
        return square


class LawMeasurement(Passes):
    """Measures norms, alignments and curvatures of two sizes of direction."""

    def __init__(
        self,
        parameters: Sequence[Tensor],
        *,
        replay: Replay,
        delta: float,
        scales: Sequence[float],
        direction: Direction = SIGN,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__(parameters, replay, ranks, delta)
        self._stream = ChunkStream(parameters, scales=scales, direction=direction)
        # Of the pairs of chunks: size of the direction, examples it was measured on, curvature.
        self._pairs: list[tuple[float, float, float]] = []

    def run(self, chunks: Sequence[Chunk]) -> Measurement:
        """Measure from chunks whose gradients have yet to be computed."""
        stream = self._stream
        passed: list[Chunk] = []
        for chunk, gradient in self._each(chunks):
            passed.append(chunk)
            # The slope is read while the gradient is there, the secant taken when nothing holds it.
            slope = self._slope(stream.latest_direction, gradient) if stream.in_reference else None
            stream.add(gradient, chunk.size)
            del gradient
            if slope is not None:
                self._drop_gradients()
                value = self._secant([chunk], stream.latest_direction, slope.item(), release=stream.latest)
                self._pairs.append((stream.latest_size, chunk.size, value))
        statistics = stream.statistics()
        curvatures = [weighted_mean(self._pairs)]
        stream.latest.clear()  # of a chunk that none came after
        if len(passed) > 2:
            slope = self._slope(stream.prefix_direction, stream.reference) / stream.reference_size
            value = self._secant(passed[1::2], stream.prefix_direction, slope.item())
            curvatures.append(SizedValue(stream.prefix_size, value))
        return Measurement(
            statistics, tuple(curvatures), self._passes, len(passed), pairs=pairs_of(stream.sizes)
        )

    def _slope(self, direction: Displacement, gradient: Sequence[Tensor | None]) -> Tensor:
        return realised_slope(self._parameters, direction, self._delta, gradient)

    def _secant(
        self, chunks: Sequence[Chunk], along: Displacement, slope: float, release: list[Tensor] | None = None
    ) -> float:
        # The replays rewind the random streams; later chunks must not draw the same numbers again.
        random_state = RandomState.capture()

        def gradient_at_displaced() -> list[Tensor | None]:
            if release is not None:
                release.clear()  # the parameters' copy has taken its place
            self._drop_gradients()
            self._pass_all(chunks)
            return self._gradients()

        curvature = secant_curvature(
            self._parameters,
            direction=along,
            slope=slope,
            gradient_at_displaced=gradient_at_displaced,
            delta=self._delta,
        )
        self._drop_gradients()
        random_state.restore()
        return curvature
