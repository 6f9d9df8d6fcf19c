"""What a chart can show of a long run: fewer points without losing extremes, spans, ends of axes, numbers."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lightning_surge.runs.series import Series

FloatArray = NDArray[np.float64]
XAxis = Literal["steps", "examples"]

# Okabe and Ito's palette, which stays apart under the common forms of colour blindness.
BLACK, GREY, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = (
    "#000000", "#8c8c8c", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
# Points per line, spans per row and marks of a changed batch size that a chart can show; the share of its
# width that a letter beside a mark takes.
MOST_POINTS, MOST_MARKS, LETTER_WIDTH = 2000, 40, 0.014
# Room around what a logarithmic axis shows: so that there is a power of two.
ROOM = 1.5


def number(value: float) -> str:
    """A number for an axis or a legend."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def thinned(series: Series) -> Series:
    """As many points as a chart shows: of each bucket the first, smallest and largest one, the first gap."""
    size = series.steps.size
    if size <= MOST_POINTS:
        return series
    width = -(-size * 4 // MOST_POINTS)
    kept = {size - 1}
    for begin in range(0, size, width):
        part = series.values[begin : begin + width]
        finite = np.isfinite(part)
        low, high = np.where(finite, part, np.inf), np.where(finite, part, -np.inf)
        kept |= {begin, *(begin + int(at) for at in (np.argmin(finite), np.argmin(low), np.argmax(high)))}
    index = np.array(sorted(kept))
    return Series(series.steps[index], series.values[index])


def coarse(series: Series) -> Series:
    """The largest value of each bucket, at its first step: a short hold stays visible."""
    size = series.steps.size
    begins = np.arange(0, size, max(1, -(-size // MOST_POINTS)))
    return Series(series.steps[begins], np.maximum.reduceat(series.values, begins)) if size else series


def spans(steps: NDArray[np.int64], flags: NDArray[np.bool_]) -> FloatArray:
    """Begin and end of each run of set flags, shape `(n, 2)`; a sample reaches half way to its neighbours."""
    if not flags.any():
        return np.empty((0, 2))
    edges = np.concatenate([[steps[0] - 0.5], (steps[1:] + steps[:-1]) / 2, [steps[-1] + 0.5]])
    turns = np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8))
    return np.column_stack([edges[turns == 1], edges[turns == -1]])


def positive(values: FloatArray) -> FloatArray:
    """The values that a log axis can show."""
    return values[np.isfinite(values) & (values > 0)]


def changes(batch: Series, places: FloatArray) -> list[tuple[float, str]]:
    """Where the batch size changed, and to what as long as the words do not run into each other."""
    changed = np.flatnonzero(np.diff(batch.values)) + 1
    letter, free, marks = LETTER_WIDTH * (places[-1] - places[0]), -math.inf, []
    for index in changed if changed.size <= MOST_MARKS else ():
        place, words = float(places[index]), number(batch.values[index])
        half = letter * (len(words) + 1) / 2
        words = words if place - half >= free else ""
        free = place + half if words else free
        marks.append((place, words))
    return marks


def rate_top(predicted: FloatArray, *others: FloatArray) -> float:
    """Room for ordinary excursions of the prediction; one wild value must not flatten everything else."""
    kept, asked = positive(np.concatenate(others)), positive(predicted)
    top = float(kept.max()) if kept.size else 1.0
    return 1.12 * max(top, min(float(asked.max()) if asked.size else top, 1.5 * top))


def size_range(batch: FloatArray, *others: FloatArray) -> tuple[float, float]:
    """Ends of a log axis; decades above the largest batch size say nothing a reader can use."""
    shown = positive(np.concatenate([batch, *others]))
    largest = float(np.nanmax(batch, initial=1.0))
    low, high = (float(shown.min()), float(shown.max())) if shown.size else (1.0, 2.0)
    return max(low, largest / 1e4) / ROOM, min(high, 100.0 * largest) * ROOM
