"""The loop that runs cells, with processes that only pretend."""

import signal
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from lightning_surge.cli.sweep import Progress
from lightning_surge.sweep import run as module
from lightning_surge.sweep.cells import Cell, Grid, Outcome, SweepSettings, planned
from lightning_surge.sweep.run import CellProcess, run_cells
from lightning_surge.sweep.study import SweepStudy
from tests.processes import is_running, wait

pytestmark = [
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
    pytest.mark.skipif(sys.platform == "win32", reason="signals and process groups"),
]
GRID = Grid((8, 16), (0.01, 0.1), (0,))
CELLS = GRID.cells()
SETTINGS = SweepSettings(("run.yaml",), examples=1024)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE", 0.001)
    monkeypatch.setattr(module, "LOOK", 0.001)


@pytest.fixture
def study(tmp_path: Path) -> SweepStudy:
    study = SweepStudy(str(tmp_path / "sweep.study.log"), "sweep")
    study.begin(SETTINGS, CELLS)
    return study


class Pretence:
    """A cell that ends after so many looks, with a loss of 1."""

    def __init__(self, study: SweepStudy, trial: Any, looks: int, log: list[tuple[str, Cell]]):
        self.study, self.trial, self.looks, self.log = study, trial, looks, log
        self.note("start")

    def note(self, what: str) -> None:
        self.log.append((what, Cell(**self.trial.params)))

    @property
    def ended(self) -> bool:
        self.looks -= 1
        if self.looks == 0:
            self.study.tell(self.trial._trial_id, Outcome("finished", 1.0))
        return self.looks <= 0

    def stop(self, *, forget: bool = True) -> None:
        self.note("stop and forget" if forget else "stop")


def run(study: SweepStudy, start: Callable[[Any, int], Any], **options: Any) -> dict[Cell, Outcome]:
    defaults: dict[str, Any] = {"slots": 1, "look": lambda records, trials: None, "say": print}
    return run_cells(study, lambda records: planned(GRID, records), start, **defaults | options)


@pytest.mark.parametrize("slots", [1, 2, 9])
def test_cells_run_some_at_a_time_and_once(study: SweepStudy, slots: int) -> None:
    log: list[tuple[str, Cell]] = []
    running = []

    def start(trial: Any, slot: int) -> Any:
        running.append(1 + sum(1 if what == "start" else -1 for what, _ in log))
        return Pretence(study, trial, 3 if slot else 2, log)

    first = study.claim()
    study.tell(first._trial_id, Outcome("finished", 2.0))
    records = run(study, start, slots=slots)
    assert [records[cell].loss for cell in CELLS] == [2.0, 1.0, 1.0, 1.0]
    for event in ("start", "stop and forget"):
        assert sorted(cell for name, cell in log if name == event) == sorted(CELLS[1:])
    assert max(running) == min(slots, 3)


def test_cells_that_run_elsewhere_are_waited_for(study: SweepStudy) -> None:
    log: list[tuple[str, Cell]] = []
    elsewhere = study.claim()
    looks = []

    def look(records: dict[Cell, Outcome], trials: Any) -> None:
        looks.append(len(records))
        if looks.count(3) == 3:
            study.tell(elsewhere._trial_id, Outcome("finished", 7.0))

    records = run(study, lambda trial, slot: Pretence(study, trial, 1, log), look=look)
    assert records[CELLS[0]].loss == 7.0
    assert len(log) == 6


PROGRAM = """
import json, os, signal, sys, time
order = json.loads(sys.argv[1])
print("trains", order, flush=True)
if order["does"] == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if order["does"] == "fail":
    sys.exit(7)
if order["does"] == "hang":
    if os.fork() == 0:
        open("worker", "w").write(str(os.getpid()))
    time.sleep(60)
"""


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], CellProcess]:
    (tmp_path / "pretended_cell.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "PROGRAM", "pretended_cell")
    return lambda does: CellProcess({"does": does}, tmp_path / "logs" / "trial-0.log", {})


@pytest.mark.parametrize(
    ("does", "status", "message"),
    [
        ("die", "killed", "ended by SIGKILL (out of memory?); see "),
        ("fail", "failed", "exit status 7: trains {"),
        ("nothing", "failed", "exit status 0: trains {"),
    ],
)
def test_a_crash_is_an_outcome(
    start: Callable[[str], CellProcess], does: str, status: str, message: str
) -> None:
    process = start(does)
    wait(lambda: process.ended)
    outcome = process.crash()
    assert (outcome.status, outcome.loss) == (status, None)
    assert message in outcome.message
    process.stop(forget=False)
    assert str(process.log) in outcome.message
    assert "trains" in process.log.read_text()
    process.stop()
    assert not process.log.parent.exists()


def test_stopping_ends_the_workers_too(start: Callable[[str], CellProcess], tmp_path: Path) -> None:
    process = start("hang")
    worker = int(wait(lambda: (tmp_path / "worker").exists() and (tmp_path / "worker").read_text()))
    process.stop()
    wait(lambda: not is_running(worker))
    assert signal.Signals(-process._process.returncode) == signal.SIGKILL


def test_a_line_for_every_cell_that_ends(
    study: SweepStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", stream := StringIO())
    progress = Progress(tmp_path / "new" / "sweep.csv", {Cell(9, 0.1, 0)})
    records = {Cell(9, 0.1, 0): Outcome("finished", 1.0, seconds=30.0)}
    for cell, outcome in (
        (None, None),
        (CELLS[0], Outcome("finished", 0.5, seconds=90.0)),
        (CELLS[1], Outcome("out_of_memory", seconds=120.0, message="too large")),
    ):
        if cell is not None and outcome is not None:
            study.tell(study.claim()._trial_id, outcome)  # type: ignore[union-attr]
            records[cell] = outcome
        progress.look(records, study.trials())
    for _ in range(2):
        progress.say("waiting")
    assert stream.getvalue().splitlines() == [
        "batch_size=8 lr=0.01 seed=0: loss 0.5, 90 s; 2 done, 3 left, about 3 min",
        "batch_size=8 lr=0.1 seed=0: out of memory (too large), 2 min; 3 done, 2 left, about 2 min",
        "waiting",
    ]
    assert len((tmp_path / "new" / "sweep.csv").read_text().splitlines()) == 3
    assert not list((tmp_path / "new").glob(".*"))
