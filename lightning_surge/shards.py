"""Parameters that live in pieces on several ranks, as under FSDP2.

Each rank then does the arithmetic on its own piece, coordinate by coordinate as anywhere else; only sums over
all coordinates have to be put together. That is all this module knows: the piece at hand, and the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

__all__ = ["Shards", "local"]


def local(tensor: Tensor) -> Tensor:
    """The piece of a tensor that this process holds: all of it, unless it is sharded.

    Args:
        tensor: any.

    Returns:
        A plain tensor that shares its memory with the piece.
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Shards:
    """The ranks over which parameters are spread, and sums over them.

    Parameters that every rank holds whole have no such ranks: their sums are complete as they are.

    Args:
        parameters: all of them spread in the same way, or none.

    Raises:
        ValueError: if some are spread and others are not, or in other ways.

    Example:
        >>> Shards([torch.ones(3)]).sum(torch.tensor(2.0))
        tensor(2.)
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        spread = {_spread(parameter) for parameter in parameters}
        if len(spread) > 1:
            raise ValueError(
                "Expected parameters that are all sharded over the same ranks, or none, got several kinds: "
                "shard the whole module with fully_shard(module)."
            )
        mesh: Any
        mesh, dimensions = spread.pop() if spread else (None, ())
        self._groups: list[Any] = [mesh.get_group(dimension) for dimension in dimensions]

    def sum(self, total: Tensor) -> Tensor:
        """Add up what every rank found on its own piece.

        Args:
            total: changed in place.

        Returns:
            The same tensor, equal on every rank.
        """
        for group in self._groups:
            torch.distributed.all_reduce(total, group=group)
        return total

    @property
    def index(self) -> int:
        """Which piece this process holds, counted from 0; for random numbers that differ between pieces."""
        index = 0
        for group in self._groups:
            index = index * torch.distributed.get_world_size(group) + torch.distributed.get_rank(group)
        return index

    @property
    def count(self) -> int:
        """Into how many pieces parameters are cut; 1 if they are whole."""
        count = 1
        for group in self._groups:
            count *= torch.distributed.get_world_size(group)
        return count


def _spread(parameter: Tensor) -> tuple[Any, tuple[int, ...]]:
    if not isinstance(parameter, DTensor):
        return None, ()
    cut = (index for index, placement in enumerate(parameter.placements) if isinstance(placement, Shard))
    return parameter.device_mesh, tuple(cut)
