"""Run a module's training step again and leave no trace of it.

A probe recomputes gradients in the middle of training. Everything that a training step may change
is put back bit for bit afterwards: gradients, buffers, random streams, metric states, and the plain
Python attributes (lists, dicts, counters) of every submodule. Parameters are not copied here; what
moves them (`curvature.displaced`) restores them.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, MutableMapping, MutableSequence, MutableSet
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric

__all__ = ["Chunk", "Piece", "RandomState", "TraceError", "no_trace"]

# Plain tensor attributes up to this many elements are copied; a change of a larger one cannot be
# undone and is reported instead. Buffers and metric states are always copied.
COPIED_ELEMENTS = 1 << 20


class TraceError(RuntimeError):
    """A replayed step changed something that could not be put back."""


class RandomState(NamedTuple):
    """The states of Python's, NumPy's and torch's global random streams."""

    python: Any
    numpy: Any
    torch: Tensor
    cuda: list[Tensor]

    @classmethod
    def capture(cls) -> RandomState:
        """Read the streams as they are now."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)  # noqa: NPY002

    def restore(self) -> None:
        """Set the streams back to what was captured."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002
        torch.set_rng_state(self.torch)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


class Piece(NamedTuple):
    """A batch, or a slice of one, whose gradient can be computed again.

    Attributes:
        batch: what `training_step` or `loss_fn` takes.
        batch_idx: the index that the step was, or would be, called with.
        size: examples in `batch`, or whatever `batch_size_fn` counts.
        random_state: the streams to compute with, so that dropout masks repeat; None goes on with
            the streams as they are.
    """

    batch: Any
    batch_idx: int
    size: float
    random_state: RandomState | None = None


class Chunk(NamedTuple):
    """Pieces whose gradients count as one, weighted by their sizes.

    Attributes:
        pieces: those of this process.
        total: examples in the pieces of all processes that measure together; None if there is only this one.
        mine: whether the pieces count. Those of a chunk that belongs to other processes are passed along with
            weight 0: whatever a training step says to the other processes, all of them must say it.
        idle: examples that count nothing but are passed, by other processes.
    """

    pieces: tuple[Piece, ...]
    total: float | None = None
    mine: bool = True
    idle: float = 0.0

    @property
    def size(self) -> float:
        """Examples in all pieces."""
        return sum(piece.size for piece in self.pieces) if self.total is None else self.total


@contextmanager
def no_trace(modules: Iterable[nn.Module], parameters: Iterable[Tensor]) -> Iterator[None]:
    """Undo on exit whatever the block did to gradients, buffers, random streams and attributes.

    Inside, every gradient is None. A module inside a list or dict attribute is covered too; an object
    of another class that keeps state of its own is not.

    Args:
        modules: the modules that run, submodules included by the caller's `modules()`.
        parameters: every parameter whose `.grad` the block may touch.

    Raises:
        TraceError: on exit, if a tensor attribute too large to copy was changed in place.
    """
    undo: list[Callable[[], object]] = [RandomState.capture().restore]
    seen: set[int] = set()
    for module in modules:
        _remember_module(module, undo, seen)
    gradients = [(parameter, parameter.grad) for parameter in parameters]
    for parameter, _ in gradients:
        parameter.grad = None

    def put_back() -> list[Exception]:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        failures: list[Exception] = []
        for step in reversed(undo):
            try:
                step()
            except Exception as error:  # one that fails must not keep the others from running
                failures.append(error)
        return failures

    try:
        yield
    except BaseException:
        put_back()  # what was raised matters more than a trace
        raise
    if failures := put_back():
        # The error's own traceback must not lead back to it: what a probe holds would outlive it.
        error = failures.pop(0)
        try:
            raise error
        finally:
            del error, failures


# nn.Module's own registries: torch manages them, and a training step does not touch them.
_REGISTRIES = frozenset(vars(nn.Module())) - {"training"}


