"""Cut a batch into slices, and group pieces of batches into chunks."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor

SplitBatch = Callable[[Any, int], Sequence[Any]]
"""Cuts a batch into so many slices of about equal size, each a batch that a training step takes."""


DATA = (Tensor, np.ndarray, list)
FIELDS = (Tensor, np.ndarray, Mapping, list, tuple)


class BatchError(ValueError):
    """A batch cannot be cut."""


class TooFewExamplesError(BatchError):
    """A batch can be cut, but not into so many slices."""


def split_leading_dimension(batch: Any, num_slices: int) -> list[Any]:
    """Cut every tensor and array in a batch along its first dimension.

    Tensors, arrays and lists are data and must agree on their length; mappings, tuples and dataclasses
    are structure; anything else (a string, a number, None, a scalar tensor) is shared by all slices.

    Example:
        >>> import torch
        >>> [x.tolist() for x, name in split_leading_dimension((torch.arange(5), "train"), 2)]
        [[0, 1], [2, 3, 4]]
    """
    lengths = [len(leaf) for leaf in leaves(batch) if isinstance(leaf, DATA) and not _is_scalar(leaf)]
    remedy = "pass split_batch=, a function of (batch, num_slices) that returns the slices."
    if not lengths:
        raise BatchError(f"Expected a batch with tensors to slice, got {type(batch).__name__}: {remedy}")
    if len(set(lengths)) > 1:
        raise BatchError(
            f"Expected one length along the leading dimension of everything in the batch, got lengths "
            f"{sorted(set(lengths))}: {remedy}"
        )
    if not 1 <= num_slices <= lengths[0]:
        raise TooFewExamplesError(
            f"Expected 1 <= num_slices <= examples in the batch, got num_slices={num_slices}, "
            f"{lengths[0]} examples: use larger batches, or let several be pooled."
        )
    groups = group_evenly(range(lengths[0]), num_slices)
    return [_map(batch, operator.itemgetter(slice(group[0], group[-1] + 1))) for group in groups]


def _parts(batch: Any) -> Iterable[Any] | None:
    """What a container holds; None of data and anything else."""
    if isinstance(batch, Mapping):
        return batch.values()
    if isinstance(batch, tuple):
        return batch
    if isinstance(batch, list):
        # A list of tensors is what default collation makes of a list of fields; of anything else, examples.
        return batch if batch and all(isinstance(value, FIELDS) for value in batch) else None
    if is_dataclass(batch) and not isinstance(batch, type):
        return (getattr(batch, field.name) for field in fields(batch) if hasattr(batch, field.name))
    return None


def leaves(batch: Any) -> Iterator[Any]:
    """Tensors, arrays, lists of examples, and whatever else a batch holds, in order. Nothing is rebuilt."""
    parts = _parts(batch)
    if parts is None:
        yield batch
    else:
        for part in parts:
            yield from leaves(part)


def _is_scalar(data: Any) -> bool:
    return isinstance(data, (Tensor, np.ndarray)) and not data.ndim


def _map(batch: Any, function: Callable[[Any], Any]) -> Any:
    """The same containers with `function` of the data in them, scalars and other objects as they are."""
    if _parts(batch) is None:
        return function(batch) if isinstance(batch, DATA) and not _is_scalar(batch) else batch
    if isinstance(batch, (tuple, list)):
        values = [_map(value, function) for value in batch]
        if isinstance(batch, list):
            return values
        return type(batch)(*values) if hasattr(batch, "_fields") else tuple(values)
    if isinstance(batch, Mapping):
        items = {key: _map(value, function) for key, value in batch.items()}
        if type(batch) is dict:
            return items
        # A subclass may take other arguments, as defaultdict does; a copy has them already.
        copied: Any = copy.copy(batch)
        for key, value in items.items():
            copied[key] = value
        return copied
    # Not made anew: a dataclass may take other arguments than its fields, and check those.
    copied = copy.copy(batch)
    for field in fields(batch):
        if hasattr(batch, field.name):
            object.__setattr__(copied, field.name, _map(getattr(batch, field.name), function))
    return copied


def shared_copy(batch: Any) -> Any:
    """The same data in new containers, so that taking something out of one leaves the other whole."""
    try:
        return _map(batch, lambda data: list(data) if isinstance(data, list) else data)
    except Exception:
        return batch


def tensors_in(batch: Any) -> list[Tensor]:
    """Every tensor in a batch, in order."""
    return [leaf for leaf in leaves(batch) if isinstance(leaf, Tensor)]


def group_evenly(items: Sequence[Any], num_groups: int) -> list[list[Any]]:
    """Deal consecutive items into groups whose numbers differ by at most one."""
    if not 1 <= num_groups <= len(items):
        raise ValueError(
            f"Expected 1 <= num_groups <= {len(items)} items, got num_groups={num_groups}: make as many"
            " groups as there are items at most."
        )
    edges = [index * len(items) // num_groups for index in range(num_groups + 1)]
    return [list(items[a:b]) for a, b in pairwise(edges)]
