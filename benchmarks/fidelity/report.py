"""Tables as Markdown, a summary with one row per target, and figures, from whatever cells are finished."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cells import Store
from benchmarks.fidelity import figures, held
from benchmarks.fidelity.analysis import POINT, Record, joined, mean, pick, summary, unique
from benchmarks.fidelity.betas import betas_table
from benchmarks.fidelity.free import free_table, free_targets
from benchmarks.fidelity.ladder import best_ratio_table
from benchmarks.fidelity.markdown import share, table, targets_table
from benchmarks.fidelity.one_step import COUNTS
from benchmarks.results import target, write, write_page

__all__ = ["read", "targets", "write_report"]

COMMAND = "make fidelity"
KEYS = {
    "truths": (*POINT, "seed"),
    "laws": (*POINT, "seed"),
    "live": (*POINT, "seed", "objective", "max_overhead", "examples"),
    "free": (*POINT, "examples"),
    "ladder": (*POINT, "examples"),
    "betas": (*POINT, "examples"),
}
"""What tells the cells of a kind apart."""
Records = Mapping[str, Sequence[Record]]
SECTIONS: dict[str, tuple[str, Callable[[Records], str]]] = {
    "laws": ("one_step", held.laws),
    "free": ("ladder", free_table),
    "best_ratio": ("ladder", best_ratio_table),
    "betas": ("betas", betas_table),
}
"""By heading of the page: the records without which there is nothing to show, and what makes the section."""


def write_report(store: Store, results: Path, expected: Mapping[str, int]) -> None:
    """Write tables, figures and summary of the finished cells, with their number out of those expected."""
    records = read(store)
    results.mkdir(parents=True, exist_ok=True)
    found = targets(records)
    note = "After a mean: its 95 % half-width, from the means over all changes of each seed."
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
    """The records of each kind, and the points with both a truth and laws."""
    records = {kind: unique(store.records(kind), keys) for kind, keys in KEYS.items()}
    return records | {"one_step": joined(records["truths"], records["laws"], KEYS["truths"])}


def targets(records: Records) -> list[dict[str, Any]]:
    """Every target of which something is measured."""
    return [*held_targets(records["one_step"]), *free_targets(records, COMMAND)]


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
