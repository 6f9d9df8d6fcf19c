"""The same changes with more examples after them: what is trained, and what the page compares."""

import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cells import Store
from benchmarks.fidelity import best_base, longer
from benchmarks.fidelity.longer import LONG, cells, longer_table
from benchmarks.fidelity.regrets import DEFAULT, all_rows
from benchmarks.fidelity.training import CONTINUED_EXAMPLES, PHASES, train_to
from benchmarks.fidelity.workloads import WORKLOADS

POINT: dict[str, Any] = {"workload": "perceptron", "beta_2": 0.95, "phase": "late"}
GRID = [2.0**index for index in range(-4, 5)]


def sweep_record(batch_size: int, best: float, examples: int) -> dict[str, Any]:
    losses = [[1.0 + 0.05 * (math.log2(m) - best) ** 2 for m in GRID]] * 3
    key = POINT | {"batch_size": batch_size, "examples": examples}
    return key | {"multipliers": GRID, "seeds": [0, 1, 2], "losses": losses}


def live_record(seed: int, loss: float, examples: int) -> dict[str, Any]:
    run = {"predicted": 4.0, "used": 2.0, "loss": loss, "mean_log2_ratio": 1.5}
    key = POINT | DEFAULT | {"seed": seed, "examples": examples}
    return key | {"noise_scale": 48.0, "by_batch_size": {"64": run, "256": run}}


def test_every_cell_has_four_times_the_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def called(**key: Any) -> dict[str, Any]:
        asked.append(key)
        return {}

    monkeypatch.setattr(best_base, "live", called)
    monkeypatch.setattr(longer, "live", called)
    monkeypatch.setattr(longer, "sweep", called)
    monkeypatch.setattr(best_base, "best_multiplier", lambda store, **point: {LONG: 0.5}[point["examples"]])
    grid = cells(Store(tmp_path), ["perceptron"], 0.95)
    for kind in ("sweep", "live", "best_base"):
        cell = [cell for cell in grid if cell.kind == kind and cell.key["phase"] == "late"][-1]
        cell.measure(**cell.key)
    point = POINT | {"examples": LONG}
    run = point | {"seed": 2} | DEFAULT | {"batch_sizes": (64, 256)}
    assert asked == [point | {"batch_size": 256}, run, run | {"multiplier": 0.5}]
    assert LONG == 4 * CONTINUED_EXAMPLES
    sizes = [c.key["batch_size"] for c in grid if c.kind == "sweep" and c.key["phase"] == "early"]
    assert sizes == [16, 64, 256]


def test_a_run_stops_at_the_change_and_plans_for_the_examples_after_it() -> None:
    _, trainer = train_to(WORKLOADS["perceptron"], beta_2=0.95, phase="start", seed=0, examples=3200)
    assert trainer.max_steps == PHASES["start"] + 3200 // 16
    assert trainer.global_step == PHASES["start"]


def test_only_changes_of_both_lengths_are_compared() -> None:
    short, long = CONTINUED_EXAMPLES, LONG
    records: dict[str, list[dict[str, Any]]] = {"laws": []}
    records["sweep"] = [
        *(sweep_record(size, best, short) for size, best in ((16, 0.0), (64, 1.0), (256, 2.0))),
        *(sweep_record(size, best, long) for size, best in ((16, 0.0), (64, 2.0))),
    ]
    records["live"] = [
        live_record(seed, loss, after) for after, loss in ((short, 1.1), (long, 1.2)) for seed in range(3)
    ]
    records["best_base"] = records["live"]
    records |= {"rules": all_rows(records), "longer": all_rows(records, LONG)}
    page = longer_table(records)
    assert "| perceptron | 0.95 | late | 64 | 2.00 (1.00) | 4.00 (1.00) |" in page
    assert "| 256 |" not in page
    live = f"{DEFAULT['objective']}, live"
    assert f"| {short} | {live} | 3 | 0.500 ± 0.000 | 0.100 ± 0.000 | - | 0.100 ± 0.000 | - |" in page
    assert f"| {long} | {live} | 3 | 0.500 ± 0.000 | 0.200 ± 0.000 | - | 0.200 ± 0.000 | - |" in page
