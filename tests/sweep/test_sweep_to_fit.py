"""What `lightning-surge sweep` writes is what `lightning-surge fit` takes, without flags."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_surge.cli import main
from lightning_surge.laws.base import MeasuredLaw
from lightning_surge.sweep.cells import Cell, Grid, Outcome, Reached, Record, SweepSettings
from lightning_surge.sweep.grid import best_lr
from lightning_surge.sweep.table import SweepTable
from lightning_surge.tables.read import read_table

LAW = MeasuredLaw(alignment_limit=1.0, alignment_scale=200.0, noise_curvature=100.0, signal_curvature=900.0)
SIZES = (8, 32, 128)
PLACES = (-2, -1, 0, 1, 2)
Outcomes = Callable[[int, int, int], Outcome]


def distance(place: int) -> float:
    """Doublings from the best learning rate."""
    return place + 0.2


def finished(size: int, place: int, seed: int, targets: tuple[float, ...] = ()) -> Outcome:
    loss = 0.5 + 0.1 * distance(place) ** 2 + 0.001 * seed
    steps = round(100 * (1 + 20 / size) * (1 + 0.2 * distance(place) ** 2)) + seed
    reached = tuple(Reached(target, k * steps, k * steps * size) for k, target in enumerate(targets, 1))
    return Outcome("finished", loss, 4096 // size, 4096, 1.5, reached)


def swept(path: Path, outcomes: Outcomes, targets: tuple[float, ...] = (), seeds: int = 2) -> Path:
    """The table of a sweep whose cells said `outcomes(size, place, seed)`."""
    settings = SweepSettings(("run.yaml",), config_digest="abc", examples=4096, targets=targets)
    lrs = {(size, place): LAW.lr(size) * 2 ** distance(place) for size in SIZES for place in PLACES}
    grid = Grid(SIZES, tuple(sorted(lrs.values())), tuple(range(seeds)))
    with SweepTable(path) as table:
        table.begin(settings, grid, announce=table.read(settings, grid))
        for (size, place), lr in lrs.items():
            for seed in range(seeds):
                table.add(Record(Cell(size, lr, seed), outcomes(size, place, seed)))
    return path


def fitted(capsys: pytest.CaptureFixture[str], path: Path, *words: str) -> dict[str, Any]:
    assert main(["fit", str(path), "--bootstrap", "20", "--json", *words]) == 0
    out, error = capsys.readouterr()
    assert error == ""
    answer: dict[str, Any] = json.loads(out)
    return answer


def best(fit: dict[str, Any]) -> list[float]:
    return [optimum["lr"] for optimum in fit["optima"]]


def test_losses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = fitted(capsys, swept(tmp_path / "sweep.csv", finished))
    assert (answer["measure"], answer["runs"]) == ("loss", 30)
    (fit,) = answer["fits"]
    assert fit["target"] is None
    assert best(fit) == pytest.approx([LAW.lr(size) for size in SIZES], rel=1e-6)
    assert fit["intervals_from"] == "seeds"
    # The steps of a cell without a target are the same at every learning rate.
    assert not any("--measure steps" in note for note in fit["notes"])


def test_targets_are_fitted_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def outcomes(size: int, place: int, seed: int) -> Outcome:
        return finished(size, place, seed, (1.5, 0.8))

    answer = fitted(capsys, swept(tmp_path / "sweep.csv", outcomes, (1.5, 0.8)))
    assert answer["measure"] == "steps"
    assert [fit["target"] for fit in answer["fits"]] == [1.5, 0.8]
    for fit in answer["fits"]:
        assert best(fit) == pytest.approx([LAW.lr(size) for size in SIZES], rel=0.02)
    first, second = ([optimum["steps"] for optimum in fit["optima"]] for fit in answer["fits"])
    assert second == pytest.approx([2 * steps for steps in first], rel=1e-6)


def test_losses_of_a_table_with_targets_count_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def outcomes(size: int, place: int, seed: int) -> Outcome:
        return finished(size, place, seed, (1.5, 0.8))

    path = swept(tmp_path / "sweep.csv", outcomes, (1.5, 0.8))
    table = read_table(path, measure="loss")
    assert table.outcomes.size == 30
    assert table.targets is None
    one = fitted(capsys, path, "--measure", "loss")["fits"]
    assert one == fitted(capsys, swept(tmp_path / "plain.csv", finished))["fits"]


def test_a_target_that_was_not_reached(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def outcomes(size: int, place: int, seed: int) -> Outcome:
        outcome = finished(size, place, seed, (1.5, 0.8))
        if place < 2:
            return outcome
        missed = (outcome.reached[0], Reached(0.8, None, None))
        return Outcome("finished", outcome.loss, outcome.steps, outcome.examples, 1.0, missed)

    path = swept(tmp_path / "sweep.csv", outcomes, (1.5, 0.8))
    assert "not_reached" in path.read_text()
    table = read_table(path)
    assert table.targets is not None
    assert np.isinf(table.outcomes).sum() == np.isinf(table.outcomes[table.targets == 0.8]).sum() == 6
    assert [fit["error"] for fit in fitted(capsys, path)["fits"]] == [None, None]


@pytest.mark.parametrize("targets", [(), (1.5,)])
@pytest.mark.parametrize("status", ["diverged", "out_of_memory", "killed", "failed"])
def test_what_did_not_finish_is_no_candidate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], status: Any, targets: tuple[float, ...]
) -> None:
    """Also where it had reached the target, and whatever steps it had taken; the sweep's own table agrees."""

    def outcomes(size: int, place: int, seed: int) -> Outcome:
        outcome = finished(size, place, seed, targets)
        return Outcome(status, None, 3, 3 * size, 1.0, outcome.reached) if place == 2 else outcome

    path = swept(tmp_path / "sweep.csv", outcomes, targets)
    failed = 6 if status == "diverged" else 0
    for table in (read_table(path), read_table(path, measure="steps")):
        assert np.isinf(table.outcomes).sum() == failed
        assert table.outcomes.size == 24 + failed
    (fit,) = fitted(capsys, path)["fits"]
    assert best(fit) == pytest.approx([LAW.lr(size) for size in SIZES], rel=0.02)
    told = [note for note in fit["notes"] if f"6 {status}" in note and "--retry-failed" in note]
    assert len(told) == (status != "diverged")


