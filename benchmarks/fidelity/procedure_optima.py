"""Best learning rates of the paper's procedure, their peaks, and its two claims, from the records."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.fidelity.procedure import BATCH_SIZES, BETAS, TARGETS
from benchmarks.fidelity.workloads import WORKLOADS
from lightning_surge.laws import tradeoff

__all__ = [
    "Case",
    "Optimum",
    "Records",
    "Shape",
    "best_over_following",
    "best_to_target",
    "cases",
    "claims",
    "fit_tradeoff",
    "line_of",
    "log_steps",
    "optimum",
    "shape",
]

Records = Mapping[str, Sequence[Mapping[str, Any]]]
"""The records of each kind of cell."""
MOVED = 2.0
"""Factor by which a peak must differ to count as moved: half the distance of two batch sizes."""


class Optimum(NamedTuple):
    """The best learning rate at a batch size.

    Attributes:
        batch_size: examples.
        lr: between the learning rates tried, by a parabola in their logarithms.
        error: standard error of the log of `lr`, from the seeds' scatter.
        edge: whether the best rate tried was the smallest or the largest.
        values: what was made smallest, by seed.
    """

    batch_size: int
    lr: float
    error: float
    edge: bool
    values: list[float]


def vertex(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Bottom of the parabola through the smallest of evenly spaced points and its neighbours."""
    index = int(np.argmin(y))
    if not 0 < index < len(x) - 1 or not np.isfinite(y[index - 1 : index + 2]).all():
        return float(x[index]), float(y[index])
    left, middle, right = y[index - 1 : index + 2]
    bend = left - 2 * middle + right
    if bend <= 0:
        return float(x[index]), float(middle)
    shift = 0.5 * (left - right) / bend
    return float(x[index] + shift * (x[1] - x[0])), float(middle - bend * shift**2 / 2)


def optimum(batch_size: int, lrs: Sequence[float], rows: np.ndarray) -> Optimum:
    """Where rows of values by seed and learning rate are smallest."""
    x = np.log(lrs)
    mean = rows.mean(0)
    bottoms = np.array([vertex(x, row) for row in rows])
    error = float(bottoms[:, 0].std(ddof=1) / math.sqrt(len(rows)))
    edge = int(np.argmin(mean)) in (0, len(x) - 1)
    return Optimum(batch_size, math.exp(vertex(x, mean)[0]), error, edge, bottoms[:, 1].tolist())


def values(nested: Any) -> np.ndarray:
    """Numbers of a record, infinite where it has none."""
    array = np.array(nested, dtype=np.float64)
    return np.where(np.isnan(array), np.inf, array)


def log_steps(record: Mapping[str, Any], target: int) -> np.ndarray:
    """Log of the steps to a target by seed and learning rate, from the lowest loss so far; else infinite."""
    level, marks = record["targets"][target], np.log(record["steps"])
    lowest = np.minimum.accumulate(values(record["losses"]), axis=2)
    result = np.full(lowest.shape[:2], np.inf)
    for place in np.ndindex(*result.shape):
        course = lowest[place]
        if course[-1] <= level:
            after = int(np.argmax(course <= level))
            result[place] = marks[after]
            if after > 0 and np.isfinite(course[after - 1]):
                part = (course[after - 1] - level) / (course[after - 1] - course[after])
                result[place] = marks[after - 1] + part * (marks[after] - marks[after - 1])
    return result


def best_to_target(records: Sequence[Mapping[str, Any]], target: int) -> list[Optimum]:
    """The best learning rate of each batch size that reached a target; its values are logs of steps.

    A learning rate that has not reached it counts as if it had at the end.
    """
    found = []
    for record in sorted(records, key=lambda record: record["batch_size"]):
        rows = log_steps(record, target)
        if np.isfinite(rows).all(0).any():
            rows = np.minimum(rows, math.log(record["steps"][-1]))
            found.append(optimum(record["batch_size"], record["lrs"], rows))
    return found


def best_over_following(record: Mapping[str, Any]) -> list[Optimum]:
    """The best learning rate of each batch size over the steps after a point."""
    return [optimum(int(size), record["lrs"], values(rows)) for size, rows in record["losses"].items()]


class Shape(NamedTuple):
    """How the best learning rate depends on the batch size.

    Attributes:
        peak: batch size where it is largest; 0 or infinite if that is the smallest or the largest tried.
        rises: whether it does, up to the peak, by more than a standard error.
        falls: the same beyond the peak.
    """

    peak: float
    rises: bool
    falls: bool


def shape(optima: Sequence[Optimum]) -> Shape:
    """Peak, rise and fall; a batch size that missed the target has no part in it."""
    y = np.log([each.lr for each in optima])
    x = np.log([each.batch_size for each in optima])
    top = int(np.argmax(y))

    def above(end: int) -> bool:
        return bool(y[top] - y[end] > math.hypot(optima[top].error, optima[end].error))

    peak = 0.0 if top == 0 else math.inf if top == len(y) - 1 else math.exp(vertex(x, -y)[0])
    return Shape(peak, above(0), above(-1))


