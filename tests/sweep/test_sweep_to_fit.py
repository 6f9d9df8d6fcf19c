"""What `lightning-surge sweep` writes is what `lightning-surge fit` takes, without flags."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_surge.cli import main
from lightning_surge.cli.sweep import Progress
from lightning_surge.laws.base import MeasuredLaw
from lightning_surge.sweep.cells import Cell, Outcome, Reached, best_lr
from lightning_surge.sweep.study import SweepStudy

pytestmark = [
    pytest.mark.slow,  # workers that wait for each other, and a store on disk
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
]
Capture = pytest.CaptureFixture[str]
LAW = MeasuredLaw(alignment_limit=1.0, alignment_scale=200.0, noise_curvature=100.0, signal_curvature=900.0)
SIZES = (8, 32, 128)
PLACES = (-2, -1, 0, 1, 2)
OPTIMA = [LAW.lr(size) for size in SIZES]


def lr_of(size: int, place: int) -> float:
    return LAW.lr(size) * 2 ** (place + 0.2)


def finished(size: int, place: int, seed: int, targets: tuple[float, ...] = ()) -> Outcome:
    bend = (place + 0.2) ** 2
    steps = round(100 * (1 + 20 / size) * (1 + 0.2 * bend)) + seed
    reached = tuple(Reached(target, k * steps, k * steps * size) for k, target in enumerate(targets, 1))
    return Outcome("finished", 0.5 + 0.1 * bend + 0.001 * seed, 4096 // size, 4096, reached)


def swept(path: Path, outcomes: Callable[[int, int, int], Outcome]) -> Path:
    """The table of a sweep whose cells said `outcomes(size, place, seed)`."""
    study = SweepStudy(str(path.with_suffix(".study.log")), "sweep")
    said = {
        Cell(size, lr_of(size, place), seed): outcomes(size, place, seed)
        for size in SIZES for place in PLACES for seed in (0, 1)
    }  # fmt: skip
    study.enqueue(said)
    while (trial := study.claim()) is not None:
        study.tell(trial._trial_id, said[Cell(**trial.params)])
    Progress(path, ()).look({}, study.trials())
    return path


def fitted(capsys: Capture, path: Path, *words: str) -> dict[str, Any]:
    assert main(["fit", str(path), "--bootstrap", "20", "--json", *words]) == 0
    out, error = capsys.readouterr()
    assert error == ""
    answer: dict[str, Any] = json.loads(out)
    return answer


def best(fit: dict[str, Any]) -> list[float]:
    return [optimum["lr"] for optimum in fit["optima"]]


def test_losses(tmp_path: Path, capsys: Capture) -> None:
    answer = fitted(capsys, swept(tmp_path / "sweep.csv", finished))
    assert (answer["measure"], answer["runs"]) == ("loss", 30)
    (fit,) = answer["fits"]
    assert best(fit) == pytest.approx(OPTIMA, rel=1e-6)
    assert fit["intervals_from"] == "seeds"
    # The steps of a cell without a target are the same at every learning rate.
    assert not any("--measure steps" in note for note in fit["notes"])
    # The study says the same as its table.
    assert fitted(capsys, tmp_path / "sweep.study.log")["fits"] == [fit]


def test_targets_are_fitted_one_by_one(tmp_path: Path, capsys: Capture) -> None:
    path = swept(tmp_path / "sweep.csv", lambda *cell: finished(*cell, (1.5, 0.8)))
    answer = fitted(capsys, path)
    assert answer["measure"] == "steps"
    assert [fit["target"] for fit in answer["fits"]] == [1.5, 0.8]
    for fit in answer["fits"]:
        assert best(fit) == pytest.approx(OPTIMA, rel=0.02)
    first, second = ([optimum["steps"] for optimum in fit["optima"]] for fit in answer["fits"])
    assert second == pytest.approx([2 * steps for steps in first], rel=1e-6)
    # The losses of such a table count once.
    one = fitted(capsys, path, "--measure", "loss")["fits"]
    assert one == fitted(capsys, swept(tmp_path / "plain.csv", finished))["fits"]


@pytest.mark.parametrize("targets", [(), (1.5,)])
@pytest.mark.parametrize("status", ["diverged", "out_of_memory", "killed", "failed"])
def test_what_did_not_finish_is_no_candidate(
    tmp_path: Path, capsys: Capture, status: Any, targets: tuple[float, ...]
) -> None:
    """Also where it had reached the target, and whatever steps it had taken."""

    def outcomes(size: int, place: int, seed: int) -> Outcome:
        outcome = finished(size, place, seed, targets)
        return replace(outcome, status=status, loss=None, steps=3) if place == 2 else outcome

    (fit,) = fitted(capsys, swept(tmp_path / "sweep.csv", outcomes))["fits"]
    assert best(fit) == pytest.approx(OPTIMA, rel=0.02)
    told = [note for note in fit["notes"] if f"6 {status}" in note and "--retry-failed" in note]
    assert len(told) == (status != "diverged")


def test_a_cell_that_was_killed_leaves_its_learning_rate_to_the_other_seeds(
    tmp_path: Path, capsys: Capture
) -> None:
    """At the best learning rate, where it would make another one the best if it counted as failed."""

    def outcomes(size: int, place: int, seed: int) -> Outcome:
        killed = place == 0 and seed == 0
        return Outcome("killed", None, 3, 3 * size) if killed else finished(size, place, seed)

    path = swept(tmp_path / "sweep.csv", outcomes)
    (fit,) = fitted(capsys, path)["fits"]
    assert [optimum["status"] for optimum in fit["optima"]] == ["inside"] * 3
    assert best(fit) == pytest.approx(OPTIMA, rel=0.05)
    # The sweep's own table agrees.
    records = SweepStudy(str(path.with_suffix(".study.log")), "sweep").records()
    own = [best_lr(records, size) for size in SIZES]
    assert [found.lr for found in own if found] == [lr_of(size, 0) for size in SIZES]


def test_a_learning_rate_that_diverged_bounds_the_valley(tmp_path: Path, capsys: Capture) -> None:
    """Beside the best one: it is no edge of the grid."""

    def outcomes(size: int, place: int, seed: int) -> Outcome:
        return Outcome("diverged", None, 3, 3 * size) if place > 0 else finished(size, place, seed)

    (fit,) = fitted(capsys, swept(tmp_path / "sweep.csv", outcomes))["fits"]
    assert [optimum["status"] for optimum in fit["optima"]] == ["bracketed"] * 3


def test_a_sweep_in_which_nothing_finished(tmp_path: Path, capsys: Capture) -> None:
    path = swept(tmp_path / "sweep.csv", lambda *_: Outcome("failed", None, message="no data"))
    assert main(["fit", str(path)]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("lightning-surge: Expected runs that finished, got 30 failed in")
