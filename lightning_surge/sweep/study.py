"""The Optuna study of a sweep: one trial per cell, however many workers share it and however they end."""

from __future__ import annotations

import errno
import os
import re
import socket
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from lightning_surge.sweep.cells import Cell, Outcome, SweepError, SweepSettings

__all__ = ["SweepStudy", "patiently"]

T = TypeVar("T")
# Wide enough for every grid: a study may be extended.
RANGES: dict[str, Any] = {
    "batch_size": IntDistribution(1, 10**12, log=True),
    "lr": FloatDistribution(1e-30, 1e30, log=True),
    "seed": IntDistribution(0, 2**32),
}
# Seconds between two signs of life, and after which a worker is given up: more than caches of network
# file systems are late by, and clocks of machines differ.
BEAT, GRACE = 30, 180
RETRY = 5.0  # seconds between two attempts to write
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
STATES = {"finished": TrialState.COMPLETE, "diverged": TrialState.PRUNED}


def patiently(write: Callable[[], T], say: Callable[[str], None] = print) -> T:
    """Write, and while the disk is full or the database away, wait: hours of training may hang on it."""
    while True:
        try:
            return write()
        except (OSError, StorageInternalError) as error:
            if isinstance(error, OSError) and error.errno not in FULL:
                raise
            reason = str(error.__cause__ or error).splitlines()[0]
            say(f"waiting, since nothing can be written: {reason}")
            time.sleep(RETRY)


class _Lock(JournalFileOpenLock):
    """Cuts off what a full disk has left of a line, which would spoil the line after it."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._path = path

    def acquire(self) -> bool:
        super().acquire()
        try:
            with open(self._path, "rb+") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - 2**20))
                tail = file.read()
                if tail and not tail.endswith(b"\n"):
                    file.truncate(size - len(tail) + tail.rfind(b"\n") + 1)
        except BaseException:
            self.release()
            raise
        return True


class _Journal(JournalStorage, BaseHeartbeat):
    """A journal with the signs of life that Optuna's databases have."""

    def record_heartbeat(self, trial_id: int) -> None:
        self.set_trial_user_attr(trial_id, "heartbeat", time.time())

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        running = self.get_all_trials(study_id, deepcopy=False, states=(TrialState.RUNNING,))
        beats = {trial: trial.user_attrs.get("heartbeat") or _started(trial) for trial in running}
        return [trial._trial_id for trial, beat in beats.items() if time.time() - beat > GRACE]

    def get_heartbeat_interval(self) -> int:
        return BEAT

    def get_heartbeat_stale_trial_callback(self) -> None:
        return None

    get_failed_trial_callback = get_heartbeat_stale_trial_callback


def _started(trial: FrozenTrial) -> float:
    return trial.datetime_start.timestamp() if trial.datetime_start else time.time()


