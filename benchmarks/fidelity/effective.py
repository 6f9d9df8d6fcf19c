"""Does momentum make the effective batch larger? Then ratios would saturate at smaller batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.fidelity.analysis import POINT, Record, Row, groups, mean, pick
from benchmarks.fidelity.markdown import number, table
from benchmarks.fidelity.regrets import DEFAULT, mccandlish, sweeps_of, truth_rows

__all__ = ["BETA_1", "FACTORS", "effective_rows", "effective_table"]

BETA_1 = 0.9
MOMENTUM = (1.0 - BETA_1) / (1.0 + BETA_1)
"""Variance of an average of gradients with weights `(1 - beta_1) beta_1^k`, over that of one of them."""
FACTORS = (MOMENTUM, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 1 / MOMENTUM)


def effective_rows(truths: Iterable[Row], lives: Iterable[Record]) -> list[Row]:
    """By factor on the noise scale and change of the batch size: McCandlish's ratio over R_true, log2.

    A batch as good as `s` times its size has the noise scale of one `s` times as small. Noise scales are the
    callback's before the change, and ratios are averaged over seeds in the logarithm.
    """
    live_of = groups(pick(lives, **DEFAULT), *POINT)
    rows = []
    for truth in truths:
        runs = live_of.get(tuple(truth[name] for name in POINT), [])
        scales = [run["noise_scale"] for run in runs if "noise_scale" in run]
        for factor in FACTORS if scales else ():
            logs = [
                mccandlish(math.inf if scale is None else factor * scale, truth["batch_size"])
                for scale in scales
            ]
            row: dict[str, Any] = {"factor": factor, "batch_size": truth["batch_size"]}
            rows.append(row | {"error": mean(logs).value - truth["ratio"]})
    return rows


def effective_table(records: Mapping[str, Sequence[Record]]) -> str:
    """Errors of the ratio by factor on the noise scale."""
    rows = effective_rows(truth_rows(sweeps_of(records["sweep"])), records["live"])
    sizes = sorted({row["batch_size"] for row in rows})
    lines = []
    for (factor,), found in groups(rows, "factor").items():
        parts = [found, *(pick(found, batch_size=size) for size in sizes)]
        errors = [mean(abs(row["error"]) for row in part).value for part in parts]
        lines.append([f"{factor:.3g}", *map(number, errors)])
    return "\n\n".join(
        [
            "Mean absolute log2 of sqrt((1 + B_s / 16) / (1 + B_s / B)) over R_true, with the callback's "
            f"noise scale times a factor for B_s. If momentum of beta_1 = {BETA_1} made the effective batch "
            f"larger by as much as it makes the noise of an average smaller, {MOMENTUM:.3g} would fit best. "
            f"{len(rows) // len(FACTORS)} changes of the batch size.",
            table(["factor", "all", *(f"B = {size}" for size in sizes)], lines),
        ]
    )
