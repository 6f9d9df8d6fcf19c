"""Tables as Markdown, a summary with one row per target, and figures, from whatever cells are finished."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cells import Store
from benchmarks.fidelity import figures, held_tables, procedure_figures, procedure_tables, run_tables, secants
from benchmarks.fidelity.analysis import (
    CHANGE,
    POINT,
    Record,
    groups,
    joined,
    mean,
    mean_over_seeds,
    pick,
    quantile,
    summary,
    unique,
)
from benchmarks.fidelity.approach import approach_table
from benchmarks.fidelity.coupled import coupled_table
from benchmarks.fidelity.effective import effective_table
from benchmarks.fidelity.everywhere import everywhere_table
from benchmarks.fidelity.fine import refined
from benchmarks.fidelity.held import calibration_rows, one_step_rows, settling_rows
from benchmarks.fidelity.lag import lag_table
from benchmarks.fidelity.leave_out import leave_out
from benchmarks.fidelity.longer import longer_rows, longer_table
from benchmarks.fidelity.markdown import share, table
from benchmarks.fidelity.one_step import COUNTS
from benchmarks.fidelity.regrets import DEFAULT, FIXED, best_fixed, shared
from benchmarks.fidelity.switch import SEEDS
from benchmarks.fidelity.tuning import tuning_table
from benchmarks.results import finite, machine

__all__ = ["targets", "write_report"]

KEYS = {
    "truths": (*POINT, "seed"),
    "fine": (*POINT, "seed"),
    "laws": (*POINT, "seed"),
    "sweep": CHANGE,
    "lag": (*CHANGE, "correct_lag"),
    "live": (*POINT, "seed", "objective", "max_overhead"),
    "best_base": (*POINT, "seed", "objective", "max_overhead"),
    "coupled": (*POINT, "seed"),
    "long_sweep": CHANGE,
    "long_live": (*POINT, "seed", "objective", "max_overhead"),
    "long_best_base": (*POINT, "seed", "objective", "max_overhead"),
    "approach": CHANGE,
    "decay": ("workload", "beta_2", "seed"),
    "ramp": ("workload", "beta_2", "budget", "rule", "seed", "max_overhead"),
    "tuning": ("workload", "beta_2"),
    "secants": ("workload", "phase", "seed"),
    "procedure_grid": ("workload", "beta_1", "beta_2", "batch_size"),
    "procedure_following": ("workload", "beta_1", "beta_2", "target"),
}
"""What tells the cells of a kind apart."""
Records = Mapping[str, Sequence[Record]]
PAGES: dict[str, tuple[tuple[str, ...], Callable[[Records], str]]] = {
    "one_step": (("one_step",), held_tables.one_step),
    "laws": (("one_step",), held_tables.laws),
    "calibration": (("one_step",), held_tables.calibration),
    "alignment": (("truths",), held_tables.alignment),
    "direction": (("truths",), held_tables.direction),
    "negative": (("truths", "live"), held_tables.negative),
    "rules": (("live",), run_tables.rules),
    "switch": (("sweep",), run_tables.switch),
    "switch_points": (("sweep",), run_tables.switch_points),
    "switch_settings": (("sweep",), run_tables.switch_settings),
    "leave_out": (("live", "decay"), leave_out),
    "effective": (("live",), effective_table),
    "everywhere": (("live",), everywhere_table),
    "coupled": (("coupled",), coupled_table),
    "longer": (("long_sweep",), longer_table),
    "approach": (("approach",), approach_table),
    "decay": (("decay",), run_tables.decay),
    "lag": (("lag",), lag_table),
    "tuning": (("tuning",), tuning_table),
    "ramp": (("ramp",), run_tables.ramp),
    "procedure": (("procedure_grid", "procedure_following"), procedure_tables.table),
    "secants": (
        ("secants",),
        lambda records: secants.table(records["secants"]).replace("(package)", "(one small)"),
    ),
}
"""By file: the kinds of cells of which any is something to show, and what makes the page."""


def write_report(store: Store, results: Path, expected: Mapping[str, int]) -> None:
    """Write tables, figures and summary.

    Args:
        store: of the finished cells.
        results: directory to write to.
        expected: number of cells of each kind in the full grid.
    """
    records = read(store)
    results.mkdir(parents=True, exist_ok=True)
    for name, (kinds, page) in PAGES.items():
        text = page(records) if any(records[kind] for kind in kinds) else "No cell is finished."
        (results / f"{name}.md").write_text(text + "\n")
    (results / "coverage.md").write_text(coverage(records, expected) + "\n")
    figures.draw(records, results)
    procedure_figures.figures(records, results)
    found = targets(records)
    (results / "summary.md").write_text(summary_table(found) + "\n")
    raw = {"machine": machine(), "cells": {kind: len(records[kind]) for kind in KEYS}}
    raw["procedure"] = procedure_tables.claims_of(records)
    (results / "raw.json").write_text(json.dumps(finite(raw), indent=1) + "\n")
    (results / "summary.json").write_text(json.dumps(finite(found), indent=1) + "\n")
    for entry in found:
        sign = "at most" if entry["better"] == "lower" else "at least"
        verdict = "met" if entry["met"] else "MISSED"
        print(f"{entry['value']:9.4f}  {sign} {entry['bound']:<6g} {verdict:7} {entry['name']}")
    print(f"written to {results}")


def summary_table(found: Iterable[Mapping[str, Any]]) -> str:
    """The targets, a line each."""
    lines = []
    for entry in found:
        bound = f"at {'most' if entry['better'] == 'lower' else 'least'} {entry['bound']:g}"
        width = f" ± {entry['half_width']:.2g}" if "half_width" in entry else ""
        value = f"{entry['value']:.3g}{width}"
        lines.append([entry["name"], value, bound, "met" if entry["met"] else "missed"])
    note = "After a mean regret: its 95 % half-width, from the means over all changes of each seed."
    return f"{table(['what', 'value', 'target', ''], lines)}\n\n{note}"


def read(store: Store) -> dict[str, list[Record]]:
    """The records of each kind, and as `one_step` the points with both a truth, the finest, and laws."""
    records = {kind: unique(store.records(kind), keys) for kind, keys in KEYS.items()}
    truths = refined(records["truths"], records["fine"])
    return records | {"one_step": joined(truths, records["laws"], KEYS["truths"])}


def coverage(records: Records, expected: Mapping[str, int]) -> str:
    """Finished cells of all cells."""
    lines = [
        [
            kind,
            share(len(records.get(kind, ())), count),
            sum(r["seconds"] for r in records.get(kind, ())) / 60,
        ]
        for kind, count in expected.items()
    ]
    return table(
        ["cells", "finished", "minutes they took"],
        [[kind, finished, f"{minutes:.0f}"] for kind, finished, minutes in lines],
    )


def target(
    name: str, value: float, bound: float, better: str = "lower", half_width: float = math.inf
) -> dict[str, Any]:
    """A row of the summary; NaN, nothing measured, meets nothing. The half-width is shown if there is one."""
    met = value <= bound if better == "lower" else value >= bound
    rounded = round(value, 4) if math.isfinite(value) else value
    row = {"name": name, "value": rounded, "bound": bound, "better": better, "met": bool(met)}
    row |= {"half_width": round(half_width, 4)} if math.isfinite(half_width) else {}
    return row | {"command": "make fidelity"}


def targets(records: Records) -> list[dict[str, Any]]:
    """Every target of which something is measured."""
    return [
        *held_targets(records["one_step"]),
        *switch_targets(run_tables.all_rows(records)),
        *switch_targets(longer_rows(records), ", four times the examples"),
    ]


def with_every_seed(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of changes that have been run at every seed."""
    changes = groups(rows, *CHANGE).items()
    complete = {key for key, part in changes if {row["seed"] for row in part} == set(SEEDS)}
    return [row for row in rows if tuple(row[name] for name in CHANGE) in complete]


