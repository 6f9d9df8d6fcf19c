"""Whether the best ratio of learning rates rises and falls with the batch size, read off the ladder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.fidelity.analysis import POINT, Array, Record, Row, groups, loss_of_run
from benchmarks.fidelity.ceilings import LEAST_STEPS
from benchmarks.fidelity.free import DECAYS, approached
from benchmarks.fidelity.markdown import number, table
from benchmarks.fidelity.workloads import BASE_BATCH_SIZE
from lightning_surge.policy.policy import MAX_DRIFT

__all__ = ["best_ratio_table", "best_ratios"]


def best_ratios(records: Sequence[Record]) -> list[Row]:
    """The best ratio approached after each change of the batch size, of the mean over seeds and of each seed.

    At most what the last step reaches. `open` where it is the ladder's highest, or takes more than half of
    the steps to reach. Changes of so few steps that no rule has the time to rise are left out.
    """
    rows = []
    for cell in records:
        for size, by_ratio in cell["losses"].items():
            steps = cell["examples"] // int(size)
            if steps < LEAST_STEPS:
                continue
            x = np.log2([float(ratio) for ratio in by_ratio])
            losses = np.array([[loss_of_run(loss) for loss in found] for found in by_ratio.values()])
            half, last = (approached(math.inf, MAX_DRIFT, step) for step in (steps // 2 - 1, steps - 1))
            best, *of_seeds = (min(lowest(x, one), last) for one in (losses.mean(axis=1), *losses.T))
            rows.append(
                {name: cell[name] for name in (*POINT, "examples")}
                | {"growth": int(size) // BASE_BATCH_SIZE, "best": best, "of_seeds": of_seeds}
                | {"open": bool(best >= min(2.0 ** x[-1], half))}
            )
    return rows


def lowest(x: Array, losses: Array) -> float:
    """The ratio of the lowest loss between those of the ladder."""
    finite = np.isfinite(losses)
    return float(2.0 ** vertex(x[finite], losses[finite]))


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


def best_ratio_table(records: Mapping[str, Sequence[Record]]) -> str:
    """Best ratios by workload, decay and phase, a column for each growth of the batch."""
    rows = best_ratios(records["ladder"])
    growths = sorted({row["growth"] for row in rows})
    lines = []
    for (workload, beta_2, examples, phase), found in groups(rows, *POINT[:2], "examples", "phase").items():
        by_growth = {row["growth"]: shown(row) for row in found}
        cells = [by_growth.get(growth, "-") for growth in growths]
        lines.append([workload, beta_2, f"{examples // DECAYS[0]} x", phase, *cells])
    note = (
        "The approached ratio at which the final loss is lowest, of the mean over seeds (lowest and highest "
        f'of a seed), {100 * MAX_DRIFT:g} % a step. "At least": the highest of the ladder, or more than what '
        "half of the steps reach."
    )
    headers = ["workload", "beta_2", "decay", "phase", *(f"{growth} x batch" for growth in growths)]
    return f"{note}\n\n{table(headers, lines)}"


def shown(row: Row) -> str:
    """A best ratio and its range."""
    low, high = (number(end, 1) for end in (min(row["of_seeds"]), max(row["of_seeds"])))
    return f"{'at least ' * row['open']}{number(row['best'], 1)} ({low} to {high})"
