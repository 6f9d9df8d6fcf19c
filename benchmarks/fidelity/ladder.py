"""A ladder of ratios after a change of the batch size, each approached from 1; and the best of them.

Whether the best ratio rises and falls with the batch size is what the paper says of one step, asked of whole
runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.fidelity.analysis import POINT, Array, Record, Row, groups, loss_of_run
from benchmarks.fidelity.free import DECAYS, LARGER, approached
from benchmarks.fidelity.markdown import number, table
from benchmarks.fidelity.switch import SEEDS, final_losses
from benchmarks.fidelity.workloads import BASE_BATCH_SIZE
from lightning_surge.policy.policy import MAX_DRIFT

__all__ = ["LONGEST", "best_ratio_table", "best_ratios", "ladder"]

RATIOS = (1.0, 2.0, 4.0, 8.0, 16.0, 64.0, 256.0)
LONGEST = 8 * DECAYS[-1]
"""Examples after the change that are enough for a ladder up to 256 times the batch size."""
LEAST_STEPS = 32


def ladder(
    workload: str, beta_2: float, phase: str, examples: int, sizes: Sequence[int] = LARGER
) -> dict[str, Any]:
    """Final losses after a change at a phase: by batch size and ratio approached, one for each seed."""
    losses = {}
    for size in sizes:
        ends = [ratio for ratio in RATIOS if ratio <= max(size / BASE_BATCH_SIZE, 8.0)]

        def multipliers_at(step: int, ends: Sequence[float] = ends) -> torch.Tensor:
            return torch.tensor([approached(end, MAX_DRIFT, step) for end in ends])

        found = final_losses(workload, beta_2, phase, size, multipliers_at, examples)
        losses[str(size)] = dict(zip(map(str, ends), map(list, zip(*found, strict=True)), strict=True))
    return {"seeds": list(SEEDS), "losses": losses}


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
    """Minimum of the parabola through the lowest point and its neighbours; the point itself at an end.

    No more points: beside a wall of runs that almost diverged they would draw it away.
    """
    low = int(np.argmin(losses))
    if low in (0, len(x) - 1):
        return float(x[low])
    near = slice(low - 1, low + 2)
    square, linear, _ = np.polyfit(x[near] - x[low], losses[near] - losses[low], 2)
    return float(x[low] - linear / (2 * square)) if square > 0.0 else float(x[low])


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
