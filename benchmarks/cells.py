"""A grid of experiments as cells: each one is run once, and its result is one line of a file.

The full grid is hours of work. Finished cells are kept in `results/<kind>.jsonl`, so that a later run goes on
where an earlier one stopped, whether it ran out of its budget or was killed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.results import commit, finite

__all__ = ["Cell", "Store", "chosen", "run_cells"]


@dataclass(frozen=True)
class Cell:
    """One experiment.

    Attributes:
        kind: which experiment, the name of its file.
        key: what tells it from others of its kind; plain values.
        measure: does it; returns plain numbers, strings, lists and dicts.
        priority: smaller is done first.
    """

    kind: str
    key: dict[str, Any]
    measure: Callable[..., dict[str, Any]]
    priority: int = 0

    @property
    def name(self) -> str:
        """For progress lines."""
        return f"{self.kind} " + " ".join(f"{name}={value}" for name, value in self.key.items())


class Store:
    """The lines of finished cells.

    Args:
        directory: of the files.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def path(self, kind: str) -> Path:
        """The file of one kind."""
        return self._directory / f"{kind}.jsonl"

    def records(self, kind: str) -> list[dict[str, Any]]:
        """All finished cells of a kind. A last line that was cut off by a kill is passed over."""
        path = self.path(kind)
        return list(_lines(path)) if path.exists() else []

    def add(self, cell: Cell, values: dict[str, Any], seconds: float) -> None:
        """Append a finished cell."""
        self._directory.mkdir(parents=True, exist_ok=True)
        line = {**cell.key, **finite(values), "seconds": round(seconds, 2), "commit": commit()}
        path = self.path(cell.kind)
        torn = path.exists() and not path.read_text().endswith("\n") and path.stat().st_size > 0
        with path.open("a") as file:
            file.write(("\n" if torn else "") + json.dumps(line) + "\n")

    def unfinished(self, cells: Iterable[Cell]) -> list[Cell]:
        """Those of some cells that are not finished, in their order; every file is read once."""
        records: dict[str, list[dict[str, Any]]] = {}
        left = []
        for cell in cells:
            if cell.kind not in records:
                records[cell.kind] = self.records(cell.kind)
            if not any(cell.key.items() <= record.items() for record in records[cell.kind]):
                left.append(cell)
        return left


def chosen(
    cells: Iterable[Cell], kinds: Collection[str] | None, **axes: Collection[Any] | None
) -> list[Cell]:
    """Cells of some kinds with some values in their keys.

    Args:
        cells: any.
        kinds: to keep; none at all for every kind.
        **axes: for a name in the key, the values to keep; none at all for every cell.
    """
    return [
        cell
        for cell in cells
        if (not kinds or cell.kind in kinds)
        and all(not values or cell.key.get(name) in values for name, values in axes.items())
    ]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def run_cells(
    cells: Iterable[Cell], store: Store | None, budget_seconds: float, *, strict: bool = False
) -> int:
    """Run what is not finished, by priority, until the budget is used up.

    Args:
        cells: the grid.
        store: where results go; None prints them only.
        budget_seconds: no cell starts after so long.
        strict: whether a failing cell ends it all, instead of being left for the next time.

    Returns:
        Cells still to do, those that failed among them.
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
        print(
            f"[{spent / 60:6.1f} of {budget_seconds / 60:.0f} min, {index}/{len(todo)}] {cell.name}",
            flush=True,
        )
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
            store.add(cell, values, time.monotonic() - start)
    return failed