def held_targets(records: Sequence[Record]) -> Iterable[dict[str, Any]]:
    """Those at points where the model was held."""
    if not records:
        return
    rows = pick(one_step_rows(records), law="measured, 50", batch_size=held_tables.NEAR)
    known = pick(calibration_rows(records), half_life="8", count=COUNTS[-1], batch_size=held_tables.NEAR)
    for what, name in (("lr", "lr"), ("ratio", "R")):
        found = summary(row[what] for row in rows)
        title = f"one step, |log2| of {name} within 16 times the active batch size, measured law"
        yield target(f"{title}, median", found.median, 0.25)
        yield target(f"{title}, 90th percentile", found.high, 0.6)
    for what, name in (("lr", "lr"), ("ratio", "R")):
        inside = [row[what] for row in known if row[what] is not None]
        part = sum(inside) / len(inside) if inside else math.nan
        for bound, better in ((0.55, "higher"), (0.8, "lower")):
            yield target(f"share of true {name} inside the 68 % interval", part, bound, better)
    for (half_life, size), found in groups(settling_rows(records), "half_life", "batch_size").items():
        alike = "" if half_life == "8" else ", all counted alike"
        for goal, name in (("average", "its long average"), ("truth", "the truth")):
            if alike and goal == "average":
                continue
            count = quantile([row[goal] for row in found], 0.5)
            yield target(
                f"measurements until R({size}) stays within 10 % of {name}, median{alike}", count, 50
            )


def switch_targets(rows: Sequence[dict[str, Any]], which: str = "") -> Iterable[dict[str, Any]]:
    """Those after a change of the batch size, with the default objective at its default cost.

    Args:
        rows: of all rules.
        which: changes these are, for the names.
    """
    for how, name in (("used", "frozen"), ("live", "live")):
        rule = f"{DEFAULT['objective']}, {how}"
        rules, default = (*FIXED, rule), run_tables.at_default(rows)
        same = shared(default, rules)
        if not same:
            continue
        title = f"change of the batch size{which}, {name} ratio"
        errors = mean(abs(row["error"]) for row in pick(same, rule=rule))
        yield target(f"{title}, mean |log2(R / R_true)|", errors.value, 0.25)
        for (field, base), (nats, unit) in itertools.product(
            {"regret": "", "tuned": ", at the best base lr"}.items(),
            ((True, "cross-entropy"), (False, "autoencoder")),
        ):
            part = run_tables.of_unit(with_every_seed(shared(default, rules, field)), nats=nats)
            own = mean_over_seeds(pick(part, rule=rule), field)
            best = best_fixed(part, field)
            if best is None:
                continue
            # A fixed rule that loses nothing leaves nothing to be a quarter of.
            quotient = own.value / best[1] if best[1] > 0.0 else math.inf
            yield target(f"{title}, regret over that of {best[0]}, {unit}{base}", quotient, 0.25)
            bound, scale = (0.005, "nats") if nats else (0.5, "% of the loss")
            name = f"{title}, mean regret{base} ({scale})"
            yield target(name, own.value, bound, half_width=own.half_width)
