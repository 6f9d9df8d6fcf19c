"""Tables of whole runs: changes of the batch size, decays, ramps, and the lag of Adam's average."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.fidelity.analysis import (
    CHANGE,
    POINT,
    Mean,
    Record,
    Row,
    decay_rows,
    groups,
    mean,
    paired,
    pick,
    ramp_rows,
    rms,
)
from benchmarks.fidelity.decay import RATIO_SIZES
from benchmarks.fidelity.markdown import average, number, table
from benchmarks.fidelity.ramp import BUDGETS, RULES
from benchmarks.fidelity.regrets import (
    BEYOND,
    CELL,
    DEFAULT,
    ELSEWHERE,
    error_of_the_right_rule,
    shared,
    sweeps_of,
    switch_rows,
    truth_rows,
)
from benchmarks.fidelity.switch import SEEDS
from benchmarks.fidelity.workloads import BASE_BATCH_SIZE, WORKLOADS

__all__ = [
    "RULE_HEADERS",
    "all_rows",
    "at_default",
    "decay",
    "of_unit",
    "ramp",
    "rule_columns",
    "rules",
    "switch",
    "switch_points",
    "switch_settings",
    "true_ratio",
]

Records = Mapping[str, Sequence[Record]]
NATS = tuple(name for name, workload in WORKLOADS.items() if workload.cross_entropy)
PERCENT = tuple(name for name in WORKLOADS if name not in NATS)
RULE_HEADERS = (
    "mean absolute log2(R / R_true)",
    *(f"regret {base}, {unit}" for base in ("at the best base lr", "as run") for unit in ("nats", "%")),
)
REFERENCE = f"{DEFAULT['objective']}, used"


def all_rows(records: Records) -> list[Row]:
    """Of every rule at every change of the batch size."""
    return switch_rows(sweeps_of(records["sweep"]), records["live"], records["laws"], records["best_base"])


def at_default(rows: Sequence[Row]) -> list[Row]:
    """Rules without a callback, and the callback at the cost of most of its runs."""
    return pick(rows, overhead=(None, DEFAULT["max_overhead"]))


def of_unit(rows: Sequence[Row], *, nats: bool) -> list[Row]:
    """Those whose regret is in nats, or those in percent."""
    return pick(rows, workload=NATS if nats else PERCENT)


def _mean(rows: Sequence[Row], field: str) -> Mean:
    return mean(abs(row[field]) if field == "error" else row[field] for row in rows if row[field] is not None)


def switch(records: Records) -> str:
    """What each rule loses after a change of the batch size."""
    rows = all_rows(records)
    default = at_default(rows)
    truths = truth_rows(sweeps_of(records["sweep"]))
    by_rule = groups(default, "rule")
    parts = [
        "The batch size changes from 16 to 2, 64 or 256 and the lr decays to zero over equal examples. "
        "A sweep finds the best ratio R_true of the new lr to the best lr at 16, by a parabola through "
        "the mean over seeds, and the loss of every other lr. `predicted`: the law at the change, "
        "frozen; `used`: with the callback's shrinkage and bounds, frozen; `live`: a run with the "
        "callback, its ratio averaged over steps. Regret: loss minus the same seed's loss at the lr "
        "that is best on average; in nats, for the autoencoder in percent of the best loss. Means ± 95 "
        "% half-widths over cells of workload, phase, beta_2, B and seed, n of them; the seeds of one "
        f"change share its R_true. {len(truths)} changes have a sweep at both sizes, "
        f"{sum(t['censored'] for t in truths)} of them with a minimum at an end of a sweep, so that R_true "
        "is a bound. The scatter of R_true over seeds leaves an error of about "
        f"{number(error_of_the_right_rule(truths, len(SEEDS)))} in the mean to a rule that is always right. "
        f"`{ELSEWHERE}`: the mean of log2 R_true of the other workloads at the same B. The callback has "
        f"max_overhead={DEFAULT['max_overhead']:g}.",
    ]
    blocks: list[tuple[str, str, Sequence[Row]]] = [
        ("error", "Mean absolute log2(R / R_true)", default),
        ("regret", "Mean regret, ratio times the base lr of the run", default),
        ("tuned", "Mean regret, ratio times the best base lr", default),
    ]
    for field, title, shown in blocks:
        lines = []
        for (rule,), found in groups(shown, "rule").items():
            known = [row for row in found if row[field] is not None]
            if not known:
                continue
            columns = [pick(found, workload=name) for name in WORKLOADS]
            columns.append(found if field == "error" else of_unit(found, nats=True))
            columns += [pick(found, censored=False)] if field == "error" else []
            beyond = [sum(row[BEYOND[field]] for row in found)] if field in BEYOND else []
            lines.append([rule, len(known), *(average(_mean(part, field)) for part in columns), *beyond])
        headers = ["rule", "n", *WORKLOADS, "all" if field == "error" else "cross-entropy, all"]
        headers += ["all but bounds" if field == "error" else "lr beyond the sweep"]
        parts += [f"**{title}**", table(headers, lines)]
    lines = []
    for (rule,), found in by_rule.items():
        gaps = [
            paired(of_unit(found, nats=nats), by_rule.get((REFERENCE,), []), "regret", CELL)
            for nats in (True, False)
        ]
        lines.append([rule, *(entry for gap in gaps for entry in (average(gap), gap.n))])
    parts += [
        f"**Regret minus that of `{REFERENCE}`, same cells**",
        table(["rule", "nats", "n", "percent", "n"], lines),
    ]
    return "\n\n".join(parts)


def rules(records: Records) -> str:
    """Every rule on the cells that all of them have, in few columns."""
    rows = at_default(all_rows(records))
    names = [rule for (rule,) in groups(rows, "rule")]
    same = shared(rows, names)
    lines = []
    for (rule,), found in groups(same, "rule").items():
        lines.append([rule, *rule_columns(found)])
    count = f"{len(same) // max(len(names), 1)} cells that every rule has."
    return "\n\n".join([count, table(["rule", *RULE_HEADERS], lines)])


def rule_columns(rows: Sequence[Row]) -> list[str]:
    """Of one rule, under `RULE_HEADERS`."""
    units = [
        average(_mean(of_unit(rows, nats=nats), field))
        for field in ("tuned", "regret")
        for nats in (True, False)
    ]
    return [average(_mean(rows, "error")), *units]


def switch_settings(records: Records) -> str:
    """The same by cost of the callback, beta_2, phase and batch size."""
    rows = all_rows(records)
    default = at_default(rows)
    lines = []
    for field in ("overhead", "beta_2", "phase", "batch_size"):
        shown = _at_every_cost(rows) if field == "overhead" else default
        for (value, rule), found in groups(shown, field, "rule").items():
            units = [average(_mean(of_unit(found, nats=nats), "regret")) for nats in (True, False)]
            label = value if field == "phase" else f"{field} {value:g}"
            lines.append([label, rule, len(found), average(_mean(found, "error")), *units])
    headers = ["cells", "rule", "n", "mean absolute log2(R / R_true)", "regret, nats", "regret, percent"]
    note = (
        "Means ± 95 % half-widths as in `switch.md`, of the ratio times the base lr of the run. Costs of the "
        "callback (`overhead`) are compared on the cells that have been run at all of them."
    )
    return "\n\n".join([note, table(headers, lines)])


def _at_every_cost(rows: Sequence[Row]) -> list[Row]:
    """Of the callback's rules: the cells that have been run at every cost that any has."""
    measured = [row for row in rows if row["overhead"] is not None]
    costs = {row["overhead"] for row in measured}
    by_cell = groups(measured, "rule", *CELL).values()
    return [row for part in by_cell if {row["overhead"] for row in part} == costs for row in part]


