"""Cut a batch into slices, and group pieces of batches into chunks."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor

__all__ = [
    "BatchError",
    "SplitBatch",
    "TooFewExamplesError",
    "group_evenly",
    "shared_copy",
    "split_leading_dimension",
    "tensors_in",
]

SplitBatch = Callable[[Any, int], Sequence[Any]]
"""Cuts a batch into so many slices of about equal size, each a batch that a training step takes."""


class BatchError(ValueError):
    """A batch cannot be cut."""


class TooFewExamplesError(BatchError):
    """A batch can be cut, but not into so many slices."""


def split_leading_dimension(batch: Any, num_slices: int) -> list[Any]:
    """Cut every tensor and array in a batch along its first dimension.

    Tensors, arrays and lists are data and must agree on their length; mappings, tuples and dataclasses
    are structure; anything else (a string, a number, None, a scalar tensor) is shared by all slices.

    Args:
        batch: what a DataLoader yields, nested at will.
        num_slices: slices to cut, from 1 to the number of examples.

    Returns:
        The slices, in order; their sizes differ by at most one example.

    Raises:
        BatchError: if the leading dimensions disagree, or there is none.
        TooFewExamplesError: if there are fewer examples than slices.

    Example:
        >>> import torch
        >>> [x.tolist() for x, name in split_leading_dimension((torch.arange(5), "train"), 2)]
        [[0, 1], [2, 3, 4]]
    """
    lengths: list[int] = []
    _map(batch, lambda data: lengths.append(len(data)))
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


def _map(batch: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(batch, (Tensor, np.ndarray)):
        return function(batch) if batch.ndim else batch
    if isinstance(batch, Mapping):
        items = {key: _map(value, function) for key, value in batch.items()}
        if type(batch) is dict:
            return items
        # A subclass may take other arguments, as defaultdict does; a copy has them already.
        copied: Any = copy.copy(batch)
        for key, value in items.items():
            copied[key] = value
        return copied
    if isinstance(batch, tuple):
        values = [_map(value, function) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else tuple(values)
    if isinstance(batch, list):
        # A list of tensors is what default collation makes of a list of fields; of anything else, examples.
        if batch and all(isinstance(value, (Tensor, np.ndarray, Mapping, list, tuple)) for value in batch):
            return [_map(value, function) for value in batch]
        return function(batch)
    if is_dataclass(batch) and not isinstance(batch, type):
        changes = {field.name: _map(getattr(batch, field.name), function) for field in fields(batch)}
        return replace(batch, **changes)
    return batch


def shared_copy(batch: Any) -> Any:
    """The same data in new containers, so that taking something out of one leaves the other whole.

    Args:
        batch: nested mappings, sequences and dataclasses of tensors and anything else.

    Returns:
        A batch whose tensors and arrays are the very same objects.

    Example:
        >>> batch = {"x": [1, 2]}
        >>> copied = shared_copy(batch)
        >>> _ = batch.pop("x"); copied
        {'x': [1, 2]}
    """
    return _map(batch, lambda data: list(data) if isinstance(data, list) else data)


def tensors_in(batch: Any) -> list[Tensor]:
    """Every tensor in a batch, in order."""
    found: list[Tensor] = []
    _map(batch, lambda data: found.append(data) if isinstance(data, Tensor) else None)
    return found


def group_evenly(items: Sequence[Any], num_groups: int) -> list[list[Any]]:
    """Deal consecutive items into groups whose numbers differ by at most one.

    Args:
        items: what to deal.
        num_groups: from 1 to the number of items.

    Returns:
        The groups, in order, none of them empty.

    Raises:
        ValueError: If `num_groups` is not from 1 to the number of items.

    Example:
        >>> group_evenly([1, 2, 3, 4, 5], 2)
        [[1, 2], [3, 4, 5]]
    """
    if not 1 <= num_groups <= len(items):
        raise ValueError(
            f"Expected 1 <= num_groups <= {len(items)} items, got num_groups={num_groups}: make as many"
            " groups as there are items at most."
        )
    edges = [index * len(items) // num_groups for index in range(num_groups + 1)]
    return [list(items[a:b]) for a, b in pairwise(edges)]
