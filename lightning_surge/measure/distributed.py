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
from torch.distributed.tensor import DTensor

T = TypeVar("T")

# Gradients are summed in buffers of about this many elements: one message each.
MESSAGE_ELEMENTS = 1 << 22


class RankError(RuntimeError):
    """Another process failed, so that this one cannot go on either."""

    def __init__(self, message: str, *, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


class Ranks:
    """A group of processes, or a single one, for which everything here is free."""

    def __init__(
        self,
        device: torch.device | str = "cpu",
        *,
        count: int = 1,
        rank: int = 0,
        replicas: int | None = None,
        sharded: bool = False,
    ) -> None:
        self._device = device
        self.count = count
        self.rank = rank
        self.sharded = sharded
        # Ranks of one replica, as under tensor parallelism, have the same examples.
        self.replica_share = 1.0 if replicas is None else replicas / count

    def total(self, *values: float) -> tuple[float, ...]:
        """Sum numbers over the processes, in one message."""
        return self._reduced(values, torch.distributed.ReduceOp.SUM) if self.count > 1 else values

    def examples(self, *counts: float) -> tuple[float, ...]:
        """Sum counts of examples over the processes, each example once, in one message."""
        return tuple(self.replica_share * count for count in self.total(*counts))

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
        """Replace every `.grad` by its sum over the processes."""
        if self.count == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            elif parameter.grad.is_sparse:
                parameter.grad = parameter.grad.to_dense()
        self.sum([parameter.grad for parameter in parameters if parameter.grad is not None])

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors over the processes, in place."""
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
    """The piece of a tensor that this process holds: all of it, unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


ALONE = Ranks()
