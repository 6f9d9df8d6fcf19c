"""What the records of one step say, at points of training where the model was held."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from benchmarks.fidelity.analysis import POINT, Record, Row, difference, groups, log2, pick, summary
from benchmarks.fidelity.markdown import spread, table
from benchmarks.fidelity.one_step import SIZES
from benchmarks.fidelity.workloads import BASE_BATCH_SIZE
from lightning_surge.laws.base import MeasuredLaw

LAWS = {
    "measured, 50": "50",
    "measured, 12": "12",
    "exact statistics": "exact",
    "theorem 2": "theorem2",
    "theorem 3": "theorem3",
}
"""Names of the laws in tables, and their keys in records."""
NEAR = tuple(size for size in SIZES if 4 <= size <= 1024)
"""Within 16 times the active size."""
BASE = SIZES.index(BASE_BATCH_SIZE)


def exact_noise_scale(record: Record) -> float | None:
    """B_simple, from mean |g_B|^2 = |G|^2 + tr Sigma / B at the base size and the largest.

    None without a signal.
    """
    small, large = (record["grad_sq_of_batches"][str(size)] for size in (BASE_BATCH_SIZE, SIZES[-1]))
    trace = (small - large) / (1 / BASE_BATCH_SIZE - 1 / SIZES[-1])
    signal = large - trace / SIZES[-1]
    return max(trace, 0.0) / signal if signal > 0.0 else None


def exact_law(record: Record) -> MeasuredLaw | None:
    """The measured law's form from exact N at 16 and 64, D = N / lr_true there, and the exact noise scale."""
    scale, sizes = exact_noise_scale(record), (BASE_BATCH_SIZE, 4 * BASE_BATCH_SIZE)
    truths = [record["sign"][str(size)] for size in sizes]
    if scale is None or any(truth["lr"] is None or truth["alignment"] <= 0.0 for truth in truths):
        return None
    n = np.array([truth["alignment"] for truth in truths])
    d = n / np.array([truth["lr"] for truth in truths])
    h_sq = 1 / (1 + scale / np.array(sizes))
    limit = float(np.sum(n * np.sqrt(h_sq)) / np.sum(h_sq))
    slope = (d[1] - d[0]) / (h_sq[1] - h_sq[0]) if scale > 0.0 else 0.0
    slope = float(min(max(slope, 0.0), d.mean() / h_sq.mean()))
    return MeasuredLaw(
        alignment_limit=limit,
        alignment_scale=scale,
        noise_curvature=max(float(d.mean() - slope * h_sq.mean()), 0.0),
        signal_curvature=slope / limit**2,
    )


def law_log2_lrs(record: Record, law: str) -> list[float] | None:
    """log2 lr at all sizes by a key of `LAWS`; None where there is no law."""
    if law == "exact":
        found = exact_law(record)
        return None if found is None else [math.log2(found.lr(size)) for size in SIZES]
    entry = record[law] if law in record else record["measured"].get(law)
    return None if entry is None else [math.log2(lr) for lr in entry["lr"]]


def one_step_rows(records: Iterable[Record]) -> list[Row]:
    """One row by point, batch size and law, with the errors of `lr` and `ratio`."""
    rows = []
    for record in records:
        truths = [record["sign"][str(size)] for size in SIZES]
        lr_true = [log2(truth["lr"]) for truth in truths]
        for name, key in LAWS.items():
            lr = law_log2_lrs(record, key)
            for index, size in enumerate(SIZES):
                ratio_true = difference(lr_true[index], lr_true[BASE]) if index != BASE else None
                row = {field: record[field] for field in (*POINT, "seed")}
                row |= {"law": name, "batch_size": size, "lr_true": lr_true[index]}
                row["lr"] = difference(math.inf if lr is None else lr[index], lr_true[index])
                row["ratio"] = difference(math.inf if lr is None else lr[index] - lr[BASE], ratio_true)
                rows.append(row)
    return rows


def calibration_rows(records: Iterable[Record]) -> list[Row]:
    """Whether the truth is inside the 68 % interval, to which its own error is added in quadrature.

    None where the law, the truth or its error is unknown.
    """
    rows = []
    for record in records:
        truths = [record["sign"][str(size)] for size in SIZES]
        for count, entry in record["measured"].items():
            for index, size in enumerate(SIZES):
                row = {name: record[name] for name in (*POINT, "seed")}
                row |= {"count": int(count), "batch_size": size}
                row |= {"lr": None, "ratio": None}
                for what in ("lr", "ratio") if entry is not None else ():
                    ends = (index,) if what == "lr" else (index, BASE)
                    errors = [truths[end]["log2_error"] for end in ends]
                    if None in errors or ends == (BASE, BASE):
                        continue
                    gaps = [math.log2(entry["lr"][end] / truths[end]["lr"]) for end in ends]
                    own = entry[f"{what}_error"][index]
                    width = math.inf if own is None else math.hypot(own, *errors)
                    allowed = math.hypot(*(entry["extrapolation"][end] for end in ends))
                    row[what] = abs(gaps[0] - sum(gaps[1:])) <= math.hypot(width, allowed)
                rows.append(row)
    return rows


def laws(records: Mapping[str, Sequence[Record]]) -> str:
    """The same in few lines, for pages: by law, and by workload."""
    rows = pick(one_step_rows(records["one_step"]), batch_size=NEAR)
    lines = []
    for law in LAWS:
        found = pick(rows, law=law)
        by_workload = [summary(row["ratio"] for row in part) for _, part in groups(found, "workload").items()]
        whole = [summary(row[what] for row in found) for what in ("lr", "ratio")]
        lines.append([law, *map(spread, whole), *map(spread, by_workload)])
    names = [name for (name,) in groups(rows, "workload")]
    headers = ["law", "lr: median, 90th percentile", "R", *(f"R, {name}" for name in names)]
    note = f"{len(records['one_step'])} points of training, B = {NEAR[0]} to {NEAR[-1]}, 64 in force."
    return "\n\n".join([table(headers, lines), note])
