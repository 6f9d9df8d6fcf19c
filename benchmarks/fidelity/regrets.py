"""The best learning rate after a change of the batch size, and what rules lose against it. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.interpolate import PchipInterpolator

from benchmarks.fidelity.analysis import CHANGE, POINT, Array, Record, Row, groups, mean, pick
from benchmarks.fidelity.one_step import SIZES
from benchmarks.fidelity.training import CONTINUED_EXAMPLES
from benchmarks.fidelity.workloads import BASE_BATCH_SIZE, WORKLOADS
from lightning_surge import SurgeLRCallback

DEFAULT = {"objective": SurgeLRCallback().settings.objective, "max_overhead": 0.05}
"""The callback's default objective. Its default cost is for longer runs than these."""
CELL = (*CHANGE, "seed")
FIXED = ("constant", "sqrt", "linear")
ELSEWHERE = "swept elsewhere"
"""The mean of what sweeps find on the other workloads at the same batch size, instead of a rule."""


class Sweep(NamedTuple):
    """Final losses of one cell."""

    x: Array  # log2 of the multipliers, increasing, without those at which some seed has diverged
    losses: Array  # by seed and multiplier
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

    def loss(self, seed: int, x: float) -> float:
        """Loss of a seed at a multiplier, interpolated; at an end of the grid beyond it."""
        row = self.losses[self.seeds.index(seed)]
        inside = min(max(x, self.x[0]), self.x[-1])
        return float(PchipInterpolator(self.x, row)(inside))

    def regret(self, seed: int, x: float) -> float:
        """Loss of a seed at a multiplier minus its loss at the multiplier that is best on average."""
        return self.loss(seed, x) - self.reference(seed)

    def reference(self, seed: int) -> float:
        """Loss of a seed at the multiplier of the grid that is best on average."""
        return float(self.losses[self.seeds.index(seed), int(np.argmin(self.mean))])


def vertex(x: Array, losses: Array) -> float:
    """Minimum of the least-squares parabola through five points around the lowest, fewer at an end.

    Through three points where the two differ by more than half a step of the grid, as they do beside a wall
    of runs that almost diverged. The lowest point itself if nothing turns inside.
    """
    low = int(np.argmin(losses))
    left, right = x[max(low - 1, 0)], x[min(low + 1, len(x) - 1)]
    found = []
    for reach in (1, 2):
        near = slice(max(low - reach, 0), low + reach + 1)
        if len(x[near]) >= 3:
            square, linear, _ = np.polyfit(x[near] - x[low], losses[near] - losses[low], 2)
            if square > 0.0 and left <= x[low] - linear / (2 * square) <= right:
                found.append(float(x[low] - linear / (2 * square)))
    if not found:
        return float(x[low])
    step = (right - left) / (2 if 0 < low < len(x) - 1 else 1)
    return found[-1] if abs(found[-1] - found[0]) <= step / 2 else found[0]


def sweeps_of(records: Iterable[Record]) -> dict[tuple[Any, ...], Sweep]:
    """By workload, beta_2, phase and batch size; without those that diverged at nearly every multiplier."""
    found = {tuple(record[name] for name in CHANGE): Sweep.of(record) for record in records}
    return {key: sweep for key, sweep in found.items() if len(sweep.x) >= 3}


def all_rows(records: Mapping[str, Sequence[Record]]) -> list[Row]:
    """Of every rule at every change of the batch size that was swept."""
    lives, at_best_base = (pick(records[kind], examples=CONTINUED_EXAMPLES) for kind in ("live", "best_base"))
    return switch_rows(sweeps_of(records["sweep"]), lives, records["laws"], at_best_base)


def regret_unit(workload: str, found: Sweep) -> float:
    """What a difference of losses is multiplied with: nats stay, others become percent of the lowest loss."""
    return 1.0 if WORKLOADS[workload].cross_entropy else 100.0 / float(found.mean.min())


def loss_of_run(loss: float | None) -> float:
    """JSON has no number for a run that has diverged."""
    return math.inf if loss is None else loss


def truth_rows(sweeps: dict[tuple[Any, ...], Sweep]) -> list[Row]:
    """log2 of R_true by point and batch size, and of the best multiplier at the base batch size."""
    rows = []
    for (*point, size), found in sweeps.items():
        base = sweeps.get((*point, BASE_BATCH_SIZE))
        if base is None or size == BASE_BATCH_SIZE:
            continue
        row = dict(zip(POINT, point, strict=True)) | {"batch_size": size, "base": base.best}
        rows.append(row | {"ratio": found.best - base.best})
    return rows


def mccandlish(noise_scale: float, batch_size: int) -> float:
    """log2 of sqrt((1 + B_s / base) / (1 + B_s / B)): square-root scaling where the scale is infinite."""
    if math.isinf(noise_scale):
        return 0.5 * math.log2(batch_size / BASE_BATCH_SIZE)
    return 0.5 * math.log2((1 + noise_scale / BASE_BATCH_SIZE) / (1 + noise_scale / batch_size))


