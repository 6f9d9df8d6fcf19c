"""How fast may the ratio rise after a change to a larger batch size, and how far?

The callback's default writes at once what an unchanged cost of a step allows, and approaches the rest of what
the objective asks for by `max_drift_per_step`. Here the same two ratios are taken from its runs, frozen, and
approached at other rates, and up to square-root scaling as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.cells import Store
from benchmarks.fidelity.analysis import POINT, Mean, Record, Row, groups, mean, pick
from benchmarks.fidelity.best_base import best_multiplier
from benchmarks.fidelity.leave_out import chosen_elsewhere
from benchmarks.fidelity.markdown import average, number, table
from benchmarks.fidelity.regrets import DEFAULT, Sweep, sweeps_of
from benchmarks.fidelity.switch import SEEDS, final_losses
from benchmarks.fidelity.workloads import BASE_BATCH_SIZE, WORKLOADS
from lightning_surge import SurgeLRCallback

__all__ = ["RATES", "approach", "approach_rows", "approach_table", "rising"]

DRIFT = SurgeLRCallback().settings.max_drift_per_step
# 0 stays at what is written at once; infinity writes the end at once.
RATES = (0.0, DRIFT / 4, DRIFT / 2, DRIFT, 2 * DRIFT, 4 * DRIFT, math.inf)
"""Largest relative rises per step."""
BASES = ("as run", "best base lr")


def rising(start: float, end: float, rate: float, step: int) -> float:
    """The ratio of a step after the change: from one ratio to another by a rate, at once if it falls."""
    if end <= start or math.isinf(rate):
        return end
    # Beyond any end the power would overflow.
    return start * math.exp(min(step * math.log1p(rate), math.log(end / start)))


def approach(store: Store, workload: str, beta_2: float, phase: str, batch_size: int) -> dict[str, Any]:
    """Final losses of runs whose ratio rises after the change.

    Args:
        store: with the callback's runs at the default objective, and the sweep at the base batch size.
        workload: its name.
        beta_2: Adam's.
        phase: at which the batch size changes.
        batch_size: after the change, above the base.

    Returns:
        The ratio in the first step and the ends, means of the callback's over seeds in the logarithm; losses
        by base learning rate and end, by seed and rate.

    Raises:
        LookupError: If the callback's runs or the sweep are not finished there.
    """
    point: dict[str, Any] = {"workload": workload, "beta_2": beta_2, "phase": phase}
    lives = pick(store.records("live"), **DEFAULT, **point)
    if {live["seed"] for live in lives} < set(SEEDS):
        raise LookupError(f"The callback's runs have to come first, not all are finished at {point}.")
    changes = [live["by_batch_size"][str(batch_size)] for live in lives]
    start, asked = (_mean_ratio([change[name] for change in changes]) for name in ("used", "predicted"))
    ends = {DEFAULT["objective"]: asked, "sqrt": math.sqrt(batch_size / BASE_BATCH_SIZE)}
    bases = dict(zip(BASES, (1.0, best_multiplier(store, **point)), strict=True))
    kinds = [(base, end, rate) for base in bases.values() for end in ends.values() for rate in RATES]

    def multipliers_at(step: int) -> Tensor:
        return torch.tensor([base * rising(start, end, rate, step) for base, end, rate in kinds])

    losses = np.array(final_losses(workload, beta_2, phase, batch_size, multipliers_at))
    by_base = losses.reshape(len(SEEDS), len(bases), len(ends), len(RATES)).swapaxes(0, 1)
    return {
        "start": start,
        "ends": ends,
        "bases": bases,
        "rates": RATES,
        "seeds": list(SEEDS),
        "losses": {
            base: {end: part[:, index].tolist() for index, end in enumerate(ends)}
            for base, part in zip(bases, by_base, strict=True)
        },
    }


def _mean_ratio(ratios: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def approach_rows(records: Iterable[Record], sweeps: Mapping[tuple[Any, ...], Sweep]) -> list[Row]:
    """By change, base, end, rate and seed: the regret against the best *constant* multiplier of the sweep.

    In nats, or percent of the best loss where the loss is no cross-entropy; infinite for a run that diverged.
    Changes without a sweep have no row.
    """
    rows = []
    for record in records:
        found = sweeps.get(tuple(record[name] for name in (*POINT, "batch_size")))
        if found is None:
            continue
        unit = 1.0 if WORKLOADS[record["workload"]].cross_entropy else 100.0 / float(found.mean.min())
        for base, by_end in record["losses"].items():
            for end, by_seed in by_end.items():
                for seed, losses in zip(record["seeds"], by_seed, strict=True):
                    for rate, loss in zip(record["rates"], losses, strict=True):
                        row = {name: record[name] for name in (*POINT, "batch_size")}
                        row |= {"seed": seed, "base": base, "end": end}
                        # JSON has no number for an infinite rate, nor for a run that has diverged.
                        row["rate"] = math.inf if rate is None else rate
                        regret = math.inf if loss is None else unit * (loss - found.reference(seed))
                        rows.append(row | {"regret": regret})
    return rows


def rate_costs(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Mean regret by workload and rate, in units of that of staying at what is written at once.

    A workload on which staying loses nothing has no unit, and is left out.
    """
    costs = {}
    for (workload,), found in groups(rows, "workload").items():
        by_rate = {rate: _mean_regret(part).value for (rate,), part in groups(found, "rate").items()}
        if by_rate[0.0] > 0.0:
            costs[workload] = {_name(rate): value / by_rate[0.0] for rate, value in by_rate.items()}
    return costs


