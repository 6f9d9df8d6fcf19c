"""Ratios that rise after a change of the batch size: what is trained with, and what the table says of it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.cells import Store
from benchmarks.fidelity import approach as bench
from benchmarks.fidelity import switch
from benchmarks.fidelity.approach import RATES, approach, approach_rows, approach_table, rate_costs, rising
from benchmarks.fidelity.live import loss_of
from benchmarks.fidelity.regrets import DEFAULT, sweeps_of
from benchmarks.fidelity.switch import SEEDS, final_losses, sweep
from benchmarks.fidelity.training import train_to
from benchmarks.fidelity.workloads import WORKLOADS

POINT: dict[str, Any] = {"workload": "perceptron", "beta_2": 0.95, "phase": "late"}
GRID = [0.25, 0.5, 1.0, 2.0, 4.0]


def sweep_record(batch_size: int, best: float) -> dict[str, Any]:
    losses = [[seed + math.log2(m / best) ** 2 for m in GRID] for seed in range(3)]
    return POINT | {"batch_size": batch_size, "multipliers": GRID, "seeds": [0, 1, 2], "losses": losses}


def live_record(seed: int, used: float) -> dict[str, Any]:
    changes = {"64": {"used": used, "predicted": 4.0 * used}}
    return POINT | DEFAULT | {"seed": seed, "by_batch_size": changes}


def filled(directory: Path, seeds: int = 3) -> Store:
    """The best base learning rate is half of that in use; ratios of 1, 2 and 4 are used."""
    lines = {
        "sweep": [sweep_record(16, 0.5), sweep_record(64, 1.0)],
        "live": [live_record(seed, 2.0**seed) for seed in range(seeds)],
    }
    for kind, records in lines.items():
        (directory / f"{kind}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    return Store(directory)


def test_a_ratio_rises_by_its_rate_until_it_is_there() -> None:
    assert [rising(2.0, 2.4, 0.1, step) for step in range(4)] == pytest.approx([2.0, 2.2, 2.4, 2.4])
    assert [rising(2.0, 2.4, 0.0, step) for step in (0, 1000)] == [2.0, 2.0]
    assert rising(2.0, 2.4, math.inf, 0) == 2.4
    assert rising(2.0, 1.5, 0.1, 0) == 1.5  # falls act at once
    assert rising(2.0, 2.4, 0.2, 10**9) == pytest.approx(2.4)


def test_every_base_end_and_rate_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[float]] = []

    def losses(*key: Any) -> list[list[float]]:
        *point, multipliers_at = key
        assert point == ["perceptron", 0.95, "late", 64]
        asked.extend(multipliers_at(step).tolist() for step in (0, 10_000))
        return [[100 * seed + index for index in range(len(asked[0]))] for seed in range(3)]

    monkeypatch.setattr(bench, "final_losses", losses)
    record = approach(filled(tmp_path), **POINT, batch_size=64)
    # The ratio used is 2 in the mean of the logarithm, that asked for 8; sqrt scaling asks for 2.
    assert record["start"] == pytest.approx(2.0)
    assert record["ends"] == pytest.approx({DEFAULT["objective"]: 8.0, "sqrt": 2.0})
    assert record["bases"] == pytest.approx({"as run": 1.0, "best base lr": 0.5})
    count = len(RATES)
    first, last = asked
    to_8, to_2 = [2.0] * (count - 1) + [8.0], [2.0] * count
    assert first == pytest.approx([*to_8, *to_2, *(m / 2 for m in (*to_8, *to_2))])
    to_8 = [2.0] + [8.0] * (count - 1)
    assert last == pytest.approx([*to_8, *to_2, *(m / 2 for m in (*to_8, *to_2))])
    # Losses are numbered as the multipliers are.
    assert record["losses"]["as run"]["sqrt"][0] == list(range(count, 2 * count))
    assert record["losses"]["best base lr"][DEFAULT["objective"]][2][0] == 200 + 2 * count


def test_without_the_callbacks_runs_there_is_nothing_to_approach(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match=r"runs have to come first.*perceptron"):
        approach(filled(tmp_path, seeds=2), **POINT, batch_size=64)


def rising_record(**changes: Any) -> dict[str, Any]:
    """Staying costs 0.2, each faster rate 0.1 less, and the fastest diverges."""
    losses = [[seed + 0.2 - 0.1 * index for index in range(len(RATES) - 1)] + [None] for seed in range(3)]
    rates = [*RATES[:-1], None]
    by_base = {"as run": {DEFAULT["objective"]: losses}}
    record = POINT | {"batch_size": 64, "rates": rates, "seeds": [0, 1, 2], "losses": by_base}
    return record | {"seconds": 60.0} | changes


def test_regrets_are_against_the_best_constant_ratio_of_the_same_seed() -> None:
    sweeps = sweeps_of([sweep_record(64, 1.0)])
    rows = approach_rows([rising_record(), rising_record(batch_size=256)], sweeps)
    by_rate = {row["rate"]: row["regret"] for row in rows if row["seed"] == 2}
    expected = [*(0.2 - 0.1 * index for index in range(len(RATES) - 1)), math.inf]
    assert by_rate == pytest.approx(dict(zip(RATES, expected, strict=True)))
    assert {row["batch_size"] for row in rows} == {64}
    assert rate_costs(rows)["perceptron"]["0 %"] == 1.0


def test_the_table_of_rates() -> None:
    page = approach_table({"approach": [rising_record()], "sweep": [sweep_record(64, 1.0)]})
    (line,) = [line for line in page.splitlines() if "| perceptron |" in line]
    assert line.startswith(
        f"| as run | {DEFAULT['objective']} | perceptron | 3 | 0.200 ± 0.000 | 0.100 ± 0.000 |"
    )
    assert line.endswith("| inf |")


def test_multipliers_are_those_of_their_steps() -> None:
    """Of two steps: none, both, the first only."""
    losses = final_losses("perceptron", 0.95, "start", 4096, lambda step: torch.tensor([0.0, 1.0, step == 0]))
    study, _ = train_to(WORKLOADS["perceptron"], beta_2=0.95, phase="start", seed=SEEDS[1])
    held, moved, partly = losses[1]
    assert held == pytest.approx(loss_of(study), rel=1e-5)
    assert len({held, moved, partly}) == 3


def test_the_correction_for_the_lag_is_that_of_the_average(monkeypatch: pytest.MonkeyPatch) -> None:
    """`sqrt(EMA[1/B] B)`, the average begun at the base batch size."""
    seen: list[float] = []
    monkeypatch.setattr(
        switch, "final_losses", lambda *key: seen.extend(float(key[4](s)[0]) for s in range(3))
    )
    factors = sweep("perceptron", 0.9, "start", 64, correct_lag=True)["multipliers"]
    average, expected = 1 / 16, []
    for _ in range(3):
        average = 0.9 * average + 0.1 / 64
        expected.append(factors[0] * math.sqrt(average * 64))
    assert seen == pytest.approx(expected)
