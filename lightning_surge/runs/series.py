"""Series of logged values, and how those of several files become one run."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["NOTHING", "PREFIX", "Points", "RunLogError", "Series", "joined", "progress"]

PREFIX = "surge/"
# An error gives so many names of what it found instead.
MOST_NAMED = 8
SECONDS_UNTIL_PROGRESS = 2.0


class RunLogError(ValueError):
    """A run cannot be read: the rule, the value and the remedy."""


class Series(NamedTuple):
    """One logged quantity: what was written, and at which optimizer step.

    Attributes:
        steps: Optimizer steps, shape `(n,)`, increasing.
        values: Values, shape `(n,)`. TensorBoard keeps them in single precision.
    """

    steps: NDArray[np.int64]
    values: NDArray[np.float64]


NOTHING = Series(np.array([], dtype=np.int64), np.array([], dtype=np.float64))


class Points:
    """The points of one file, of keys under `surge/` and those in `also`, in the order of the file.

    `others` are some of the keys that were passed over.
    """

    def __init__(self, also: Collection[str] = ()) -> None:
        self._also = frozenset(also)
        self._parts: dict[str, list[Series]] = {}
        self.others: set[str] = set()

    def wants(self, key: str) -> bool:
        """Whether points of a key are kept; if not, its name is noted."""
        wanted = key.startswith(PREFIX) or key in self._also
        if not wanted and len(self.others) < MOST_NAMED:
            self.others.add(key)
        return wanted

    def add(self, key: str, steps: ArrayLike, values: ArrayLike) -> None:
        """Append points of one key, two sequences of one length."""
        part = Series(np.asarray(steps, dtype=np.int64), np.asarray(values, dtype=np.float64))
        self._parts.setdefault(key, []).append(part)

    def series(self) -> dict[str, Series]:
        """All points of every key; nothing is left, so that a long run is in memory once."""
        return {key: _concatenated(self._parts.pop(key)) for key in list(self._parts)}


def _concatenated(parts: Sequence[Series]) -> Series:
    return parts[0] if len(parts) == 1 else Series(*map(np.concatenate, zip(*parts, strict=True)))


def joined(files: Sequence[dict[str, Series]]) -> dict[str, Series]:
    """One run from the series of its files, oldest first: each replaces what came after its beginning."""
    run: dict[str, Series] = {}
    for part in files:
        ours = [one.steps.min() for key, one in part.items() if key.startswith(PREFIX)]
        begin = min(ours, default=math.inf)
        for key, (steps, values) in run.items():
            if key.startswith(PREFIX):
                run[key] = Series(steps[steps < begin], values[steps < begin])
        for key, one in part.items():
            run[key] = _increasing(_concatenated([run[key], one]) if key in run else one)
    return {key: one for key, one in run.items() if one.steps.size}


def _increasing(series: Series) -> Series:
    """Without the points that a later one with the same or an earlier step takes back."""
    steps = series.steps
    if (steps[1:] > steps[:-1]).all():
        return series
    earliest_after = np.minimum.accumulate(steps[::-1])[::-1][1:]
    kept = np.append(steps[:-1] < earliest_after, True)
    return Series(steps[kept], series.values[kept])


def progress(path: Path, size: int) -> Any:
    """A bar on a terminal for files that take seconds to read; `update` it by the bytes that were read."""
    from tqdm import tqdm  # a dependency of Lightning

    return tqdm(
        desc=f"reading {path.name}", total=size, unit="B", unit_scale=True, leave=False,
        delay=SECONDS_UNTIL_PROGRESS, disable=None,
    )  # fmt: skip