def _name(rate: float) -> str:
    return "at once" if math.isinf(rate) else f"{100 * rate:g} %"


def approach_table(records: Mapping[str, Sequence[Record]]) -> str:
    """Mean regret by rate and end, and what other workloads would have chosen."""
    rows = approach_rows(records["approach"], sweeps_of(records["sweep"]))
    lines = []
    for key, found in groups(rows, "base", "end", "workload").items():
        entries = [average(_mean_regret(pick(found, rate=rate))) for rate in RATES]
        lines.append([*key, len(found) // len(RATES), *entries])
    for key, found in groups(rows, "base", "end", "batch_size").items():
        found = [row for row in found if WORKLOADS[row["workload"]].cross_entropy]
        entries = [average(_mean_regret(pick(found, rate=rate))) for rate in RATES]
        lines.append([*key[:2], f"cross-entropy, B = {key[2]}", len(found) // len(RATES), *entries])
    chosen = []
    for (base,), found in groups(pick(rows, end=DEFAULT["objective"]), "base").items():
        for row in chosen_elsewhere(rate_costs(found), _name(DRIFT)):
            costs = [number(row[name], 2) for name in ("cost", "best cost", "default cost")]
            chosen.append([base, row["workload"], row["chosen"], costs[0], row["best"], *costs[1:]])
    headers = ["base", "left out", "the others choose", "which costs here", "best here", "costs"]
    return "\n\n".join(
        [
            "After a change to a larger batch size the ratio starts where the callback's does, at what an "
            "unchanged cost of a step allows, and rises by so much a step to what the objective asks for, or "
            "to sqrt scaling; both frozen at the change. Mean regret over seeds, phases, beta_2 and batch "
            "sizes, ± 95 % half-widths, against the best constant ratio of the sweep: nats, for the "
            f"autoencoder percent of the loss. {len(records['approach'])} changes of the batch size.",
            table(["base", "end", "cells", "n", *map(_name, RATES)], lines),
            f"Each workload judges the rate that the others would have chosen on the way to "
            f"`{DEFAULT['objective']}`, in units of the regret of no rise.",
            table([*headers, f"callback: {_name(DRIFT)}"], chosen),
        ]
    )


def _mean_regret(rows: Sequence[Row]) -> Mean:
    return mean(row["regret"] for row in rows)
