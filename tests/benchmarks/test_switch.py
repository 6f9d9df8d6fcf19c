"""Sweeps after a change of the batch size: what is trained, and where a grid goes on."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.fidelity import switch
from benchmarks.fidelity.live import loss_of
from benchmarks.fidelity.switch import SEEDS, beyond, final_losses, sweep
from benchmarks.fidelity.training import train_to
from benchmarks.fidelity.workloads import WORKLOADS

POINT = ("perceptron", 0.95, "start")


def test_multipliers_are_those_of_their_steps() -> None:
    """Of two steps: none, both, the first only."""
    losses = final_losses(*POINT, 4096, lambda step: torch.tensor([0.0, 1.0, step == 0]))
    study, _ = train_to(WORKLOADS["perceptron"], beta_2=0.95, phase="start", seed=SEEDS[1])
    held, moved, partly = losses[1]
    assert held == pytest.approx(loss_of(study), rel=1e-5)
    assert len({held, moved, partly}) == 3


def test_so_many_examples_are_trained() -> None:
    seen: list[int] = []

    def count(step: int) -> torch.Tensor:
        seen.append(step)
        return torch.tensor([0.0])

    final_losses(*POINT, 1024, count, examples=3 * 1024)
    assert set(seen) == {0, 1, 2}


def parabola(*key: Any) -> list[list[float]]:
    """Losses of the first step's multipliers, the lowest at 64."""
    multipliers_at = key[4]
    return [[(math.log2(m) - 6.0) ** 2 + seed for m in multipliers_at(0).tolist()] for seed in SEEDS]


def test_a_sweep_goes_on_beyond_the_end_with_the_lowest_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(switch, "final_losses", parabola)
    found = sweep(*POINT, 64)
    assert found["multipliers"][:9] == pytest.approx(switch.multipliers(64))
    steps = np.diff(np.log2(found["multipliers"]))
    assert steps == pytest.approx(np.full(len(steps), steps[0]))
    # At most 16 on the grid, and 64 lies inside of what was added.
    assert found["multipliers"][np.argmin(found["losses"][0])] == pytest.approx(64.0, rel=0.4)
    assert found["multipliers"][-1] > 64.0
    assert [row[0] for row in found["losses"]] == pytest.approx([64.0 + seed for seed in SEEDS])


def test_a_grid_is_extended_where_its_lowest_loss_is_at_an_end() -> None:
    factors = [0.5, 1.0, 2.0]
    assert beyond(factors, np.array([[3.0, 2.0, 1.0]])) == [4.0, 8.0]
    assert beyond(factors, np.array([[1.0, 2.0, 3.0]])) == [0.125, 0.25]
    assert beyond(factors, np.array([[2.0, 1.0, 2.0]])) == []
    # A multiplier at which one seed diverges ends the grid, with the lowest loss of the others or not.
    assert beyond(factors, np.array([[3.0, 2.0, math.inf], [3.0, 2.0, 0.0]])) == []
    assert beyond(factors, np.array([[3.0, 2.0, math.nan]])) == []
