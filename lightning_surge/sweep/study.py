"""The Optuna study of a sweep: one trial per cell, however many workers share it and however they end."""

from __future__ import annotations

import errno
import os
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

from lightning_surge.sweep.cells import Cell, Outcome, Reached, SweepError, SweepSettings
from lightning_surge.tables.study import shown

T = TypeVar("T")
# Wide enough for every grid: a study may be extended.
RANGES: dict[str, Any] = {
    "batch_size": IntDistribution(1, 10**12, log=True),
    "lr": FloatDistribution(1e-30, 1e30, log=True),
    "seed": IntDistribution(0, 2**32),
}
STATES = {"finished": TrialState.COMPLETE, "diverged": TrialState.PRUNED}
# Seconds between two signs of life of a worker, and without one until it is given up.
BEAT, GRACE = 15, 60
RETRY = 5.0  # seconds between two attempts to write
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def patiently(write: Callable[[], T], say: Callable[[str], None] = print) -> T:
    """Write, and while the disk is full or the database away, wait: hours of training may hang on it."""
    while True:
        try:
            return write()
        except (OSError, StorageInternalError) as error:
            if isinstance(error, OSError) and error.errno not in FULL:
                raise
            say(f"waiting, since nothing can be written: {str(error.__cause__ or error).splitlines()[0]}")
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
    """A journal with the signs of life that Optuna knows of databases."""

    def record_heartbeat(self, trial_id: int) -> None:
        with suppress(UpdateFinishedTrialError):
            self.set_trial_user_attr(trial_id, "heartbeat", time.time())

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        running = self.get_all_trials(study_id, deepcopy=False, states=(TrialState.RUNNING,))
        return [t._trial_id for t in running if time.time() - t.user_attrs.get("heartbeat", 0) > GRACE]

    def get_heartbeat_interval(self) -> int:
        return BEAT

    def get_heartbeat_stale_trial_callback(self) -> None:
        return None


def _storage(where: str) -> RDBStorage | _Journal:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        if "://" not in where:
            path = Path(where)
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and path.read_bytes()[:1] not in (b"", b"{"):
                raise ValueError("something else is in it")
            return _Journal(JournalFileBackend(where, lock_obj=_Lock(where)))
        storage = RDBStorage(where, heartbeat_interval=BEAT, grace_period=GRACE)
        if where.startswith("sqlite"):
            from sqlalchemy import event

            # Otherwise two workers may both read that a trial waits, and both take it.
            event.listen(storage.engine, "begin", lambda link: link.exec_driver_sql("BEGIN IMMEDIATE"))
        return storage
    except Exception as error:  # of whatever driver the URL names
        raise SweepError(
            "Expected --study to be an Optuna journal, a new file, or the URL of a database, got "
            f"{shown(where)!r} ({type(error).__name__}: {str(error).splitlines()[0]}): choose another one."
        ) from error


class SweepStudy:
    """One trial per cell; workers on any machine claim them, and take over from those that are gone.

    Two workers may enqueue a cell at once. The first trial of a cell counts, and whichever first retries
    the one that counts; nobody runs the others. `where` is the path of a journal, or the URL of a database.
    """

    def __init__(self, where: str, name: str, *, maximize: bool = False) -> None:
        warnings.filterwarnings("ignore", category=ExperimentalWarning)  # heartbeats are, since 2021
        self.storage = _storage(where)
        self.study = optuna.create_study(
            storage=self.storage, study_name=name, load_if_exists=True,
            direction="maximize" if maximize else "minimize",
        )  # fmt: skip

    def begin(
        self, settings: SweepSettings, cells: Collection[Cell], *, extend: bool = False, dry: bool = False
    ) -> None:
        """Check that the study is about the same; unless `dry`, enqueue the cells, new ones with `extend`."""
        said, now, trials = self.study.user_attrs, settings.identity, self.trials()
        before = said.get("settings", now)
        changed = [name for name in now if before.get(name) != now[name]]
        if changed:
            what = ", ".join(f"{name} {before.get(name)!r} became {now[name]!r}" for name in changed)
            what = "the configuration says something else" if "config_digest" in changed else what
            raise SweepError(
                f"Expected the sweep that the study was begun with, got another one ({what}): its losses "
                "cannot be compared. Go back to the former settings, or choose another --output."
            )
        new = [cell for cell in cells if cell not in trials]
        if new and said.get("enqueued") and not extend:
            raise SweepError(
                f"Expected the cells that the study was begun with, got {len(new)} others, such as {new[0]}: "
                "pass --extend to add them, or choose another --output."
            )
        if dry:
            return
        self.study.set_user_attr("settings", now)
        self.enqueue(cells)
        # Until here the same command, after a kill or elsewhere, completes the grid without --extend.
        self.study.set_user_attr("enqueued", True)

    def _sorted(self) -> tuple[dict[Cell, FrozenTrial], list[FrozenTrial]]:
        counts: dict[Cell, FrozenTrial] = {}
        surplus = []
        for trial in self.study.get_trials(deepcopy=False):
            if trial.params.keys() != RANGES.keys():
                continue
            cell = Cell(**trial.params)
            before = counts.get(cell)
            if before is None or before.number in trial.system_attrs.get("retry_history", ()):
                counts[cell] = trial
            elif not trial.state.is_finished():
                surplus.append(trial)
        return counts, surplus

    def trials(self) -> dict[Cell, FrozenTrial]:
        """The trial that counts, of every cell that has one."""
        return self._sorted()[0]

    def records(self) -> dict[Cell, Outcome]:
        """What the cells said that have ended."""
        found = {}
        for cell, trial in self.trials().items():
            if trial.duration is not None and "outcome" in trial.user_attrs:
                outcome = trial.user_attrs["outcome"]
                reached = tuple(Reached(*entry) for entry in outcome["reached"])
                seconds = trial.duration.total_seconds()
                found[cell] = Outcome(**outcome | {"reached": reached, "seconds": seconds})
        return found

    def enqueue(self, cells: Iterable[Cell], *, again: Collection[Cell] = ()) -> None:
        """Give a cell a trial that waits, if it has none, or one that was given up, or is to run `again`."""
        trials, surplus = self._sorted()
        for trial in surplus:
            self.tell(trial._trial_id, None)
        for cell in cells:
            if (known := trials.get(cell)) is None:
                options: dict[str, Any] = {"params": cell._asdict(), "distributions": RANGES}
                self.study.add_trial(optuna.create_trial(state=TrialState.WAITING, **options))
            elif known.state.is_finished() and (cell in again or "outcome" not in known.user_attrs):
                trial = self.study.trials[known.number]  # a copy
                trial.user_attrs = {}
                RetryHeartbeatStaleTrialCallback()(self.study, trial)

    def claim(self) -> FrozenTrial | None:
        """Take the next trial that waits; None if there is none."""
        for trial in self.trials().values():
            if trial.state == TrialState.WAITING:
                with suppress(UpdateFinishedTrialError):
                    # The sign of life comes first: whoever dies in between is missed.
                    self.storage.record_heartbeat(trial._trial_id)
                    if self.storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING):
                        return trial
        return None

    def keep(self, own: Collection[int]) -> None:
        """Give a sign of life for the own trials, then give up those whose workers give none."""
        for trial_id in own:
            self.storage.record_heartbeat(trial_id)
        fail_stale_trials(self.study)

    def tell(self, trial_id: int, outcome: Outcome | None, refusal: str = "") -> None:
        """End a trial that nobody has given up: None runs again, a `refusal` says why no cell can run."""
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