def fit_tradeoff(steps: Mapping[int, Sequence[float]], draws: int = 200) -> dict[str, list[float]]:
    """The line of 1/S against 1/E, Eq. 22.

    Args:
        steps: S by seed, for each batch size.
        draws: of the seeds, with replacement, for the standard errors.

    Returns:
        `min_steps`, `min_examples` and `noise_scale`, which is B_noise = E_min / S_min in examples, each with
        its standard error; nan where the line does not fall.
    """
    sizes = np.array(list(steps), dtype=np.float64)
    logs = [np.log(each) for each in steps.values()]

    def line(means: Sequence[float]) -> list[float]:
        counts = np.exp(means)
        try:
            found = tradeoff.fit_tradeoff(counts, sizes * counts)
        except ValueError:
            return [math.nan] * 3
        return [found.min_steps, found.min_examples, found.critical_batch_size]

    generator = np.random.default_rng(0)
    whole = line([float(each.mean()) for each in logs])
    drawn = np.array(
        [line([generator.choice(each, len(each)).mean() for each in logs]) for _ in range(draws)]
    )
    valid = drawn[~np.isnan(drawn[:, 0])]
    errors = valid.std(0, ddof=1).tolist() if len(valid) > draws / 2 else [math.nan] * 3
    names = ("min_steps", "min_examples", "noise_scale")
    return {name: [value, error] for name, value, error in zip(names, whole, errors, strict=True)}


def line_of(optima: Sequence[Optimum]) -> dict[str, list[float]]:
    """`fit_tradeoff` of the best learning rates."""
    return fit_tradeoff({each.batch_size: np.exp(each.values).tolist() for each in optima})


class Case(NamedTuple):
    """All there is about a workload, betas and a target."""

    workload: str
    betas: tuple[float, float]
    target: int
    loss: float
    grid: list[Mapping[str, Any]]
    optima: list[Optimum]
    following: Mapping[str, Any] | None

    @property
    def title(self) -> str:
        """For figures."""
        return f"{self.workload}, betas {self.betas[0]:g}, {self.betas[1]:g}, loss {self.loss:.2f}"


def cases(records: Records) -> list[Case]:
    """One for each workload, betas and target of which something was measured."""
    found = []
    for name in WORKLOADS:
        for betas in BETAS:

            def own(
                kind: str, name: str = name, betas: tuple[float, float] = betas
            ) -> list[Mapping[str, Any]]:
                mine = (name, *betas)
                return [r for r in records.get(kind, ()) if (r["workload"], r["beta_1"], r["beta_2"]) == mine]

            runs, after = own("procedure_grid"), {r["target"]: r for r in own("procedure_following")}
            for target in range(len(TARGETS)):
                if runs or target in after:
                    loss = runs[0]["targets"][target] if runs else after[target]["loss"]
                    best = best_to_target(runs, target)
                    found.append(Case(name, betas, target, loss, runs, best, after.get(target)))
    return found


def claims(records: Records) -> dict[str, dict[str, int]]:
    """The two claims, counted.

    Returns:
        By source, "runs", "following" and "callback": `cases`, and how many of them have an optimum that
        `rises_and_falls` within the batch sizes tried; `pairs` of neighbouring targets, and in how many of
        them the peak `moves_up`, `moves_down` or `stays` as the loss falls, to within a factor of two. A
        peak below or above the range counts as one place each.
    """
    shapes: dict[str, dict[tuple[Any, ...], Shape]] = {"runs": {}, "following": {}, "callback": {}}
    for case in cases(records):
        key = (case.workload, case.betas, case.target)
        if len(case.optima) > 2:
            shapes["runs"][key] = shape(case.optima)
        if case.following is not None:
            shapes["following"][key] = shape(best_over_following(case.following))
            said = case.following["callback"].get("peak_batch_size", [None])[0]
            peak = (
                math.inf if said is None or said > BATCH_SIZES[-1] else 0.0 if said < BATCH_SIZES[0] else said
            )
            if case.following["callback"]:
                shapes["callback"][key] = Shape(peak, peak > 0, not math.isinf(peak))
    result = {}
    for source, found in shapes.items():
        both = sum(0 < s.peak < math.inf and s.rises and s.falls for s in found.values())
        counts = {"cases": len(found), "rises_and_falls": both, "pairs": 0, "moves_up": 0, "moves_down": 0}
        for (*rest, target), after in found.items():
            before = found.get((*rest, target - 1))
            if before is not None:
                counts["pairs"] += 1
                counts["moves_up"] += after.peak > MOVED * before.peak
                counts["moves_down"] += before.peak > MOVED * after.peak
        result[source] = {**counts, "stays": counts["pairs"] - counts["moves_up"] - counts["moves_down"]}
    return result
