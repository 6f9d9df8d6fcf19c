"""What rules lose after a change of the batch size, and whether other workloads would choose the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from benchmarks.fidelity.analysis import Mean, Record, Row, groups, mean, pick
from benchmarks.fidelity.markdown import average, number, table
from benchmarks.fidelity.regrets import CELL, DEFAULT, FIXED, best_fixed, shared
from benchmarks.fidelity.workloads import WORKLOADS

__all__ = ["at_default", "chosen_elsewhere", "leave_out", "objective_costs", "of_unit", "rules"]

HEADERS = (
    "mean absolute log2(R / R_true)",
    *(f"regret {base}, {unit}" for base in ("at the best base lr", "as run") for unit in ("nats", "%")),
)
Costs = Mapping[str, Mapping[str, float]]
"""By workload and choice; smaller is better, and comparable between workloads."""


def at_default(rows: Sequence[Row]) -> list[Row]:
    """Rules without a callback, and the callback at the cost of most of its runs."""
    return pick(rows, overhead=(None, DEFAULT["max_overhead"]))


def of_unit(rows: Sequence[Row], *, nats: bool) -> list[Row]:
    """Those whose regret is in nats, or those in percent."""
    return [row for row in rows if WORKLOADS[row["workload"]].cross_entropy == nats]


def rules(records: Mapping[str, Sequence[Record]]) -> str:
    """Every rule on the cells that all of them have, in few columns."""
    rows = at_default(records["rules"])
    names = [rule for (rule,) in groups(rows, "rule")]
    same = shared(rows, names)
    lines = []
    for (rule,), found in groups(same, "rule").items():
        means = [_mean(found, "error")]
        for field in ("tuned", "regret"):
            means += [_mean(of_unit(found, nats=nats), field) for nats in (True, False)]
        lines.append([rule, *map(average, means)])
    count = f"{len(same) // max(len(names), 1)} cells that every rule has."
    return "\n\n".join([count, table(["rule", *HEADERS], lines)])


def _mean(rows: Sequence[Row], field: str) -> Mean:
    return mean(abs(row[field]) if field == "error" else row[field] for row in rows if row[field] is not None)


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
            means = {rule: mean(row["regret"] for row in pick(found, rule=rule)).value for rule in live}
            costs[workload] = {rule.removesuffix(", live"): cost / fixed[1] for rule, cost in means.items()}
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
    headers.append(f"callback: {default}")
    note = (
        "Each workload judges what the others would have chosen by their mean; beside it what was best "
        "on it, and what the callback does. Mean regret of live runs after a change of the batch size, "
        f"over that of the best fixed rule on the same workload. {len(cells)} cells."
    )
    return f"{note}\n\n{table(headers, lines) if lines else 'Too few workloads.'}"
