"""How fast may the ratio rise after a change to a larger batch size, and how far?

The callback's default writes at once what an unchanged cost of a step allows, and approaches the rest of what
the objective asks for by `max_drift_per_step`. Here both ratios are taken from its runs, frozen, and the way
between them is taken at other rates, and up to square-root scaling as well.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.cells import Store
from benchmarks.fidelity.analysis import CHANGE, Record, Row, groups, mean, paired, pick
from benchmarks.fidelity.best_base import best_multiplier
from benchmarks.fidelity.markdown import average, number, table
from benchmarks.fidelity.regrets import CELL, DEFAULT, Sweep, loss_of_run, regret_unit, sweeps_after
from benchmarks.fidelity.switch import SEEDS, final_losses
from benchmarks.fidelity.training import CONTINUED_EXAMPLES
from benchmarks.fidelity.workloads import BASE_BATCH_SIZE, WORKLOADS
from lightning_surge import SurgeLRCallback
from lightning_surge.policy.reasons import Reason

__all__ = ["RATES", "approach", "approach_rows", "approach_table", "rising"]

DRIFT = SurgeLRCallback().settings.max_drift_per_step
# 0 stays at the ratio at an unchanged cost; infinity writes the end at once.
RATES = (0.0, DRIFT / 4, DRIFT / 2, DRIFT, 2 * DRIFT, 4 * DRIFT, math.inf)
"""Largest relative rises per step."""
BASES = ("as run", "best base lr")


def rising(start: float, end: float, rate: float, step: int) -> float:
    """The ratio of a step after the change. The first one rises already, as the callback's does.

    It starts at the ratio at an unchanged cost of a step, and rises by a rate per step; a fall acts at once.
    """
    if end <= start or math.isinf(rate):
        return end
    # Beyond any end the power would overflow.
    return start * math.exp(min((step + 1) * math.log1p(rate), math.log(end / start)))


def at_once(change: Mapping[str, Any]) -> float:
    """The ratio at an unchanged cost of a step, of what a run of the callback says of its first step."""
    return float(change["used"]) / (1.0 + DRIFT if change["reason"] == Reason.RISING.text else 1.0)


def approach(store: Store, workload: str, beta_2: float, phase: str, batch_size: int) -> dict[str, Any]:
    """Final losses of runs whose ratio rises after the change to a batch size above the base.

    Returns:
        The ratio at an unchanged cost of a step, and the ends: the callback's, before its shrinkage, as means
        over seeds in the logarithm. Losses by base learning rate and end, by seed and rate.

    Raises:
        LookupError: If the callback's runs or the sweep are not finished there.
    """
    point: dict[str, Any] = {"workload": workload, "beta_2": beta_2, "phase": phase}
    point["examples"] = CONTINUED_EXAMPLES
    lives = pick(store.records("live"), **DEFAULT, **point)
    if {live["seed"] for live in lives} < set(SEEDS):
        raise LookupError(f"The callback's runs have to come first, not all are finished at {point}.")
    changes = [live["by_batch_size"][str(batch_size)] for live in lives]
    start = _mean_ratio([at_once(change) for change in changes])
    asked = _mean_ratio([change["predicted"] for change in changes])
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

    In nats, or percent of the lowest loss where the loss is no cross-entropy; infinite for a run that
    diverged. `constant lr` is the regret of the same seed at a ratio of 1. Without a sweep there is no row.
    """
    rows = []
    for record in records:
        found = sweeps.get(tuple(record[name] for name in CHANGE))
        if found is None:
            continue
        unit = regret_unit(record["workload"], found)
        for (base, by_end), seed in itertools.product(record["losses"].items(), record["seeds"]):
            index = record["seeds"].index(seed)
            constant = unit * found.regret(seed, math.log2(record["bases"][base]))
            row = {name: record[name] for name in CHANGE} | {
                "seed": seed,
                "base": base,
                "constant lr": constant,
            }
            for end, by_seed in by_end.items():
                for rate, loss in zip(record["rates"], by_seed[index], strict=True):
                    regret = unit * (loss_of_run(loss) - found.reference(seed))
                    # JSON has no number for an infinite rate.
                    of_rate = {"end": end, "rate": math.inf if rate is None else rate}
                    rows.append(row | of_rate | {"regret": regret})
    return rows


def rate_name(rate: float) -> str:
    """In percent."""
    return "at once" if math.isinf(rate) else f"{100 * rate:g} %"


def approach_table(records: Mapping[str, Sequence[Record]]) -> str:
    """Mean regrets by rate and end, and their differences to the callback's."""
    rows = approach_rows(records["approach"], sweeps_after(records))
    larger = groups([row for row in rows if WORKLOADS[row["workload"]].cross_entropy], "batch_size")
    cells = {name: found for (name,), found in groups(rows, "workload").items()}
    cells |= {f"cross-entropy, B = {size}": found for (size,), found in larger.items()}
    means, gaps = [], []
    for name, in_cell in cells.items():
        for (base, end), found in groups(in_cell, "base", "end").items():
            by_rate = [pick(found, rate=rate) for rate in RATES]
            own = by_rate[RATES.index(DRIFT)]
            key = [name, base, end, len(own)]
            means.append([*key, *(number(mean(row["regret"] for row in part).value, 3) for part in by_rate)])
            gaps.append([*key, *(average(paired(part, own, "regret", CELL)) for part in by_rate)])
    headers = ["cells", "base", "end", "n", *map(rate_name, RATES)]
    parts = [
        "After a change to a larger batch size the ratio starts at what an unchanged cost of a step allows, "
        "and rises by so much a step to what the objective asks for, or to sqrt scaling; as the callback has "
        "them at the change. Mean regret over seeds, phases, beta_2 and batch sizes, against the best "
        "constant ratio of the sweep: nats, for the autoencoder percent of the loss. "
        f"{len(groups(rows, *CHANGE))} changes of the batch size.",
        table(headers, means),
        f"The same minus that at {rate_name(DRIFT)}, the callback's, paired over cells, ± 95 % half-widths.",
        table(headers, gaps),
    ]
    return "\n\n".join(parts)
