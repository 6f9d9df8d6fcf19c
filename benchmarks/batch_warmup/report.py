"""Tables as Markdown, a summary with one row per target, and a figure, from whatever cells are finished."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.batch_warmup.analysis import Line, Tuned, lines, runs
from benchmarks.batch_warmup.figure import draw
from benchmarks.batch_warmup.rules import BUDGETS, MULTIPLIERS, RULES, SEEDS, Rule, growth
from benchmarks.batch_warmup.targets import targets
from benchmarks.batch_warmup.workloads import WORKLOADS, Workload
from benchmarks.cells import Store
from benchmarks.fidelity.analysis import Record, pick
from benchmarks.fidelity.markdown import number, table, targets_table
from benchmarks.results import write, write_page

__all__ = ["main_table", "write_report"]


def write_report(store: Store, results: Path, expected: Mapping[str, int]) -> None:
    """Write tables, figure and summary of the finished cells, with their number out of those expected."""
    constants, ramps = (runs(store.records(kind), kind) for kind in ("constant", "ramp"))
    tables = [main_table(workload, constants, ramps) for workload in WORKLOADS.values()]
    found = targets(constants, ramps)
    write_page(results, {"rules": "\n\n".join(tables), "targets": targets_table(found, ".4f", ".4f")})
    draw(constants, ramps, results / "figure.png")
    # Runs with a rule that was the default before are kept, and in no table.
    known = [run for run in ramps if Rule(run["ramp"], run["rule"], run["max_overhead"]) in RULES]
    tuning = [run for run in constants if run["multiplier"] in MULTIPLIERS[run["budget"], run["batch_size"]]]
    counts = {"constant": len(pick(tuning, seed=SEEDS)), "ramp": len(pick(known, seed=SEEDS))}
    print(", ".join(f"{counts[kind]} of {expected[kind]} {kind}" for kind in counts), "cells are finished")
    write(results, found, finished=counts, expected=dict(expected))


def main_table(workload: Workload, constants: Sequence[Record], ramps: Sequence[Record]) -> str:
    """One workload: a row for each rule, three columns for each budget."""
    by_budget = {budget: lines(constants, ramps, workload.name, budget) for budget in BUDGETS}
    budgets = ", ".join(f"{name} {workload.examples[name]:,} examples" for name in BUDGETS)
    title = workload.title[0].upper() + workload.title[1:]
    head = (
        f"**{title}**: {budgets}. Validation loss at the end, nats, mean ± standard deviation over "
        f"{len(SEEDS)} seeds (the worst seed); optimizer steps, and processor time of training on one "
        "thread, relative to the constant small batch."
    )
    if not any(by_budget.values()):
        return f"{head}\n\nNo row is finished."
    # A tuned learning rate differs between budgets, the row is the same.
    found: dict[tuple[str, str], dict[str, Line]] = {}
    for budget, here in by_budget.items():
        for line in here:
            found.setdefault(_names(line.rule), {})[budget] = line
    fields = [f"{budget}: {what}" for budget in BUDGETS for what in ("loss", "steps", "time")]
    rows = [
        [*names, *(cell for budget in BUDGETS for cell in _cells(of_row.get(budget)))]
        for names, of_row in found.items()
    ]
    notes = "; ".join(
        _note(workload, budget, line.rule)
        for budget, here in by_budget.items()
        for line in here
        if isinstance(line.rule, Tuned)
    )
    body = table(["batch size", "learning rate", *fields], rows)
    return f"{head}\n\n{body}\n\nTuned learning rates: {notes}. Growing batch sizes use that of B = 8."


def _names(rule: Any) -> tuple[str, str]:
    return (
        (f"constant {rule.batch_size}", "tuned")
        if isinstance(rule, Tuned)
        else (growth(rule.ramp), rule.label)
    )


def _cells(line: Line | None) -> list[str]:
    if line is None:
        return ["-"] * 3
    spread = f" ± {line.spread:.4f}" if math.isfinite(line.spread) else ""
    whole = len(line.runs) == len(SEEDS)
    seeds = number(line.worst, 4) if whole else f"{len(line.runs)} of {len(SEEDS)} seeds"
    return [
        f"{number(line.loss, 4)}{spread} ({seeds})",
        f"{100 * line.step_share:.1f} %",
        f"{100 * line.time_share:.0f} %",
    ]


def _note(workload: Workload, budget: str, best: Tuned) -> str:
    edge = ", at the edge of the grid: the best one may lie outside" if best.edge else ""
    part = "" if best.complete else ", of an unfinished grid"
    lr = workload.base_lr * best.multiplier
    return f"B = {best.batch_size} {budget} {lr:.2g} ({best.multiplier:g} x {workload.base_lr:g}{edge}{part})"
