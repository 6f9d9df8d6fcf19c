"""Batches kept from one window to the next, until they are enough for a probe."""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities import rank_zero_warn

from lightning_surge.batches import tensors_in
from lightning_surge.replay import Piece, TraceError

__all__ = ["Pool", "Versions"]

# Checkpoints in a row that may interrupt a measurement before the user is told.
PATIENCE = 3


class Versions:
    """Tells whether a pass has changed its batch, which then cannot be passed again.

    Args:
        batch: before the pass.

    Example:
        >>> import torch
        >>> batch = torch.ones(2)
        >>> versions = Versions(batch)
        >>> versions.check(batch)
        True
        >>> batch.add_(1.0)
        tensor([2., 2.])
        >>> versions.check(batch)
        Traceback (most recent call last):
        ...
        lightning_surge.replay.TraceError: Expected a training_step that leaves its batch alone, but it ...
    """

    def __init__(self, batch: Any = None) -> None:
        self._versions = [tensor._version for tensor in tensors_in(batch)]

    def check(self, batch: Any) -> bool:
        """True, after the pass.

        Raises:
            TraceError: if it has changed a tensor.
        """
        if self._versions != [tensor._version for tensor in tensors_in(batch)]:
            raise TraceError(
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

    Example:
        >>> pool = Pool()
        >>> pool.target = 8.0
        >>> for batch in ([1], [2]):
        ...     pool.open_window()
        ...     pool.add(Piece(batch, 0, 4.0), Versions(batch))
        >>> pool.gathered = pool.examples
        >>> pool.full
        True
        >>> pool.drop_window()
        >>> [piece.batch for piece in pool.pieces]
        [[1]]
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

    def open_window(self) -> None:
        """Remember where a window begins."""
        self._before = len(self.pieces)

    def drop_window(self) -> None:
        """Forget the batches of a window whose step is skipped."""
        del self.pieces[self._before :]

    def add(self, piece: Piece, versions: Versions) -> None:
        """Keep a batch, if any is wanted.

        Args:
            piece: the batch, which has been passed.
            versions: of its tensors before that.
        """
        # Several steps on one batch see the same examples, which are no news of the noise.
        seen = bool(self.pieces) and self.pieces[-1].batch is piece.batch
        if not self.target or piece.size <= 0.0 or seen:
            return
        try:
            versions.check(piece.batch)
        except TraceError as error:
            self.broken = error  # the other processes must hear of it
        else:
            self.pieces.append(piece)

    def drop(self) -> None:
        """Let go of the batches when a checkpoint is saved: a run that resumes from it has none."""
        if self.pieces:
            self._dropped += 1
            if self._dropped == PATIENCE:
                rank_zero_warn(
                    f"The last {PATIENCE} checkpoints each came while batches were being pooled for a "
                    "measurement, and dropped them: nothing is measured. Save less often, or set "
                    "probe_examples= lower."
                )
        self.clear()

    def measured(self) -> None:
        """A measurement has been taken in spite of checkpoints."""
        self._dropped = 0
