"""From the records of finished cells to numbers: pure functions, which read and write nothing.

A record is one line of `results/<kind>.jsonl`. Most functions return rows, flat dicts that a table or a
figure groups. Errors are log2 of predicted over true. Where a law does not exist its error is infinite, and
where no truth exists there is no error, None; so that neither can get lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

Array = NDArray[np.float64]
Record = dict[str, Any]
Row = dict[str, Any]

POINT = ("workload", "beta_2", "phase")
CHANGE = (*POINT, "batch_size")

Costs = Mapping[str, Mapping[str, float]]
"""By workload and choice; smaller is better, and comparable between workloads."""


class Summary(NamedTuple):
    """Absolute errors where there is a truth; without a law an error is infinite."""

    n: int
    missing: int  # without a law
    median: float
    high: float  # 90th percentile


class Mean(NamedTuple):
    """A mean with its 95 % half-width (Student's t) and the number of values behind it."""

    value: float
    half_width: float
    n: int


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


def joined(left: Iterable[Record], right: Iterable[Record], keys: Sequence[str]) -> list[Record]:
    """Both records of every key that both have, as one."""
    found = {tuple(record[key] for key in keys): record for record in right}
    pairs = [(record, found.get(tuple(record[key] for key in keys))) for record in left]
    return [one | other for one, other in pairs if other is not None]


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
    """With an infinite half-width for a single value or beside an infinite one; NaN of nothing."""
    found = list(values)
    count = len(found)
    if count < 2 or not all(map(math.isfinite, found)):
        return Mean(sum(found) / count if found else math.nan, math.inf, count)
    width = student.ppf(0.975, count - 1) * np.std(found, ddof=1) / math.sqrt(count)
    return Mean(float(np.mean(found)), float(width), count)


def mean_over_seeds(rows: Sequence[Row], field: str) -> Mean:
    """The mean of everything, with the half-width of the mean over seeds of each seed's own mean.

    Differences between experiments are no scatter, and a seed's weights and batches are in many of them.
    """
    of_seeds = mean(mean(row[field] for row in part).value for part in groups(rows, "seed").values())
    return of_seeds._replace(n=len(rows))


def deviation(values: Sequence[float]) -> float:
    """Standard deviation; NaN below two values or beside an infinite one."""
    known = len(values) > 1 and all(map(math.isfinite, values))
    return float(np.std(values, ddof=1)) if known else math.nan


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


def loss_of_run(loss: float | None) -> float:
    """JSON has no number for a run that has diverged."""
    return math.inf if loss is None else loss


def chosen_elsewhere(costs: Costs, default: str) -> list[list[object]]:
    """For each workload: what the others choose by their mean cost, what that costs here, and what is best.

    Only choices that every workload has are compared. The cost of the default comes last.
    """
    choices = [
        choice for choice in next(iter(costs.values()), {}) if all(choice in by for by in costs.values())
    ]
    if len(costs) < 2 or not choices:
        return []
    rows: list[list[object]] = []
    for workload, here in costs.items():
        others = [by for name, by in costs.items() if name != workload]
        chosen = min(choices, key=lambda choice: sum(by[choice] for by in others))
        best = min(choices, key=lambda choice: here[choice])
        rows.append([workload, chosen, here[chosen], best, here[best], here.get(default, math.nan)])
    return rows
