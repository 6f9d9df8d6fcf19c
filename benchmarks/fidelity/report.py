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
from benchmarks.fidelity.approach import approach_table
from benchmarks.fidelity.leave_out import leave_out
from benchmarks.fidelity.longer import LONG, longer_table
from benchmarks.fidelity.markdown import share, table, targets_table
from benchmarks.fidelity.one_step import COUNTS
from benchmarks.fidelity.ramp import ramp_table
from benchmarks.fidelity.regrets import DEFAULT, FIXED, all_rows, best_fixed, shared
from benchmarks.fidelity.rules import at_default, of_unit, rules
from benchmarks.fidelity.switch import SEEDS
from benchmarks.results import target, write, write_page

__all__ = ["read", "targets", "write_report"]

COMMAND = "make fidelity"
RUN = (*POINT, "seed", "objective", "max_overhead", "examples")
KEYS = {
    "truths": (*POINT, "seed"),
    "laws": (*POINT, "seed"),
    "sweep": (*CHANGE, "examples"),
    "live": RUN,
    "best_base": RUN,
    "approach": CHANGE,
    "ramp": ("workload", "beta_2", "budget", "rule", "seed", "max_overhead"),
}
"""What tells the cells of a kind apart."""
Records = Mapping[str, Sequence[Record]]
SECTIONS: dict[str, tuple[str, Callable[[Records], str]]] = {
    "laws": ("one_step", held.laws),
    "calibration": ("one_step", held.calibration),
    "rules": ("rules", rules),
    "longer": ("longer", longer_table),
    "approach": ("approach", approach_table),
    "ramp": ("ramp", ramp_table),
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
    write_page(results, sections | {"coverage": coverage(records, expected)})
    figures.draw(records, results)
    write(results, found, cells={kind: len(records[kind]) for kind in KEYS})


def read(store: Store) -> dict[str, list[Record]]:
    """The records of each kind, and what several sections need of them.

    `one_step` has the points with both a truth and laws, `rules` the rows of every rule at every change of
    the batch size, and `longer` the same with more examples after it.
    """
    records = {kind: unique(store.records(kind), keys) for kind, keys in KEYS.items()}
    one_step = joined(records["truths"], records["laws"], KEYS["truths"])
    return records | {"one_step": one_step, "rules": all_rows(records), "longer": all_rows(records, LONG)}


def coverage(records: Records, expected: Mapping[str, int]) -> str:
    """Finished cells of all cells."""
    lines = []
    for kind, count in expected.items():
        found = records.get(kind, ())
        lines.append([kind, share(len(found), count), f"{sum(r['seconds'] for r in found) / 60:.0f}"])
    return table(["cells", "finished", "minutes they took"], lines)


def targets(records: Records) -> list[dict[str, Any]]:
    """Every target of which something is measured."""
    return [
        *held_targets(records["one_step"]),
        *switch_targets(records["rules"]),
        *switch_targets(records["longer"], ", four times the examples"),
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
    rows = pick(held.one_step_rows(records), law="measured, 50", batch_size=held.NEAR)
    known = pick(held.calibration_rows(records), count=COUNTS[-1], batch_size=held.NEAR)
    for what, name in (("lr", "lr"), ("ratio", "R")):
        found = summary(row[what] for row in rows)
        title = f"one step, |log2| of {name} within 16 times the active batch size, measured law"
        yield target(f"{title}, median", found.median, 0.25, COMMAND)
        yield target(f"{title}, 90th percentile", found.high, 0.6, COMMAND)
    for what, name in (("lr", "lr"), ("ratio", "R")):
        inside = [row[what] for row in known if row[what] is not None]
        part = sum(inside) / len(inside) if inside else math.nan
        for bound, better in ((0.55, "higher"), (0.8, "lower")):
            yield target(
                f"share of true {name} inside the 68 % interval", part, bound, COMMAND, better=better
            )


def switch_targets(rows: Sequence[dict[str, Any]], which: str = "") -> Iterable[dict[str, Any]]:
    """Those after a change of the batch size, with the default objective; `which` tells of the changes."""
    for how, name in (("used", "frozen"), ("live", "live")):
        rule = f"{DEFAULT['objective']}, {how}"
        compared, default = (*FIXED, rule), at_default(rows)
        same = shared(default, compared)
        if not same:
            continue
        title = f"change of the batch size{which}, {name} ratio"
        errors = mean(abs(row["error"]) for row in pick(same, rule=rule))
        yield target(f"{title}, mean |log2(R / R_true)|", errors.value, 0.25, COMMAND)
        for (field, base), (nats, unit) in itertools.product(
            {"regret": "", "tuned": ", at the best base lr"}.items(),
            ((True, "cross-entropy"), (False, "autoencoder")),
        ):
            part = of_unit(with_every_seed(shared(default, compared, field)), nats=nats)
            own = mean_over_seeds(pick(part, rule=rule), field)
            best = best_fixed(part, field)
            if best is None:
                continue
            # A fixed rule that loses nothing leaves nothing to be a quarter of.
            quotient = own.value / best[1] if best[1] > 0.0 else math.inf
            yield target(f"{title}, regret over that of {best[0]}, {unit}{base}", quotient, 0.25, COMMAND)
            bound, scale = (0.005, "nats") if nats else (0.5, "% of the loss")
            width = {"half_width": round(own.half_width, 4)} if math.isfinite(own.half_width) else {}
            yield target(f"{title}, mean regret{base} ({scale})", own.value, bound, COMMAND, **width)
