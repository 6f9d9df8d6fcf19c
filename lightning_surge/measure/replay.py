"""Run a module's training step again and leave no trace of it.

A probe recomputes gradients in the middle of training. Everything that a training step may change
is put back bit for bit afterwards: gradients, buffers, random streams, metric states, settings of optimizers
and schedulers, and the Python attributes of every submodule and of the objects that it holds, in `__dict__`
or in `__slots__`. What moves parameters (`curvature.displaced`) restores them; a training step that moves
some itself, as the moving average of a teacher, is found out.
"""

from __future__ import annotations

import copy
import math
import random
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, MutableSequence, MutableSet
from contextlib import contextmanager
from functools import lru_cache, partial
from types import BuiltinFunctionType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, Sampler
from torchmetrics import Metric

from lightning_surge.measure.distributed import local

# Plain tensor attributes up to this many elements are copied; a change of a larger one cannot be
# undone and is reported instead. Buffers and metric states are always copied.
COPIED_ELEMENTS = 1 << 20


class TraceError(RuntimeError):
    """A replayed step changed something that it must not change, or that cannot be put back."""


class ChangedBatchError(RuntimeError):
    """A training step changed its batch, which therefore cannot be passed again."""


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
    """

    pieces: tuple[Piece, ...]
    total: float | None = None

    @property
    def size(self) -> float:
        """Examples in all pieces."""
        return sum(piece.size for piece in self.pieces) if self.total is None else self.total


@contextmanager
def no_trace(
    modules: Iterable[nn.Module],
    parameters: Mapping[str, Tensor],
    *,
    others: Iterable[Any] = (),
    copies: bool = False,
) -> Iterator[None]:
    """Undo on exit whatever the block did to gradients, buffers, random streams, groups and attributes.

    Inside, every gradient is None. Objects that modules hold are covered as far as their attributes can be
    seen: schedulers, dataclasses, counters. An iterator that cannot be copied may not be drawn from.
    """
    memory = _Memory()
    try:
        # Memory may give out in here, too: what has been done by then is undone.
        for thing in (*modules, *others):
            memory.remember(thing)
        memory.undo.append(_remember_parameters(parameters, copies=copies))
        for parameter in parameters.values():
            memory.undo.append(partial(setattr, parameter, "grad", parameter.grad))
            parameter.grad = None
        yield
    except BaseException:
        memory.put_back()  # what was raised matters more than a trace
        raise
    if failures := memory.put_back():
        # The error's own traceback must not lead back to it: what a probe holds would outlive it.
        error = failures.pop(0)
        try:
            raise error
        finally:
            del error, failures


REMEDY = "pass loss_fn=, a function of (module, batch) that returns the mean loss and changes nothing"


def _remember_parameters(parameters: Mapping[str, Tensor], *, copies: bool) -> Callable[[], None]:
    """Compare parameters with what they are now, and put those back of which there are copies."""
    tensors = {name: local(parameter.data) for name, parameter in parameters.items()}
    small = sum(tensor.numel() for tensor in tensors.values()) <= COPIED_ELEMENTS
    kept = {}
    for name, tensor in tensors.items():
        # Whole copies of what the optimizer moves would be one more buffer of its size.
        if small or (copies and (tensor.numel() <= COPIED_ELEMENTS or not parameters[name].requires_grad)):
            kept[name] = tensor.clone()
    before = _sums_of_bits(tensors.values())

    def check() -> None:
        after = _sums_of_bits(local(parameter.data) for parameter in parameters.values())
        changed = [name for name, old, new in zip(tensors, before, after, strict=True) if old != new]
        for name in changed:
            if name in kept:
                local(parameters[name].data).copy_(kept[name])
        if changed:
            raise TraceError(
                f"Expected a training_step that leaves parameters to the optimizer, but it changes "
                f"{', '.join(changed[:3])}: {REMEDY}"
            )

    return check


def _sums_of_bits(tensors: Iterable[Tensor]) -> list[tuple[int, ...]]:
    """Sums over each tensor's bits, read as whole numbers, and over their places, so that order counts too.

    Any change shows, and nothing is copied.
    """
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums: dict[torch.device, list[Tensor]] = {}
    order = []
    for tensor in tensors:
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        bits = real.view(kinds[real.element_size()]).reshape(-1)
        width = max(math.isqrt(bits.numel()), 1)
        found = sums.setdefault(tensor.device, [])
        order.append((tensor.device, len(found)))
        for part in (bits[: bits.numel() // width * width].view(-1, width), bits.view(1, -1)[:, -width:]):
            rows, columns = (part.sum(dim, dtype=torch.int64) for dim in (1, 0))
            found += [
                (line * torch.arange(1, len(line) + 1, device=line.device)).sum() for line in (rows, columns)
            ]
    read = {device: torch.stack(found).tolist() for device, found in sums.items()}
    return [tuple(read[device][index : index + 4]) for device, index in order]


# nn.Module's own registries: torch manages them, and a training step does not touch them.
_REGISTRIES = frozenset(vars(nn.Module())) - {"training"}
# Lightning's references to the trainer lead out of the module.
_OUTWARD = frozenset({"_trainer", "_fabric"})
# What holds no state that a step may change, or more of it than can be looked through.
_OPAQUE = (type, ModuleType, FunctionType, MethodType, BuiltinFunctionType, Dataset, DataLoader, Sampler)
_ATOMS = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size)
_LIBRARIES = frozenset({"torch", "lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics"})


class _Guard:
    """Stands in for an iterator that a repeated step would draw from for good."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        raise TraceError(
            f"Expected a training_step whose traces can be removed, but it uses {vars(self)['_name']}, which "
            f"cannot be put back: {REMEDY}"
        )

    def __iter__(self) -> Any:
        return self.__getattr__("__iter__")

    def __next__(self) -> Any:
        return self.__getattr__("__next__")


