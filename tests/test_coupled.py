"""A loss that couples examples: measured by batch size, and told apart in the table of rules."""

import math
from typing import Any

import pytest

from benchmarks.fidelity import coupled as bench
from benchmarks.fidelity.coupled import coupled, coupled_table
from benchmarks.fidelity.regrets import DEFAULT
from benchmarks.fidelity.switch import BATCH_SIZES

POINT: dict[str, Any] = {"beta_2": 0.95, "phase": "start"}
GRID = [2.0**index for index in range(-6, 5)]


@pytest.fixture
def small_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 512 examples."""
    sample = bench.fixed_sample
    monkeypatch.setattr(bench, "fixed_sample", lambda what: tuple(t[:512] for t in sample(what)))


@pytest.mark.usefixtures("small_sample")
def test_batchnorm_makes_another_loss_of_a_small_batch() -> None:
    found = coupled("convnet", **POINT, seed=0)["training"]
    assert list(found) == list(BATCH_SIZES)
    # A hundred times what the test below allows.
    assert found[2] > 1.01 * found[256]


@pytest.mark.usefixtures("small_sample")
def test_without_coupling_the_loss_is_that_of_any_size() -> None:
    found = coupled("perceptron", **POINT, seed=0)["training"]
    assert list(found.values()) == pytest.approx([found[256]] * 4, rel=1e-4)


def sweep_record(workload: str, batch_size: int, best: float) -> dict[str, Any]:
    losses = [[1.0 + 0.05 * (math.log2(m) - best) ** 2 for m in GRID]] * 3
    key = POINT | {"workload": workload, "batch_size": batch_size}
    return key | {"multipliers": GRID, "seeds": [0, 1, 2], "losses": losses}


def live_record(workload: str, seed: int) -> dict[str, Any]:
    run = {"predicted": 2.0, "used": 2.0, "loss": 1.0, "mean_log2_ratio": 1.0}
    key = POINT | DEFAULT | {"workload": workload, "seed": seed, "noise_scale": 1e9}
    return key | {"by_batch_size": {"2": run, "64": run}}


def test_changes_below_the_base_of_a_coupled_loss_are_told_apart() -> None:
    names = ("convnet", "perceptron")
    bests = {("convnet", 2): -3.5, ("perceptron", 2): -1.5}
    sweeps = [
        sweep_record(name, size, bests.get((name, size), float(size == 64)))
        for name in names
        for size in (2, 16, 64)
    ]
    lives = [live_record(name, seed) for name in names for seed in range(3)]
    record = POINT | {"workload": "convnet", "seed": 0, "running": 0.5}
    record["training"] = {str(size): 1.0 / size for size in BATCH_SIZES}
    page = coupled_table(
        {"coupled": [record], "sweep": sweeps, "live": lives, "laws": [], "best_base": lives}
    )
    assert "| convnet | 0.95 | start | 0.500 | 0.062 | 0.016 | 0.004 | 0.500 |" in page
    # Square-root scaling is two octaves off there, and right elsewhere.
    assert "| convnet below B = 16 | sqrt | 3 | 2.000 ± 0.000 |" in page
    assert "| all but these | sqrt | 9 | 0.000 ± 0.000 |" in page
