"""What a sweep says: its plan beforehand, its progress, the best learning rates afterwards."""

from __future__ import annotations

import argparse
import csv
import json
import os
import shlex
import sys
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from lightning_surge.cli.command import CommandError
from lightning_surge.sweep.cells import Cell, Outcome, SweepSettings
from lightning_surge.sweep.grid import Grid, accumulation_for, best_lr
from lightning_surge.tables.study import COLUMNS, study_rows

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from lightning_surge.sweep.config import TrainingConfig

__all__ = ["Progress", "print_plan", "print_result"]

PLAN = ("batch_size", "micro_batch", "accumulated", "steps", "examples")


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
        micro_batch = size // (parts * settings.replicas)
        rows.append((size, micro_batch, parts, settings.steps_of(size), settings.examples_of(size)))
    keys = {"batch_size_key": settings.batch_size_key, "lr_key": settings.lr_key}
    finished, table = len(set(cells).intersection(done)), str(options.output)
    if options.json:
        plan = [dict(zip(PLAN, row, strict=True)) for row in rows]
        counts = {"cells": len(cells), "finished": finished, "table": table, "study": options.study}
        print(
            json.dumps(
                keys | grid._asdict() | {"without": training.left_out, "plan": plan} | counts, indent=1
            )
        )
        return
    print("batch size: {batch_size_key}, learning rate: {lr_key}".format(**keys))
    print(f"learning rates: {', '.join(f'{lr:g}' for lr in grid.lrs)}")
    print(f"seeds: {', '.join(map(str, grid.seeds))}")
    if training.left_out:
        print(f"without: {', '.join(training.left_out)}")
    for row in (("batch size", "micro-batch", *PLAN[2:]), *rows):
        print("{:>10}  {:>11}  {:>11}  {:>8}  {:>10}".format(*row))
    print(f"{len(cells)} cells, {finished} of them finished; table: {table}")


def print_result(
    table: Path, settings: SweepSettings, records: Mapping[Cell, Outcome], *, as_json: bool
) -> None:
    """Print the best learning rate of every batch size, how many cells failed, and what to do next.

    Raises:
        CommandError: if no cell gave a loss.
    """
    sizes = sorted({cell.batch_size for cell in records})
    targets = settings.targets or (None,)
    found = [best_lr(records, size, t, maximize=settings.maximize) for t in targets for size in sizes]
    best = [each for each in found if each is not None]
    cells = Counter(outcome.status for outcome in records.values())
    failed = dict(sorted(Counter(o.status for o in records.values() if not o.is_answer).items()))
    if not best:
        reasons = sorted({outcome.message for outcome in records.values() if outcome.message})[:3]
        remedy = "use smaller learning rates" if cells["diverged"] else "remedy that and pass --retry-failed"
        raise CommandError(
            f"Expected cells that finish, got none of {len(records)}, see {table} ({'; '.join(reasons)}): "
            f"{remedy}."
        )
    fit = shlex.join(["lightning-surge", "fit", str(table), *["--maximize"] * settings.maximize])
    if as_json:
        answer = {"table": str(table), "cells": dict(sorted(cells.items())), "failed": sum(failed.values())}
        print(json.dumps(answer | {"best": [each._asdict() for each in best], "fit": fit}, indent=1))
        return
    print(f"table: {table}")
    for before, entry in zip([None, *best], best, strict=False):
        if before is None or entry.target != before.target:
            title = "" if entry.target is None else f"   steps to {entry.target:g}"
            print(f"{'batch size':>10}  {'best lr':>10}  {'loss':>10}{title}")
        reached = "never" if entry.steps is None else f"{entry.steps:g}"
        steps = "" if entry.target is None else f"   {reached}"
        edge = f"   {entry.edge} tried: --refine goes beyond" if entry.edge else ""
        print(f"{entry.batch_size:>10}  {entry.lr:>10.4g}  {entry.loss:>10.5g}{steps}{edge}")
    if failed:
        kinds = ", ".join(f"{n} {status.replace('_', ' ')}" for status, n in failed.items())
        print(f"without a loss: {kinds}, of {len(records)} cells; --retry-failed runs them again")
    print(f"next: {fit}")


class Progress:
    """A line for every cell that ends, with the time left; and the table, written anew each time.

    `ended` are the cells of former runs.
    """

    def __init__(self, table: Path, ended: Collection[Cell]) -> None:
        self._table = table
        self._ended, self._written = set(ended), False
        self._said = ""

    def say(self, text: str) -> None:
        """Print a line, unless it was the last one."""
        if text != self._said:
            print(text, file=sys.stderr, flush=True)
        self._said = text

    def look(self, records: Mapping[Cell, Outcome], trials: Mapping[Cell, FrozenTrial]) -> None:
        """Take note of what the cells have said, and of all their trials."""
        new = [cell for cell in records if cell not in self._ended]
        if new or not self._written:
            self._write(trials)
        left = sum(not trial.state.is_finished() for trial in trials.values())
        running = sum(trial.state.name == "RUNNING" for trial in trials.values())
        spent = [outcome.seconds for outcome in records.values() if outcome.status == "finished"]
        about = f", about {_duration(fmean(spent) * left / max(1, running))}" if spent and left else ""
        for cell in new:
            outcome = records[cell]
            said = outcome.status.replace("_", " ") if outcome.loss is None else f"loss {outcome.loss:.5g}"
            said += f" ({outcome.message})" if outcome.message else ""
            done = f"{len(records)} done, {left or 'none'} left{about}"
            self.say(f"{cell}: {said}, {_duration(outcome.seconds)}; {done}")
        self._ended, self._written = set(records), True

    def _write(self, trials: Mapping[Cell, FrozenTrial]) -> None:
        rows = study_rows(trials.values())
        columns = [name for name in COLUMNS if name != "target" or (rows and name in rows[0])]
        draft = self._table.with_name(f".{self._table.name}.{os.getpid()}")
        draft.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(draft, self._table)  # a reader sees the old one or the new one


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
