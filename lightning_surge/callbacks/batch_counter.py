"""How many examples a batch holds: counted where that is certain, asked for where it is not.

The count multiplies the learning rate, so it is never guessed. Lightning takes the leading dimension of the
first tensor that it finds: nodes of a batch of graphs, channels of the first image of a list, time steps
where these come first. What the first batch of a loader holds is compared with what the loader says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from numbers import Real
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_surge.checking.arguments import function, optional
from lightning_surge.measure.batches import DATA, leaves

Rule = Callable[[Any], float]


class BatchCounter:
    """Counts with the user's function, or by the rule that fits the first batch of a loader.

    Example:
        >>> import torch
        >>> count = BatchCounter(None, "Callback")
        >>> count((torch.zeros(8, 3), torch.zeros(8)))
        8.0
        >>> count((torch.zeros(37, 3), torch.zeros(8)))
        Traceback (most recent call last):
        lightning.fabric.utilities.exceptions.MisconfigurationException: Callback cannot tell how ...
    """

    def __init__(self, batch_size_fn: Callable[[Any], float] | None, owner: str) -> None:
        optional(function, "batch_size_fn", batch_size_fn, of="a batch")
        self._function = batch_size_fn
        self._owner = owner
        self._rule: Rule | None = batch_size_fn
        self._loader: object = None

    def __call__(self, batch: Any) -> float:
        """Examples in a batch, or in a slice of one. Zero is a batch that weighs nothing."""
        size = (self._rule or self._choose(batch, None))(batch)
        if not isinstance(size, Real):
            size = _as_number(size)
        if not 0 <= size < math.inf:
            raise ValueError(
                f"Expected batch_size_fn to return 0 <= examples < inf, got {size!r}: count what the "
                "batch holds."
            )
        return float(size)

    def first(self, batch: Any, loader: object) -> float:
        """Examples in a batch of a loader, of which the first decides how batches are counted."""
        if self._function is None and loader is not self._loader:
            self._rule, self._loader = self._choose(batch, loader), loader
        return self(batch)

    def _choose(self, batch: Any, loader: object) -> Rule:
        """Which of the rules is certain."""
        if isinstance(getattr(batch, "num_graphs", None), int):
            return lambda batch: float(batch.num_graphs)
        loaded, full = _loaded(loader)
        found = list(_lengths(batch))
        lengths = {length for _, length in found}
        if loaded is not None:
            # What fills a batch of the loader to the last example is what the loader counts.
            if found and found[0][1] == loaded:
                return _leading
            if isinstance(batch, list) and len(batch) == loaded and full and lengths != {loaded}:
                return len
        certain = len(lengths) == 1 and (loaded is None or (found[0][1] <= loaded and not full))
        if certain:
            return _leading
        seen = f"{found[0][1]} in the first tensor, {found[0][0]}" if found else "no tensor"
        others = sorted({length for _, length in found[1:] if length != found[0][1]})
        also = f", and {', '.join(map(str, others[:3]))} in others" if others else ""
        says = "" if loaded is None else f" The DataLoader says batch_size={loaded}."
        raise MisconfigurationException(
            f"{self._owner} cannot tell how many examples a {type(batch).__name__} holds, and the learning "
            f"rate depends on it: got {seen}{also}.{says} Pass batch_size_fn=, a function of a batch that "
            "returns its number of examples."
        )


def _leading(batch: Any) -> float:
    if type(batch) in (list, tuple) and set(map(type, batch)) == {Tensor} and batch[0].ndim:
        return int(batch[0].shape[0])  # the usual batch, at every step
    return next(_lengths(batch))[1]


def _lengths(batch: Any) -> Iterator[tuple[str, int]]:
    """What each tensor, array or list of examples is, and how long."""
    for leaf in leaves(batch):
        if isinstance(leaf, DATA):
            shape = getattr(leaf, "shape", None)
            if shape is None:
                yield f"a list of {len(leaf)}", len(leaf)
            elif len(shape) > 0:
                yield f"of shape {tuple(shape)}", int(shape[0])


def _loaded(loader: object) -> tuple[int | None, bool]:
    """Examples in a batch as the loader says, and whether its first batch holds as many for certain."""
    size = getattr(loader, "batch_size", None)
    if not isinstance(size, int) or isinstance(size, bool):
        return None, False
    try:
        return size, len(loader.sampler) >= size  # type: ignore[attr-defined]
    except (AttributeError, TypeError, NotImplementedError):
        return size, False


def _as_number(size: Any) -> float:
    """A count in a tensor or array of one element; NaN for what is none."""
    try:
        return float(size)
    except (TypeError, ValueError):
        return math.nan
