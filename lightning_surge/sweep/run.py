"""Runs the trials of a study, some at a time, each in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial

from lightning_surge.sweep.cells import Cell, Outcome, SweepError
from lightning_surge.sweep.study import BEAT, SweepStudy, patiently

PROGRAM = "lightning_surge.sweep.worker"
# Seconds between two looks at the processes, and at the study, where others may have written.
PAUSE, LOOK = 0.1, 2.0


class CellProcess:
    """A cell in a fresh interpreter, which tells the study what it has found.

    It has a session of its own, so that Ctrl-C reaches only the sweep, and ends when its standard input does:
    a sweep that is killed leaves no process behind. The log of what it prints stays if it has no loss.
    """

    def __init__(self, order: Mapping[str, Any], log: Path, environment: Mapping[str, str]) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", PROGRAM, json.dumps(order)],
                stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, **environment},
            )  # fmt: skip

    @property
    def ended(self) -> bool:
        """Whether the process has ended."""
        return self._process.poll() is not None

    def crash(self) -> Outcome:
        """The outcome of a cell whose process has ended without telling any."""
        code = self._process.returncode
        if code < 0:
            name = signal.Signals(-code).name
            hint = " (out of memory?)" if name == "SIGKILL" else ""
            return Outcome("killed", message=f"ended by {name}{hint}; see {self.log}")
        lines = self.log.read_text(errors="replace").split("\n")
        last = next((line.strip()[:200] for line in reversed(lines) if line.strip()), "nothing printed")
        return Outcome("failed", message=f"exit status {code}: {last}; see {self.log}")

    def stop(self, *, forget: bool = True) -> None:
        """End the process and all that it started, other ranks and workers of loaders; `forget` the log."""
        with suppress(ProcessLookupError, PermissionError):
            if sys.platform == "win32":
                self._process.kill()
            else:
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()
        if forget:
            self.log.unlink(missing_ok=True)
            with suppress(OSError):  # other cells may have left something there
                self.log.parent.rmdir()


def run_cells(
    study: SweepStudy,
    plan: Callable[[Mapping[Cell, Outcome]], Sequence[Cell]],
    start: Callable[[FrozenTrial, int], CellProcess | None],
    *,
    slots: int,
    again: Collection[Cell] = (),
    look: Callable[[Mapping[Cell, Outcome], Mapping[Cell, FrozenTrial]], None],
    say: Callable[[str], None],
) -> dict[Cell, Outcome]:
    """Run the cells that a plan wants and that have not ended, or run `again`; wait for those elsewhere.

    Not `Study.optimize`: where no trial waits it makes a new one, which a grid does not have. When anything
    is raised, running cells are stopped first. `start` returns None for a cell that has ended already.
    """
    running: dict[int, tuple[FrozenTrial, CellProcess]] = {}
    looked = beat = -float("inf")
    done = False

    def turn() -> None:
        nonlocal looked, beat, done, again
        looked = time.monotonic()
        if looked - beat > BEAT:
            study.keep([trial._trial_id for trial, _ in running.values()])
            beat = looked
        study.enqueue(plan(study.records()), again=again)
        again = ()
        done = not running and all(trial.state.is_finished() for trial in study.trials().values())
        for slot in set(range(slots)) - running.keys():
            if (trial := study.claim()) is not None:
                if (process := start(trial, slot)) is not None:
                    running[slot] = (trial, process)
                else:
                    looked = -float("inf")
        look(study.records(), study.trials())

    try:
        while not done:
            ended = [slot for slot, (_, process) in running.items() if process.ended]
            for slot in ended:
                _end(study, *running[slot], say)
                del running[slot]
            if ended or time.monotonic() - looked > LOOK:
                patiently(turn, say)
            else:
                time.sleep(PAUSE)
        return study.records()
    finally:
        for trial, process in running.values():
            process.stop()
            with suppress(OSError, StorageInternalError):
                study.tell(trial._trial_id, None)


def _end(study: SweepStudy, trial: FrozenTrial, process: CellProcess, say: Callable[[str], None]) -> None:
    told = study.storage.get_trial(trial._trial_id)
    finished = told.state.is_finished()
    status = told.user_attrs.get("outcome", {"status": "finished"})["status"]
    process.stop(forget=finished and status in ("finished", "diverged"))
    if not finished:
        patiently(lambda: study.tell(trial._trial_id, process.crash()), say)
    if "refusal" in told.user_attrs:
        raise SweepError(told.user_attrs["refusal"])
