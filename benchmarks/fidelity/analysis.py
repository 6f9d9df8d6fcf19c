"""From the records of finished cells to numbers: pure functions, which read and write nothing.

A record is one line of `results/<kind>.jsonl`. Most functions return rows, flat dicts that a table or a figure
groups. Errors are log2 of predicted over true. Where a law does not exist its error is infinite, and where no truth
exists there is no error, None; so that neither can get lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator
from scipy.stats import t as student

from benchmarks.fidelity.workloads import BASE_BATCH_SIZE, WORKLOADS

Array = NDArray[np.float64]
Record = dict[str, Any]
Row = dict[str, Any]

POINT = ("workload", "beta_2", "phase")


class Summary(NamedTuple):
    """Absolute errors.

    Attributes:
        count: with a truth.
        missing: of these, without a law; their error is infinite.
        median: of all.
        high: 90th percentile of all.
    """

    count: int
    missing: int
    median: float
    high: float


class Mean(NamedTuple):
    """A mean with its 95 % half-width (Student's t) and the number of values behind it."""

    value: float
    half_width: float
    count: int


def pick(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows that have these values; a tuple lists alternatives."""

    def fits(row: Row) -> bool:
        return all(
            row.get(name) in value if isinstance(value, tuple) else row.get(name) == value
            for name, value in wanted.items()
        )

    return [row for row in rows if fits(row)]


def groups(rows: Iterable[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by the values of some fields, in the order of their first appearance."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def unique(records: Iterable[Record], expected: Sequence[str]) -> list[Record]:
    """The last record of every key, in case two processes have finished the same cell."""
    return list({tuple(record.get(name) for name in expected): record for record in records}.values())


def quantile(values: Sequence[float], share: float) -> float:
    """Interpolated linearly, infinite where an infinite value takes part; NaN of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low, part = int(position), position - int(position)
    return ordered[low] if part == 0 else ordered[low] * (1 - part) + ordered[low + 1] * part


def summary(errors: Iterable[float | None]) -> Summary:
    """Count, misses, median and 90th percentile of absolute errors."""
    known = [abs(error) for error in errors if error is not None]
    missing = sum(map(math.isinf, known))
    return Summary(len(known), missing, quantile(known, 0.5), quantile(known, 0.9))


def mean(values: Iterable[float]) -> Mean:
    """With a half-width that is infinite for a single value; NaN of nothing."""
    found = list(values)
    count = len(found)
    if count < 2:
        return Mean(found[0] if found else math.nan, math.inf, count)
    width = student.ppf(0.975, count - 1) * np.std(found, ddof=1) / math.sqrt(count)
    return Mean(float(np.mean(found)), float(width), count)


def rms(values: Iterable[float]) -> float:
    """Root mean square; NaN of nothing."""
    found = list(values)
    return math.sqrt(sum(value * value for value in found) / len(found)) if found else math.nan


def paired(left: Iterable[Row], right: Iterable[Row], field: str, keys: Sequence[str]) -> Mean:
    """Mean difference, left minus right, over the keys that both have."""
    values = {tuple(row[key] for key in keys): row[field] for row in right}
    pairs = [(row[field], values.get(tuple(row[key] for key in keys))) for row in left]
    return mean(a - b for a, b in pairs if a is not None and b is not None)


def log2(value: float | None) -> float | None:
    """None for what has no logarithm."""
    return math.log2(value) if value is not None and value > 0.0 else None


def difference(left: float | None, right: float | None) -> float | None:
    """None where either is."""
    return None if left is None or right is None else left - right


class Sweep(NamedTuple):
    """Final losses of one cell.

    Attributes:
        x: log2 of the multipliers, increasing, without those at which some seed has diverged.
        losses: by seed and multiplier.
        seeds: of the rows.
    """

    x: Array
    losses: Array
    seeds: tuple[int, ...]

    @classmethod
    def of(cls, record: Record) -> Sweep:
        """The losses of a record."""
        losses = np.array(record["losses"], dtype=float)
        finite = np.isfinite(losses).all(axis=0)
        return cls(np.log2(record["multipliers"])[finite], losses[:, finite], tuple(record["seeds"]))

    @property
    def mean(self) -> Array:
        """Over seeds."""
        return np.asarray(self.losses.mean(axis=0))

    @property
    def best(self) -> float:
        """log2 of the best multiplier of the mean over seeds."""
        return vertex(self.x, self.mean)

    @property
    def bests(self) -> Array:
        """The same of each seed."""
        return np.array([vertex(self.x, row) for row in self.losses])

    @property
    def censored(self) -> bool:
        """Whether the lowest mean is at an end of the grid, beyond which the best may be."""
        return int(np.argmin(self.mean)) in (0, len(self.x) - 1)

    def regret(self, seed: int, x: float) -> float:
        """Loss of a seed at a multiplier minus its loss at the multiplier that is best on average."""
        row = self.losses[self.seeds.index(seed)]
        inside = min(max(x, self.x[0]), self.x[-1])
        return float(PchipInterpolator(self.x, row)(inside)) - self.reference(seed)

    def reference(self, seed: int) -> float:
        """Loss of a seed at the multiplier of the grid that is best on average."""
        return float(self.losses[self.seeds.index(seed), int(np.argmin(self.mean))])

    def beyond(self, x: float) -> bool:
        """Whether a multiplier is outside the grid."""
        return bool(x < self.x[0] - 1e-9 or x > self.x[-1] + 1e-9)


def vertex(x: Array, losses: Array) -> float:
    """Minimum of the least-squares parabola through five points around the lowest, or exactly through three.

    Three where five put it further off than a neighbour of the lowest point; that point itself where it is at an
    end of the grid and the parabola does not turn inside.
    """
    low = int(np.argmin(losses))
    left, right = x[max(low - 1, 0)], x[min(low + 1, len(x) - 1)]
    for reach in (2, 1):
        near = slice(max(low - reach, 0), low + reach + 1)
        if len(x[near]) >= 3:
            square, linear, _ = np.polyfit(x[near] - x[low], losses[near] - losses[low], 2)
            if square > 0.0 and left <= x[low] - linear / (2 * square) <= right:
                return float(x[low] - linear / (2 * square))
    return float(x[low])


def sweeps_of(records: Iterable[Record]) -> dict[tuple[Any, ...], Sweep]:
    """By workload, beta_2, phase and batch size."""
    return {tuple(record[name] for name in (*POINT, "batch_size")): Sweep.of(record) for record in records}


def truth_rows(sweeps: dict[tuple[Any, ...], Sweep]) -> list[Row]:
    """log2 of R_true by point and batch size, with its standard deviation over seeds."""
    rows = []
    for (*point, size), found in sweeps.items():
        base = sweeps.get((*point, BASE_BATCH_SIZE))
        if base is None or size == BASE_BATCH_SIZE:
            continue
        row = dict(zip(POINT, point, strict=True)) | {"batch_size": size, "ratio": found.best - base.best}
        row |= {"spread": float(np.std(found.bests - base.bests, ddof=1)), "base": base.best}
        rows.append(row | {"censored": found.censored or base.censored})
    return rows


def mccandlish(noise_scale: float, batch_size: int) -> float:
    """log2 of sqrt((1 + B_s / base) / (1 + B_s / B)): square-root scaling where the scale is infinite."""
    if math.isinf(noise_scale):
        return 0.5 * math.log2(batch_size / BASE_BATCH_SIZE)
    return 0.5 * math.log2((1 + noise_scale / BASE_BATCH_SIZE) / (1 + noise_scale / batch_size))


def fixed_ratios(batch_size: int, lives: Sequence[Record], one_steps: Sequence[Record]) -> dict[str, float]:
    """log2 of the ratio by rules that measure nothing during the run, from the records of one point.

    Those of the formulas are averaged in log over the seeds there are.
    """
    octaves = math.log2(batch_size / BASE_BATCH_SIZE)
    found = {"constant": 0.0, "sqrt": octaves / 2, "linear": octaves}
    scales = {live["seed"]: live["noise_scale"] for live in lives if "noise_scale" in live}
    logs = [mccandlish(math.inf if scale is None else scale, batch_size) for scale in scales.values()]
    if logs:
        found["McCandlish"] = float(np.mean(logs))
    laws = [record["theorem3"]["lr"] for record in one_steps if record["theorem3"] is not None]
    if laws and batch_size in SIZES:
        at, base = SIZES.index(batch_size), SIZES.index(BASE_BATCH_SIZE)
        found["theorem 3"] = float(np.mean([math.log2(lr[at] / lr[base]) for lr in laws]))
    return found


def decay_rows(records: Iterable[Record]) -> list[Row]:
    """log2 R by a half-life minus the reference of the held model, and how far the reference has moved."""
    rows = []
    for record in records:
        for mark, point in record["points"].items():
            reference, first = point["reference"], next(iter(record["points"].values()))["reference"]
            for name, ratios in point.items():
                if name == "lr_factor":
                    continue
                for index, size in enumerate((64, 256)):
                    start = None if first is None else first[index]
                    goal = start if name == "reference" else None if reference is None else reference[index]
                    value = math.inf if ratios is None else ratios[index]
                    row = {field: record[field] for field in ("workload", "beta_2", "seed")}
                    row |= {"mark": float(mark), "half_life": name, "batch_size": size}
                    rows.append(row | {"error": difference(value, goal)})
    return rows
