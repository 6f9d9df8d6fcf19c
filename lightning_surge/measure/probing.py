"""Turn the batches at hand into chunks, and their losses into gradients.

A probe recomputes gradients of batches that training has at hand: the current one cut into slices,
or several consecutive ones pooled. This module decides how many examples and chunks that takes, and checks
once that cutting a batch does not change what is being measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_surge.measure.batches import SplitBatch, TooFewExamplesError, group_evenly
from lightning_surge.measure.distributed import ALONE, Ranks
from lightning_surge.measure.gradients import dense
from lightning_surge.measure.measurement import MIN_SLICES, slices_for
from lightning_surge.measure.replay import Chunk, Piece, RandomState

ComputeLoss = Callable[[Any, int], Tensor]
"""Mean loss of a batch, given the batch and its index."""

# Slices whose mean gradient differs from the whole batch's by more than this share of its squared length,
# beyond three times what repeating the whole batch with other random numbers changes on average, measure
# something else. (Random numbers alone make the two equal on average.)
TOLERATED_MISMATCH = 0.01
TOLERATED_NOISE = 3.0
REPEATS = 3
# Passes of a comparison, of another one without noise, and of a repetition that finds it all the same.
CHECK_PASSES = 5


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


class Noiseless(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What is drawn inside is the same for every example, and so for batches of any size.

    Dropout keeps everything, Gaussian noise is its mean, and a uniform draw is one number for all. It differs
    from draw to draw, so that what draws until a number is accepted comes to an end. All this acts on the
    operators that layers, attention and functions come down to; compiled code runs uncompiled.
    """

    UNIFORM: ClassVar = ("rand", "rand_like", "uniform_", "randint", "randint_like", "exponential_")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._draws = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call an operator, with what makes its result random taken out."""
        kind = func._schema.name.removeprefix("aten::")
        names = [argument.name for argument in func._schema.arguments]
        given: dict[str, Any] = dict(zip(names, args, strict=False)) | (kwargs or {})
        replaced: dict[str, Any] = dict.fromkeys({"dropout_p", "dropout"}.intersection(names), 0.0)
        if kind == "native_dropout":
            replaced["p"] = 0.0
        elif kind in ("bernoulli", "bernoulli_"):
            name = "p" if "p" in names else "self"
            kept = given.get(name, 0.5)
            replaced[name] = kept.ceil() if isinstance(kept, Tensor) else math.ceil(kept)
        elif kind in ("normal", "normal_"):
            replaced["std"] = 0.0 * given.get("std", 1.0)
        result = func(**given | replaced) if replaced else func(*args, **(kwargs or {}))
        if kind in ("randn", "randn_like"):
            result.zero_()
        elif kind in self.UNIFORM:
            low, high = given.get("low", given.get("from", 0.0)), given.get("high", given.get("to", 1.0))
            # Steps of the golden ratio spread them evenly.
            drawn = low + (high - low) * ((0.5 + self._draws * 0.6180339887) % 1.0)
            result.fill_(math.floor(drawn) if "high" in names else drawn)
            self._draws += 1
        return result


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
    ) -> None:
        self.ranks = ranks
        self._uses_batch_statistics = uses_batch_statistics
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
        is a sum over them. Dropout and noise make two passes differ too, and would hide that: so if the first
        comparison fails there is another one without them, unless no gradient is left then. Other random
        numbers are allowed for, by what repeating the whole batch changes; beside batch statistics no
        difference is forgiven.
        """
        slices = self.cut(piece, num_slices)
        self.ranks.meet()
        (size,) = self.ranks.total(sum(part.size for part in slices))
        share = piece.size / size if self.ranks.count > 1 else 1.0

        def compared(noise: Callable[[], Any]) -> tuple[list[Tensor | None], float]:
            with noise():
                self.replay(piece, share)
            whole = self._take()
            for part in slices:
                with noise():
                    self.replay(part, part.size / size)
            return whole, self._relative_difference(whole)

        _, mismatch = compared(nullcontext)
        if not math.isfinite(mismatch):
            raise ArithmeticError(
                "Expected finite gradients, got some that are not, as where the loss scale overflows"
            )
        if mismatch <= TOLERATED_MISMATCH:
            return Agreement(True, True, 2 * size)
        state, passes = RandomState.capture(), 2.0
        for noise in (Noiseless, nullcontext):
            repeats: list[float] = []
            whole, mismatch = compared(noise)
            if mismatch > TOLERATED_MISMATCH and not self._uses_batch_statistics():
                while len(repeats) < REPEATS and repeats != [0.0]:
                    with noise():
                        self.replay(piece, share)
                    repeats.append(self._relative_difference(whole))
            passes += 2 + len(repeats)
            # A loss that divides by its noise, or is a multiple of it, has no gradient without.
            if math.isfinite(mismatch) and any(one is not None and bool(dense(one).any()) for one in whole):
                break
        state.restore()
        forgiven = TOLERATED_NOISE * sum(repeats) / max(len(repeats), 1)
        return Agreement(mismatch <= TOLERATED_MISMATCH + forgiven, False, passes * size)

    def _take(self) -> list[Tensor | None]:
        self.ranks.sum_gradients(self.parameters)
        gradients = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return gradients

    def _relative_difference(self, reference: Sequence[Tensor | None]) -> float:
        """`|g - reference|^2 / |reference|^2` of the gradient at hand, which is dropped."""
        change, length = 0.0, 0.0
        for gradient, other in zip(self._take(), reference, strict=True):
            if other is not None:
                length += float(torch.linalg.vector_norm(dense(other)).square())
                difference = other if gradient is None else gradient - other
                change += float(torch.linalg.vector_norm(dense(difference)).square())
            elif gradient is not None:
                change += float(torch.linalg.vector_norm(dense(gradient)).square())
        if not math.isfinite(change + length):
            return math.nan
        return change / length if length > 0.0 else float(change > 0.0)
