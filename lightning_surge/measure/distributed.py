"""Data-parallel processes that measure together.

Every process holds its own examples. What is measured is the gradient over all of them: each process adds
its share, and a sum over the processes completes it. Whatever is decided from it must be equal on all of
them, or they would wait for each other for ever; so must be a failure, which is why every sum begins by
asking whether all of them got as far.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

__all__ = ["RankError", "Ranks", "Shards", "local"]


T = TypeVar("T")

# Gradients are summed in buffers of about this many elements: one message each.
MESSAGE_ELEMENTS = 1 << 22


class RankError(RuntimeError):
    """Another process failed, so that this one cannot go on either.

    Args:
        message: what happened.
        final: whether that one will not try again.
    """

    def __init__(self, message: str, *, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


class Ranks:
    """A group of processes, or a single one, for which everything here is free.

    Args:
        device: on which messages are made.
        count: number of processes; 1 needs no group.
        rank: of this process.
        replicas: how many of the processes have examples of their own; None for all.
        reduces: whether gradients arrive summed already, as those of sharded parameters do.

    Example:
        >>> alone = Ranks()
        >>> alone.total(3.0, 4.0)
        (3.0, 4.0)
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        *,
        count: int = 1,
        rank: int = 0,
        replicas: int | None = None,
        reduces: bool = False,
    ) -> None:
        self._device = device
        self.count = count
        self.rank = rank
        self.reduces = reduces
        # Ranks of one replica, as under tensor parallelism, have the same examples.
        self._replica_share = 1.0 if replicas is None else replicas / count

    @property
    def share(self) -> float:
        """Factor on a loss whose gradients arrive as a mean over the processes, so that they are a sum."""
        return float(self.count) if self.reduces else 1.0

    @property
    def reducer_owns_gradients(self) -> bool:
        """Whether the processes have `DistributedDataParallel` add up their gradients."""
        return self.count > 1 and not self.reduces

    def total(self, *values: float) -> tuple[float, ...]:
        """Sum numbers over the processes, in one message.

        Args:
            *values: of this process.

        Returns:
            The sums, equal everywhere.
        """
        return self._reduced(values, torch.distributed.ReduceOp.SUM) if self.count > 1 else values

    def examples(self, *counts: float) -> tuple[float, ...]:
        """Sum counts of examples over the processes, each example once, in one message."""
        return tuple(self._replica_share * count for count in self.total(*counts))

    def least(self, *values: float) -> tuple[float, ...]:
        """The smallest of each number over the processes, likewise."""
        return self._reduced(values, torch.distributed.ReduceOp.MIN) if self.count > 1 else values

    def first(self, value: T) -> T:
        """What the first process has: floating point need not agree to the last digit between devices."""
        if self.count == 1:
            return value
        message = [value]
        torch.distributed.broadcast_object_list(message, 0, device=torch.device(self._device))
        return message[0]

    def _reduced(self, values: Sequence[float], how: Any) -> tuple[float, ...]:
        message = torch.tensor(values, dtype=torch.float64, device=self._device)
        torch.distributed.all_reduce(message, how)
        return tuple(message.tolist())

    def meet(self, *, failed: bool = False, final: bool = False) -> None:
        """Wait for all processes, and learn whether they got here.

        A process that fails between two meetings must come to the next one all the same, with `failed`, where
        the others expect it.

        Args:
            failed: whether this process comes to say that it failed.
            final: whether it will not try again, so that no process may.

        Raises:
            RankError: if another one did.
        """
        if self.count == 1:
            return
        failures, finals = self.total(float(failed), float(failed and final))
        if failures and not failed:
            raise RankError(
                f"Expected {self.count} processes to measure together, but {failures:g} of them failed",
                final=finals > 0.0,
            )

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace every `.grad` by its sum over the processes.

        Args:
            parameters: None counts as zero where another process has a gradient; it becomes zeros.

        Raises:
            RankError: if another process failed on the way here.
        """
        if self.count == 1:
            return
        if self.reduces:
            self.meet()
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            elif parameter.grad.is_sparse:
                parameter.grad = parameter.grad.to_dense()
        self.sum([parameter.grad for parameter in parameters if parameter.grad is not None])

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors over the processes, in place.

        Args:
            tensors: of the same shapes everywhere.

        Raises:
            RankError: if another process failed on the way here.
        """
        if self.count == 1:
            return
        bunches = list(_bunches(tensors))
        # Whatever memory it takes is taken before the processes meet: nothing can fail between the messages.
        room: dict[torch.dtype, Tensor] = {}
        for bunch in bunches:
            needed, dtype = sum(tensor.numel() for tensor in bunch), bunch[0].dtype
            if dtype not in room or room[dtype].numel() < needed:
                room[dtype] = torch.empty(needed, dtype=dtype, device=bunch[0].device)
        self.meet()
        for bunch in bunches:
            sizes = [tensor.numel() for tensor in bunch]
            message = room[bunch[0].dtype][: sum(sizes)]
            torch.cat([tensor.reshape(-1) for tensor in bunch], out=message)
            torch.distributed.all_reduce(message)
            for tensor, part in zip(bunch, torch.split(message, sizes), strict=True):
                tensor.copy_(part.view_as(tensor))


def _bunches(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive tensors of one dtype, as many as fit into a message."""
    bunch: list[Tensor] = []
    elements = 0
    for tensor in map(local, tensors):
        full = elements + tensor.numel() > MESSAGE_ELEMENTS
        if bunch and (full or tensor.dtype != bunch[0].dtype):
            yield bunch
            bunch, elements = [], 0
        bunch.append(tensor)
        elements += tensor.numel()
    if bunch:
        yield bunch


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
