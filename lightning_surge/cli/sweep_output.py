"""What a sweep answers: its plan beforehand, the best learning rates afterwards."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_surge.cli.command import CommandError
from lightning_surge.sweep.cells import Grid, Record, SweepSettings
from lightning_surge.sweep.grid import Best, accumulation_for, best_lr
from lightning_surge.sweep.table import SweepTable

if TYPE_CHECKING:
    from lightning_surge.sweep.config import TrainingConfig
import time
from collections.abc import Mapping
from typing import TextIO

from lightning_surge.sweep.cells import Cell
from lightning_surge.sweep.grid import remaining_seconds

__all__ = ["SweepProgress", "duration", "print_plan", "print_result"]


def print_plan(settings: SweepSettings, grid: Grid, training: TrainingConfig, table: SweepTable) -> None:
    """Print what would run.

    Args:
        settings: of the sweep.
        grid: of the sweep.
        training: what the configuration says.
        table: with the cells that are finished.
    """
    done = {record.cell for record in table.records}
    cells = grid.cells()
    print(f"batch size: {settings.batch_size_key}, learning rate: {settings.lr_key}")
    print(f"learning rates: {', '.join(f'{lr:g}' for lr in grid.lrs)}")
    print(f"seeds: {', '.join(map(str, grid.seeds))}")
    if training.left_out:
        print(f"without: {', '.join(training.left_out)}")
    print(f"{'batch size':>10}  {'micro-batch':>11}  {'accumulated':>11}  {'steps':>8}  {'examples':>10}")
    for size in grid.batch_sizes:
        parts = accumulation_for(size, largest=settings.max_micro_batch_size, replicas=settings.replicas)
        micro = size // (parts * settings.replicas)
        print(
            f"{size:>10}  {micro:>11}  {parts:>11}  {settings.steps_of(size):>8}  "
            f"{settings.examples_of(size):>10}"
        )
    print(f"{len(cells)} cells, {len(done.intersection(cells))} of them finished; table: {table.path}")


def print_result(table: Path, settings: SweepSettings, records: Sequence[Record], *, as_json: bool) -> None:
    """Print the best learning rate of every batch size, and what to do next.

    Args:
        table: path of the table.
        settings: of the sweep.
        records: finished cells.
        as_json: for programs.

    Raises:
        CommandError: if no cell gave a loss.
    """
    best = [
        found
        for target in settings.targets or (None,)
        for size in sorted({record.cell.batch_size for record in records})
        if (found := best_lr(records, size, target)) is not None
    ]
    if not best:
        reasons = sorted({record.outcome.message for record in records if record.outcome.message})
        diverged = any(record.outcome.status == "diverged" for record in records)
        raise CommandError(
            f"Expected cells that finish, got none of {len(records)}, see {table} "
            f"({'; '.join(reasons[:3])}): "
            + ("use smaller learning rates." if diverged else "put that right, and pass --retry-failed.")
        )
    fit = shlex.join(["lightning-surge", "fit", str(table)])
    if as_json:
        print(json.dumps(_as_json(table, best, records, fit), indent=1))
        return
    print(f"table: {table}")
    for line in _best_lines(best):
        print(line)
    print(f"next: {fit}")


def _as_json(table: Path, best: Sequence[Best], records: Sequence[Record], fit: str) -> dict[str, Any]:
    statuses = [record.outcome.status for record in records]
    return {
        "table": str(table),
        "cells": {status: statuses.count(status) for status in sorted(set(statuses))},
        "best": [entry._asdict() for entry in best],
        "fit": fit,
    }


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


REDRAW = 1.0  # seconds


def duration(seconds: float) -> str:
    """For people.

    Example:
        >>> duration(42), duration(600), duration(9000)
        ('42 s', '10 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class SweepProgress:
    """A line for every finished cell; on a terminal also one that is redrawn, with the time left.

    Args:
        stream: usually standard error.
        examples: of a cell, by batch size.
        processes: cells that run at a time.
    """

    def __init__(self, stream: TextIO, examples: Mapping[int, int], *, processes: int) -> None:
        self._stream = stream
        self._examples = examples
        self._processes = processes
        self._terminal = stream.isatty()
        self._records: list[Record] = []  # of this run: former ones may come from another machine
        self._running: dict[Cell, float] = {}
        self._waiting: Sequence[Cell] = ()
        self._drawn = ""
        self._drawn_at = 0.0

    def say(self, text: str) -> None:
        """One line."""
        self._clear()
        print(text, file=self._stream, flush=True)

    def watch(self, running: Mapping[Cell, float], waiting: Sequence[Cell]) -> None:
        """Take note of what runs and what waits."""
        self._running, self._waiting = dict(running), waiting
        if self._terminal and time.monotonic() - self._drawn_at > REDRAW:
            self._clear()
            self._drawn_at = time.monotonic()
            self._drawn = f"{len(self._running)} cells run, {self._left()}"
            self._stream.write(self._drawn)
            self._stream.flush()

    def finished(self, record: Record) -> None:
        """Take note of a finished cell."""
        self._records.append(record)
        self._running.pop(record.cell, None)
        cell, outcome = record
        said = f"loss {outcome.loss:.5g}" if outcome.loss is not None else outcome.status.replace("_", " ")
        if outcome.message:
            said += f" ({outcome.message})"
        self.say(f"{cell.name}: {said}, {duration(outcome.seconds)}; {self._left()}")

    def _left(self) -> str:
        left = dict(self._running) | dict.fromkeys(self._waiting, 0.0)
        if not left:
            return f"{len(self._records)} done, none left"
        seconds = remaining_seconds(self._records, left, self._examples, self._processes)
        about = "" if seconds is None else f", about {duration(seconds)}"
        return f"{len(self._records)} done, {len(left)} left{about}"

    def _clear(self) -> None:
        if self._drawn:
            self._stream.write("\r" + " " * len(self._drawn) + "\r")
            self._drawn = ""

    def close(self) -> None:
        """Leave the terminal clean."""
        self._clear()
        self._stream.flush()
