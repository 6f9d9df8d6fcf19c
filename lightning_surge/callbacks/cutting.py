"""Whether batches may be cut into slices without changing what is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from lightning.fabric.utilities import rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_surge.batches import BatchError, SplitBatch, split_leading_dimension
from lightning_surge.budget import ProbeBudget
from lightning_surge.probing import Prober
from lightning_surge.replay import Chunk, Piece

__all__ = ["Cutting"]


class Cutting:
    """Knows how batches are cut, and finds out once whether their slices agree with them.

    Args:
        split_batch: cuts a batch; None for the default, False never to cut.

    Attributes:
        allowed: whether batches may be cut, as far as it is known.
    """

    def __init__(self, split_batch: SplitBatch | Literal[False] | None) -> None:
        self._split_batch = split_batch or split_leading_dimension
        self.allowed = split_batch is not False
        self._checked = False

    @property
    def split_batch(self) -> SplitBatch | None:
        """What cuts a batch; None if batches must stay whole."""
        return self._split_batch if self.allowed else None

    def check(self, batch: Any, prober: Prober) -> None:
        """Try it before the first step is taken.

        Args:
            batch: of at least 2 examples.
            prober: cuts it.

        Raises:
            MisconfigurationException: if the batch cannot be cut.
        """
        try:
            prober.cut(Piece(batch, 0, 2.0), 2)
        except Exception as error:
            reason = str(error) if isinstance(error, BatchError) else f"{type(error).__name__}: {error}."
            raise MisconfigurationException(
                f"SurgeLRCallback cannot cut a batch into slices. {reason} Or pass split_batch=False to "
                "measure from whole, pooled batches."
            ) from error

    def agrees(
        self, pieces: Sequence[Piece], chunks: Sequence[Chunk], prober: Prober, budget: ProbeBudget
    ) -> bool:
        """Whether chunks can be measured in place of the batches, which is made sure of once.

        Args:
            pieces: whole batches.
            chunks: made of them.
            prober: passes the batches and their slices, on all processes.
            budget: pays for the passes.
        """
        if self._checked or len(chunks) <= len(pieces):
            return True
        num_slices = max(len(chunks) // len(pieces), 2)
        # The cheapest that can be cut: a size may count tokens, and a batch be a single row.
        piece = next(
            (
                piece
                for piece in sorted(pieces, key=lambda piece: piece.size)
                if len(prober.cut(piece, num_slices)) > 1
            ),
            None,
        )
        prober.ranks.meet()
        if not any(prober.ranks.total(float(piece is not None))):
            return True  # nothing was cut
        agree, passes = prober.slices_agree(piece or pieces[0], num_slices)
        self._checked = True
        budget.charge(passes, measured=False)
        if not agree:
            self.allowed = False
            rank_zero_warn(
                "The mean gradient of a batch's slices is not the gradient of the batch: the loss couples "
                "examples (BatchNorm, a contrastive loss), is a sum over them, or a mean over something "
                "else, as tokens without padding (then pass batch_size_fn=). Whole batches are pooled "
                "instead of sliced; pass loss_fn= or split_batch= if slices can be made to agree."
            )
        return agree

    def state_dict(self) -> dict[str, Any]:
        """What has been found out."""
        return {"slices_checked": self._checked, "may_split": self.allowed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of `state_dict`.

        Raises:
            KeyError: if a value is missing.
        """
        self._checked, self.allowed = bool(state["slices_checked"]), bool(state["may_split"])
