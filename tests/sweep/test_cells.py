"""The parts of a sweep that train nothing: grids, tables, plans, and processes that only pretend."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_surge.cli.sweep_output import SweepProgress
from lightning_surge.sweep import pool
from lightning_surge.sweep.cells import (
    Cell,
    CellSpec,
    Grid,
    Outcome,
    Reached,
    Record,
    SweepError,
    SweepSettings,
)
from lightning_surge.sweep.grid import accumulation_for, best_lr, parse_numbers, planned, remaining_seconds
from lightning_surge.sweep.pool import CellProcess, run_cells
from lightning_surge.sweep.recorder import Crossings, SmoothedLoss
from lightning_surge.sweep.table import SweepTable, table_rows

SETTINGS = SweepSettings(("run.yaml",), config_digest="abc", examples=1024)
GRID = Grid((8, 16), (0.01, 0.1), (0,))


def done(batch_size: int, lr: float, loss: float | None, seed: int = 0, **rest: Any) -> Record:
    status = "diverged" if loss is None else "finished"
    return Record(Cell(batch_size, lr, seed), Outcome(**({"status": status, "loss": loss} | rest)))


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("words", "whole", "expected"),
    [
        (["16", "4", "16"], True, (4, 16)),
        (["16:1024:4"], True, (16, 64, 256, 1024)),
        (["10:20:3"], True, (10, 14, 20)),
        (["1e-4:1e-1:4"], False, (1e-4, 1e-3, 1e-2, 1e-1)),
        (["1e-2:1:3", "0.05"], False, (0.01, 0.05, 0.1, 1.0)),
    ],
)
def test_grids_as_they_are_typed(words: list[str], whole: bool, expected: tuple[float, ...]) -> None:
    assert parse_numbers(words, "x", whole=whole) == expected


@pytest.mark.parametrize(
    "word", ["", "a", "0", "-1", "inf", "nan", "1:2", "2:1:3", "1:2:1", "0:1:3", "1:2:3:4", "1:inf:3"]
)
@pytest.mark.parametrize("whole", [False, True])
def test_what_is_no_grid_is_named(word: str, whole: bool) -> None:
    with pytest.raises(ValueError, match="Expected --lrs to be positive") as caught:
        parse_numbers(["1", word], "--lrs", whole=whole)
    assert repr(word) in str(caught.value)


def test_batch_sizes_are_whole() -> None:
    with pytest.raises(ValueError, match=r"whole numbers.*'1\.5'"):
        parse_numbers(["1.5"], "--batch-sizes", whole=True)


@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 8))
def test_micro_batches_fit_and_make_up_the_batch(share: int, largest: int, replicas: int) -> None:
    parts = accumulation_for(share * replicas, largest=largest, replicas=replicas)
    assert share % parts == 0
    assert share // parts <= largest
    # As few as possible.
    assert all(share % fewer or share // fewer > largest for fewer in range(1, parts))


def test_a_batch_that_replicas_cannot_share() -> None:
    with pytest.raises(ValueError, match="3 replicas can share, got 16: use multiples of 3"):
        accumulation_for(16, largest=None, replicas=3)
    with pytest.raises(ValueError, match="max_micro_batch_size >= 1, got 0"):
        accumulation_for(16, largest=0)


def test_cells_have_equal_examples_or_equal_steps() -> None:
    assert [SETTINGS.steps_of(size) for size in (8, 16, 2048)] == [128, 64, 1]
    assert SETTINGS.examples_of(24) == 43 * 24  # 1024 / 24 is 42.7
    equal_steps = SweepSettings(("run.yaml",), steps=10)
    assert [equal_steps.examples_of(size) for size in (8, 16)] == [80, 160]


def test_a_specification_survives_its_file() -> None:
    spec = CellSpec(SweepSettings(("a", "b"), targets=(1.0, 0.5), steps=3), Cell(8, 0.1, 2))
    assert CellSpec.from_json(spec.to_json()) == spec


# ---------------------------------------------------------------- losses


@given(st.floats(-5, 5), st.lists(st.floats(1, 1000), min_size=1))
def test_the_average_of_a_constant_is_the_constant(loss: float, steps: list[float]) -> None:
    smoothed = SmoothedLoss(100)
    for examples in steps:
        assert smoothed.add(loss, examples) == pytest.approx(loss)


def test_averages_are_over_examples_and_not_over_steps() -> None:
    small, large = SmoothedLoss(64), SmoothedLoss(64)
    for loss in (3.0, 1.0):
        for _ in range(16):
            small.add(loss, 4)
        large.add(loss, 64)
    # e^-1 of the first half is left: (1 e^-1 (1 - e^-1) 3 + (1 - e^-1)) / (1 - e^-2)
    kept = math.exp(-1)
    expected = (kept * 3.0 + 1.0) / (1 + kept)
    assert small.value == pytest.approx(expected)
    assert large.value == pytest.approx(expected)
    with pytest.raises(ValueError, match="smoothing=0"):
        SmoothedLoss(0)


def test_the_first_reaching_counts() -> None:
    crossings = Crossings([2.0, 1.0])
    for step, loss in [(1, 3.0), (2, 1.5), (3, 2.5), (4, 0.5), (5, 3.0)]:
        crossings.look(step, 8 * step, loss)
    # Down from 3 to 1.5 the line meets 2 at step 1.67; from 2.5 to 0.5 it meets 1 at step 3.75.
    assert crossings.reached == (Reached(2.0, 2, 16), Reached(1.0, 4, 32))
    assert crossings.complete


def test_a_first_look_below_the_target() -> None:
    crossings = Crossings([2.0])
    crossings.look(7, 56, 1.0)
    assert crossings.reached == (Reached(2.0, 7, 56),)
    assert not Crossings([]).complete


def test_two_looks_at_one_step() -> None:
    crossings = Crossings([2.0])
    crossings.look(7, 56, 3.0)
    crossings.look(7, 56, 1.0)
    assert crossings.reached == (Reached(2.0, 7, 56),)


# ---------------------------------------------------------------- planning


def test_the_best_is_over_seeds_and_a_divergence_spoils_it() -> None:
    records = [
        done(8, 0.01, 0.5), done(8, 0.01, 0.7, seed=1),
        done(8, 0.1, 0.1), done(8, 0.1, None, seed=1),
        done(8, 0.001, 0.9), done(16, 0.1, 0.0),
        Record(Cell(8, 1.0, 0), Outcome("out_of_memory")),
    ]  # fmt: skip
    best = best_lr(records, 8)
    assert best is not None
    assert (best.lr, best.loss, best.edge, best.steps) == (0.01, pytest.approx(0.6), None, None)
    assert best_lr(records, 32) is None
    assert best_lr([done(8, 0.1, None)], 8) is None


def test_the_best_for_a_target_takes_the_fewest_steps() -> None:
    def reaching(lr: float, steps: int | None, loss: float) -> Record:
        return done(8, lr, loss, reached=(Reached(1.0, steps, 8), Reached(0.1, None, None)))

    records = [reaching(0.01, 50, 0.1), reaching(0.1, 20, 0.5), reaching(1.0, None, 1.2)]
    best = best_lr(records, 8, 1.0)
    assert best is not None
    assert (best.lr, best.steps, best.edge) == (0.1, 20, None)
    # Nobody reached the other one: the loss decides.
    best = best_lr(records, 8, 0.1)
    assert best is not None
    assert (best.lr, best.steps, best.edge) == (0.01, None, "lowest")


def losses_of(grid: Grid, loss: Callable[[Cell], float | None], refine: int) -> list[Record]:
    """All that a sweep would run, one cell at a time."""
    records: list[Record] = []
    while left := [
        cell
        for cell in planned(grid, records, refine=refine)
        if cell not in {record.cell for record in records}
    ]:
        records.append(done(left[0].batch_size, left[0].lr, loss(left[0]), left[0].seed))
    return records


def test_refining_goes_beyond_the_edge_until_the_best_has_neighbours() -> None:
    records = losses_of(Grid((8,), (1.0, 2.0), (0, 1)), lambda cell: abs(math.log2(cell.lr / 8)), refine=9)
    assert sorted({record.cell.lr for record in records}) == [1, 2, 4, 8, 16]
    assert len(records) == 10  # both seeds
    records = losses_of(Grid((8,), (1.0, 2.0), (0,)), lambda cell: abs(math.log2(cell.lr / 0.25)), refine=9)
    assert sorted({record.cell.lr for record in records}) == [0.125, 0.25, 0.5, 1, 2]


def test_refining_is_bounded_and_each_batch_size_for_itself() -> None:
    def loss(cell: Cell) -> float:
        return -cell.lr if cell.batch_size == 8 else abs(cell.lr - 2.0)

    records = losses_of(Grid((8, 16), (1.0, 2.0, 4.0), (0,)), loss, refine=2)
    lrs = {size: sorted(cell.lr for cell, _ in records if cell.batch_size == size) for size in (8, 16)}
    assert lrs == {8: [1, 2, 4, 8, 16], 16: [1, 2, 4]}


def test_refining_looks_below_where_everything_diverged_and_stops_where_cells_fail() -> None:
    records = losses_of(
        Grid((8,), (1.0, 2.0), (0,)), lambda cell: None if cell.lr > 0.4 else 1 / cell.lr, refine=5
    )
    assert sorted(record.cell.lr for record in records) == [0.125, 0.25, 0.5, 1, 2]
    failed = [Record(cell, Outcome("failed")) for cell in GRID.cells()]
    assert planned(GRID, failed, refine=3) == GRID.cells()
    # The edge was tried beyond, and ran out of memory.
    tried = [done(8, 1.0, 0.5), done(8, 2.0, 0.4), Record(Cell(8, 4.0, 0), Outcome("out_of_memory"))]
    assert len(planned(Grid((8,), (1.0, 2.0), (0,)), tried, refine=3)) == 3


def test_refining_waits_for_all_cells_of_the_batch_size() -> None:
    records = [done(8, 0.1, 0.1)]
    assert planned(GRID, records, refine=3) == GRID.cells()


def test_a_single_lr_is_refined_to_both_sides() -> None:
    records = losses_of(Grid((8,), (1.0,), (0,)), lambda cell: abs(math.log(cell.lr)), refine=4)
    assert sorted(record.cell.lr for record in records) == pytest.approx([10**-0.5, 1.0, 10**0.5], rel=1e-5)


def test_time_left_is_weighted_by_examples() -> None:
    records = [
        done(8, 0.1, 1.0, examples=100, seconds=10.0),
        done(16, 0.1, 1.0, examples=100, seconds=5.0),
        Record(Cell(8, 0.2, 0), Outcome("killed", examples=1, seconds=99.0)),
    ]
    examples = {8: 100, 16: 100, 32: 200}
    left = {Cell(8, 0.3, 0): 0.0, Cell(16, 0.3, 0): 2.0}
    assert remaining_seconds(records, left, examples, 1) == pytest.approx(10 + 3)
    assert remaining_seconds(records, left, examples, 2) == pytest.approx(10)  # the longest is waited for
    # No cell of that size so far: as all the others, 7.5 seconds per 100 examples.
    assert remaining_seconds(records, {Cell(32, 0.3, 0): 0.0}, examples, 1) == pytest.approx(15)
    assert remaining_seconds(records[2:], left, examples, 1) is None


# ---------------------------------------------------------------- the table


def opened(path: Path, settings: SweepSettings = SETTINGS, grid: Grid = GRID, **options: Any) -> SweepTable:
    table = SweepTable(path)
    table.begin(settings, grid, announce=table.read(settings, grid, **options))
    return table


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_finished_cells_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "sweep.csv"
    records = [done(8, 0.1, 0.25, steps=128, examples=1024), done(8, 0.01, None, steps=3, examples=24)]
    with opened(path) as table:
        for record in records:
            table.add(record)
            assert len(rows_of(path)) == len(table.records)  # usable while the sweep runs
    with opened(path) as table:
        assert table.records == records
        assert table.damaged == 0
    assert table.journal.read_text().count("\n") == 3
    rows = rows_of(path)
    assert list(rows[0]) == ["batch_size", "lr", "loss", "steps", "examples", "seed", "status", "seconds"]
    assert [(row["lr"], row["loss"], row["steps"], row["status"]) for row in rows] == [
        ("0.01", "", "3", "diverged"),
        ("0.1", "0.25", "128", "finished"),
    ]
    assert {entry.name for entry in path.parent.iterdir()} == {"sweep.csv", "sweep.cells.jsonl"}


def test_each_target_has_a_row() -> None:
    reached = (Reached(1.0, 20, 160), Reached(0.5, None, None))
    rows = table_rows([done(8, 0.1, 0.7, reached=reached), done(8, 0.2, None)], (1.0, 0.5))
    assert [(row["lr"], row["target"], row["steps"], row["examples"], row["status"]) for row in rows] == [
        (0.1, 1.0, 20, 160, "finished"),
        (0.1, 0.5, None, None, "not_reached"),
        (0.2, 1.0, None, None, "diverged"),
        (0.2, 0.5, None, None, "diverged"),
    ]


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_torn_last_line_costs_its_cell_only(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "sweep.csv"
    with opened(path) as table:
        table.add(done(8, 0.1, 0.25))
        table.add(done(8, 0.01, 0.5))
    table.journal.write_bytes(table.journal.read_bytes()[:-cut])
    with opened(path) as table:
        # Without its end of line alone the line is whole.
        kept = 2 if cut == 1 else 1
        assert len(table.records) == kept
        assert table.damaged == 2 - kept
        table.add(done(16, 0.1, 0.75))
    with opened(path) as table:
        assert done(16, 0.1, 0.75) in table.records
        assert len(table.records) == kept + 1


@pytest.mark.parametrize(
    "line", ["{", "[]", "null", "\x00\x00", '{"batch_size": 8}', '{"batch_size": 8, "lr": 0.1, "seed": 0}']
)
def test_damaged_lines_are_passed_over(tmp_path: Path, line: str) -> None:
    path = tmp_path / "sweep.csv"
    with opened(path) as table:
        table.add(done(8, 0.1, 0.25))
    with table.journal.open("a") as file:
        file.write(line + "\n" + json.dumps(done(16, 0.1, 0.5).to_json()) + "\n")
    with opened(path) as table:
        assert [record.cell for record in table.records] == [Cell(8, 0.1, 0), Cell(16, 0.1, 0)]
        assert table.damaged == 1


def test_the_last_word_of_a_cell_counts(tmp_path: Path) -> None:
    path = tmp_path / "sweep.csv"
    with opened(path) as table:
        table.add(Record(Cell(8, 0.1, 0), Outcome("killed")))
        table.add(done(8, 0.1, 0.25))
    with opened(path) as table:
        assert table.records == [done(8, 0.1, 0.25)]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"config_digest": "other"}, "the configuration says something else"),
        ({"metric": "loss"}, "metric 'val_loss' became 'loss'"),
        ({"examples": 2048}, "examples 1024 became 2048"),
        ({"targets": (1.0,)}, r"targets \[\] became \[1.0\]"),
    ],
)
def test_another_sweep_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    path = tmp_path / "sweep.csv"
    opened(path).close()
    before = path.read_bytes()
    with pytest.raises(SweepError, match=f"begun with.*{said}.*choose another --output"):
        opened(path, replace(SETTINGS, **changes), extend=True)
    assert path.read_bytes() == before


def test_files_may_move_and_be_formatted_anew(tmp_path: Path) -> None:
    path = tmp_path / "sweep.csv"
    opened(path).close()
    opened(path, SweepSettings(("moved.yaml",), "abc", files_digest="new", examples=1024)).close()


def test_another_grid_needs_a_word(tmp_path: Path) -> None:
    path = tmp_path / "sweep.csv"
    with opened(path) as table:
        table.add(done(8, 0.1, 0.25))
    larger = Grid((8, 16), (0.01, 0.1), (0, 1))
    with pytest.raises(SweepError, match=r"seeds \[0\] became \[0, 1\].*--extend"):
        opened(path, grid=larger)
    opened(path, grid=larger, extend=True).close()
    with opened(path, grid=larger) as table:  # it is that sweep's grid now
        assert table.records == [done(8, 0.1, 0.25)]


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "sweep.csv"
    path.write_text("mine\n")
    with pytest.raises(SweepError, match="no sweep has left there"):
        opened(path)
    assert path.read_text() == "mine\n"


def test_a_journal_without_its_first_line_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sweep.csv"
    with opened(path) as table:
        table.add(done(8, 0.1, 0.25))
    table.journal.write_text("".join(table.journal.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(SweepError, match="damaged first line"):
        opened(path)


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
def test_one_sweep_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "sweep.csv"
    with opened(path), pytest.raises(SweepError, match="another sweep"):
        opened(path)
    opened(path).close()


# ---------------------------------------------------------------- processes


class Pretence:
    """A cell that is done after so many looks."""

    def __init__(self, cell: Cell, looks: int, log: list[tuple[str, Cell]]) -> None:
        self.cell, self.looks, self.log = cell, looks, log
        log.append(("start", cell))

    def poll(self) -> Outcome | None:
        self.looks -= 1
        return None if self.looks > 0 else Outcome("finished", 1.0)

    def stop(self) -> None:
        self.log.append(("stop", self.cell))


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "PAUSE", 0.001)


@pytest.mark.parametrize("slots", [1, 2, 9])
def test_cells_run_some_at_a_time_and_once(slots: int) -> None:
    log: list[tuple[str, Cell]] = []
    running = []
    first = GRID.cells()[0]
    records = run_cells(
        lambda records: planned(GRID, records),
        lambda cell, slot: Pretence(cell, 3 if slot else 2, log),
        [done(first.batch_size, first.lr, 1.0)],
        slots=slots,
        finished=lambda record: log.append(("finished", record.cell)),
        watch=lambda now, waiting: running.append(len(now)),
    )
    assert sorted(record.cell for record in records) == sorted(GRID.cells())
    for event in ("start", "finished"):
        assert sorted(cell for name, cell in log if name == event) == sorted(GRID.cells()[1:])
    assert max(running) == min(slots, 3)


def test_an_interrupt_stops_what_runs_and_keeps_what_has_finished() -> None:
    log: list[tuple[str, Cell]] = []
    finished: list[Record] = []

    def interrupt(record: Record) -> None:
        finished.append(record)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_cells(
            lambda records: planned(GRID, records),
            lambda cell, slot: Pretence(cell, 1 if slot == 0 else 99, log),
            [],
            slots=3,
            finished=interrupt,
        )
    assert [record.cell for record in finished] == GRID.cells()[:1]
    assert [cell for name, cell in log if name == "stop"] == GRID.cells()[1:3]


PROGRAM = """
import json, os, signal, sys, time
specification, answer = sys.argv[1:]
cell = json.load(open(specification))["cell"]
print("trains", cell, flush=True)
what = {1: "answers", 2: "dies", 3: "fails", 4: "refuses", 5: "hangs", 6: "lies"}[cell["seed"]]
if what == "answers":
    said = {"status": "finished", "loss": 0.5, "steps": 4, "examples": 32, "reached": [[1.0, 2, 16]]}
    json.dump(said, open(answer, "w"))
