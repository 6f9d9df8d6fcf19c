"""What the records of one step say, at points of training where the model was held. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from scipy.optimize import minimize_scalar

from benchmarks.fidelity.analysis import POINT, Array, Record, Row, difference, log2
from benchmarks.fidelity.one_step import COUNTS, HALF_LIVES, KINDS, SIZES
from benchmarks.fidelity.workloads import BASE_BATCH_SIZE
from lightning_surge.laws.base import MeasuredLaw

LAWS = {
    "measured, 50": "8/50",
    "measured, 12": "8/12",
    "exact statistics": "exact",
    "theorem 2": "theorem2",
    "theorem 3": "theorem3",
}
"""Names of the laws in tables, and their keys in records."""
ALIGNMENT_FLOOR = 0.02
"""Added to the errors of log2 N(B) in fits, so that one point cannot take all of the weight."""
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
    """One row by point, batch size and law: `lr` and `ratio`, errors, and how well the truths are known."""
    rows = []
    for record in records:
        truths = [record["sign"][str(size)] for size in SIZES]
        lr_true = [log2(truth["lr"]) for truth in truths]
        known = [math.inf if truth["log2_error"] is None else truth["log2_error"] for truth in truths]
        for name, key in LAWS.items():
            lr = law_log2_lrs(record, key)
            for index, size in enumerate(SIZES):
                ratio_true = difference(lr_true[index], lr_true[BASE]) if index != BASE else None
                row = {field: record[field] for field in (*POINT, "seed")}
                row |= {"law": name, "batch_size": size, "lr_true": lr_true[index]}
                row["lr"] = difference(math.inf if lr is None else lr[index], lr_true[index])
                row["ratio"] = difference(math.inf if lr is None else lr[index] - lr[BASE], ratio_true)
                row |= {"lr_known": known[index], "ratio_known": math.hypot(known[index], known[BASE])}
                rows.append(row)
    return rows


def calibration_rows(records: Iterable[Record]) -> list[Row]:
    """Whether the truth is inside the 68 % interval, to which its own error is added in quadrature.

    For `lr` and `ratio`; None where the law, the truth or its error is unknown. The interval is the
    callback's, with what it allows for extrapolation; `lr_alone` and `ratio_alone` are without that.
    `infinite` tells of an interval without bounds, in which every truth is.
    """
    rows = []
    for record in records:
        truths = [record["sign"][str(size)] for size in SIZES]
        for key, entry in record["measured"].items():
            half_life, _, count = key.partition("/")
            for index, size in enumerate(SIZES):
                row = {name: record[name] for name in (*POINT, "seed")}
                row |= {"half_life": half_life, "count": int(count), "batch_size": size, "infinite": False}
                row |= dict.fromkeys(("lr", "ratio", "lr_alone", "ratio_alone"))
                for what in ("lr", "ratio") if entry is not None else ():
                    ends = (index,) if what == "lr" else (index, BASE)
                    errors = [truths[end]["log2_error"] for end in ends]
                    if None in errors or ends == (BASE, BASE):
                        continue
                    gaps = [math.log2(entry["lr"][end] / truths[end]["lr"]) for end in ends]
                    own = entry[f"{what}_error"][index]
                    width = math.inf if own is None else math.hypot(own, *errors)
                    allowed = math.hypot(*(entry["extrapolation"][end] for end in ends))
                    row[f"{what}_alone"] = abs(gaps[0] - sum(gaps[1:])) <= width
                    row[what] = abs(gaps[0] - sum(gaps[1:])) <= math.hypot(width, allowed)
                    row["infinite"] |= own is None
                rows.append(row)
    return rows


def measurements_until(errors: Sequence[float], bound: float, counts: Sequence[int] = COUNTS) -> float:
    """Count from which errors stay within a bound, interpolated; infinite if the last one is not.

    Args:
        errors: absolute, one for each count; infinite where there is no law.
        bound: of the errors.
        counts: increasing.
    """
    if errors[-1] > bound:
        return math.inf
    outside = [index for index, error in enumerate(errors) if error > bound]
    if not outside:
        return float(counts[0])
    last = outside[-1]
    if math.isinf(errors[last]):
        return float(counts[last + 1])
    part = (errors[last] - bound) / (errors[last] - errors[last + 1])
    return counts[last] + part * (counts[last + 1] - counts[last])


def settling_rows(records: Iterable[Record], bound: float = math.log2(1.1)) -> list[Row]:
    """Measurements until R(64) and R(256) stay within a bound of their long average, and of the truth.

    `known` tells whether the standard error of the truth is within the bound.
    """
    rows = []
    for record in records:
        for half_life, size in ((h, s) for h in HALF_LIVES for s in (64, 256)):
            index = SIZES.index(size)

            def ratio(key: str, record: Record = record, index: int = index) -> float | None:
                lr = law_log2_lrs(record, key)
                return None if lr is None else lr[index] - lr[BASE]

            found = [ratio(f"{half_life:g}/{count}") for count in COUNTS]
            truths = [log2(record["sign"][str(s)]["lr"]) for s in (size, BASE_BATCH_SIZE)]
            goals = {"average": ratio(f"{HALF_LIVES[-1]:g}/{COUNTS[-1]}"), "truth": difference(*truths)}
            row = {name: record[name] for name in (*POINT, "seed")}
            row |= {"half_life": f"{half_life:g}", "batch_size": size}
            errors_of_truth = [record["sign"][str(s)]["log2_error"] for s in (size, BASE_BATCH_SIZE)]
            row["known"] = None not in errors_of_truth and math.hypot(*errors_of_truth) <= bound
            for name, goal in goals.items():
                errors = [math.inf if r is None or goal is None else abs(r - goal) for r in found]
                row[name] = measurements_until(errors, bound)
            rows.append(row)
    return rows


def alignment_rows(records: Iterable[Record]) -> list[Row]:
    """log2 of the modelled over the exact N(B) / N(reference), by model; None where N is not positive."""
    rows = []
    for record in records:
        exact = [log2(record["sign"][str(size)]["alignment"]) for size in SIZES]
        noise = [
            record["sign"][str(size)]["alignment_error"] / abs(record["sign"][str(size)]["alignment"])
            for size in SIZES
        ]
        scale = exact_noise_scale(record)
        models: dict[str, Array | None] = {"B_simple": None, "pi/2 B_simple": None}
        if scale is not None:
            models = {"B_simple": _log2_h(scale), "pi/2 B_simple": _log2_h(math.pi / 2 * scale)}
        fitted = fitted_scale(exact, np.array(noise) / math.log(2))
        models["fitted"] = None if fitted is None else _log2_h(fitted)
        models["erf sums"] = np.log2([record["erf_alignment"][str(size)] for size in SIZES])
        for reference in (SIZES[-1], BASE_BATCH_SIZE):
            at = SIZES.index(reference)
            for name, model in models.items():
                for index, size in enumerate(SIZES):
                    if size == reference or size == SIZES[-1]:
                        continue
                    row = {field: record[field] for field in (*POINT, "seed")}
                    row |= {"reference": reference, "model": name, "batch_size": size, "fitted": fitted}
                    truth = difference(exact[index], exact[at])
                    predicted = math.inf if model is None else float(model[index] - model[at])
                    row |= {"error": difference(predicted, truth), "scale": scale}
                    rows.append(row | {"noise": math.hypot(noise[index], noise[at]) / math.log(2)})
    return rows


def _log2_h(scale: float) -> Array:
    return np.asarray(-0.5 * np.log2(1 + scale / np.array(SIZES)))


def fitted_scale(log2_alignment: Sequence[float | None], errors: Array) -> float | None:
    """B_phi of N(B) = N_inf / sqrt(1 + B_phi / B), by least squares in log2 N; None below three sizes."""
    used = [index for index, value in enumerate(log2_alignment) if value is not None]
    if len(used) < 3:
        return None
    values = np.array([log2_alignment[index] for index in used], dtype=float)
    weights = 1 / (errors[used] ** 2 + ALIGNMENT_FLOOR**2)

    def misfit(log2_scale: float) -> float:
        rest = values - _log2_h(2.0**log2_scale)[used]
        return float(np.sum(weights * (rest - np.average(rest, weights=weights)) ** 2))

    return float(2 ** minimize_scalar(misfit, bounds=(-10, 24), method="bounded").x)


def direction_rows(records: Iterable[Record]) -> list[Row]:
    """By point, seed, kind of step and batch size: the best lr, its ratio to the base's, and signs."""
    rows = []
    for record in records:
        for kind in KINDS:
            base = log2(record[kind][str(BASE_BATCH_SIZE)]["lr"])
            for size in SIZES:
                entry = record[kind][str(size)]
                row = {field: record[field] for field in (*POINT, "seed")}
                row |= {"kind": kind, "batch_size": size, "ratio": difference(log2(entry["lr"]), base)}
                row |= {"without": entry["lr"] is None, "against": entry["alignment"] < 0.0}
                rows.append(row | {"curvature": entry.get("curvature")})
    return rows
