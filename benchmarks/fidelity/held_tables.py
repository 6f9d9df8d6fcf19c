"""Tables of the points of training at which the model was held."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from benchmarks.fidelity.analysis import (
    CHANGE,
    POINT,
    Record,
    Row,
    groups,
    mean,
    pick,
    quantile,
    rms,
    summary,
)
from benchmarks.fidelity.held import (
    LAWS,
    alignment_rows,
    calibration_rows,
    direction_rows,
    one_step_rows,
    settling_rows,
)
from benchmarks.fidelity.markdown import number, share, spread, table
from benchmarks.fidelity.one_step import COUNTS, KINDS, SIZES
from benchmarks.fidelity.regrets import DEFAULT, sweeps_of, truth_rows

__all__ = ["NEAR", "alignment", "calibration", "direction", "laws", "negative", "one_step"]

Records = Mapping[str, Sequence[Record]]
NEAR = tuple(size for size in SIZES if 4 <= size <= 1024)
"""Within 16 times the active size."""
KNOWN = 0.25


def one_step(records: Records) -> str:
    """How far every law is from the line search."""
    rows = pick(one_step_rows(records["one_step"]), batch_size=NEAR)
    unknown = sum(row["lr_true"] is None for row in pick(rows, law=next(iter(LAWS))))
    parts = [
        "Absolute log2 of predicted over true, for the best lr of one sign step and for the ratio R to "
        f"that at B = 16, at B = {NEAR[0]} to {NEAR[-1]}: 1 is a factor of two. n counts points of "
        f"training times batch sizes, from {len(records['one_step'])} points; a law that does not exist "
        f"has an infinite error. {unknown} truths do not exist: there every step raises the loss. "
        "`measured, 50` is the callback's law after 50 measurements; `exact statistics` has its form, "
        "from exact N and lr at 16 and 64 and the exact noise scale.",
    ]
    for title, limit in (("Every point", math.inf), ("Truth known to 0.25 in log2 or better", KNOWN)):
        lines = []
        for law in LAWS:
            line: list[object] = [law]
            for what in ("lr", "ratio"):
                found = summary(r[what] for r in pick(rows, law=law) if r[f"{what}_known"] <= limit)
                line += [found.n, found.missing, number(found.median), number(found.high)]
            lines.append(line)
        columns = ("n", "no law", "median", "90th percentile")
        headers = ["law", *(f"{what}: {name}" for what in ("lr", "R") for name in columns)]
        parts += [f"**{title}**", table(headers, lines)]
    for what, name in (("lr", "lr"), ("ratio", "R")):
        lines = []
        for field in ("workload", "phase", "beta_2", "batch_size"):
            for (value,), found_rows in groups(rows, field).items():
                by_law = [summary(row[what] for row in pick(found_rows, law=law)) for law in LAWS]
                label = f"{field} {value}" if field in ("beta_2", "batch_size") else value
                if by_law[0].n:
                    lines.append([label, by_law[0].n, *map(spread, by_law)])
        parts += [
            f"**{name}: median, 90th percentile; every point**",
            table(["points", "n", *LAWS], lines),
        ]
    return "\n\n".join(parts)


def laws(records: Records) -> str:
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


def calibration(records: Records) -> str:
    """Whether the reported errors are those that are made, and how many measurements it takes."""
    rows = pick(calibration_rows(records["one_step"]), batch_size=NEAR)

    def inside(found: Sequence[Row], what: str) -> str:
        known = [row[what] for row in found if row[what] is not None]
        return share(sum(known), len(known))

    whats = ("lr", "ratio", "lr_alone", "ratio_alone")
    lines = [
        [
            half_life,
            count,
            *(inside(found, what) for what in whats),
            sum(row["infinite"] for row in found),
            sum(row["lr"] is None for row in found),
        ]
        for (half_life, count), found in groups(rows, "half_life", "count").items()
    ]
    names = ("lr", "R", "lr, jackknife alone", "R, jackknife alone")
    headers = ["half-life", "measurements", *names, "intervals without bounds", "law or truth unknown"]
    every = pick(calibration_rows(records["one_step"]), half_life="8", count=COUNTS[-1])
    by_size = [
        [size, *(inside(found, what) for what in whats)]
        for (size,), found in groups(every, "batch_size").items()
    ]
    settled = settling_rows(records["one_step"])
    waits = [
        [
            half_life,
            size,
            len(found),
            *(number(quantile([row[goal] for row in found], 0.5), 0) for goal in ("average", "truth")),
            *(
                share(sum(math.isfinite(row[goal]) for row in found), len(found))
                for goal in ("average", "truth")
            ),
            share(sum(row["known"] for row in found), len(found)),
        ]
        for (half_life, size), found in groups(settled, "half_life", "batch_size").items()
    ]
    goals = ("its own average of 50", "the truth")
    return "\n\n".join(
        [
            "Share of truths inside the callback's 68 % interval of log2, to which the error of the "
            f"truth is added in quadrature, at B = {NEAR[0]} to {NEAR[-1]}; and inside the jackknife's, "
            "without what is allowed for extrapolation. Right would be 68 %; the target is 55 to 80 %.",
            table(headers, lines),
            f"**By batch size, half-life 8, {COUNTS[-1]} measurements**",
            table(["B", *names], by_size),
            "**Measurements until R stays within 10 %** (medians over points; inf: not within "
            f"{COUNTS[-1]}; at most {COUNTS[0]} is shown as {COUNTS[0]}), and how often the standard error "
            "of the truth is below 10 %.",
            table(
                [
                    *("half-life", "B", "n"),
                    *(f"of {g}" for g in goals),
                    *(f"reached, {g}" for g in goals),
                    "truth known",
                ],
                waits,
            ),
        ]
    )


def alignment(records: Records) -> str:
    """How N(B) saturates."""
    rows = alignment_rows(records["truths"])
    parts = [
        "Root mean square of log2 of modelled over exact N(B), after both are divided by their values "
        "at a reference size, over B = 1 to 1024. Models: 1 / sqrt(1 + B_phi / B) with B_phi from the "
        "exact noise scale, pi/2 of it, or fitted to N itself at all sizes; and Theorem 2's sum of erf. "
        "The column `noise` is the statistical error of the exact values."
    ]
    models = list(dict.fromkeys(row["model"] for row in rows))
    for (reference,), of_reference in groups(rows, "reference").items():
        lines = []
        for label, found in _parts(of_reference):
            one = pick(found, model=models[0])
            used = [row for row in one if row["error"] is not None]
            entries = []
            for model in models:
                errors = [row["error"] for row in pick(found, model=model) if row["error"] is not None]
                finite = [error for error in errors if math.isfinite(error)]
                lost = len(errors) - len(finite)
                entries.append(number(rms(finite)) + (f" ({lost} without)" if lost else ""))
            noise = number(rms(row["noise"] for row in used))
            lines.append([label, len(used), len(one) - len(used), *entries, noise])
        headers = ["points", "n", "N(B) or N(reference) not positive", *models, "noise"]
        parts += [f"**N(B) / N({reference})**", table(headers, lines)]
    points = list({tuple(row[name] for name in (*POINT, "seed")): row for row in rows}.values())
    lines = []
    for label, found in _parts(points):
        pairs = [(row["fitted"], row["scale"]) for row in found if row["fitted"] and row["scale"]]
        quotients = [fitted / scale for fitted, scale in pairs]
        lines.append(
            [
                label,
                len(pairs),
                number(quantile([scale for _, scale in pairs], 0.5), 0),
                number(quantile(quotients, 0.5)),
                f"{number(quantile(quotients, 0.1))} to {number(quantile(quotients, 0.9))}",
            ]
        )
    headers = ["points", "n", "B_simple, median (examples)", "fitted B_phi / B_simple, median"]
    parts += ["**B_phi**", table([*headers, "10th to 90th percentile"], lines)]
    return "\n\n".join(parts)


def _parts(rows: Sequence[Row]) -> list[tuple[str, Sequence[Row]]]:
    """All rows, those of each workload and those of each phase."""
    named = [groups(rows, field) for field in ("workload", "phase")]
    return [("all", rows), *((name, found) for parts in named for (name,), found in parts.items())]


def direction(records: Records) -> str:
    """Which kind of one step has the ratio that is best for the rest of a run."""
    rows = direction_rows(records["truths"])
    truths = truth_rows(sweeps_of(records["sweep"]))
    lines: list[list[object]] = []
    errors: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for truth in truths:
        entries: list[object] = []
        for kind in KINDS:
            point = {name: truth[name] for name in CHANGE}
            found = [row["ratio"] for row in pick(rows, kind=kind, **point) if row["ratio"] is not None]
            entries.append(f"{2 ** mean(found).value:.2f} ({len(found)})" if found else "-")
            errors[kind] += [abs(mean(found).value - truth["ratio"])] if found else []
        if any(entry != "-" for entry in entries):
            point_names = [truth[name] for name in CHANGE]
            lines.append([*point_names, f"{2 ** truth['ratio']:.2f}", *entries])
    signs = []
    for (phase, kind), found in groups(rows, "phase", "kind").items():
        for size in (SIZES[0], 16, 64, 256):
            at = pick(found, batch_size=size)
            count = len(at)
            against, without = (sum(row[name] for row in at) for name in ("against", "without"))
            signs.append([phase, kind, size, share(against, count), share(without, count)])
    return "\n\n".join(
        [
            "lr(B) / lr(16) of one step along the sign of a gradient, along the gradient over Adam's "
            "root of v, and along Adam's own update, next to the ratio R_true that a sweep finds best "
            "for the rest of a run. Means over seeds in the logarithm, with the number of seeds.",
            table(
                ["step", "mean absolute log2 of its ratio over R_true", "n"],
                [[kind, number(mean(found).value), len(found)] for kind, found in errors.items()],
            ),
            table([*POINT, "B", "R_true", *KINDS], lines),
            "**How often a step points against the gradient, and how often no lr lowers the loss**",
            table(["phase", "step", "B", "negative alignment", "no lr lowers the loss"], signs),
        ]
    )


def negative(records: Records) -> str:
    """Negative curvature along signs, and what the callback said there."""
    rows = pick(direction_rows(records["truths"]), kind="sign")
    laws = pick(one_step_rows(records["one_step"]), law="measured, 50")
    said = {tuple(row[name] for name in (*POINT, "seed", "batch_size")): row for row in laws}
    lines = []
    for (phase,), of_phase in groups(rows, "phase").items():
        by_size = [(size, pick(of_phase, batch_size=size)) for size in SIZES]
        for size, found in [("all", of_phase), *by_size]:
            below = [row for row in found if row["curvature"] is not None and row["curvature"] <= 0.0]
            if not below and size != "all":
                continue
            keys = [tuple(row[name] for name in (*POINT, "seed", "batch_size")) for row in below]
            known = summary(said[key]["lr"] for key in keys if key in said)
            measured = sum(key in said for key in keys)
            counts = [share(len(below), len(found)), measured, known.missing, known.n]
            lines.append([phase, size, *counts, spread(known)])
    headers = ["phase", "B", "curvature not positive", "of these measured"]
    headers += ["without a law though with a best lr", "with a best lr"]
    reasons = []
    for (phase,), runs in groups(pick(records["live"], **DEFAULT), "phase").items():
        counted = Counter(entry["reason"] for run in runs for entry in run["by_batch_size"].values())
        unmeasured = sum(run["measurements"] == 0 for run in runs)
        told = ", ".join(f"{reason}: {count}" for reason, count in counted.most_common())
        reasons.append([phase, len(runs), unmeasured, told])
    return "\n\n".join(
        [
            "Curvature V'HV along signs of batch gradients over a step so short that the loss is "
            "quadratic, and the measured law after 50 measurements, whose secants are as long as a step "
            "of training. Batch sizes at which the curvature is always positive are not listed.",
            table([*headers, "absolute log2(predicted / true) of lr there: median, 90th percentile"], lines),
            "**Reasons of the first decision after the change of the batch size**, default objective",
            table(["phase", "runs", "of these without a measurement", "reasons, by run and B"], reasons),
        ]
    )
