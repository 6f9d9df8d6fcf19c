"""Batches kept from one window to the next, until they are enough for a probe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_surge.callbacks.lightning_host import warn
from lightning_surge.measure.batches import BatchError, SplitBatch, split_leading_dimension, tensors_in
from lightning_surge.measure.budget import ProbeBudget, probe_cost
from lightning_surge.measure.probing import Prober
from lightning_surge.measure.replay import ChangedBatchError, Piece

# Checkpoints in a row that may interrupt a measurement before the user is told.
PATIENCE = 3
# Slices that a part of a batch is compared with, and about how many examples it has.
COMPARED = 4
COMPARED_EXAMPLES = 16.0


class Versions:
    """Tells whether a pass has changed its batch, which then cannot be passed again."""

    def __init__(self, batch: Any = None) -> None:
        self._versions = self._of(batch)

    @staticmethod
    def _of(batch: Any) -> list[int]:
        # Inference tensors, which nothing can change in place, have none.
        return [0 if tensor.is_inference() else tensor._version for tensor in tensors_in(batch)]

    def check(self, batch: Any) -> bool:
        """True, after the pass."""
        if self._versions != self._of(batch):
            raise ChangedBatchError(
                "Expected a training_step that leaves its batch alone, but it changes a tensor of it in "
                "place: work on a copy"
            )
        return True


class Pool:
    """Gathers the batches of consecutive windows up to a number of examples.

    Attributes:
        pieces: whole batches of this process.
        target: examples of all processes that are wanted; 0 while none are.
        gathered: examples of all processes, as far as this one has been told.
        broken: why a batch could not be kept.
    """

    def __init__(self) -> None:
        self.broken: Exception | None = None
        self._dropped = 0
        self.clear()

    def clear(self) -> None:
        """Start afresh: no batch is wanted."""
        self.pieces: list[Piece] = []
        self.target = 0.0
        self.gathered = 0.0
        self._before = 0

    @property
    def examples(self) -> float:
        """That this process holds."""
        return sum(piece.size for piece in self.pieces)

    @property
    def full(self) -> bool:
        """Whether there are as many examples as were wanted."""
        return self.target > 0.0 and self.gathered >= self.target

    def begin(self, examples: float) -> None:
        """Gather so many examples, from a window that begins."""
        self.target = examples
        self.open_window()

    def open_window(self) -> None:
        """Remember where a window begins."""
        self._before = len(self.pieces)

    def drop_window(self) -> None:
        """Forget the batches of a window whose step is skipped."""
        del self.pieces[self._before :]

    def add(self, piece: Piece, versions: Versions) -> None:
        """Keep a batch, if any is wanted."""
        # Several steps on one batch see the same examples, which are no news of the noise.
        seen = bool(self.pieces) and self.pieces[-1].batch is piece.batch
        if not self.target or piece.size <= 0.0 or seen:
            return
        try:
            versions.check(piece.batch)
        except ChangedBatchError as error:
            self.broken = error  # the other processes must hear of it
        else:
            self.pieces.append(piece)

    def drop(self) -> None:
        """Let go of the batches when a checkpoint is saved: a run that resumes from it has none."""
        if self.pieces:
            self._dropped += 1
            if self._dropped == PATIENCE:
                warn(
                    f"The last {PATIENCE} checkpoints each came while batches were being pooled for a "
                    "measurement, and dropped them: nothing is measured. Save less often, or set "
                    "probe_examples= lower."
                )
        self.clear()

    def measured(self) -> None:
        """A measurement has been taken in spite of checkpoints."""
        self._dropped = 0


class Cutting:
    """Knows how batches are cut, and finds out once whether their slices agree with them.

    Attributes:
        allowed: whether batches may be cut, as far as it is known.
        checked: whether slices have been compared with a batch.
        exact: whether they agree without random numbers.
    """

    def __init__(self, split_batch: SplitBatch | Literal[False] | None) -> None:
        self._split_batch = split_batch or split_leading_dimension
        self.allowed = split_batch is not False
        self.checked = self.exact = False

    @property
    def split_batch(self) -> SplitBatch | None:
        """What cuts a batch; None if batches must stay whole."""
        return self._split_batch if self.allowed else None

    def check(self, batch: Any, prober: Prober) -> None:
        """Try it before the first step is taken."""
        try:
            prober.cut(Piece(batch, 0, 2.0), 2)
        except Exception as error:
            reason = str(error) if isinstance(error, BatchError) else f"{type(error).__name__}: {error}."
            raise MisconfigurationException(
                f"SurgeLRCallback cannot cut a batch into slices. {reason} Or pass split_batch=False to "
                "measure from whole, pooled batches."
            ) from error

    def agrees(self, pieces: Sequence[Piece], prober: Prober, budget: ProbeBudget) -> bool:
        """Whether slices can be measured in place of the batches, which is made sure of once."""
        if self.checked:
            return self.allowed
        # The cheapest that can be cut: a size may count tokens, and a batch be a single row.
        by_size = sorted(pieces, key=lambda piece: piece.size)
        piece = next((piece for piece in by_size if len(prober.cut(piece, 2)) > 1), None)
        while piece is not None and piece.size >= 2.0 * COMPARED_EXAMPLES:
            half = prober.cut(piece, 2)[0]
            if len(prober.cut(half, 2)) < 2:
                break
            piece = half
        prober.ranks.meet()
        if not any(prober.ranks.total(float(piece is not None))):
            return True  # nothing was cut
        piece = piece or pieces[0]
        # Slices of a single example would be refused by batch statistics.
        found = prober.slices_agree(piece, int(min(max(piece.size // 2, 2), COMPARED)))
        self.checked, self.exact = True, found.exact
        budget.charge(probe_cost(found.passes), measured=False)
        if not found.agrees:
            self.allowed = False
            warn(
                "The mean gradient of a batch's slices is not the gradient of the batch: the loss couples "
                "examples (BatchNorm, a contrastive loss), is a sum over them, or a mean over something "
                "else, as tokens without padding (then pass batch_size_fn=). Whole batches are pooled "
                "instead of sliced; pass loss_fn= or split_batch= if slices can be made to agree."
            )
        return found.agrees