def _storage(where: str) -> RDBStorage | _Journal:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        if "://" not in where:
            path = Path(where)
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and path.read_bytes()[:1] not in (b"", b"{"):
                raise ValueError("something else is in it")
            return _Journal(JournalFileBackend(where, lock_obj=_Lock(where)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            storage = RDBStorage(where, heartbeat_interval=BEAT, grace_period=GRACE)
        if where.startswith("sqlite"):
            from sqlalchemy import event

            # Otherwise two workers may both read that a trial waits, and both take it.
            event.listen(storage.engine, "begin", lambda link: link.exec_driver_sql("BEGIN IMMEDIATE"))
        return storage
    except Exception as error:
        shown = re.sub(r"(://[^:/]*):[^@/]*@", r"\1:***@", where)
        raise SweepError(
            f"Expected --study to be an Optuna journal, a new file, or the URL of a database such as "
            f"sqlite:///sweep.db, got {shown!r} ({type(error).__name__}: {str(error).splitlines()[0][:200]}): "
            "choose another one."
        ) from error


# A process and where its id means something: hostname and namespace of processes (containers).
with suppress(OSError):
    _NAMESPACE = os.stat("/proc/self/ns/pid").st_ino if sys.platform == "linux" else 0


def _me() -> list[Any]:
    return [f"{socket.gethostname()}/{_NAMESPACE}", os.getpid()]


def _is_gone(worker: list[Any]) -> bool:
    """Whether it is a process of this machine that has ended."""
    place, pid = worker
    if place != _me()[0] or sys.platform == "win32":
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


class SweepStudy:
    """One trial per cell; workers on any machine claim them, and take over from those that are gone.

    Any of them may enqueue a cell, so that a cell may have several trials. Those count whose predecessors
    they retry; from the others, which two workers had enqueued at once, nobody will run one.

    Args:
        where: path of a journal, or URL of a database.
        name: name of the study.
        maximize: whether larger losses are better.

    Raises:
        SweepError: if there can be no study.
    """

    def __init__(self, where: str, name: str, *, maximize: bool = False) -> None:
        self.storage = _storage(where)
        self.study = optuna.create_study(
            storage=self.storage,
            study_name=name,
            direction="maximize" if maximize else "minimize",
            load_if_exists=True,
        )

    def begin(self, settings: SweepSettings, cells: Collection[Cell], *, extend: bool = False) -> None:
        """Say what the study is about, or check that it is about the same; enqueue the cells.

        Args:
            settings: the settings of the sweep that is asked for.
            cells: the cells of its grid.
            extend: whether the study may get further cells.

        Raises:
            SweepError: if it is about something else.
        """
        said = self.study.user_attrs
        now = settings.identity
        before = said.get("settings", now)
        changed = [name for name in now if before.get(name) != now[name]]
        if changed:
            what = ", ".join(f"{name} {before.get(name)!r} became {now[name]!r}" for name in changed)
            what = "the configuration says something else" if "config_digest" in changed else what
            raise SweepError(
                f"Expected the sweep that the study was begun with, got another one ({what}): its losses "
                "cannot be compared. Go back to the former settings, or choose another --output."
            )
        trials = self.trials()
        new = [cell for cell in cells if cell not in trials]
        if new and said.get("enqueued") and not extend:
            raise SweepError(
                f"Expected the cells that the study was begun with, got {len(new)} others, such as "
                f"{new[0].name}: pass --extend to add them, or choose another --output."
            )
        self.study.set_user_attr("settings", now)
        self.enqueue(cells)
        # Until here another worker, or the same command after a kill, may complete the grid.
        self.study.set_user_attr("enqueued", True)

    def trials(self) -> dict[Cell, FrozenTrial]:
        """The trial that counts, of every cell that has one."""
        return self._sorted()[0]

    def _sorted(self) -> tuple[dict[Cell, FrozenTrial], list[FrozenTrial]]:
        counts: dict[Cell, FrozenTrial] = {}
        surplus = []
        for trial in self.study.get_trials(deepcopy=False):
            if trial.params.keys() == RANGES.keys():
                cell = Cell(**trial.params)
                before = counts.get(cell)
                if before is None or before.number in trial.system_attrs.get("retry_history", ()):
                    counts[cell] = trial
                elif trial.state == TrialState.WAITING:
                    surplus.append(trial)
        return counts, surplus

    def records(self) -> dict[Cell, Outcome]:
        """What the cells said that have ended."""
        return {
            cell: Outcome.from_json(trial.user_attrs["outcome"], _seconds(trial))
            for cell, trial in self.trials().items()
            if "outcome" in trial.user_attrs
        }

    def enqueue(self, cells: Iterable[Cell], *, again: Iterable[Cell] = ()) -> None:
        """Give cells a trial that waits, where they have none, or one that nobody has ended.

        Args:
            cells: the cells that are wanted.
            again: those that run again although they have said something.
        """
        trials, surplus = self._sorted()
        for trial in surplus:
            self.tell(trial._trial_id, None)
        again = set(again)
        for cell in cells:
            trial = trials.get(cell)
            if trial is None:
                waiting = optuna.create_trial(
                    state=TrialState.WAITING, params=cell._asdict(), distributions=RANGES
                )
                self.study.add_trial(waiting)
            elif trial.state.is_finished() and ("outcome" not in trial.user_attrs or cell in again):
                trial = self.study.trials[trial.number]
                trial.user_attrs = {}
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ExperimentalWarning)
                    RetryHeartbeatStaleTrialCallback()(self.study, trial)

    def claim(self) -> FrozenTrial | None:
        """Take the next trial that waits; None if there is none."""
        for trial in self.trials().values():
            if trial.state == TrialState.WAITING:
                with suppress(UpdateFinishedTrialError):
                    if self.storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING):
                        self.storage.set_trial_user_attr(trial._trial_id, "worker", _me())
                        self.storage.record_heartbeat(trial._trial_id)
                        return trial
        return None

    def keep(self, own: Collection[int]) -> None:
        """Give a sign of life for the own trials, and give up those whose workers give none.

        Args:
            own: the trials that run here.
        """
        for trial_id in own:
            with suppress(UpdateFinishedTrialError):
                self.storage.record_heartbeat(trial_id)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            fail_stale_trials(self.study)
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            worker = trial.user_attrs.get("worker")
            if trial._trial_id in own or (worker is None and time.time() - _started(trial) < GRACE):
                continue
            if worker in (None, _me()) or _is_gone(worker):
                self.tell(trial._trial_id, None)

    def tell(self, trial_id: int, outcome: Outcome | None, refusal: str = "") -> None:
        """End a trial; if somebody else has given it up, nothing happens.

        Args:
            trial_id: the trial.
            outcome: what its cell said; None if the cell has to run again.
            refusal: why no cell of the sweep can run.
        """
        state, values = TrialState.FAIL, None
        with suppress(UpdateFinishedTrialError):
            if outcome is not None:
                # All of it in one entry: with it the cell has ended, whatever becomes of this process.
                self.storage.set_trial_user_attr(trial_id, "outcome", asdict(outcome))
                state = STATES.get(outcome.status, state)
                values = None if outcome.loss is None else [outcome.loss]
            elif refusal:
                self.storage.set_trial_user_attr(trial_id, "refusal", refusal)
            self.storage.set_trial_state_values(trial_id, state, values)


def _seconds(trial: FrozenTrial) -> float:
    return trial.duration.total_seconds() if trial.duration else 0.0
