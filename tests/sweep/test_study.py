"""A study as several workers use it: who gets a cell, who takes over, and what a full disk leaves."""

import errno
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from lightning_surge.sweep import study as module
from lightning_surge.sweep.cells import Cell, Grid, Outcome, Reached, SweepError, SweepSettings
from lightning_surge.sweep.study import SweepStudy, patiently
from lightning_surge.tables.files import read_frame
from lightning_surge.tables.study import is_study, read_study

pytestmark = [
    pytest.mark.slow,  # workers that wait for each other, and a store on disk
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
]
Patch = pytest.MonkeyPatch
SETTINGS = SweepSettings(("run.yaml",), config_digest="abc", examples=1024)
CELLS = Grid((8, 16), (0.01, 0.1), (0,)).cells()
DONE = Outcome("finished", 0.5, 64, 1024, (Reached(1.0, 2, 16),))
Open = Callable[[], SweepStudy]


@pytest.fixture(params=["{}/new/sweep.log", "sqlite:///{}/sweep.db"], ids=["journal", "sqlite"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    place: str = request.param.format(tmp_path)
    return place


@pytest.fixture
def another(where: str) -> Open:
    """Opens the study, as another process would."""
    return lambda: SweepStudy(where, "sweep")


def states(study: SweepStudy) -> list[TrialState]:
    return [trial.state for trial in study.study.trials]


def test_two_workers_share_the_cells(another: Open) -> None:
    """Also where both have enqueued all of them: nobody runs the second trial of a cell."""
    one, two = another(), another()
    for study in (one, two):
        for cell in CELLS:  # as if neither had seen the other's
            study.study.add_trial(
                optuna.create_trial(
                    state=TrialState.WAITING, params=cell._asdict(), distributions=module.RANGES
                )
            )
    claimed = [trial for study in (one, two, one, two) if (trial := study.claim()) is not None]
    assert [Cell(**trial.params) for trial in claimed] == CELLS
    assert one.claim() is two.claim() is None
    for trial in claimed:
        one.tell(trial._trial_id, DONE)
    two.enqueue(CELLS)
    assert two.claim() is None
    assert states(one) == [TrialState.COMPLETE] * 4 + [TrialState.FAIL] * 4
    assert {cell: replace(said, seconds=0) for cell, said in two.records().items()} == dict.fromkeys(
        CELLS, DONE
    )


@pytest.mark.parametrize(
    ("outcome", "state", "value"),
    [
        (DONE, TrialState.COMPLETE, 0.5),
        (Outcome("diverged", message="the loss became nan"), TrialState.PRUNED, None),
        (Outcome("killed", message="ended by SIGKILL"), TrialState.FAIL, None),
    ],
)
def test_what_a_cell_said_is_found_again(another: Open, outcome: Outcome, state: Any, value: Any) -> None:
    study = another()
    study.begin(SETTINGS, CELLS)
    study.tell(study.claim()._trial_id, outcome)  # type: ignore[union-attr]
    study.enqueue(CELLS)  # it stays as it is
    assert (study.study.trials[0].state, study.study.trials[0].value) == (state, value)
    ((cell, found),) = another().records().items()
    assert (cell, replace(found, seconds=0)) == (CELLS[0], outcome)
    assert len(study.study.trials) == 4
    study.enqueue(CELLS, again=[cell])
    assert len(study.study.trials) == 5
    assert another().records() == {}
    assert study.study.trials[4].system_attrs["retry_history"] == [0]


def test_whoever_is_gone_is_given_up(another: Open, monkeypatch: Patch) -> None:
    one = another()
    one.begin(SETTINGS, CELLS)
    gone, alive = one.claim(), one.claim()
    monkeypatch.setattr(module, "GRACE", 1)
    two = another()
    time.sleep(2.5)
    two.keep([alive._trial_id])
    assert states(two)[:2] == [TrialState.FAIL, TrialState.RUNNING]
    two.enqueue(CELLS)
    assert states(two) == [TrialState.FAIL, TrialState.RUNNING] + [TrialState.WAITING] * 3
    # The one that was thought gone comes back: what it says is too late.
    one.tell(gone._trial_id, DONE)
    assert one.records() == {}


def test_whoever_is_gone_after_it_has_told_has_finished(another: Open, monkeypatch: Patch) -> None:
    study = another()
    study.begin(SETTINGS, CELLS)
    trial = study.claim()
    monkeypatch.setattr(study.storage, "set_trial_state_values", raises(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        study.tell(trial._trial_id, DONE)
    monkeypatch.undo()
    assert study.records() == {}
    another().tell(trial._trial_id, None)  # given up
    study.enqueue(CELLS)
    assert len(study.study.trials) == 4
    assert study.records()[CELLS[0]].loss == 0.5


def raises(error: BaseException) -> Callable[..., Any]:
    def fails(*_: Any, **__: Any) -> Any:
        raise error

    return fails


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"config_digest": "other"}, "the configuration says something else"),
        ({"maximize": True}, "maximize False became True"),
        ({"metric": "loss"}, "metric 'val_loss' became 'loss'"),
        ({"targets": (1.0,)}, r"targets \[\] became \[1.0\]"),
    ],
)
def test_another_sweep_is_refused(another: Open, changes: dict[str, Any], said: str) -> None:
    another().begin(SETTINGS, CELLS)
    with pytest.raises(SweepError, match=f"begun with.*{said}.*choose another --output"):
        another().begin(replace(SETTINGS, **changes), CELLS, extend=True)
    # Files may move and be formatted anew.
    another().begin(replace(SETTINGS, configs=("moved.yaml",), files_digest="new"), CELLS)