if what == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "fails":
    sys.exit(7)
if what == "refuses":
    json.dump({"unusable": "no cell can run"}, open(answer, "w"))
if what == "lies":
    json.dump({"status": "fine"}, open(answer, "w"))
if what == "hangs":
    if os.fork() == 0:
        open(answer + ".worker", "w").write(str(os.getpid()))
    time.sleep(60)
"""


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], CellProcess]:
    """Starts a cell whose seed says what it does."""
    (tmp_path / "pretended_cell.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pool, "PROGRAM", "pretended_cell")
    return lambda seed: CellProcess(CellSpec(SETTINGS, Cell(8, 0.1, seed)), tmp_path / "logs")


def wait(condition: Callable[[], Any]) -> Any:
    begin = time.monotonic()
    while not (result := condition()):
        assert time.monotonic() - begin < 20
        time.sleep(0.01)
    return result


def test_an_answer_is_read_and_nothing_is_left(start: Callable[[int], CellProcess], tmp_path: Path) -> None:
    outcome = wait(start(1).poll)
    assert outcome == Outcome("finished", 0.5, 4, 32, outcome.seconds, (Reached(1.0, 2, 16),))
    assert not (tmp_path / "logs").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
@pytest.mark.parametrize(
    ("seed", "status", "message"),
    [
        (2, "killed", "SIGKILL (out of memory?)"),
        (3, "failed", "exit status 7: trains {"),
        (6, "failed", "exit status 0"),
    ],
)
def test_a_crash_is_an_outcome(
    start: Callable[[int], CellProcess], seed: int, status: str, message: str
) -> None:
    process = start(seed)
    outcome = wait(process.poll)
    assert (outcome.status, outcome.loss) == (status, None)
    assert message in outcome.message
    assert str(process.log) in outcome.message
    assert "trains" in process.log.read_text()


def test_a_refusal_ends_the_sweep(start: Callable[[int], CellProcess]) -> None:
    process = start(4)
    with pytest.raises(SweepError, match="no cell can run"):
        wait(process.poll)


@pytest.mark.skipif(sys.platform == "win32", reason="no process groups")
def test_stopping_ends_the_workers_too(start: Callable[[int], CellProcess], tmp_path: Path) -> None:
    process = start(5)
    note = tmp_path / "logs" / "b8-lr0.1-seed5.answer.json.worker"
    worker = int(wait(lambda: note.exists() and note.read_text()))
    process.stop()

    def gone() -> bool:
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return True
        # Where nobody collects orphans it stays as a zombie.
        return Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0] == "Z"

    assert wait(gone)
    assert signal.Signals(-process._process.returncode) == signal.SIGKILL


# ---------------------------------------------------------------- progress


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_where_there_is_no_terminal() -> None:
    stream = StringIO()
    progress = SweepProgress(stream, {8: 100}, processes=1)
    cells = [Cell(8, lr, 0) for lr in (0.1, 0.2, 0.3)]
    progress.watch({cells[0]: 1.0}, cells[1:])
    progress.finished(done(8, 0.1, 0.5, examples=100, seconds=30.0))
    progress.watch({cells[1]: 10.0}, cells[2:])
    progress.finished(Record(cells[1], Outcome("out_of_memory", seconds=20.0, message="too large")))
    progress.close()
    assert stream.getvalue().splitlines() == [
        "batch_size=8 lr=0.1 seed=0: loss 0.5, 30 s; 1 done, 2 left, about 60 s",
        "batch_size=8 lr=0.2 seed=0: out of memory (too large), 20 s; 2 done, 1 left, about 30 s",
    ]


def test_a_terminal_gets_a_line_that_is_redrawn() -> None:
    stream = Terminal()
    progress = SweepProgress(stream, {8: 100}, processes=1)
    progress.watch({Cell(8, 0.1, 0): 1.0}, [])
    assert stream.getvalue() == "1 cells run, 0 done, 1 left"
    progress.finished(done(8, 0.1, 0.5, examples=100, seconds=30.0))
    shown = stream.getvalue().rpartition("\r")[2]
    assert shown == "batch_size=8 lr=0.1 seed=0: loss 0.5, 30 s; 1 done, none left\n"
