"""Runs cells, some at a time, each in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from lightning_surge.sweep.cells import Cell, CellSpec, Outcome, Reached, Record, SweepError

__all__ = ["CellProcess", "Job", "outcome_from_json", "run_cells"]

# What runs inside the process: the one module of a sweep that knows Lightning.
PROGRAM = "lightning_surge.sweep.worker"
PAUSE = 0.1  # seconds between two looks at the processes


class Job(Protocol):
    """A cell that runs."""

    def poll(self) -> Outcome | None:
        """What the cell said; None while it runs."""

    def stop(self) -> None:
        """End it now."""


def run_cells(
    plan: Callable[[Sequence[Record]], Sequence[Cell]],
    start: Callable[[Cell, int], Job],
    records: Sequence[Record],
    *,
    slots: int,
    finished: Callable[[Record], None],
    watch: Callable[[Mapping[Cell, float], Sequence[Cell]], None] = lambda running, waiting: None,
) -> list[Record]:
    """Run the cells that a plan wants and that are not finished.

    Args:
        plan: all cells that are wanted, in order; asked again whenever one has finished.
        start: starts a cell in a slot.
        records: cells that are finished already.
        slots: cells that run at a time.
        finished: told of every cell, before any other is started.
        watch: told now and then which cells run, with their seconds so far, and which wait.

    Returns:
        All records, the new ones last. When anything is raised, running cells are stopped first.
    """
    records = list(records)
    running: dict[int, tuple[Cell, Job, float]] = {}
    changed = True
    waiting: list[Cell] = []
    try:
        while True:
            if changed:
                known = {record.cell for record in records} | {cell for cell, _, _ in running.values()}
                waiting = [cell for cell in plan(records) if cell not in known]
                for slot in range(slots):
                    if waiting and slot not in running:
                        cell = waiting.pop(0)
                        running[slot] = (cell, start(cell, slot), time.monotonic())
                if not running:
                    return records
            now = time.monotonic()
            watch({cell: now - begin for cell, _, begin in running.values()}, waiting)
            changed = False
            for slot, (cell, job, _) in list(running.items()):
                outcome = job.poll()
                if outcome is not None:
                    del running[slot]
                    records.append(Record(cell, outcome))
                    finished(records[-1])
                    changed = True
            if not changed:
                time.sleep(PAUSE)
    finally:
        for _, job, _ in running.values():
            job.stop()


class CellProcess:
    """A cell in a fresh interpreter.

    It gets its specification in a file and leaves its answer in another. It lives in a session of its own, so
    that an interrupt from the terminal reaches only the sweep, and ends when its standard input does: a sweep
    that is killed leaves nobody behind.

    Args:
        spec: of the cell.
        directory: for the files, and for what the cell prints, which stays there if it did not finish.
        environment: variables beside those of this process.
    """

    def __init__(self, spec: CellSpec, directory: Path, environment: Mapping[str, str] | None = None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        stem = directory / spec.cell.slug
        self._specification = stem.with_name(stem.name + ".spec.json")
        self._answer = stem.with_name(stem.name + ".answer.json")
        self.log = stem.with_name(stem.name + ".log")
        self._answer.unlink(missing_ok=True)
        self._specification.write_text(spec.to_json())
        self._begin = time.monotonic()
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", PROGRAM, str(self._specification), str(self._answer)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **(environment or {})},
            )

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def poll(self) -> Outcome | None:
        """What the cell said; None while it runs.

        Raises:
            SweepError: if no cell of this sweep can run.
        """
        code = self._process.poll()
        if code is None:
            return None
        seconds = time.monotonic() - self._begin
        self._kill_group()  # other ranks, workers of loaders
        try:
            outcome = outcome_from_json(self._answer.read_text(), seconds)
        except SweepError:
            self._clean(keep_log=False)
            raise
        except (OSError, ValueError, KeyError, TypeError):
            outcome = self._without_answer(code, seconds)
        self._clean(keep_log=outcome.status not in ("finished", "diverged"))
        return outcome

    def stop(self) -> None:
        """End the process and all that it started, without asking: a cell holds nothing worth keeping."""
        self._kill_group()
        self._process.wait()
        self._clean(keep_log=False)

    def _without_answer(self, code: int, seconds: float) -> Outcome:
        if code < 0:
            name = signal.Signals(-code).name
            hint = " (out of memory?)" if name == "SIGKILL" else ""
            return Outcome("killed", seconds=seconds, message=f"ended by {name}{hint}; see {self.log}")
        printed = self.log.read_text(errors="replace").split("\n")
        last = next((line.strip()[:200] for line in reversed(printed) if line.strip()), "nothing printed")
        return Outcome("failed", seconds=seconds, message=f"exit status {code}: {last}; see {self.log}")

    def _kill_group(self) -> None:
        if sys.platform == "win32":
            self._process.kill()
            return
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            self._process.kill()

    def _clean(self, *, keep_log: bool) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._specification.unlink(missing_ok=True)
        self._answer.unlink(missing_ok=True)
        if not keep_log:
            self.log.unlink(missing_ok=True)
            with suppress(OSError):  # other cells may have left something there
                self.log.parent.rmdir()


def outcome_from_json(text: str, seconds: float) -> Outcome:
    """Read a cell's answer.

    Args:
        text: a JSON object: the fields of an `Outcome`, or `unusable` with a reason why no cell can run.
        seconds: wall time since the cell was started.

    Raises:
        SweepError: if no cell of this sweep can run.
        KeyError, TypeError, ValueError: if the text is something else.

    Example:
        >>> outcome_from_json('{"status": "diverged", "steps": 3}', 5.0).seconds
        5.0
    """
    values = json.loads(text)
    if "unusable" in values:
        raise SweepError(values["unusable"])
    reached = tuple(Reached(*entry) for entry in values.pop("reached", ()))
    return Outcome(**{**values, "seconds": seconds, "reached": reached})
