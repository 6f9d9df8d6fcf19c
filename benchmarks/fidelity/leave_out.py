"""Would the other workloads have chosen the same? Each is left out once, and judges what the rest choose."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from benchmarks.fidelity.analysis import Record, Row, groups, mean, pick
from benchmarks.fidelity.markdown import number, table
from benchmarks.fidelity.regrets import CELL, DEFAULT, FIXED, best_fixed, shared
from benchmarks.fidelity.rules import at_default

__all__ = ["chosen_elsewhere", "leave_out", "objective_costs"]

Costs = Mapping[str, Mapping[str, float]]
"""By workload and choice; smaller is better, and comparable between workloads."""


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


def objective_costs(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Mean regret of live runs by objective, over that of the best fixed rule on the same workload."""
    live = [rule for (rule,) in groups(rows, "rule") if rule.endswith(", live")]
    costs = {}
    for (workload,), found in groups(shared(rows, (*FIXED, *live)), "workload").items():
        fixed = best_fixed(found)
        if fixed is not None and fixed[1] > 0.0:
            costs[workload] = {
                rule.removesuffix(", live"): mean(row["regret"] for row in pick(found, rule=rule)).value
                / fixed[1]
                for rule in live
            }
    return costs


def leave_out(records: Mapping[str, Sequence[Record]]) -> str:
    """The choice of the objective as a table."""
    rows = at_default(records["rules"])
    live = [rule for (rule,) in groups(rows, "rule") if rule.endswith(", live")]
    cells = groups(shared(rows, (*FIXED, *live)), *CELL)
    default = DEFAULT["objective"]
    lines = [
        [number(entry, 3) if isinstance(entry, float) else entry for entry in row]
        for row in chosen_elsewhere(objective_costs(rows), default)
    ]
    headers = ["left out", "the others choose", "which costs here", "best here", "costs"]
    return "\n\n".join(
        [
            "Each workload judges what the others would have chosen by their mean; beside it what was best "
            "on it, and what the callback does. Mean regret of live runs after a change of the batch size, "
            f"over that of the best fixed rule on the same workload. {len(cells)} cells.",
            table([*headers, f"callback: {default}"], lines) if lines else "Too few workloads.",
        ]
    )
