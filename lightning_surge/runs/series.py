"""Series of logged values, and how those of several files become one run."""

from __future__ import annotations

import math
from array import array
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

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

    def at(self, steps: NDArray[np.int64]) -> NDArray[np.float64]:
        """The values at some steps, NaN where there is none."""
        if not self.steps.size:
            return np.full(steps.shape, np.nan)
        index = np.minimum(np.searchsorted(self.steps, steps), self.steps.size - 1)
        return np.where(self.steps[index] == steps, self.values[index], np.nan)


NOTHING = Series(np.array([], dtype=np.int64), np.array([], dtype=np.float64))


class Points:
    """The points of one file, of keys under `surge/` and those in `also`, in the order of the file.

    `others` are some of the keys that were passed over.
    """

    def __init__(self, also: Collection[str] = ()) -> None:
        self._also = frozenset(also)
        self.found: dict[str, tuple[array[int], array[float]]] = defaultdict(lambda: (array("q"), array("d")))
        self.others: set[str] = set()

    def wants(self, key: str) -> bool:
        """Whether points of a key are kept; if not, its name is noted."""
        wanted = key.startswith(PREFIX) or key in self._also
        if not wanted and len(self.others) < MOST_NAMED:
            self.others.add(key)
        return wanted

    def add(self, key: str, step: int, value: float) -> None:
        """Append a point of one key."""
        steps, values = self.found[key]
        steps.append(step)
        values.append(value)

    def series(self) -> dict[str, Series]:
        """All points of every key, in the memory that they were gathered in."""
        return {
            key: Series(np.frombuffer(x, np.int64), np.frombuffer(y)) for key, (x, y) in self.found.items()
        }


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
            steps, values = run.get(key, NOTHING)
            run[key] = _increasing(np.append(steps, one.steps), np.append(values, one.values))
    return {key: one for key, one in run.items() if one.steps.size}


def _increasing(steps: NDArray[np.int64], values: NDArray[np.float64]) -> Series:
    """Without the points that a later one with the same or an earlier step takes back."""
    earliest_after = np.minimum.accumulate(steps[::-1])[::-1][1:]
    kept = np.append(steps[:-1] < earliest_after, True)
    return Series(steps[kept], values[kept])


def progress(path: Path, size: int) -> Any:
    """A bar on a terminal for files that take seconds to read; `update` it by the bytes that were read."""
    from tqdm import tqdm  # a dependency of Lightning

    return tqdm(
        desc=f"reading {path.name}", total=size, unit="B", unit_scale=True, leave=False,
        delay=SECONDS_UNTIL_PROGRESS, disable=None,
    )  # fmt: skip
