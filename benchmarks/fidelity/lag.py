"""Is a correction worth having for the lag of Adam's second average behind a change of the batch size?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from benchmarks.fidelity.analysis import CHANGE, POINT, Record, Row, groups, mean, pick
from benchmarks.fidelity.markdown import average, number, table
from benchmarks.fidelity.regrets import DEFAULT, sweeps_of
from benchmarks.fidelity.workloads import BASE_BATCH_SIZE

__all__ = ["lag_rows", "lag_table"]


def lag_rows(sweeps: Iterable[Record], corrected: Iterable[Record], lives: Iterable[Record]) -> list[Row]:
    """By change: the best multiplier and loss of the sweep with and without the correction.

    `difference` of the losses, corrected minus not, is paired over seeds, each at the multiplier that is best
    on average. `at first ratio` is the same at the ratio of the callback's first step after the change times
    the best base learning rate, both held: who corrects does not sweep again.
    """
    plain = sweeps_of(sweeps)
    live_of = groups(pick(lives, **DEFAULT), *POINT)
    rows = []
    for key, found in sweeps_of(corrected).items():
        if key not in plain:
            continue
        row = dict(zip(CHANGE, key, strict=True))
        for name, entry in {"without": plain[key], "with": found}.items():
            row |= {f"loss {name}": entry.lowest, f"multiplier {name}": 2.0**entry.best}
        seeds = [seed for seed in found.seeds if seed in plain[key].seeds]
        row["difference"] = mean(found.reference(seed) - plain[key].reference(seed) for seed in seeds)
        used = [live["by_batch_size"][str(key[-1])]["used"] for live in live_of.get(key[:-1], [])]
        base = plain.get((*key[:-1], BASE_BATCH_SIZE))
        x = math.nan if base is None or not used else base.best + float(np.mean(np.log2(used)))
        known = [] if math.isnan(x) else seeds
        row["at first ratio"] = mean(found.loss(seed, x) - plain[key].loss(seed, x) for seed in known)
        rows.append(row)
    return rows


def lag_table(records: Mapping[str, Sequence[Record]]) -> str:
    """What undoing the lag is worth."""
    lines = [
        [
            *(row[name] for name in ("workload", "beta_2", "batch_size")),
            *(number(row[f"multiplier {name}"]) for name in ("without", "with")),
            *(number(row[f"loss {name}"], 4) for name in ("without", "with")),
            average(row["difference"], 4),
            row["difference"].n,
            average(row["at first ratio"], 4),
        ]
        for row in lag_rows(records["sweep"], records["lag"], records["live"])
    ]
    headers = ["workload", "beta_2", "B", "best multiplier", "corrected", "loss there", "corrected"]
    return "\n\n".join(
        [
            "Sweeps after a change of the batch size in the late phase, with Adam's step and with a "
            "step from which the lag of v behind the new batch size is taken out. Losses are the lowest "
            "mean over seeds; differences, corrected minus not, are paired over seeds, ± 95 % "
            "half-widths: at the best multiplier of each, and at the callback's first ratio times the best "
            "base lr.",
            table([*headers, "difference", "seeds", "difference at the callback's"], lines),
        ]
    )
