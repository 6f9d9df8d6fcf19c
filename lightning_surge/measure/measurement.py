"""One measurement: chunks of examples in, noise and curvature at one point of training out.

The order of work keeps the memory at four gradient-sized buffers, whatever the number of chunks:

1. a chunk makes a direction: it is kept (buffer 1) and added to the prefix (buffer 2);
2. the next one is added to the reference (buffer 3) while its gradient passes by (buffer 4), and tells the
   slope along that direction; then its gradient is recomputed at a displaced point (the parameters' copy
   takes the place of buffer 1), which tells the curvature: a secant;
3. in the end the same is done once for the direction of the whole prefix, on the whole reference.

Two sizes of direction, measured on the same examples, separate the curvature that noise pays from
the curvature of the signal. The small ones scatter most, so there are as many of them as chunks allow, each
on examples of its own: that costs no more passes than a single one on all examples. Where Adam's sharpness is
asked for, its secants follow on the examples of the reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from lightning_surge.measure.curvature import Displacement, Sample, realised_slope, secant_curvature
from lightning_surge.measure.direction import SIGN, Direction
from lightning_surge.measure.distributed import Ranks
from lightning_surge.measure.gradients import ChunkStream, weighted_mean
from lightning_surge.measure.records import Measurement, SizedValue
from lightning_surge.measure.replay import Chunk, Piece, RandomState

__all__ = [
    "LawMeasurement",
    "MoreSecants",
    "Replay",
    "pass_chunk",
    "slices_for",
]

Replay = Callable[[Piece, float], None]
"""Adds `weight` times the mean gradient of a piece, at the parameters as they are, to `.grad`."""

MoreSecants = Callable[[Sample, Sample], tuple[SizedValue, ...]]
"""Takes the examples of the prefix, and those of the reference."""

ALONE = Ranks()
MAX_SLICES = 16
MIN_SLICES = 4


def slices_for(batch_size: float, base_batch_size: float, fewest: int = MIN_SLICES) -> int:
    """Into how many slices to cut a batch, so that directions span base batch size to half a batch.

    A ratio of learning rates needs the law at both ends. Powers of two keep the halves equal.

    Args:
        batch_size: examples at hand.
        base_batch_size: examples at which the scheduled learning rate was tuned.
        fewest: slices to make in any case.

    Returns:
        A power of two from `fewest` to 16.

    Example:
        >>> slices_for(128, base_batch_size=16), slices_for(16, base_batch_size=16)
        (8, 4)
    """
    wanted = 2 ** round(math.log2(max(batch_size / base_batch_size, 1.0)))
    return int(min(max(wanted, fewest), MAX_SLICES))


def pass_chunk(chunk: Chunk, replay: Replay, weight: float) -> Chunk:
    """Add a chunk's mean gradient to `.grad`, with the random numbers that it was made with before.

    Args:
        chunk: pieces without a random state go on with the streams as they are.
        replay: adds a piece's gradient.
        weight: factor on the gradient.

    Returns:
        The chunk, with the random states that this pass began with: a later pass repeats its masks.
        Where several processes measure, each has its own share in `.grad` then.
    """
    pieces = []
    for piece in chunk.pieces:
        if piece.random_state is None:
            piece = piece._replace(random_state=RandomState.capture())
        else:
            piece.random_state.restore()
        replay(piece, weight * piece.size / chunk.size if chunk.mine else 0.0)
        pieces.append(piece)
    return chunk._replace(pieces=tuple(pieces))


class LawMeasurement:
    """Collects the chunks of one measurement and measures the curvature on the way.

    Args:
        parameters: the parameters that the optimizer moves.
        num_chunks: chunks to come, at least 2.
        replay: recomputes a piece's gradient into `.grad`.
        delta: distance of the secant, a learning rate.
        scales: per parameter, its learning rate relative to the run's.
        direction: what the optimizer steps along.
        stride: chunks that make the smallest direction.
        keep_all: whether more secants will ask for the prefix's examples too.
        ranks: the processes that measure together.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        *,
        num_chunks: int,
        replay: Replay,
        delta: float,
        scales: Sequence[float],
        direction: Direction = SIGN,
        stride: int = 1,
        keep_all: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self._ranks = ranks
        self._parameters = parameters
        self._replay = replay
        self._delta = delta
        self._stream = ChunkStream(
            parameters, num_chunks=num_chunks, scales=scales, direction=direction, stride=stride
        )
        self._keep_all = keep_all
        self._prefix_chunks: list[Chunk] = []
        self._reference_chunks: list[Chunk] = []
        # Of each of these chunks, its size times the slope along the small direction before it.
        self._slopes: list[Tensor] = []
        # Of the pairs of groups: size of the direction, examples it was measured on, curvature.
        self._pairs: list[tuple[float, float, float]] = []
        self._passes = 0.0

    @property
    def complete(self) -> bool:
        """Whether a pair of groups has come, so that there is something to measure."""
        return bool(self._pairs)

    def add(self, chunk: Chunk, gradient: Sequence[Tensor | None]) -> bool:
        """Fold in a chunk and its mean gradient at the current parameters.

        Args:
            chunk: kept until the end if it belongs to the reference, or all are.
            gradient: over the examples of all processes; read, not kept.

        Returns:
            Whether a secant is due now: call `measure_curvature`, with nothing but this object holding
            a gradient.
        """
        if self._stream.in_reference:
            self._reference_chunks.append(chunk)
            self._slopes.append(chunk.size * self._slope(self._stream.group_direction, gradient))
        elif self._keep_all:
            self._prefix_chunks.append(chunk)
        return self._stream.add(gradient, chunk.size)

    def measure_curvature(self) -> None:
        """Measure `D` along the latest small direction, on the examples of the group after it."""
        stream = self._stream
        chunks = self._reference_chunks[-stream.stride :]
        slope = sum(value.item() for value in self._slopes[-stream.stride :]) / stream.partner_size
        curvature = self._secant(chunks, stream.group_direction, slope, release=stream.group)
        self._pairs.append((stream.group_size, stream.partner_size, curvature))

    def _slope(self, direction: Displacement, gradient: Sequence[Tensor | None]) -> Tensor:
        return realised_slope(self._parameters, direction, self._delta, gradient)

    def _secant(
        self,
        chunks: Sequence[Chunk],
        direction: Displacement,
        slope: float,
        release: list[Tensor] | None = None,
    ) -> float:
        # The replays rewind the random streams; later chunks must not draw the same numbers again.
        random_state = RandomState.capture()

        def gradient_at_displaced() -> list[Tensor | None]:
            if release is not None:
                release.clear()  # the parameters' copy has taken its place
            return self._gradient_now(chunks)

        curvature = secant_curvature(
            self._parameters,
            direction=direction,
            slope=slope,
            gradient_at_displaced=gradient_at_displaced,
            delta=self._delta,
        )
        self._drop_gradients()
        random_state.restore()
        return curvature

    def _gradient_now(self, chunks: Sequence[Chunk]) -> list[Tensor | None]:
        """Mean gradient of chunks at the parameters as they are."""
        self._drop_gradients()
        size = sum(chunk.size for chunk in chunks)
        for chunk in chunks:
            self._pass(chunk, chunk.size / size)
        self._ranks.sum_gradients(self._parameters)
        return [parameter.grad for parameter in self._parameters]

    def _sample(self, total: Sequence[Tensor], size: float, chunks: Sequence[Chunk]) -> Sample:
        return Sample([tensor.div_(size) for tensor in total], lambda: self._gradient_now(chunks))

    def _drop_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _pass(self, chunk: Chunk, weight: float = 1.0) -> Chunk:
        self._passes += chunk.size + chunk.idle
        return pass_chunk(chunk, self._replay, weight)

    def run(self, chunks: Sequence[Chunk], sharpness: MoreSecants | None = None) -> Measurement:
        """Measure from chunks whose gradients have yet to be computed.

        Args:
            chunks: as many as announced.
            sharpness: measures Adam's sharpness.

        Returns:
            The measurement.
        """
        for chunk in chunks:
            passed = self._pass(chunk)
            self._ranks.sum_gradients(self._parameters)
            due = self.add(passed, [parameter.grad for parameter in self._parameters])
            self._drop_gradients()
            if due:
                self.measure_curvature()
        return self.finish(sharpness)

    def finish(self, sharpness: MoreSecants | None = None) -> Measurement:
        """Close the measurement.

        Args:
            sharpness: measures Adam's sharpness.

        Returns:
            What was measured.

        Raises:
            ValueError: if too few chunks came.
        """
        stream = self._stream
        statistics = stream.statistics()
        curvatures = [weighted_mean(self._pairs)]
        stream.group.clear()  # of a group that none came after
        if stream.more_than_a_pair:
            slope = self._slope(stream.prefix_direction, stream.reference).item() / stream.reference_size
            value = self._secant(self._reference_chunks, stream.prefix_direction, slope)
            curvatures.append(SizedValue(stream.prefix_size, value))
        measured = Measurement(statistics, tuple(curvatures), self._passes, stream.num_added)
        if sharpness is None:
            return measured
        values = sharpness(
            self._sample(stream.prefix, stream.prefix_size, self._prefix_chunks),
            self._sample(stream.reference, stream.reference_size, self._reference_chunks),
        )
        self._drop_gradients()
        return measured._replace(sharpness=values, passes=self._passes)
