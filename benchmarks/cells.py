"""A grid of experiments as cells: each one is run once, and its result is one line of `cells.jsonl`.

The full grid is hours of work. Finished cells are kept, so that a later run goes on where an earlier one
stopped, whether it ran out of its budget or was killed.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.results import commit, finite

__all__ = ["Cell", "Store", "chosen", "command_line", "run_cells"]


def command_line(description: str, kinds: Collection[str], workloads: Collection[str]) -> ArgumentParser:
    """The options of a bench that goes on where it stopped."""
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=60.0, help="minutes after which no cell is started")
    parser.add_argument("--quick", action="store_true", help="some cells of each kind, nothing is written")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--run-only", action="store_true", help="leave tables and figures as they are")
    parser.add_argument("--only", nargs="*", choices=kinds, help="kinds of cells to run")
    parser.add_argument("--workload", nargs="*", choices=workloads, help="workloads to run")
    return parser


@dataclass(frozen=True)
class Cell:
    """One experiment."""

    kind: str
    key: dict[str, Any]  # plain values that tell it from others of its kind, the arguments of `measure`
    measure: Callable[..., dict[str, Any]]  # returns plain numbers, strings, lists and dicts
    priority: int = 0  # smaller is done first


class Store:
    """The finished cells of a directory."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "cells.jsonl"

    def records(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Finished cells of one kind, or of all. A last line that was cut off by a kill is passed over."""
        found = []
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return [record for record in found if kind in (None, record["kind"])]

    def add(self, kind: str, values: dict[str, Any]) -> None:
        """Append a finished cell."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torn = self.path.exists() and not self.path.read_text().endswith("\n") and self.path.stat().st_size
        with self.path.open("a") as file:
            file.write(("\n" if torn else "") + json.dumps({"kind": kind} | finite(values)) + "\n")

    def unfinished(self, cells: Iterable[Cell]) -> list[Cell]:
        """Those of some cells that are not finished, in their order."""
        records = self.records()
        keys = [(cell, cell.key | {"kind": cell.kind}) for cell in cells]
        return [cell for cell, key in keys if not any(key.items() <= record.items() for record in records)]


def chosen(
    cells: Iterable[Cell], kinds: Collection[str] | None, **axes: Collection[Any] | None
) -> list[Cell]:
    """Cells of some kinds with some values in their keys; None or nothing keeps all."""
    return [
        cell
        for cell in cells
        if (not kinds or cell.kind in kinds)
        and all(not values or cell.key.get(name) in values for name, values in axes.items())
    ]


def run_cells(
    cells: Iterable[Cell], store: Store | None, budget_seconds: float, *, strict: bool = False
) -> int:
    """Run what is not finished, by priority, until the budget is used up.

    Args:
        cells: The grid.
        store: Where results go; None only prints them.
        budget_seconds: Seconds after which no cell is started.
        strict: Whether a failing cell ends the run, instead of being left for the next one.

    Returns:
        The number of cells still to do, including those that failed.
    """
    begin = time.monotonic()
    failed = 0
    todo = sorted(cells if store is None else store.unfinished(cells), key=lambda cell: cell.priority)
    for index, cell in enumerate(todo):
        spent = time.monotonic() - begin
        if spent > budget_seconds:
            return failed + len(todo) - index
        if store is not None and not store.unfinished([cell]):
            continue  # another process was faster
        name = " ".join([cell.kind, *(f"{key}={value}" for key, value in cell.key.items())])
        print(f"[{spent / 60:6.1f} of {budget_seconds / 60:.0f} min, {index}/{len(todo)}] {name}", flush=True)
        start = time.monotonic()
        try:
            values = cell.measure(**cell.key)
        except Exception as error:  # one broken cell must not cost the night
            if strict:
                raise
            print(f"failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            failed += 1
            continue
        if store is None:
            print(json.dumps(finite(values))[:200], flush=True)
        else:
            seconds = round(time.monotonic() - start, 2)
            store.add(cell.kind, {**cell.key, **values, "seconds": seconds, "commit": commit()})
    return failed
