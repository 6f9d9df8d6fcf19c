"""Would the other workloads have chosen the same? Each is left out once, and judges what the rest choose."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from benchmarks.fidelity.analysis import Record, Row, decay_rows, groups, mean, pick, rms
from benchmarks.fidelity.markdown import number, table
from benchmarks.fidelity.regrets import CELL, DEFAULT, FIXED, best_fixed, shared
from benchmarks.fidelity.run_tables import all_rows, at_default
from lightning_surge import SurgeLRCallback

__all__ = ["choices_table", "chosen_elsewhere", "half_life_costs", "leave_out", "objective_costs"]

Costs = Mapping[str, Mapping[str, float]]
"""By workload and choice; smaller is better, and comparable between workloads."""


def chosen_elsewhere(costs: Costs, default: str) -> list[Row]:
    """For each workload: what the others choose by their mean cost, and what that costs here.

    Only choices that every workload has are compared.
    """
    choices = [
        choice for choice in next(iter(costs.values()), {}) if all(choice in by for by in costs.values())
    ]
    if len(costs) < 2 or not choices:
        return []
    rows = []
    for workload, here in costs.items():
        others = [by for name, by in costs.items() if name != workload]
        chosen = min(choices, key=lambda choice: sum(by[choice] for by in others))
        best = min(choices, key=lambda choice: here[choice])
        row = {"workload": workload, "chosen": chosen, "cost": here[chosen], "best": best}
        rows.append(row | {"best cost": here[best], "default cost": here.get(default, math.nan)})
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


def half_life_costs(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """Root mean square of log2 of R by averaging window minus that of the held model, through a decay."""
    rows = [
        row for row in decay_rows(records) if row["half_life"] != "reference" and row["error"] is not None
    ]
    # Marks at which some window has no law yet would favour the others.
    point = ("workload", "seed", "mark", "batch_size")
    lost = {tuple(row[name] for name in point) for row in rows if not math.isfinite(row["error"])}
    kept = [row for row in rows if tuple(row[name] for name in point) not in lost]
    return {
        workload: {
            half: rms(row["error"] for row in part) for (half,), part in groups(found, "half_life").items()
        }
        for (workload,), found in groups(kept, "workload").items()
    }


def leave_out(records: Mapping[str, Sequence[Record]]) -> str:
    """Both choices as tables."""
    rows = at_default(all_rows(records))
    live = [rule for (rule,) in groups(rows, "rule") if rule.endswith(", live")]
    cells = groups(shared(rows, (*FIXED, *live)), *CELL)
    return "\n\n".join(
        [
            "Each workload judges what the others would have chosen by their mean; beside it what was best "
            "on it, and what the callback does.",
            "**The objective**, after a change of the batch size: mean regret of live runs over that of the "
            f"best fixed rule on the same workload. {len(cells)} cells.",
            choices_table(objective_costs(rows), DEFAULT["objective"]),
            "**The averaging window**, through a decay: root mean square of log2 R minus that of the model "
            f"held, by half-life in measurements. {len(records['decay'])} runs.",
            choices_table(half_life_costs(records["decay"]), f"{SurgeLRCallback().settings.half_life:g}"),
        ]
    )


def choices_table(costs: Costs, default: str) -> str:
    """What the others choose, by workload left out.

    Args:
        costs: by workload and choice.
        default: the callback's choice.
    """
    rows = chosen_elsewhere(costs, default)
    headers = [
        "left out",
        "the others choose",
        "which costs here",
        "best here",
        "costs",
        f"callback: {default}",
    ]
    lines = [
        [
            row["workload"],
            row["chosen"],
            number(row["cost"], 3),
            row["best"],
            number(row["best cost"], 3),
            number(row["default cost"], 3),
        ]
        for row in rows
    ]
    return table(headers, lines) if rows else "Too few workloads."
