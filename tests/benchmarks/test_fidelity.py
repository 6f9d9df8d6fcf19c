"""The reporting side of the fidelity bench on records whose answers are known, and the cells it runs."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.cells import Cell, Store, run_cells
from benchmarks.fidelity.analysis import (
    Mean,
    chosen_elsewhere,
    mean,
    mean_over_seeds,
    paired,
    pick,
    quantile,
    summary,
)
from benchmarks.fidelity.held import calibration_rows, exact_law, exact_noise_scale, one_step_rows
from benchmarks.fidelity.ladder import vertex
from benchmarks.fidelity.markdown import average, number
from benchmarks.fidelity.one_step import COUNTS, SIZES
from benchmarks.fidelity.report import read, write_report
from benchmarks.results import target
from lightning_surge.laws.base import MeasuredLaw
from tests.benchmarks.test_betas import cell as beta_cell

LAW = MeasuredLaw(alignment_limit=2.0, alignment_scale=48.0, noise_curvature=100.0, signal_curvature=150.0)
POINT = {"workload": "perceptron", "beta_2": 0.95, "phase": "late"}
GRID = [2.0 ** (index / 2) for index in range(-6, 7)]


def one_step_record(**changes: Any) -> dict[str, Any]:
    """A point of training at which `LAW` holds exactly and every law says so."""
    right: dict[str, Any] = {"lr": [LAW.lr(size) for size in SIZES]}
    errors = {f"{what}_error": [0.1] * len(SIZES) for what in ("lr", "ratio")}
    measured = right | errors | {"extrapolation": [0.0] * len(SIZES)}
    step = {
        str(size): {"lr": LAW.lr(size), "log2_error": 0.05, "alignment": LAW.alignment(size)}
        for size in SIZES
    }
    record = POINT | {"seed": 0, "seconds": 60.0, "sign": step, "theorem2": right, "theorem3": right}
    record |= {"measured": {str(count): measured for count in COUNTS}}
    record |= {"grad_sq_of_batches": {str(size): 1.0 + 48.0 / size for size in SIZES}}
    return record | changes


# ---------------------------------------------------------------------- numbers


def test_quantiles_of_missing_laws_are_infinite_only_where_these_take_part() -> None:
    values = [math.inf, 3.0, 1.0, 2.0]
    assert quantile(values, 1 / 3) == pytest.approx(2.0)
    assert quantile(values, 0.5) == pytest.approx(2.5)
    assert quantile(values, 0.9) == math.inf
    assert math.isnan(quantile([], 0.5))


def test_a_missing_law_is_counted_and_a_missing_truth_is_not() -> None:
    assert summary([-1.0, 0.5, math.inf, None]) == (3, 1, 1.0, math.inf)


def test_half_width_is_that_of_student() -> None:
    found = mean([1.0, 2.0, 3.0])
    assert (found.value, found.n) == (2.0, 3)
    assert found.half_width == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    assert mean([1.0]).half_width == math.inf
    assert mean([1.0, math.inf])[:2] == (math.inf, math.inf)


def test_half_width_over_seeds_is_blind_to_differences_between_experiments() -> None:
    """A seed that is worse is worse everywhere: more experiments do not make that scatter less."""
    for experiments in (2, 20):
        rows = [
            {"seed": seed, "loss": 10.0 * at + scatter}
            for at in range(experiments)
            for seed, scatter in enumerate((-0.1, 0.0, 0.1))
        ]
        expected = (5.0 * (experiments - 1), 4.302653 * 0.1 / math.sqrt(3), 3 * experiments)
        assert mean_over_seeds(rows, "loss") == pytest.approx(expected)
    assert mean_over_seeds([*rows, rows[0] | {"loss": math.inf}], "loss").half_width == math.inf


def test_numbers_are_as_long_as_they_say_something() -> None:
    shown = [number(value, 3) for value in (-0.0001, 12.3456, 276827.4, -math.inf, math.nan, None)]
    assert shown == ["0.000", "12.346", "2.8e+05", "-inf", "-", "-"]
    assert average(Mean(2.0, 54321.0, 3)) == "2.000 ± 5.4e+04"
    assert average(Mean(2.0, math.inf, 1)) == "2.000"


def test_differences_are_paired_by_key_and_not_by_order() -> None:
    left = [{"seed": 0, "loss": 1.0}, {"seed": 1, "loss": 5.0}, {"seed": 2, "loss": 9.0}]
    right = [{"seed": 1, "loss": 4.0}, {"seed": 0, "loss": 0.5}]
    found = paired(left, right, "loss", ("seed",))
    assert (found.value, found.n) == (0.75, 2)


# ---------------------------------------------------------------------- held points


def test_exact_statistics_of_a_law_give_that_law_back() -> None:
    record = one_step_record()
    assert exact_noise_scale(record) == pytest.approx(48.0)
    found = exact_law(record)
    for size in SIZES:
        assert found.lr(size) == pytest.approx(LAW.lr(size), rel=1e-9)


def test_no_exact_law_where_the_signal_or_a_truth_is_missing() -> None:
    drowned = {str(size): 48.0 / size for size in SIZES} | {str(SIZES[-1]): 1e-6}
    assert exact_law(one_step_record(grad_sq_of_batches=drowned)) is None
    record = one_step_record()
    record["sign"] = record["sign"] | {"64": record["sign"]["64"] | {"lr": None}}
    assert exact_law(record) is None


def test_errors_of_one_step_by_law() -> None:
    twice = {"lr": [2 * LAW.lr(size) for size in SIZES]}
    steep = {"lr": [LAW.lr(size) * size / 16 for size in SIZES]}
    record = one_step_record(theorem2=twice, theorem3=steep)
    record["measured"] = record["measured"] | {"12": None}
    rows = pick(one_step_rows([record]), batch_size=256)
    by_law = {row["law"]: (row["lr"], row["ratio"]) for row in rows}
    assert by_law["measured, 50"] == (0.0, 0.0)
    assert by_law["exact statistics"] == pytest.approx((0.0, 0.0), abs=1e-9)
    assert by_law["theorem 2"] == pytest.approx((1.0, 0.0))
    assert by_law["theorem 3"] == pytest.approx((4.0, 4.0))
    assert by_law["measured, 12"] == (math.inf, math.inf)
    at_base = pick(one_step_rows([record]), batch_size=16, law="theorem 2")
    assert (at_base[0]["lr"], at_base[0]["ratio"]) == (1.0, None)


def test_without_a_truth_there_is_no_error() -> None:
    record = one_step_record()
    record["sign"] = record["sign"] | {"256": record["sign"]["256"] | {"lr": None, "log2_error": None}}
    rows = pick(one_step_rows([record]), batch_size=256)
    assert {row["lr"] for row in rows} == {row["ratio"] for row in rows} == {None}


def intervals(entry: dict[str, Any], size: int = 64) -> dict[str, Any]:
    """What the table says of one prediction."""
    (row,) = pick(calibration_rows([one_step_record(measured={"50": entry})]), batch_size=size)
    return row


def off_by(factor: float, **changes: Any) -> dict[str, Any]:
    """A prediction that is right at the base batch size only."""
    lr = [LAW.lr(size) * (1.0 if size == 16 else factor) for size in SIZES]
    return one_step_record()["measured"]["50"] | {"lr": lr} | changes


@pytest.mark.parametrize(
    ("factor", "lr", "ratio"), [(1.076, True, True), (1.085, False, True), (1.09, False, False)]
)
def test_truths_inside_the_interval(factor: float, lr: bool, ratio: bool) -> None:
    """0.1 and the truth's 0.05 make 0.112 in log2, a factor of 1.081; the base's 0.05 makes it 1.089."""
    row = intervals(off_by(factor))
    assert (row["lr"], row["ratio"]) == (lr, ratio)
    at_base = intervals(off_by(factor), 16)
    assert (at_base["lr"], at_base["ratio"]) == (True, None)


def test_an_unknown_law_has_no_interval_and_one_without_bounds_holds_everything() -> None:
    (row,) = pick(calibration_rows([one_step_record(measured={"3": None})]), batch_size=64)
    assert (row["lr"], row["ratio"]) == (None, None)
    assert intervals(off_by(100.0, lr_error=[None] * len(SIZES)))["lr"] is True


def test_extrapolation_widens_the_interval_at_both_ends_of_a_ratio() -> None:
    """Off by 0.4: outside hypot(0.1, 0.05, 0.05) = 0.12 and hypot with 0.3, inside with 0.3 at both ends."""
    for allowed, inside in (([0.3] * len(SIZES), True), ([0.3 * (size != 16) for size in SIZES], False)):
        row = intervals(off_by(2**0.4, extrapolation=allowed))
        assert (row["lr"], row["ratio"]) == (False, inside)


# ---------------------------------------------------------------------- runs


@pytest.mark.parametrize("best", [-1.7, 0.0, 0.3, 2.7])
def test_vertex_of_a_parabola_is_exact(best: float) -> None:
    x = np.log2(GRID)
    assert vertex(x, 3.0 + 0.2 * (x - best) ** 2) == pytest.approx(best, abs=1e-9)


def test_vertex_stays_next_to_the_lowest_point() -> None:
    """A wall two points off says nothing of it, and an end is no minimum to be moved."""
    x = np.arange(7.0)
    found = vertex(x, np.array([0.3, 0.2, 0.1, 0.0, 0.1, 50.0, 90.0]))
    assert found == pytest.approx(3.0)
    assert vertex(x, -x) == 6.0


# ---------------------------------------------------------------------- report


def test_a_target_without_a_number_is_missed() -> None:
    assert target("a", 0.5, 0.5, "make")["met"]
    assert not target("a", 0.5001, 0.5, "make")["met"]
    assert target("a", 0.6, 0.55, "make", better="higher")["met"]
    assert not target("a", math.nan, 0.5, "make")["met"]
    assert not target("a", math.inf, 0.5, "make")["met"]


def fill(directory: Path) -> Store:
    """Some cells of some kinds."""
    records = {
        "truths": [one_step_record()],
        "laws": [one_step_record(), one_step_record(seed=1)],
        "betas": [beta_cell("perceptron", "0.5, 0") | {"seconds": 60.0}],
    }
    store = Store(directory)
    for kind, lines in records.items():
        for line in lines:
            store.add(kind, line)
    return store


def test_report_of_a_partial_grid(tmp_path: Path) -> None:
    store = fill(tmp_path / "results")
    write_report(store, tmp_path / "report", {"truths": 4, "free": 2})
    rows = json.loads((tmp_path / "report" / "summary.json").read_text())["targets"]
    by_name = {row["name"]: row for row in rows}
    title = "one step, |log2| of R within 16 times the active batch size, measured law, median"
    assert (by_name[title]["value"], by_name[title]["met"]) == (0.0, True)
    page = (tmp_path / "report" / "report.md").read_text()
    assert "25 % (1 of 4)" in page
    assert "0 % (0 of 2)" in page
    for kind in ("free", "best_ratio"):
        assert f"## {kind}\n\nNo cell is finished.\n\n##" in page
    assert "| 0.5, 0 | -0.1333 (-0.1000) |" in page
    assert (tmp_path / "report" / "one_step.png").read_bytes().startswith(b"\x89PNG")
    assert len(read(store)["one_step"]) == 1


def test_report_of_nothing(tmp_path: Path) -> None:
    write_report(Store(tmp_path), tmp_path / "report", {"live": 648})
    assert json.loads((tmp_path / "report" / "summary.json").read_text())["targets"] == []
    assert "0 % (0 of 648)" in (tmp_path / "report" / "report.md").read_text()


# ---------------------------------------------------------------------- choices


def test_a_workload_judges_what_the_others_choose() -> None:
    costs = {
        "a": {"x": 1.0, "y": 3.0, "only here": 0.0},
        "b": {"x": 2.0, "y": 1.0},
        "c": {"x": 1.0, "y": 1.5},
    }
    a, b, c = chosen_elsewhere(costs, "y")
    # The others' sums are 3 and 2.5, 2 and 4.5, 3 and 4.
    assert [row[1] for row in (a, b, c)] == ["y", "x", "x"]
    assert a == ["a", "y", 3.0, "x", 1.0, 3.0]
    assert chosen_elsewhere({"a": {"x": 1.0}}, "x") == []


# ---------------------------------------------------------------------- cells


def cell(index: int, ran: list[int], priority: int = 0) -> Cell:
    def measure(index: int) -> dict[str, Any]:
        ran.append(index)
        return {"value": float("nan") if index == 3 else index}

    return Cell("kind", {"index": index}, measure, priority)


def test_finished_cells_are_not_run_again_and_the_order_is_that_of_priorities(tmp_path: Path) -> None:
    store, ran = Store(tmp_path), []
    assert run_cells([cell(0, ran)], store, 60.0) == 0
    assert run_cells([cell(0, ran), cell(1, ran, priority=2), cell(2, ran, priority=1)], store, 60.0) == 0
    assert ran == [0, 2, 1]
    assert [record["value"] for record in store.records("kind")] == [0, 2, 1]


@pytest.mark.parametrize(("lost", "again"), [(20, [1]), (1, [])])
def test_a_torn_line_is_run_again_unless_it_is_whole(tmp_path: Path, lost: int, again: list[int]) -> None:
    store, ran = Store(tmp_path), []
    run_cells([cell(0, ran), cell(1, ran)], store, 60.0)
    store.path.write_text(store.path.read_text()[:-lost])
    assert run_cells([cell(0, ran), cell(1, ran), cell(3, ran)], store, 60.0) == 0
    assert ran == [0, 1, *again, 3]
    assert [(r["index"], r["value"]) for r in store.records("kind")] == [(0, 0), (1, 1), (3, None)]


def test_no_cell_starts_after_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, ran = [0.0], []
    monkeypatch.setattr("benchmarks.cells.time.monotonic", lambda: now[0])

    def slow(index: int) -> dict[str, Any]:
        ran.append(index)
        now[0] += 10.0
        return {}

    cells = [Cell("kind", {"index": index}, slow) for index in range(5)]
    assert run_cells(cells, Store(tmp_path), 15.0) == 3
    assert ran == [0, 1]
    assert [record["seconds"] for record in Store(tmp_path).records("kind")] == [10.0, 10.0]


def test_a_failing_cell_does_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(index: int) -> dict[str, Any]:
        raise ZeroDivisionError("of course")

    store, ran = Store(tmp_path), []
    assert run_cells([Cell("kind", {"index": 9}, fail, -1), cell(0, ran)], store, 60.0) == 1
    assert ran == [0]
    assert [record["index"] for record in store.records("kind")] == [0]
    assert "failed: ZeroDivisionError: of course" in capsys.readouterr().err


def test_without_a_store_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran: list[int] = []
    assert run_cells([cell(0, ran), cell(1, ran)], None, 60.0) == 0
    assert (ran, list(tmp_path.iterdir())) == ([0, 1], [])
