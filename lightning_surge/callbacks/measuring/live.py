"""Measures a window while it accumulates, from the gradients of its own micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_surge.callbacks.measuring.repeated_loss import Attempts
from lightning_surge.measure.distributed import Ranks
from lightning_surge.measure.measurement import ALONE, MIN_SLICES, LawMeasurement
from lightning_surge.measure.micro_batches import HookedGradients, MicroBatchGradients, StashedGradients
from lightning_surge.measure.replay import Chunk, Piece, RandomState

__all__ = ["FREE_CHUNKS", "LiveWindow"]

# Every micro-batch of a window that is at least this long is a chunk: no extra backward for the norms.
FREE_CHUNKS = MIN_SLICES


class LiveWindow:
    """Folds each micro-batch of a measured window into a measurement, if one is under way.

    Args:
        ranks: the processes that measure together.

    Attributes:
        groups: of processes, each of which makes a chunk of its own of every micro-batch.
        measurement: under way; None in a window that is not measured.
    """

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self._ranks = ranks
        self._own: MicroBatchGradients = (
            HookedGradients() if ranks.reducer_owns_gradients else StashedGradients()
        )
        # A single group is all of the processes together.
        self.groups = 1
        self.measurement: LawMeasurement | None = None
        self._parameters: Sequence[Tensor] = ()
        self._random_state: RandomState | None = None

    def sort_processes(self, accumulation: int, *, cuts: bool) -> None:
        """Sort the processes into groups, so that a window has chunks enough by itself.

        Args:
            accumulation: micro-batches in a window.
            cuts: whether batches can be cut instead. That costs less, since all processes then share each
                pass, but not every batch can be cut.
        """
        wanted = math.ceil(FREE_CHUNKS / accumulation)
        alone = cuts or not self._ranks.reducer_owns_gradients
        self.groups = 1 if alone or wanted > self._ranks.count else wanted

    # ------------------------------------------------------------------ the window's hooks

    def begin(self, measurement: LawMeasurement | None) -> None:
        """Measure the window that begins.

        Args:
            measurement: takes as many chunks as will come; None if it could not be made.
        """
        self.measurement = measurement

    def before_forward(self) -> None:
        """Remember the random numbers that the coming pass begins with."""
        if self.measurement is not None:
            self._random_state = RandomState.capture()

    def before_backward(self, parameters: Sequence[Tensor]) -> None:
        """Set the accumulated gradients aside, so that the coming micro-batch's stand alone.

        Args:
            parameters: that the optimizer moves.
        """
        if self.measurement is not None:
            self._parameters = parameters
            self._own.begin(parameters)

    def add(self, piece: Piece, weight: float, attempts: Attempts, untouched: Callable[[], bool]) -> None:
        """Give the measurement this micro-batch's own gradient, then put the accumulated one back.

        Args:
            piece: the micro-batch, whose backward pass has just ended.
            weight: factor that somebody put on its loss.
            attempts: runs what may fail; whoever is told of a failure calls `drop`.
            untouched: whether the pass left the batch as it was; it may raise.
        """
        try:
            if attempts.together(untouched) and piece.size > 0.0:
                self._add_groups(piece._replace(random_state=self._random_state), weight, attempts)
        finally:
            self._own.end()

    def take(self) -> LawMeasurement | None:
        """Hand the measurement over at the end of its window."""
        measurement, self.measurement = self.measurement, None
        return measurement

    def drop(self) -> None:
        """Give the measurement up, while its window goes on."""
        self.measurement = None

    def close(self) -> None:
        """The window has ended, with a step or without."""
        self.drop()
        self._own.end()
        self._parameters, self._random_state = (), None

    # ------------------------------------------------------------------ chunks

    def _add_groups(self, piece: Piece, weight: float, attempts: Attempts) -> None:
        """Fold in a micro-batch, or each group of processes' part of it."""
        live = self.measurement
        assert live is not None
        for group in range(self.groups):
            # No name for the gradients: it would keep them alive during the secant.
            due = attempts.together(partial(self._fold_in, live, piece, weight, group))
            if group == self.groups - 1:
                self._own.end()
            if due:
                attempts.without_trace(live.measure_curvature, self._parameters)
            if self.measurement is None:
                return

    def _fold_in(self, live: LawMeasurement, piece: Piece, weight: float, group: int) -> bool:
        """Add the chunk that a group of processes makes of a micro-batch."""
        if self._ranks.count == 1:
            return live.add(Chunk((piece,)), _scaled(self._own.gradients(), 1.0 / weight))
        mine = self._ranks.rank * self.groups // self._ranks.count == group
        whole, size, weights = self._ranks.total(piece.size, piece.size * mine, weight)
        chunk = Chunk((piece,), total=size, mine=mine, idle=whole - size)
        if self._ranks.reduces:
            # A mean over processes of weighted gradients.
            return live.add(chunk, _scaled(self._own.gradients(), self._ranks.count / weights))
        share = piece.size / (size * weight) if mine else 0.0
        gradients = [
            torch.zeros_like(parameter) if own is None else own.mul(share)
            for parameter, own in zip(self._parameters, self._own.gradients(), strict=True)
        ]
        self._ranks.sum(gradients)
        return live.add(chunk, gradients)


def _scaled(gradients: list[Tensor | None], factor: float) -> list[Tensor | None]:
    if factor == 1.0:
        return gradients
    return [None if gradient is None else gradient * factor for gradient in gradients]
