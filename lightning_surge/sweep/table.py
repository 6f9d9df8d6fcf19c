"""Where a sweep keeps what its cells said: one line for each, so that a kill costs only what was running."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from types import TracebackType
from typing import Any

from lightning_surge.sweep.cells import Cell, Grid, Record, SweepError, SweepSettings

if sys.platform != "win32":
    import fcntl

__all__ = ["SweepTable", "table_rows"]

COLUMNS = ("batch_size", "lr", "loss", "steps", "examples", "seed", "target", "status", "seconds")
VERSION = 1


class SweepTable:
    """A table of finished cells for `lightning-surge fit`, and the journal from which it is written.

    The journal `<name>.cells.jsonl` gets one line when a cell has finished, and nothing in it is ever
    changed. Its first line says what the sweep is about. The table is made from it anew after every cell.

    Args:
        path: of the table.

    Attributes:
        path: of the table.
        journal: path of the journal.
        logs: directory for what cells print.
        damaged: lines of the journal that could not be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.journal = path.with_name(f"{path.stem}.cells.jsonl")
        self.logs = path.with_name(f"{path.stem}.logs")
        self.damaged = 0
        self._descriptor: int | None = None
        self._targets: tuple[float, ...] = ()
        self._records: dict[Cell, Record] = {}

    @property
    def records(self) -> list[Record]:
        """Finished cells; the last word of each."""
        return list(self._records.values())

    def read(self, settings: SweepSettings, grid: Grid, *, extend: bool = False) -> bool:
        """Read what there is, and check that it is the same sweep.

        Args:
            settings: of the sweep that is asked for.
            grid: of the sweep that is asked for.
            extend: whether the grid may be another one.

        Returns:
            Whether the journal must be told of the grid.

        Raises:
            SweepError: if the table is of something else.
        """
        self._targets = settings.targets
        if not self.journal.exists():
            if self.path.exists():
                raise SweepError(
                    f"Expected {self.path} to be new, got a file that no sweep has left there "
                    f"({self.journal.name} is missing): choose another --output."
                )
            return True
        header = self._load()
        if header is None:
            if self._records:
                raise SweepError(
                    f"Expected {self.journal} to say what it is about, got a damaged first line: choose "
                    "another --output."
                )
            return True
        self._check_settings(header, settings)
        if header["grid"] == _plain(grid):
            return False
        if not extend:
            raise SweepError(
                f"Expected the grid that {self.path} was begun with, got another one "
                f"({_differences(header['grid'], _plain(grid))}): pass --extend to keep its cells and add "
                "those of the new grid, or choose another --output."
            )
        return True

    def _load(self) -> dict[str, Any] | None:
        header = None
        for line in self.journal.read_text(errors="replace").splitlines():
            try:
                values = json.loads(line)
                if "sweep" in values:
                    header = values if {"digest", "settings", "grid"} <= values.keys() else header
                else:
                    record = Record.from_json(values)
                    self._records[record.cell] = record
            except (ValueError, KeyError, TypeError):
                self.damaged += bool(line.strip())  # that cell runs again
        return header

    def _check_settings(self, header: dict[str, Any], settings: SweepSettings) -> None:
        if header["sweep"] != VERSION:
            raise SweepError(
                f"Expected a journal of version {VERSION}, got {header['sweep']} in {self.journal}: choose "
                "another --output."
            )
        if header["digest"] != settings.digest:
            raise SweepError(
                f"Expected the sweep that {self.path} was begun with ({header['digest']}), got another one "
                f"({settings.digest}; {_differences(header['settings'], settings.identity)}): its losses "
                f"cannot be compared. Go back to the former settings, choose another --output, or delete "
                f"{self.journal} and {self.path}."
            )

    def begin(self, settings: SweepSettings, grid: Grid, *, announce: bool) -> None:
        """Open the journal for writing; nobody else can until `close`.

        Args:
            settings: of the sweep.
            grid: of the sweep.
            announce: whether the journal must be told of them, as `read` said.

        Raises:
            SweepError: if another process writes to it.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self.journal, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        if sys.platform != "win32":
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.close()
                raise SweepError(
                    f"Expected nobody to write to {self.journal}, got another sweep that does: wait for it, "
                    "or choose another --output."
                ) from None
        if announce:
            header = {"sweep": VERSION, "digest": settings.digest, "settings": settings.identity}
            self._append({**header, "grid": _plain(grid)})
        self.write()

    def add(self, record: Record) -> None:
        """Commit a finished cell.

        Args:
            record: of the cell.
        """
        self._append(record.to_json())
        self._records[record.cell] = record
        self.write()

    def _append(self, values: dict[str, Any]) -> None:
        assert self._descriptor is not None
        size = os.fstat(self._descriptor).st_size
        # A kill may have torn the last line: what comes now must not become part of it.
        torn = False
        if size:
            os.lseek(self._descriptor, size - 1, os.SEEK_SET)
            torn = os.read(self._descriptor, 1) != b"\n"
        line = "\n" * torn + json.dumps(values, allow_nan=False) + "\n"
        os.write(self._descriptor, line.encode())
        os.fsync(self._descriptor)

    def write(self) -> None:
        """Write the table; a reader sees the old one or the new one."""
        rows = table_rows(self.records, self._targets)
        buffer = StringIO()
        columns = [name for name in COLUMNS if name != "target" or self._targets]
        writer = csv.DictWriter(buffer, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        draft = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        draft.write_text(buffer.getvalue())
        os.replace(draft, self.path)

    def close(self) -> None:
        """Let others write."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> SweepTable:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def table_rows(records: Collection[Record], targets: Sequence[float] = ()) -> list[dict[str, Any]]:
    """Rows of the table.

    Args:
        records: finished cells.
        targets: losses; each makes a row of its own, whose steps and examples are those until it was
            reached, and empty where it never was.

    Returns:
        By column, sorted by batch size, learning rate and seed; None for an empty field.

    Example:
        >>> from lightning_surge.sweep.cells import Outcome
        >>> rows = table_rows([Record(Cell(8, 0.1, 0), Outcome("diverged", None, 3, 24))])
        >>> rows[0]["loss"], rows[0]["steps"], rows[0]["status"]
        (None, 3, 'diverged')
    """
    rows = []
    for cell, outcome in sorted(records, key=lambda record: record.cell):
        row = {
            **asdict(cell),
            "loss": outcome.loss,
            "steps": outcome.steps,
            "examples": outcome.examples,
            "status": outcome.status,
            "seconds": round(outcome.seconds, 2),
        }
        reached = {entry.target: entry for entry in outcome.reached}
        for target in targets:
            entry = reached.get(target)
            steps, examples = (entry.steps, entry.examples) if entry else (None, None)
            missed = outcome.status == "finished" and steps is None
            status = "not_reached" if missed else outcome.status
            rows.append({**row, "steps": steps, "examples": examples, "target": target, "status": status})
        if not targets:
            rows.append(row)
    return rows


def _plain(grid: Grid) -> dict[str, Any]:
    # As JSON reads it back, where tuples are lists.
    return {name: list(values) for name, values in asdict(grid).items()}


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    changed = [name for name in now if before.get(name) != now[name]]
    if "config_digest" in changed:
        return "the configuration says something else"
    return ", ".join(f"{name} {before.get(name)!r} became {now[name]!r}" for name in changed)