@lru_cache(maxsize=4096)
def _slots_of(kind: type) -> dict[str, MemberDescriptorType]:
    """The places of `__slots__` in the objects of a class, those of its parents too."""
    return {
        name: place
        for parent in reversed(kind.__mro__)
        if "__slots__" in vars(parent)
        for name, place in vars(parent).items()
        if isinstance(place, MemberDescriptorType)
    }


class _Slots(MutableMapping[str, Any]):
    """What is set of an object's `__slots__`, as `vars` shows other attributes."""

    def __init__(self, owner: Any) -> None:
        self._owner, self._places = owner, _slots_of(type(owner))  # type: ignore[arg-type]

    def __getitem__(self, name: str) -> Any:
        try:
            return self._places[name].__get__(self._owner)
        except AttributeError:
            raise KeyError(name) from None

    def __setitem__(self, name: str, value: Any) -> None:
        self._places[name].__set__(self._owner, value)

    def __delitem__(self, name: str) -> None:
        self._places[name].__delete__(self._owner)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._places if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _where_it_stands(value: Any) -> Any:
    """A copy of a built-in iterator at the same place; anything else itself."""
    if isinstance(value, Iterator) and not _has_attributes(value):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # itertools, from Python 3.12 on
                return copy.copy(value)
        except TypeError:
            return value
    return value


def _has_attributes(value: Any) -> bool:
    return isinstance(getattr(value, "__dict__", None), dict) or bool(_slots_of(type(value)))  # type: ignore[arg-type]


def _is_plain_object(value: Any) -> bool:
    """Whether an object keeps its state in attributes, and is no part of a framework but a scheduler."""
    if isinstance(value, _OPAQUE) or not _has_attributes(value):
        return False
    ours = type(value).__module__.partition(".")[0] in _LIBRARIES
    return isinstance(value, LRScheduler) or not ours


