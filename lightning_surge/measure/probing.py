"""Turn the batches at hand into chunks, and their losses into gradients.

A probe recomputes gradients of batches that training has at hand: the current one cut into slices,
or several consecutive ones pooled. This module decides how many examples and chunks that takes, and checks
once that cutting a batch does not change what is being measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_surge.measure.batches import SplitBatch, TooFewExamplesError, group_evenly
from lightning_surge.measure.distributed import ALONE, Ranks
from lightning_surge.measure.gradients import add_scaled, dense, inner, squared_norm, zeros
from lightning_surge.measure.measurement import MIN_SLICES, slices_for
from lightning_surge.measure.replay import Chunk, Piece, RandomState

ComputeLoss = Callable[[Any, int], Tensor]
"""Mean loss of a batch, given the batch and its index."""

# Slices whose mean gradient differs from the whole batch's by more than this share of its squared length
# measure something else, unless random numbers make the difference.
TOLERATED_MISMATCH = 0.01
# So many comparisons with other random numbers, which make another difference every time: a sum over the
# examples, or a loss that couples them, makes the same. Two are enough if that is little of it, or all.
COMPARISONS = 8
COMMON = 0.5
LITTLE, ALL = 0.25, 0.99
# Passes of one comparison, and of another one without dropout.
CHECK_PASSES = 4


class Agreement(NamedTuple):
    """What comparing a batch with its slices has found.

    Attributes:
        agrees: whether the mean of the slices' gradients is the whole batch's, up to random numbers.
        exact: whether it is without them, so that a pass of a part tells what the rest's would be.
        passes: examples passed.
    """

    agrees: bool
    exact: bool
    passes: float


@contextmanager
def silenced(module: nn.Module) -> Iterator[None]:
    """Dropout and the like are off, in all layers but those that keep statistics, and recurrent ones.

    cuDNN computes no gradients of recurrent layers that are not in training.
    """
    kept = (layer for layer in module.modules() if not (layer._buffers or isinstance(layer, nn.RNNBase)))
    layers = [layer for layer in kept if layer.training]
    for layer in layers:
        layer.training = False
    try:
        yield
    finally:
        for layer in layers:
            layer.training = True


class Prober:
    """Cuts and groups batches, and adds their gradients to `.grad`."""

    def __init__(
        self,
        parameters: Sequence[Tensor],
        *,
        compute_loss: ComputeLoss,
        backward: Callable[[Tensor], None] | None,
        batch_size_fn: Callable[[Any], float],
        split_batch: SplitBatch | None,
        ranks: Ranks = ALONE,
        uses_batch_statistics: Callable[[], bool] = lambda: False,
        silenced: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.ranks = ranks
        self._uses_batch_statistics = uses_batch_statistics
        self._silenced = silenced
        self.parameters = parameters
        self._compute_loss = compute_loss
        self._backward = backward
        self._batch_size_fn = batch_size_fn
        self.split_batch = split_batch
        self.loss_scale = 1.0

    def replay(self, piece: Piece, weight: float) -> None:
        """Add `weight * loss_scale` times the mean gradient of a piece to `.grad`."""
        with torch.enable_grad():
            loss = self._compute_loss(piece.batch, piece.batch_idx)
            loss = loss * (weight * self.loss_scale)
            if self._backward is not None:
                self._backward(loss)
                return
            # Backward passes wake the hooks of DistributedDataParallel, which keep account of the parameters
            # that a step has used; asking for the gradients themselves does not.
            gradients = torch.autograd.grad(loss, list(self.parameters), allow_unused=True)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def chunks(
        self, pieces: Sequence[Piece], base_batch_size: float, fewest: int = MIN_SLICES
    ) -> list[Chunk]:
        """Arrange pieces into chunks: whole batches grouped, or each cut into slices.

        A chunk holds pieces of every process.
        """
        (examples,) = self.ranks.total(sum(piece.size for piece in pieces))
        wanted = slices_for(examples, base_batch_size, fewest)
        if self.split_batch is not None and 0 < len(pieces) < wanted:
            per_piece = math.ceil(wanted / len(pieces))
            pieces = [slice_ for piece in pieces for slice_ in self.cut(piece, per_piece)]
            wanted = len(pieces)
        self.ranks.meet()  # cutting is the user's code
        # Short batches can be cut into fewer slices, and any process may have one.
        (count,) = self.ranks.least(float(min(wanted, len(pieces))))
        chunks = [Chunk(tuple(group)) for group in group_evenly(pieces, int(count))]
        if self.ranks.count == 1:
            return chunks
        sizes = self.ranks.total(*(chunk.size for chunk in chunks))
        return [chunk._replace(total=size) for chunk, size in zip(chunks, sizes, strict=True)]

    def cut(self, piece: Piece, num_slices: int) -> list[Piece]:
        """Cut one batch into slices that know their sizes: so many, or fewer if it has fewer examples."""
        if self.split_batch is None or num_slices < 2:
            return [piece]
        try:
            slices = self.split_batch(piece.batch, num_slices)
        except TooFewExamplesError:
            return self.cut(piece, num_slices // 2)
        return [Piece(part, piece.batch_idx, self._batch_size_fn(part)) for part in slices]

    def slices_agree(self, piece: Piece, num_slices: int) -> Agreement:
        """Whether the mean of the slices' gradients is the whole batch's gradient.

        It is not where the loss couples the examples of a batch (contrastive losses, batch statistics), or
        is a sum over them. Random numbers make the two differ as well. So where they differ, and there are no
        batch statistics, they are compared again without dropout, and if they still differ, a few times more
        with other random numbers: those do not make the same difference twice.
        """
        slices = self.cut(piece, num_slices)
        self.ranks.meet()
        (size,) = self.ranks.total(sum(part.size for part in slices))
        share = piece.size / size if self.ranks.count > 1 else 1.0

        def compared() -> tuple[list[Tensor], float]:
            """What the slices' gradient has more than the batch's, and its square relative to that one's."""
            self.replay(piece, -share)
            self.ranks.sum_gradients(self.parameters)
            length = float(squared_norm([parameter.grad for parameter in self.parameters]))
            for parameter in self.parameters:
                if self.ranks.count > 1 and parameter.grad is not None:
                    parameter.grad /= self.ranks.count  # it is summed again
            for part in slices:
                self.replay(part, part.size / size)
            more = self._take()
            change = float(squared_norm(more))
            if not math.isfinite(length + change):
                raise ArithmeticError(
                    "Expected finite gradients, got some that are not, as where the loss scale overflows"
                )
            return more, change / length if length > 0.0 else float(change > 0.0)

        if compared()[1] <= TOLERATED_MISMATCH:
            return Agreement(True, True, 2 * size)
        if self._uses_batch_statistics():
            return Agreement(False, False, 2 * size)
        state = RandomState.capture()
        try:
            with self._silenced():
                agrees, comparisons = _agree(compared)
        except Exception:
            self._silenced = nullcontext  # the next attempt does without
            raise
        state.restore()
        return Agreement(agrees, False, 2 * (1 + comparisons) * size)

    def _take(self) -> list[Tensor]:
        """The gradient over all processes, zeros where there is none."""
        self.ranks.sum_gradients(self.parameters)
        gradients = [zeros(p) if p.grad is None else dense(p.grad) for p in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return gradients


def _agree(compared: Callable[[], tuple[list[Tensor], float]]) -> tuple[bool, int]:
    """Whether differences have less than half in common, and how many were needed to tell."""
    total, mismatch = compared()
    if mismatch <= TOLERATED_MISMATCH:
        return True, 1
    squares, products, count, common = float(squared_norm(total)), 0.0, 1, COMMON
    while count < COMPARISONS and LITTLE <= common <= ALL:
        more, _ = compared()
        products += inner(more, total)
        squares += float(squared_norm(more))
        add_scaled(total, more, 1.0)
        count += 1
        # The mean product of two of them over their mean square.
        common = 2.0 * products / ((count - 1) * squares)
    return common <= COMMON, count