def true_ratio(truth: Row) -> str:
    """R_true and its standard deviation over seeds as a factor; `*` where it is a bound."""
    return f"{2 ** truth['ratio']:.2f}{'*' if truth['censored'] else ''} ({number(2 ** truth['spread'])})"


def switch_points(records: Records) -> str:
    """R and regret by change of the batch size."""
    rows = at_default(all_rows(records))
    rules = [rule for (rule,) in groups(rows, "rule")]
    truths = truth_rows(sweeps_of(records["sweep"]))
    ratios: list[list[object]] = []
    regrets: dict[str, list[list[object]]] = {field: [] for field in BEYOND}
    for truth in truths:
        point: dict[str, Any] = {name: truth[name] for name in CHANGE}
        found = [pick(rows, rule=rule, **point) for rule in rules]
        logs = [mean(row["ratio"] for row in part if row["ratio"] is not None) for part in found]
        ratios.append(
            [*point.values(), f"{2 ** truth['base']:.2f}", true_ratio(truth)]
            + [f"{2**log.value:.2f}" if log.n else "-" for log in logs]
        )
        for field, beyond in BEYOND.items():
            losses = [mean(row[field] for row in part if row[field] is not None) for part in found]
            edges = ["*" if any(row[beyond] for row in part) else "" for part in found]
            regrets[field].append(
                [*point.values(), "nats" if truth["workload"] in NATS else "%"]
                + [f"{number(loss.value, 3)}{edge}" for loss, edge in zip(losses, edges, strict=True)]
            )
    return "\n\n".join(
        [
            "Ratio R of the lr after a change of the batch size to B, as means over seeds in the "
            "logarithm; after R_true, its standard deviation over seeds as a factor. `*`: a lowest loss "
            "is at an end of a sweep, so that R_true is a bound.",
            table([*POINT, "B", "best multiplier at 16", "R_true", *rules], ratios),
            "Mean regret over seeds, as run. `*`: the lr is beyond the sweep, and the loss that of its end.",
            table([*POINT, "B", "unit", *rules], regrets["regret"]),
            "The same at the best base lr.",
            table([*POINT, "B", "unit", *rules], regrets["tuned"]),
        ]
    )


