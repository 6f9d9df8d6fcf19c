"""What a sweep says: its plan beforehand, its progress, the best learning rates afterwards."""

from __future__ import annotations

import argparse
import csv
import json
import os
import shlex
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_surge.cli.command import CommandError
from lightning_surge.sweep.cells import Cell, Outcome, SweepSettings
from lightning_surge.sweep.grid import Best, Grid, accumulation_for, best_lr, seconds_left

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from lightning_surge.sweep.config import TrainingConfig

__all__ = ["Progress", "print_plan", "print_result", "write_table"]


def print_plan(
    options: argparse.Namespace,
    settings: SweepSettings,
    grid: Grid,
    training: TrainingConfig,
    done: Collection[Cell],
) -> None:
    """Print what would run, as text or JSON; `done` are the cells that have ended."""
    cells, rows = grid.cells(), []
    for size in grid.batch_sizes:
        parts = accumulation_for(size, largest=settings.max_micro_batch_size, replicas=settings.replicas)
        rows.append(
            {
                "batch_size": size,
                "micro_batch": size // (parts * settings.replicas),
                "accumulated": parts,
                "steps": settings.steps_of(size),
                "examples": settings.examples_of(size),
            }
        )
    plan = {
        "batch_size_key": settings.batch_size_key,
        "lr_key": settings.lr_key,
        "lrs": grid.lrs,
        "seeds": grid.seeds,
        "without": training.left_out,
        "batch_sizes": rows,
        "cells": len(cells),
        "finished": len(set(cells).intersection(done)),
        "table": str(options.output),
        "study": options.study,
    }
    if options.json:
        print(json.dumps(plan, indent=1))
        return
    print(f"batch size: {settings.batch_size_key}, learning rate: {settings.lr_key}")
    print(f"learning rates: {', '.join(f'{lr:g}' for lr in grid.lrs)}")
    print(f"seeds: {', '.join(map(str, grid.seeds))}")
    if training.left_out:
        print(f"without: {', '.join(training.left_out)}")
    print(f"{'batch size':>10}  {'micro-batch':>11}  {'accumulated':>11}  {'steps':>8}  {'examples':>10}")
    for row in rows:
        print("{:>10}  {:>11}  {:>11}  {:>8}  {:>10}".format(*row.values()))
    print(f"{plan['cells']} cells, {plan['finished']} of them finished; table: {options.output}")


def print_result(
    table: Path, settings: SweepSettings, records: Mapping[Cell, Outcome], *, as_json: bool
) -> None:
    """Print the best learning rate of every batch size, how many cells failed, and what to do next.

    Raises:
        CommandError: if no cell gave a loss.
    """
    sizes = sorted({cell.batch_size for cell in records})
    found = [
        best_lr(records, size, target, maximize=settings.maximize)
        for target in settings.targets or (None,)
        for size in sizes
    ]
    best = [each for each in found if each is not None]
    statuses = Counter(outcome.status for outcome in records.values())
    failed = {status: n for status, n in sorted(statuses.items()) if status not in ("finished", "diverged")}
    reasons = sorted({outcome.message for outcome in records.values() if outcome.message})[:3]
    if not best:
        remedy = "put that right, and pass --retry-failed."
        if statuses["diverged"]:
            remedy = "use smaller learning rates."
        raise CommandError(
            f"Expected cells that finish, got none of {len(records)}, see {table} ({'; '.join(reasons)}): {remedy}"
        )
    fit = ["lightning-surge", "fit", str(table), *(["--maximize"] if settings.maximize else [])]
    if as_json:
        answer = {
            "table": str(table),
            "cells": dict(sorted(statuses.items())),
            "failed": sum(failed.values()),
            "best": [entry._asdict() for entry in best],
            "fit": shlex.join(fit),
        }
        print(json.dumps(answer, indent=1))
        return
    print(f"table: {table}")
    for line in _best_lines(best):
        print(line)
    if failed:
        kinds = ", ".join(f"{n} {status.replace('_', ' ')}" for status, n in failed.items())
        print(f"without a loss: {kinds} of {len(records)} cells; --retry-failed runs them again")
    print(f"next: {shlex.join(fit)}")


def _best_lines(best: Sequence[Best]) -> list[str]:
    lines: list[str] = []
    target: float | None = None
    for entry in best:
        if not lines or entry.target != target:
            target = entry.target
            title = "" if target is None else f"   steps to {target:g}"
            lines.append(f"{'batch size':>10}  {'best lr':>10}  {'loss':>10}{title}")
        steps = "" if target is None else f"   {'never' if entry.steps is None else f'{entry.steps:g}'}"
        edge = f"   {entry.edge} tried: --refine goes beyond" if entry.edge else ""
        lines.append(f"{entry.batch_size:>10}  {entry.lr:>10.4g}  {entry.loss:>10.5g}{steps}{edge}")
    return lines


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class Progress:
    """A line for every cell that ends, with the time left; and the table, written anew each time.

    Args:
        ended: cells of former runs.
        table: path of the table.
    """

    def __init__(self, ended: Collection[Cell], table: Path) -> None:
        self._ended = set(ended)
        self._table = table
        self._said = ""
        self._written = False

    def say(self, text: str) -> None:
        """One line, once."""
        if text != self._said:
            print(text, file=sys.stderr, flush=True)
        self._said = text

    def look(self, records: Mapping[Cell, Outcome], trials: Mapping[Cell, FrozenTrial]) -> None:
        """Take note of what the cells have said, and of all their trials."""
        new = [cell for cell in records if cell not in self._ended]
        if new or not self._written:
            write_table(self._table, trials.values())
            self._written = True
        left = [cell for cell, trial in trials.items() if not trial.state.is_finished()]
        running = sum(trial.state.name == "RUNNING" for trial in trials.values())
        for cell in new:
            self._ended.add(cell)
            outcome = records[cell]
            said = (
                f"loss {outcome.loss:.5g}" if outcome.loss is not None else outcome.status.replace("_", " ")
            )
            said += f" ({outcome.message})" if outcome.message else ""
            seconds = seconds_left(records, left, running)
            about = f", about {_duration(seconds)}" if left and seconds is not None else ""
            self.say(
                f"{cell.name}: {said}, {_duration(outcome.seconds)}; {len(records)} done, "
                f"{len(left) or 'none'} left{about}"
            )


def write_table(path: Path, trials: Iterable[FrozenTrial]) -> None:
    """Write the table of a study; a reader sees the old one or the new one."""
    from lightning_surge.tables.study import COLUMNS, study_rows

    rows = study_rows(trials)
    columns = [name for name in COLUMNS if name != "target" or (rows and name in rows[0])]
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with draft.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(draft, path)
