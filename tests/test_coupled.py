"""A loss that couples examples: measured by batch size, and told apart in the table of rules."""

import math
from typing import Any

import pytest

from benchmarks.fidelity.coupled import coupled, coupled_table
from benchmarks.fidelity.switch import BATCH_SIZES

POINT: dict[str, Any] = {"beta_2": 0.95, "phase": "start"}
GRID = [2.0**index for index in range(-6, 5)]


def test_batchnorm_makes_another_loss_of_a_small_batch() -> None:
    found = coupled("convnet", **POINT, seed=0)["training"]
    assert list(found) == list(BATCH_SIZES)
    # A hundred times what the test below allows.
    assert found[2] > 1.01 * found[256]


def test_without_coupling_the_loss_is_that_of_any_size() -> None:
    found = coupled("perceptron", **POINT, seed=0)["training"]
    assert list(found.values()) == pytest.approx([found[256]] * 4, rel=1e-4)


def sweep_record(workload: str, batch_size: int, best: float) -> dict[str, Any]:
    losses = [[1.0 + 0.05 * (math.log2(m) - best) ** 2 for m in GRID]] * 3
    key = POINT | {"workload": workload, "batch_size": batch_size}
    return key | {"multipliers": GRID, "seeds": [0, 1, 2], "losses": losses}


def test_changes_below_the_base_of_a_coupled_loss_are_told_apart() -> None:
    bests = {16: 0.0, 2: -3.5, 64: 1.0}
    sweeps = [sweep_record("convnet", size, best) for size, best in bests.items()]
    sweeps.append(sweep_record("perceptron", 16, 0.0))
    sweeps.append(sweep_record("perceptron", 2, -1.5))
    record = POINT | {"workload": "convnet", "seed": 0, "running": 0.5}
    record["training"] = {str(size): 1.0 / size for size in BATCH_SIZES}
    page = coupled_table({"coupled": [record], "sweep": sweeps, "live": [], "laws": [], "best_base": []})
    assert "| convnet | 0.95 | start | 0.500 | 0.062 | 0.016 | 0.004 | 0.500 |" in page
    # Square-root scaling is two octaves off there, and right elsewhere.
    assert "| convnet below B = 16 | sqrt | 3 | 2.000 ± 0.000 |" in page
    assert "| all but these | sqrt | 6 | 0.000 ± 0.000 |" in page
