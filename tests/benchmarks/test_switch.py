"""Runs that go on after a change of the batch size: what is trained."""

import pytest
import torch

from benchmarks.fidelity.live import loss_of
from benchmarks.fidelity.switch import SEEDS, final_losses
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
