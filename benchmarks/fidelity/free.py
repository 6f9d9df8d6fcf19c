"""Rules that measure nothing, at once and approached step by step, against the callback at its default.

After a change to a larger batch size, sqrt and linear scaling are approached from a ratio of 1 at the
callback's `max_drift_per_step`. That costs nothing, so it is what measuring has to beat.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from benchmarks.fidelity.analysis import CHANGE, Record, mean_over_seeds
from benchmarks.fidelity.markdown import number, table
from benchmarks.fidelity.switch import SEEDS, final_losses
from benchmarks.fidelity.training import CONTINUED_EXAMPLES
from benchmarks.fidelity.workloads import BASE_BATCH_SIZE, WORKLOADS
from benchmarks.results import target
from lightning_surge import SurgeLRCallback
from lightning_surge.policy.policy import MAX_DRIFT

__all__ = ["AS_SHIPPED", "DECAYS", "LARGER", "approached", "free", "free_table", "free_targets", "gaps"]

LARGER = tuple(BASE_BATCH_SIZE * factor for factor in (4, 16, 64))
DECAYS = (CONTINUED_EXAMPLES, 8 * CONTINUED_EXAMPLES)
"""Examples after the change, over which the learning rate decays to zero."""
AS_SHIPPED = {
    "objective": SurgeLRCallback().settings.objective,
    "max_overhead": SurgeLRCallback().settings.max_overhead,
}
"""The callback at its default cost."""
CALLBACK = f"callback, {100 * AS_SHIPPED['max_overhead']:g} %"
REFERENCE = "sqrt, approached"
RULES: dict[str, tuple[float, float]] = {
    "constant": (0.0, math.inf),
    "sqrt, at once": (0.5, math.inf),
    REFERENCE: (0.5, MAX_DRIFT),
    "linear, at once": (1.0, math.inf),
    "linear, approached": (1.0, MAX_DRIFT),
}
"""By name: the power of the batch size, and the largest relative rise per step."""
EXPERIMENT = (*CHANGE, "examples", "seed")


def approached(end: float, rate: float, step: int) -> float:
    """The ratio of a step after the change, which rises from 1 by a rate; the first step rises already."""
    return end if math.isinf(rate) else math.exp(min((step + 1) * math.log1p(rate), math.log(end)))


def free(workload: str, beta_2: float, phase: str, examples: int) -> dict[str, Any]:
    """Final losses after a change at a phase: by batch size and rule, one for each seed."""
    losses = {}
    for size in LARGER:
        ends = [((size / BASE_BATCH_SIZE) ** power, rate) for power, rate in RULES.values()]

        def multipliers_at(step: int, ends: Sequence[tuple[float, float]] = ends) -> torch.Tensor:
            return torch.tensor([approached(end, rate, step) for end, rate in ends])

        found = final_losses(workload, beta_2, phase, size, multipliers_at, examples)
        losses[str(size)] = dict(zip(RULES, map(list, zip(*found, strict=True)), strict=True))
    return {"seeds": list(SEEDS), "losses": losses}


def of_rules(records: Mapping[str, Sequence[Record]]) -> list[Record]:
    """Cells of rules; where there are none, the ladder has the approached ones among its ratios."""

    def key(cell: Record) -> tuple[Any, ...]:
        return tuple(cell[name] for name in (*CHANGE[:3], "examples"))

    found = {key(cell): cell for cell in records["free"]}
    for cell in records["ladder"]:
        by_size = {
            size: {
                rule: by_ratio[str((int(size) / BASE_BATCH_SIZE) ** power)]
                for rule, (power, rate) in RULES.items()
                if rate == MAX_DRIFT or power == 0.0
            }
            for size, by_ratio in cell["losses"].items()
        }
        found.setdefault(key(cell), cell | {"losses": by_size})
    return list(found.values())


def gaps(records: Mapping[str, Sequence[Record]]) -> pd.DataFrame:
    """Final losses minus those of sqrt scaling approached: rows by `EXPERIMENT`, columns by rule.

    In nats, or in percent of the reference's mean loss over seeds where the loss is no cross-entropy.
    Infinite for runs that diverged. Only experiments that every approached rule has; nobody runs at once what
    is known to be ruinous over a longer decay, which is NaN.
    """
    runs = [
        {name: cell[name] for name in (*CHANGE[:3], "examples")} | {"batch_size": int(size)} | run
        for cell in of_rules(records)
        for size, by_rule in cell["losses"].items()
        for rule, losses in by_rule.items()
        for run in ({"rule": rule, "seed": s, "loss": loss} for s, loss in enumerate(losses))
    ]
    runs += [
        {name: cell[name] for name in (*CHANGE[:3], "examples", "seed")}
        | {"batch_size": int(size), "rule": CALLBACK, "loss": run["loss"]}
        for cell in records["live"]
        if cell.items() >= AS_SHIPPED.items()
        for size, run in cell["by_batch_size"].items()
    ]
    names = [name for name in (*RULES, CALLBACK) if name in {run["rule"] for run in runs}]
    found = pd.DataFrame(runs).assign(loss=lambda rows: rows["loss"].fillna(math.inf))
    losses = found.pivot(index=list(EXPERIMENT), columns="rule", values="loss")[names]
    losses = losses.dropna(subset=[name for name in names if "at once" not in name])
    level = losses[REFERENCE].groupby(list(EXPERIMENT[:-1])).transform("mean")
    workloads = losses.index.get_level_values("workload")
    nats = np.array([WORKLOADS[name].cross_entropy for name in workloads], dtype=bool)
    return losses.sub(losses[REFERENCE], axis=0).mul(np.where(nats, 1.0, 100.0 / level), axis=0)


def in_nats(found: pd.DataFrame, *, nats: bool) -> pd.DataFrame:
    """The experiments whose gaps are in nats, or those in percent."""
    names = [name for name, workload in WORKLOADS.items() if workload.cross_entropy == nats]
    return found[found.index.get_level_values("workload").isin(names)]


def by_rule(part: pd.DataFrame) -> str:
    """A row for each rule, a column for each batch size and decay: mean, and mean of the worst seed."""
    columns = {}
    for (examples, size), here in part.groupby(["examples", "batch_size"]):
        name = f"{size // BASE_BATCH_SIZE} x batch, {examples // CONTINUED_EXAMPLES} x decay"
        worst = here.groupby("seed").mean().max()
        columns[name] = [
            f"{number(here[rule].mean(), 4)} ({number(worst[rule], 4)})" if here[rule].notna().any() else "-"
            for rule in part
        ]
    return table(["rule", *columns], zip(part, *columns.values(), strict=True))


def free_table(records: Mapping[str, Sequence[Record]]) -> str:
    """Gaps by rule, batch size and decay."""
    found = gaps(records)
    commits = sorted({cell["commit"] for cell in records["live"] if cell.items() >= AS_SHIPPED.items()})
    parts = [
        f"Final loss minus that of sqrt scaling approached from 1 at {100 * MAX_DRIFT:g} % a step, at the "
        "base learning rate of the study: mean over changes of the batch size and seeds (mean of the worst "
        "seed). At once: over the shorter decay, without the larger transformer. "
        f"The callback was measured at {', '.join(commits) or 'no commit yet'}."
    ]
    for unit in ("nats", "% of the loss"):
        part = in_nats(found, nats=unit == "nats")
        if len(part):
            names = ", ".join(part.index.get_level_values("workload").unique())
            count = len(part.groupby(list(EXPERIMENT[:-1])))
            parts += [f"**{unit}** ({names}; {count} changes)", by_rule(part)]
    return "\n\n".join(parts)


def free_targets(records: Mapping[str, Sequence[Record]], command: str) -> list[dict[str, Any]]:
    """No change may cost the callback much more than the rule that is free."""
    found = gaps(records) if of_rules(records) else pd.DataFrame()
    targets: list[dict[str, Any]] = []
    if CALLBACK not in found:
        return targets
    better = found[[REFERENCE, "linear, approached"]].groupby(list(EXPERIMENT[:-1])).mean().min(axis=1)
    for nats, unit, most, near in ((True, "nats", 0.02, 0.004), (False, "% of the loss", 2.0, 0.5)):
        if len(part := in_nats(found, nats=nats)[CALLBACK]):
            of_change = part.groupby(list(EXPERIMENT[:-1])).mean()
            title = f"the callback at its default minus sqrt approached, {unit}"
            name = f"{title}: largest of {len(of_change)} changes"
            targets.append(target(name, float(of_change.max()), most, command))
            above = float((of_change - better[of_change.index]).max())
            name = name.replace("sqrt approached", "the better of sqrt and linear approached")
            targets.append(target(name, above, near, command))
            mean = mean_over_seeds(part.rename("gap").reset_index().to_dict("records"), "gap")
            width = {"half_width": round(mean.half_width, 4)} if math.isfinite(mean.half_width) else {}
            targets.append(target(f"{title}: mean", mean.value, 0.0, command, **width))
    return targets
