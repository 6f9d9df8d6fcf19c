"""The same changes with more examples after them: what is trained, and what the page compares."""

import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cells import Store
from benchmarks.fidelity import best_base, longer
from benchmarks.fidelity.longer import KINDS, LONG, cells, longer_table
from benchmarks.fidelity.regrets import DEFAULT
from benchmarks.fidelity.training import CONTINUED_EXAMPLES, PHASES, train_to
from benchmarks.fidelity.workloads import WORKLOADS

POINT: dict[str, Any] = {"workload": "perceptron", "beta_2": 0.95, "phase": "late"}
GRID = [2.0**index for index in range(-4, 5)]
SHORT, LONGER = KINDS


def sweep_record(batch_size: int, best: float) -> dict[str, Any]:
    losses = [[1.0 + 0.05 * (math.log2(m) - best) ** 2 for m in GRID]] * 3
    return POINT | {"batch_size": batch_size, "multipliers": GRID, "seeds": [0, 1, 2], "losses": losses}


def live_record(seed: int, loss: float) -> dict[str, Any]:
    run = {"predicted": 4.0, "used": 2.0, "loss": loss, "mean_log2_ratio": 1.5}
    return POINT | DEFAULT | {"seed": seed, "noise_scale": 48.0, "by_batch_size": {"64": run, "256": run}}


def test_every_cell_has_four_times_the_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def called(**key: Any) -> dict[str, Any]:
        asked.append(key)
        return {}

    monkeypatch.setattr(best_base, "live", called)
    monkeypatch.setattr(longer, "live", called)
    monkeypatch.setattr(longer, "sweep", called)
    monkeypatch.setattr(best_base, "best_multiplier", lambda store, kind, **point: {"long_sweep": 0.5}[kind])
    grid = cells(Store(tmp_path), ["perceptron"], 0.95)
    for kind in KINDS[LONGER]:
        cell = [cell for cell in grid if cell.kind == kind and cell.key["phase"] == "late"][-1]
        cell.measure(**cell.key)
    run = POINT | {"seed": 2} | DEFAULT | LONG | {"batch_sizes": (64, 256)}
    assert asked == [POINT | {"batch_size": 256} | LONG, run, run | {"multiplier": 0.5}]
    assert LONG["examples"] == 4 * CONTINUED_EXAMPLES
    sizes = [c.key["batch_size"] for c in grid if c.kind == "long_sweep" and c.key["phase"] == "early"]
    assert sizes == [16, 64, 256]


def test_a_run_stops_at_the_change_and_plans_for_the_examples_after_it() -> None:
    _, trainer = train_to(WORKLOADS["perceptron"], beta_2=0.95, phase="start", seed=0, examples=3200)
    assert trainer.max_steps == PHASES["start"] + 3200 // 16
    assert trainer.global_step == PHASES["start"]


def test_only_changes_of_both_lengths_are_compared() -> None:
    short, longer = KINDS[SHORT], KINDS[LONGER]
    records: dict[str, list[dict[str, Any]]] = {"laws": []}
    records[short[0]] = [sweep_record(16, 0.0), sweep_record(64, 1.0), sweep_record(256, 2.0)]
    records[longer[0]] = [sweep_record(16, 0.0), sweep_record(64, 2.0)]
    for kinds, loss in ((short, 1.1), (longer, 1.2)):
        for kind in kinds[1:]:
            records[kind] = [live_record(seed, loss) for seed in range(3)]
    page = longer_table(records)
    assert "| perceptron | 0.95 | late | 64 | 2.00 (1.00) | 4.00 (1.00) |" in page
    assert "| 256 |" not in page
    live = f"{DEFAULT['objective']}, live"
    assert f"| {SHORT} | {live} | 3 | 0.500 ± 0.000 | 0.100 ± 0.000 | - | 0.100 ± 0.000 | - |" in page
    assert f"| {LONGER} | {live} | 3 | 0.500 ± 0.000 | 0.200 ± 0.000 | - | 0.200 ± 0.000 | - |" in page
