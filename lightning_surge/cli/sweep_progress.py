"""What a sweep says while it runs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TextIO

from lightning_surge.sweeping.cells import Cell, Record
from lightning_surge.sweeping.planning import remaining_seconds

__all__ = ["SweepProgress", "duration"]

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