def decay(records: Records) -> str:
    """Which averaging window follows the ratio through a decay."""
    rows = decay_rows(records["decay"])
    marks = list(dict.fromkeys(row["mark"] for row in rows))
    blocks = []
    for (half_life, size), found in groups(rows, "half_life", "batch_size").items():
        entries = []
        for chosen in [(mark,) for mark in marks] + [tuple(marks)]:
            errors = [row["error"] for row in pick(found, mark=chosen) if row["error"] is not None]
            finite = [error for error in errors if math.isfinite(error)]
            lost = len(errors) - len(finite)
            entries.append(f"{number(rms(finite))} (n {len(finite)}{f', {lost} no law' if lost else ''})")
        name = "reference, moved since the start" if half_life == "reference" else f"half-life {half_life}"
        blocks.append((size, name, entries))
    order = [block for size in RATIO_SIZES for block in blocks if block[0] == size]
    return "\n\n".join(
        [
            "Root mean square of log2 R(B) by averaging window minus that of a long measurement with "
            f"the model held, at parts of a linear decay of the lr to zero. {len(records['decay'])} "
            "runs. The last column is over all marks.",
            table(
                ["B", "window (measurements)", *(f"at {mark:g}" for mark in marks), "all"],
                [[size, name, *entries] for size, name, entries in order],
            ),
        ]
    )


def ramp(records: Records) -> str:
    """Final losses of ramps, by budget."""
    parts = [
        "Final loss of a gradual ramp from 16 to 256 examples over equal examples, with a decay to zero: "
        "mean over seeds ± their standard deviation, in nats, for the autoencoder squared error per image; "
        "and minus that of sqrt scaling, paired over seeds, ± 95 % half-width. `fixed batch` stays at 16.",
    ]
    for (beta_2, budget), found in groups(ramp_rows(records["ramp"]), "beta_2", "budget").items():
        names = [name for name in WORKLOADS if pick(found, workload=name)]
        steps = {round(row["steps"]) for row in found if row["rule"] != "fixed batch"}
        lines = []
        for rule in RULES:
            rows = {row["workload"]: row for row in pick(found, rule=rule)}
            lines.append([rule, *(_final_loss(rows.get(name)) for name in names)])
        parts += [
            f"**{budget}**: {BUDGETS[budget]:,} examples, {' or '.join(map(str, sorted(steps)))} steps on "
            f"the ramp and {BUDGETS[budget] // BASE_BATCH_SIZE} at a fixed batch; beta_2 = {beta_2:g}.",
            table(["rule", *names], lines),
        ]
    return "\n\n".join(parts)


def _final_loss(row: Row | None) -> str:
    if row is None:
        return "-"
    loss = f"{number(row['loss'], 4)} ± {number(row['spread'], 4)}"
    missing = "" if row["count"] == len(SEEDS) else f" (n {row['count']})"
    gap = "" if row["rule"] in ("sqrt", "fixed batch") else f"; {average(row['difference'], 4)}"
    return loss + missing + gap