def _remember_module(module: nn.Module, undo: list[Callable[[], object]], seen: set[int]) -> None:
    if id(module) in seen:
        return
    seen.add(id(module))
    buffers = dict(module._buffers)

    def put_buffers_back() -> None:
        module._buffers.clear()
        module._buffers.update(buffers)

    undo.append(put_buffers_back)
    for buffer in buffers.values():
        if buffer is not None:
            _remember_tensor(buffer, undo, seen, always=True)

    attributes = {name: value for name, value in vars(module).items() if name not in _REGISTRIES}

    def put_attributes_back() -> None:
        for name in vars(module).keys() - attributes.keys() - _REGISTRIES:
            del vars(module)[name]
        vars(module).update(attributes)

    undo.append(put_attributes_back)
    for name, value in attributes.items():
        # Lightning's references to the trainer lead out of the module.
        if name not in ("_trainer", "_fabric"):
            _remember(value, undo, seen, always=isinstance(module, Metric))


def _remember(value: Any, undo: list[Callable[[], object]], seen: set[int], *, always: bool) -> None:
    """Append what puts a mutable value back in place, so that other references see it too."""
    if isinstance(value, nn.Parameter):
        return
    if isinstance(value, Tensor):
        _remember_tensor(value, undo, seen, always=always)
    elif isinstance(value, nn.Module):
        for module in value.modules():
            _remember_module(module, undo, seen)
    elif isinstance(value, torch.Generator):
        undo.append(partial(value.set_state, value.get_state()))
    elif isinstance(value, np.random.Generator):
        undo.append(partial(setattr, value.bit_generator, "state", value.bit_generator.state))
    elif isinstance(value, np.random.RandomState):
        undo.append(partial(value.set_state, value.get_state()))
    elif isinstance(value, random.Random):
        undo.append(partial(value.setstate, value.getstate()))
    elif isinstance(value, np.ndarray) and value.flags.writeable:
        undo.append(partial(np.copyto, value, value.copy()))
    elif isinstance(value, (MutableMapping, MutableSequence, MutableSet, deque, tuple)):
        _remember_container(value, undo, seen, always=always)


def _remember_container(
    value: Any, undo: list[Callable[[], object]], seen: set[int], *, always: bool
) -> None:
    if id(value) in seen:
        return
    seen.add(id(value))
    children: list[Any]
    if isinstance(value, MutableMapping):
        undo.append(partial(_refill_mapping, value, dict(value)))
        children = list(value.values())
    elif isinstance(value, MutableSet):
        undo.append(partial(_refill_set, value, set(value)))
        children = []  # hashable, hence not changed in place
    else:
        children = list(value)
        if not isinstance(value, tuple):
            undo.append(partial(_refill_sequence, value, list(children)))
    for child in children:
        _remember(child, undo, seen, always=always)


def _refill_mapping(mapping: MutableMapping[Any, Any], items: dict[Any, Any]) -> None:
    mapping.clear()
    mapping.update(items)


def _refill_set(members: MutableSet[Any], saved: set[Any]) -> None:
    members.clear()
    for member in saved:
        members.add(member)


def _refill_sequence(sequence: MutableSequence[Any], elements: list[Any]) -> None:
    sequence.clear()
    sequence.extend(elements)


def _remember_tensor(
    tensor: Tensor, undo: list[Callable[[], object]], seen: set[int], *, always: bool
) -> None:
    if id(tensor) in seen:
        return
    seen.add(id(tensor))
    # The data itself, in case the tensor is pointed at other data.
    data = tensor.data
    overlapping = any(
        stride == 0 and size > 1 for stride, size in zip(data.stride(), data.shape, strict=True)
    )
    undo.append(partial(setattr, tensor, "data", data))
    if overlapping:
        return  # torch refuses to write to an expanded tensor, so nobody can have
    if always or tensor.numel() <= COPIED_ELEMENTS or tensor.is_inference():
        undo.append(partial(data.copy_, data.clone()))
        return
    version = tensor._version

    def check() -> None:
        if tensor._version != version:
            raise TraceError(
                f"Expected a repeatable training step, but it changes a tensor attribute of shape "
                f"{tuple(tensor.shape)} in place: register it as a buffer, or pass loss_fn=, a function "
                "of (module, batch) that returns the mean loss and changes nothing."
            )

    undo.append(check)