def test_the_same_command_completes_a_grid_and_fewer_cells_are_no_other(
    another: Open, monkeypatch: Patch
) -> None:
    study = another()
    monkeypatch.setattr(study, "enqueue", raises(KeyboardInterrupt()))  # killed while it enqueues
    with pytest.raises(KeyboardInterrupt):
        study.begin(SETTINGS, CELLS)
    monkeypatch.undo()
    study.enqueue(CELLS[:2])
    another().begin(SETTINGS, CELLS)
    assert list(study.trials()) == CELLS
    another().begin(SETTINGS, CELLS[:2])


# ---------------------------------------------------------------- disks


@pytest.mark.parametrize("written", [1, 20, 60])
def test_a_disk_that_is_full_is_waited_for(tmp_path: Path, monkeypatch: Patch, written: int) -> None:
    """What it has left of a line spoils nothing."""
    path = tmp_path / "sweep.log"
    study = SweepStudy(str(path), "sweep")
    study.begin(SETTINGS, CELLS)
    trial = study.claim()
    monkeypatch.setattr(module, "RETRY", 0.0)
    left = [2]
    append = JournalFileBackend.append_logs

    def full(backend: JournalFileBackend, logs: list[dict[str, Any]]) -> None:
        if left[0]:
            left[0] -= 1
            with path.open("ab") as file:
                file.write(json.dumps(logs[0]).encode()[:written])
            raise OSError(errno.ENOSPC, "No space left on device")
        append(backend, logs)

    monkeypatch.setattr(JournalFileBackend, "append_logs", full)
    said: list[str] = []
    patiently(lambda: study.tell(trial._trial_id, DONE), said.append)
    assert said == ["waiting, since nothing can be written: [Errno 28] No space left on device"] * 2
    for found in (study, SweepStudy(str(path), "sweep")):
        assert found.records()[CELLS[0]].loss == 0.5
    for line in path.read_text().splitlines():
        json.loads(line)
    with pytest.raises(PermissionError):
        patiently(raises(PermissionError(errno.EACCES, "no")))


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    for where in (str(path), "nodatabase://user:secret@host/x", "sqlite:////no/such/folder/x.db"):
        with pytest.raises(SweepError, match="Expected --study to be an Optuna journal") as caught:
            SweepStudy(where, "sweep")
        assert "secret" not in str(caught.value)
    assert path.read_text() == "mine"


RACE = """
import sys, time
from lightning_surge.sweep.study import SweepStudy
study = SweepStudy(sys.argv[1], "sweep")
print("ready", flush=True)
sys.stdin.readline()
while (trial := study.claim()) is not None:
    print(trial.number, flush=True)
"""


def test_processes_that_claim_at_once(another: Open, where: str) -> None:
    """Sixty cells, three processes: each cell is claimed once."""
    study = another()
    study.enqueue(Grid((8,), tuple(0.1 * n for n in range(1, 61)), (0,)).cells())
    pipe: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen([sys.executable, "-c", RACE, where], **pipe) for _ in range(3)]
    for worker in workers:
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    claimed = [int(number) for worker in workers for number in worker.communicate()[0].split()]
    assert sorted(claimed) == list(range(60))
    assert all(worker.returncode == 0 for worker in workers)


# ---------------------------------------------------------------- reading


def test_a_study_is_read_as_its_table(another: Open, where: str) -> None:
    study = another()
    study.begin(SETTINGS, CELLS)
    for outcome in (DONE, Outcome("diverged"), Outcome("finished", 2.0, reached=(Reached(1.0, None, None),))):
        study.tell(study.claim()._trial_id, outcome)  # type: ignore[union-attr]
    study.claim()  # runs
    assert is_study(where)
    table = read_study(where)
    assert not table.attrs["maximize"]
    columns = ["batch_size", "lr", "loss", "steps", "status"]
    assert table[columns].astype(object).fillna("").to_numpy().tolist() == [
        [8, 0.01, 0.5, 2, "finished"],
        [8, 0.1, "", "", "diverged"],
        [16, 0.01, 2.0, "", "not_reached"],
    ]


def test_several_studies_of_a_database_are_told_apart(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/sweeps.db"
    for name in ("a", "b"):
        study = SweepStudy(url, name, maximize=True)
        study.begin(SETTINGS, CELLS[:1])
        study.tell(study.claim()._trial_id, DONE)  # type: ignore[union-attr]
    table = read_frame(url)
    assert (table.attrs["maximize"], table.index.name) == (True, "row")
    assert table[["study", "loss"]].to_numpy().tolist() == [["a", 0.5], ["b", 0.5]]


def test_what_is_no_study(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("lr,loss\n")
    assert not is_study(str(tmp_path / "x.csv"))
    for where in (f"sqlite:///{tmp_path}/none.db", str(tmp_path / "none.log"), "nodatabase://a:secret@b/c"):
        with pytest.raises(ValueError, match=r"Expected an .*study") as caught:
            read_study(where)
        assert "secret" not in str(caught.value)
    assert not list(tmp_path.glob("none*"))
