"""Tables as Markdown, a summary with one row per target, and figures, from whatever cells are finished."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cells import Store
from benchmarks.fidelity import figures, held
from benchmarks.fidelity.analysis import (
    CHANGE,
    POINT,
    Record,
    groups,
    joined,
    mean,
    mean_over_seeds,
    pick,
    summary,
    unique,
)
from benchmarks.fidelity.best_ratio import best_ratio_table
from benchmarks.fidelity.betas import betas_table
from benchmarks.fidelity.ceilings import ceilings
from benchmarks.fidelity.free import AS_SHIPPED, free_table, free_targets
from benchmarks.fidelity.markdown import share, table, targets_table
from benchmarks.fidelity.one_step import COUNTS
from benchmarks.fidelity.regrets import DEFAULT, FIXED, all_rows, best_fixed, shared
from benchmarks.fidelity.rules import at_default, leave_out, of_unit, rules
from benchmarks.fidelity.switch import SEEDS
from benchmarks.results import target, write, write_page
from lightning_surge.laws.objectives import RETIRED

__all__ = ["read", "targets", "write_report"]

COMMAND = "make fidelity"
RUN = (*POINT, "seed", "objective", "max_overhead", "examples")
KEYS = {
    "truths": (*POINT, "seed"),
    "laws": (*POINT, "seed"),
    "sweep": (*CHANGE, "examples"),
    "live": RUN,
    "best_base": RUN,
    "free": (*POINT, "examples"),
    "ladder": (*POINT, "examples"),
    "betas": (*POINT, "examples"),
    "state": POINT,
}
"""What tells the cells of a kind apart."""
Records = Mapping[str, Sequence[Record]]
SECTIONS: dict[str, tuple[str, Callable[[Records], str]]] = {
    "laws": ("one_step", held.laws),
    "rules": ("rules", rules),
    "free": ("ladder", free_table),
    "best_ratio": ("ladder", best_ratio_table),
    "ceilings": ("ladder", ceilings),
    "betas": ("betas", betas_table),
    "leave_out": ("rules", leave_out),
}
"""By heading of the page: the records without which there is nothing to show, and what makes the section."""


def write_report(store: Store, results: Path, expected: Mapping[str, int]) -> None:
    """Write tables, figures and summary of the finished cells, with their number out of those expected."""
    records = read(store)
    results.mkdir(parents=True, exist_ok=True)
    found = targets(records)
    note = "After a mean regret: its 95 % half-width, from the means over all changes of each seed."
    sections = {"targets": f"{targets_table(found)}\n\n{note}"}
    for name, (needed, section) in SECTIONS.items():
        sections[name] = section(records) if records[needed] else "No cell is finished."
    lines = [
        [kind, share(len(records[kind]), count), f"{sum(r['seconds'] for r in records[kind]) / 60:.0f}"]
        for kind, count in expected.items()
    ]
    sections["coverage"] = table(["cells", "finished", "minutes they took"], lines)
    write_page(results, sections)
    figures.draw(records, results)
    write(results, found, cells={kind: len(records[kind]) for kind in KEYS})


def read(store: Store) -> dict[str, list[Record]]:
    """The records of each kind, the points with both a truth and laws, and the rows of every rule.

    Those of retired objectives are left out.
    """
    records = {
        kind: [r for r in unique(store.records(kind), keys) if r.get("objective") not in RETIRED.values()]
        for kind, keys in KEYS.items()
    }
    one_step = joined(records["truths"], records["laws"], KEYS["truths"])
    return records | {"one_step": one_step, "rules": all_rows(records)}


def targets(records: Records) -> list[dict[str, Any]]:
    """Every target of which something is measured."""
    of_rules = [*held_targets(records["one_step"]), *switch_targets(records["rules"])]
    return [*of_rules, *shipped_targets(records["rules"]), *free_targets(records, COMMAND)]


def with_every_seed(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of changes that have been run at every seed."""
    changes = groups(rows, *CHANGE).items()
    complete = {key for key, part in changes if {row["seed"] for row in part} == set(SEEDS)}
    return [row for row in rows if tuple(row[name] for name in CHANGE) in complete]


def held_targets(records: Sequence[Record]) -> Iterable[dict[str, Any]]:
    """Those at points where the model was held."""
    if not records:
        return
    rows = pick(held.one_step_rows(records), law="measured, 50", batch_size=held.NEAR)
    known = pick(held.calibration_rows(records), count=COUNTS[-1], batch_size=held.NEAR)
    names = {"lr": "lr", "ratio": "R"}
    for what, name in names.items():
        found = summary(row[what] for row in rows)
        title = f"one step, |log2| of {name} within 16 times the active batch size, measured law"
        yield target(f"{title}, median", found.median, 0.25, COMMAND)
        yield target(f"{title}, 90th percentile", found.high, 0.6, COMMAND)
    for what, name in names.items():
        part = mean(row[what] for row in known if row[what] is not None).value
        for bound, better in ((0.55, "higher"), (0.8, "lower")):
            title = f"share of true {name} inside the 68 % interval"
            yield target(title, part, bound, COMMAND, better=better)


def switch_targets(rows: Sequence[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Those after a change of the batch size, with the default objective."""
    for how, name in (("used", "frozen"), ("live", "live")):
        rule = f"{DEFAULT['objective']}, {how}"
        compared, default = (*FIXED, rule), at_default(rows)
        same = shared(default, compared)
        if not same:
            continue
        title = f"change of the batch size, {name} ratio"
        errors = mean(abs(row["error"]) for row in pick(same, rule=rule))
        yield target(f"{title}, mean |log2(R / R_true)|", errors.value, 0.25, COMMAND)
        for (field, base), (nats, unit) in itertools.product(
            {"regret": "", "tuned": ", at the best base lr"}.items(),
            ((True, "cross-entropy"), (False, "autoencoder")),
        ):
            part = of_unit(with_every_seed(shared(default, compared, field)), nats=nats)
            best = best_fixed(part, field)
            if best is None:
                continue
            own = pick(part, rule=rule)
            # A fixed rule that loses nothing leaves nothing to be a quarter of.
            quotient = mean_over_seeds(own, field).value / best[1] if best[1] > 0.0 else math.inf
            yield target(f"{title}, regret over that of {best[0]}, {unit}{base}", quotient, 0.25, COMMAND)
            bound, scale = (0.005, "nats") if nats else (0.5, "% of the loss")
            yield regret_target(f"{title}, mean regret{base} ({scale})", own, field, bound)


def shipped_targets(rows: Sequence[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """The callback at its default cost loses no more than it lost at five times the cost."""
    own = pick(rows, rule=f"{AS_SHIPPED['objective']}, live", overhead=AS_SHIPPED["max_overhead"])
    title = "change to a larger batch size, live ratio, default overhead, mean regret"
    for nats, scale, bound in ((True, "nats", 0.017), (False, "% of the loss", 0.1)):
        if part := of_unit(with_every_seed(own), nats=nats):
            yield regret_target(f"{title} ({scale})", part, "regret", bound)


def regret_target(name: str, rows: Sequence[dict[str, Any]], field: str, bound: float) -> dict[str, Any]:
    """A mean with its half-width over seeds."""
    found = mean_over_seeds(rows, field)
    width = {"half_width": round(found.half_width, 4)} if math.isfinite(found.half_width) else {}
    return target(name, found.value, bound, COMMAND, **width)