def test_a_cell_that_was_killed_leaves_its_learning_rate_to_the_other_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the best learning rate, where it would make another one the best if it counted as failed."""

    def outcomes(size: int, place: int, seed: int) -> Outcome:
        killed = place == 0 and seed == 0
        return Outcome("killed", None, 3, 3 * size) if killed else finished(size, place, seed)

    path = swept(tmp_path / "sweep.csv", outcomes)
    (fit,) = fitted(capsys, path)["fits"]
    assert [optimum["status"] for optimum in fit["optima"]] == ["inside"] * 3
    assert best(fit) == pytest.approx([LAW.lr(size) for size in SIZES], rel=0.05)
    records = [
        Record(Cell(size, LAW.lr(size) * 2 ** distance(place), seed), outcomes(size, place, seed))
        for size in SIZES
        for place in PLACES
        for seed in (0, 1)
    ]
    own = [best_lr(records, size) for size in SIZES]
    assert [found.lr for found in own if found] == [LAW.lr(size) * 2 ** distance(0) for size in SIZES]


def test_a_learning_rate_that_diverged_bounds_the_valley(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside the best one: it is no edge of the grid."""

    def outcomes(size: int, place: int, seed: int) -> Outcome:
        return Outcome("diverged", None, 3, 3 * size) if place > 0 else finished(size, place, seed)

    (fit,) = fitted(capsys, swept(tmp_path / "sweep.csv", outcomes))["fits"]
    assert [optimum["status"] for optimum in fit["optima"]] == ["bracketed"] * 3


def test_a_sweep_in_which_nothing_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = swept(tmp_path / "sweep.csv", lambda *_: Outcome("failed", None, message="no data"))
    assert main(["fit", str(path)]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("lightning-surge: Expected runs that finished, got 30 failed in")


def test_a_sweep_that_has_just_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sweep.csv"
    settings = SweepSettings(("run.yaml",), config_digest="abc", examples=4096)
    with SweepTable(path) as table:
        table.begin(settings, Grid(SIZES, (0.1,), (0,)), announce=True)
    assert main(["fit", str(path)]) == 2
    assert "Expected at least one row, got none" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["fit", "plot", "advise"])
@pytest.mark.parametrize("name", ["nowhere.csv", "empty.csv", "directory"])
def test_what_cannot_be_read_ends_with_a_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, name: str
) -> None:
    (tmp_path / "empty.csv").touch()
    (tmp_path / "directory").mkdir()
    assert main([command, str(tmp_path / name)]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("lightning-surge: Expected")
    assert name in error