def theorem3(lrs: Sequence[float], batch_size: float) -> float:
    """log2 of lr(B) / lr(base) of the law `1 / lr = a / sqrt(B) + b sqrt(B)` through values at `SIZES`."""
    ends = np.array([SIZES[0], SIZES[-1]], dtype=float)
    columns = np.stack([ends**-0.5, ends**0.5], axis=1)
    a, b = np.linalg.solve(columns, 1 / np.array([lrs[0], lrs[-1]]))

    def inverse(size: float) -> float:
        return float(a * size**-0.5 + b * size**0.5)

    return math.log2(inverse(BASE_BATCH_SIZE) / inverse(batch_size))


def fixed_ratios(batch_size: int, lives: Sequence[Record], laws: Sequence[Record]) -> dict[str, float]:
    """log2 of the ratio by rules that measure nothing during the run, from the records of one point.

    Those of the formulas are averaged in log over the seeds there are.
    """
    octaves = math.log2(batch_size / BASE_BATCH_SIZE)
    found = {"constant": 0.0, "sqrt": octaves / 2, "linear": octaves}
    scales = {live["seed"]: live["noise_scale"] for live in lives if "noise_scale" in live}
    logs = [mccandlish(math.inf if scale is None else scale, batch_size) for scale in scales.values()]
    if logs:
        found["McCandlish"] = float(np.mean(logs))
    logs = [
        theorem3(record["theorem3"]["lr"], batch_size) for record in laws if record["theorem3"] is not None
    ]
    if logs:
        found["theorem 3"] = float(np.mean(logs))
    return found


def switch_rows(
    sweeps: dict[tuple[Any, ...], Sweep],
    lives: Iterable[Record],
    laws: Iterable[Record],
    at_best_base: Iterable[Record] = (),
) -> list[Row]:
    """One row by rule, point, batch size and seed.

    `error` is log2(R / R_true), with R_true of the mean over seeds. `regret` is the loss of the seed's run at
    the rule's lr, interpolated, minus its loss at the lr that is best on average: nats, or percent of the
    best loss where that is no cross-entropy. `tuned` applies the rule's ratio to the best base lr. For "live"
    the losses are those of runs, and the ratio is their mean. `overhead` is None without a callback.
    """
    rows = []
    truths = truth_rows(sweeps)
    live_of, laws_of = groups(lives, *POINT), groups(laws, *POINT)
    settings = ("objective", "max_overhead", "seed")
    tuned_of = {tuple(run[name] for name in (*POINT, *settings)): run for run in at_best_base}
    for truth in truths:
        point, size = tuple(truth[name] for name in POINT), truth["batch_size"]
        found, records = sweeps[*point, size], live_of.get(point, [])
        unit = regret_unit(truth["workload"], found)
        fixed = fixed_ratios(size, pick(records, **DEFAULT), laws_of.get(point, []))
        elsewhere = [t["ratio"] for t in pick(truths, batch_size=size) if t["workload"] != truth["workload"]]
        if elsewhere:
            fixed[ELSEWHERE] = float(np.mean(elsewhere))
        for seed in found.seeds:
            rules: list[tuple[str, float | None, float | None, tuple[float | None, float | None] | None]] = [
                (name, None, ratio, None) for name, ratio in fixed.items()
            ]
            for record in pick(records, seed=seed):
                if (run := record["by_batch_size"].get(str(size))) is None:
                    continue
                objective, overhead = record["objective"], record["max_overhead"]
                for name in ("predicted", "used"):
                    ratio = math.log2(run[name]) if run[name] else None
                    rules.append((f"{objective}, {name}", overhead, ratio, None))
                tuned = tuned_of.get((*point, objective, overhead, seed))
                ends = (_loss(record, size), None if tuned is None else _loss(tuned, size))
                rules.append((f"{objective}, live", overhead, run["mean_log2_ratio"], ends))
            for rule, overhead, ratio, ends in rules:
                row = {name: truth[name] for name in CHANGE} | {"seed": seed, "rule": rule}
                row |= {"overhead": overhead, "ratio": ratio, "error": None, "regret": None, "tuned": None}
                if ratio is not None:
                    row["error"] = ratio - truth["ratio"]
                    for index, (field, x) in enumerate((("regret", ratio), ("tuned", ratio + truth["base"]))):
                        if ends is None:
                            row[field] = unit * found.regret(seed, x)
                        elif (loss := ends[index]) is not None:
                            row[field] = unit * (loss - found.reference(seed))
                rows.append(row)
    return rows


def _loss(run: Record, batch_size: int) -> float:
    """Of a live run after the change to a batch size."""
    return loss_of_run(run["by_batch_size"][str(batch_size)]["loss"])


def shared(rows: Iterable[Row], rules: Sequence[str], field: str = "regret") -> list[Row]:
    """The rows of those cells of which every one of the rules has a regret, or another field."""
    wanted = [row for row in rows if row["rule"] in rules and row[field] is not None]
    complete = {
        key for key, found in groups(wanted, *CELL).items() if len({r["rule"] for r in found}) == len(rules)
    }
    return [row for row in wanted if tuple(row[name] for name in CELL) in complete]


def best_fixed(rows: Sequence[Row], field: str = "regret") -> tuple[str, float] | None:
    """The fixed rule with the smallest mean regret, and that regret; None of nothing."""
    means = {name: mean(row[field] for row in pick(rows, rule=name)) for name in FIXED}
    known = {name: found.value for name, found in means.items() if found.n}
    return min(known.items(), key=lambda item: item[1]) if known else None