class _Memory:
    """What puts things back in place, so that other references see it too.

    Attributes:
        undo: to be called in reverse order.
    """

    def __init__(self) -> None:
        self.undo: list[Callable[[], object]] = [RandomState.capture().restore]
        self._seen: set[int] = set()

    def put_back(self) -> list[Exception]:
        """Undo everything; the errors on the way."""
        failures: list[Exception] = []
        for step in reversed(self.undo):
            try:
                step()
            except Exception as error:  # one that fails must not keep the others from running
                failures.append(error)
        return failures

    def _is_new(self, value: Any) -> bool:
        new = id(value) not in self._seen
        self._seen.add(id(value))
        return new

    def remember(self, value: Any, *, always: bool = False) -> None:
        """Note how things stand; `always` copies tensors of any size."""
        if isinstance(value, (nn.Parameter, *_ATOMS)):
            return
        if isinstance(value, nn.Module):
            for module in value.modules():
                self._remember_module(module)
        elif isinstance(value, (torch.Generator, np.random.RandomState)):
            self.undo.append(partial(value.set_state, value.get_state()))  # type: ignore[arg-type]
        elif isinstance(value, np.random.Generator):
            self.undo.append(partial(setattr, value.bit_generator, "state", value.bit_generator.state))
        elif isinstance(value, random.Random):
            self.undo.append(partial(value.setstate, value.getstate()))
        elif isinstance(value, np.ndarray) and value.flags.writeable:
            self.undo.append(partial(np.copyto, value, value.copy()))
        elif isinstance(value, Tensor):
            if self._is_new(value):
                self._remember_tensor(value, always=always)
        elif isinstance(value, Optimizer):
            if self._is_new(value):
                self._remember_optimizer(value)
        elif isinstance(value, (MutableMapping, MutableSequence, MutableSet, deque, tuple)):
            if self._is_new(value):
                self._remember_container(value, always=always)
        elif _is_plain_object(value) and self._is_new(value):
            self._remember_attributes(value, frozenset(), always=always)

    def _remember_module(self, module: nn.Module) -> None:
        if not self._is_new(module):
            return
        self.undo.append(partial(_refill, module._buffers, dict(module._buffers)))
        self._remember_tensors(module._buffers.values())
        self._remember_attributes(module, _REGISTRIES, always=isinstance(module, Metric))

    def _remember_attributes(self, owner: Any, left_out: frozenset[str], *, always: bool) -> None:
        """Put the attributes of an object back, with the iterators among them where they stood."""
        for own in (getattr(owner, "__dict__", {}), _Slots(owner)):
            self._remember_names(own, type(owner).__name__, left_out, always=always)

    def _remember_names(
        self, own: MutableMapping[str, Any], kind: str, left_out: frozenset[str], *, always: bool
    ) -> None:
        attributes = {name: _where_it_stands(value) for name, value in own.items() if name not in left_out}

        def put_back() -> None:
            for name in own.keys() - attributes.keys() - left_out:
                del own[name]
            own.update(attributes)

        self.undo.append(put_back)
        for name, value in list(attributes.items()):
            if isinstance(value, Iterator) and value is own[name] and not _has_attributes(value):
                own[name] = _Guard(f"{kind}.{name}")
            elif name not in _OUTWARD:
                self.remember(value, always=always)

    def _remember_optimizer(self, optimizer: Optimizer) -> None:
        groups = [(group, dict(group)) for group in optimizer.param_groups]

        def put_back() -> None:
            optimizer.param_groups[:] = [group for group, _ in groups]
            for group, entries in groups:
                _refill(group, entries)

        self.undo.append(put_back)
        for _, entries in groups:
            self._remember_tensors(entries.values())

        def versions() -> list[int]:
            states = optimizer.state.values()
            return [one._version for state in states for one in state.values() if isinstance(one, Tensor)]

        before = versions()

        def check() -> None:
            if versions() != before:
                raise TraceError(
                    f"Expected a training_step that leaves the steps of {type(optimizer).__name__} to "
                    f"Lightning, but its state has changed: {REMEDY}"
                )

        self.undo.append(check)

    def _remember_container(self, value: Any, *, always: bool) -> None:
        children = list(value.values()) if isinstance(value, MutableMapping) else list(value)
        if isinstance(value, MutableMapping):
            self.undo.append(partial(_refill, value, {k: _where_it_stands(one) for k, one in value.items()}))
        elif isinstance(value, MutableSet):
            self.undo.append(partial(_refill, value, children))
            return  # its members are hashable, hence not changed in place
        elif not isinstance(value, tuple):
            self.undo.append(partial(_refill, value, list(map(_where_it_stands, children))))
        for child in children:
            if not isinstance(child, _ATOMS):
                self.remember(child, always=always)

    def _remember_tensors(self, values: Iterable[Any]) -> None:
        for value in values:
            if isinstance(value, Tensor) and self._is_new(value):
                self._remember_tensor(value, always=True)

    def _remember_tensor(self, tensor: Tensor, *, always: bool) -> None:
        # The data itself, in case the tensor is pointed at other data.
        data = tensor.data
        self.undo.append(partial(setattr, tensor, "data", data))
        if any(stride == 0 and size > 1 for stride, size in zip(data.stride(), data.shape, strict=True)):
            return  # torch refuses to write to an expanded tensor, so nobody can have
        if always or tensor.numel() <= COPIED_ELEMENTS or tensor.is_inference():
            self.undo.append(partial(data.copy_, data.clone()))
            return
        version = tensor._version

        def check() -> None:
            if tensor._version != version:
                raise TraceError(
                    f"Expected a repeatable training step, but it changes a tensor attribute of shape "
                    f"{tuple(tensor.shape)} in place: register it as a buffer, or {REMEDY}"
                )

        self.undo.append(check)


def _refill(container: Any, members: Any) -> None:
    """Let a mapping, set or sequence hold what it held."""
    container.clear()
    if isinstance(container, MutableMapping):
        container.update(members)
    elif isinstance(container, MutableSet):
        for member in members:
            container.add(member)
    else:
        container.extend(members)
