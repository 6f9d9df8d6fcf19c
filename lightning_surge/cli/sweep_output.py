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
from typing import TYPE_CHECKING

from lightning_surge.cli.command import CommandError
from lightning_surge.sweep.cells import Cell, Outcome, SweepSettings
from lightning_surge.sweep.grid import Grid, accumulation_for, best_lr, seconds_left
from lightning_surge.tables.study import COLUMNS, study_rows

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from lightning_surge.sweep.config import TrainingConfig

__all__ = ["Progress", "print_plan", "print_result"]


def print_plan(
    options: argparse.Namespace,
    settings: SweepSettings,
    grid: Grid,
    training: TrainingConfig,
    done: Collection[Cell],
) -> None:
    """Print what would run, as text or JSON; `done` are the cells that have ended."""
    cells, sizes = grid.cells(), []
    for size in grid.batch_sizes:
        parts = accumulation_for(size, largest=settings.max_micro_batch_size, replicas=settings.replicas)
        micro_batch = size // (parts * settings.replicas)
        length = {"steps": settings.steps_of(size), "examples": settings.examples_of(size)}
        sizes.append({"batch size": size, "micro-batch": micro_batch, "accumulated": parts, **length})
    finished = len(set(cells).intersection(done))
    if options.json:
        plan = {
            "batch_size_key": settings.batch_size_key,
            "lr_key": settings.lr_key,
            **grid._asdict(),
            "without": training.left_out,
            "plan": [
                {name.replace(" ", "_").replace("-", "_"): value for name, value in row.items()}
                for row in sizes
            ],
            "cells": len(cells),
            "finished": finished,
            "table": str(options.output),
            "study": options.study,
        }
        print(json.dumps(plan, indent=1))
        return
    print(f"batch size: {settings.batch_size_key}, learning rate: {settings.lr_key}")
    print(f"learning rates: {', '.join(f'{lr:g}' for lr in grid.lrs)}")
    print(f"seeds: {', '.join(map(str, grid.seeds))}")
    if training.left_out:
        print(f"without: {', '.join(training.left_out)}")
    line = "{:>10}  {:>11}  {:>11}  {:>8}  {:>10}"
    for text in (line.format(*sizes[0]), *(line.format(*row.values()) for row in sizes)):
        print(text)
    print(f"{len(cells)} cells, {finished} of them finished; table: {options.output}")


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
    failed = {status: n for status, n in sorted(cells.items()) if status not in ("finished", "diverged")}
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
    for index, entry in enumerate(best):
        if index == 0 or entry.target != best[index - 1].target:
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

    Args:
        table: path of the table.
        ended: cells of former runs.
    """

    def __init__(self, table: Path, ended: Collection[Cell]) -> None:
        self._table = table
        self._ended: set[Cell] | None = None
        self._former = set(ended)
        self._said = ""

    def say(self, text: str) -> None:
        """Print a line, unless it was the last one."""
        if text != self._said:
            print(text, file=sys.stderr, flush=True)
        self._said = text

    def look(self, records: Mapping[Cell, Outcome], trials: Mapping[Cell, FrozenTrial]) -> None:
        """Take note of what the cells have said, and of all their trials."""
        new = records.keys() - (self._former if self._ended is None else self._ended)
        if new or self._ended is None:
            self._write(trials)
            self._ended = set(records)
        left = [cell for cell, trial in trials.items() if not trial.state.is_finished()]
        running = sum(trial.state.name == "RUNNING" for trial in trials.values())
        seconds = seconds_left(records, left, running)
        about = "" if seconds is None else f", about {_duration(seconds)}"
        for cell in (cell for cell in records if cell in new):
            outcome = records[cell]
            said = outcome.status.replace("_", " ") if outcome.loss is None else f"loss {outcome.loss:.5g}"
            said += f" ({outcome.message})" if outcome.message else ""
            done = f"{len(records)} done, {len(left) or 'none'} left{about}"
            self.say(f"{cell}: {said}, {_duration(outcome.seconds)}; {done}")

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
