"""Set and restore: schedulers must not see what was written."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from lightning_surge.optimizers.lr_writer import LearningRateWriter


def make(lrs: tuple[Any, ...] = (0.1, 0.02)) -> Optimizer:
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr} for lr in lrs], lr=0.5)


def rates(optimizer: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "cosine": lambda o: CosineAnnealingLR(o, 10, eta_min=0.001),
    "exponential": lambda o: ExponentialLR(o, 0.9),
    "one cycle": lambda o: OneCycleLR(o, [0.3, 0.1], total_steps=40),
    "sequential": lambda o: SequentialLR(
        o, [LinearLR(o, 0.1, total_iters=5), CosineAnnealingLR(o, 20)], milestones=[5]
    ),
    "step": lambda o: StepLR(o, 3, 0.5),
    "lambda": lambda o: LambdaLR(o, lambda step: 1 / (1 + step)),
    "plateau": lambda o: ReduceLROnPlateau(o, factor=0.5, patience=1),
}


class TestSchedulers:
    @pytest.mark.parametrize("name", SCHEDULERS)
    @pytest.mark.parametrize("tensors", [False, True])
    def test_trajectory_is_bit_identical(self, name: str, tensors: bool) -> None:
        trajectories = []
        for written in (False, True):
            lrs = (torch.tensor(0.1), torch.tensor(0.02)) if tensors else (0.1, 0.02)
            optimizer = make(lrs)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old schedulers call each other's step(epoch)
                scheduler = SCHEDULERS[name](optimizer)
            writer, trajectory = LearningRateWriter(optimizer), []
            for step in range(30):
                if written:
                    writer.apply(0.3)
                    writer.apply(0.7 + 0.1 * step)
                    assert rates(optimizer) == pytest.approx(
                        [(0.7 + 0.1 * step) * lr for lr in writer.scheduled()], rel=1e-6
                    )
                optimizer.step()
                if written:
                    writer.restore()
                trajectory.append(rates(optimizer))
                scheduler.step(*([1.0] if name == "plateau" else []))
            trajectories.append(trajectory)
        assert trajectories[0] == trajectories[1]
        assert trajectories[0][0] != trajectories[0][-1]


class TestWriting:
    @given(factor=st.floats(1e-6, 1e6), lr=st.floats(0, 10))
    def test_applies_and_restores_exactly(self, factor: float, lr: float) -> None:
        optimizer = make((lr, 0.5 * lr))
        writer = LearningRateWriter(optimizer)
        writer.apply(factor)
        assert rates(optimizer) == [lr * factor, 0.5 * lr * factor]
        assert writer.scheduled() == [lr, 0.5 * lr]
        writer.restore()
        assert rates(optimizer) == [lr, 0.5 * lr]

    def test_a_second_factor_replaces_the_first(self) -> None:
        optimizer = make()
        writer = LearningRateWriter(optimizer)
        writer.apply(2.0)
        writer.apply(3.0)
        assert rates(optimizer) == [0.1 * 3.0, 0.02 * 3.0]
        writer.restore()
        writer.restore()
        assert rates(optimizer) == [0.1, 0.02]

    def test_what_somebody_else_writes_is_the_new_schedule(self) -> None:
        optimizer = make()
        writer = LearningRateWriter(optimizer)
        writer.apply(2.0)
        optimizer.param_groups[0]["lr"] = 0.7
        assert writer.scheduled() == [0.7, 0.02]
        writer.restore()
        assert rates(optimizer) == [0.7, 0.02]
        writer.apply(2.0)
        optimizer.param_groups[1]["lr"] = 0.9
        writer.apply(3.0)
        assert rates(optimizer) == pytest.approx([2.1, 2.7])
        writer.restore()
        assert rates(optimizer) == [0.7, 0.9]

    def test_restoring_without_writing_does_nothing(self) -> None:
        optimizer = make()
        writer = LearningRateWriter(optimizer)
        writer.restore()
        assert rates(optimizer) == [0.1, 0.02]
        optimizer.param_groups[0]["lr"] = 0.3
        writer.restore()
        assert rates(optimizer) == [0.3, 0.02]

    def test_a_group_added_in_between(self) -> None:
        optimizer = make()
        writer = LearningRateWriter(optimizer)
        writer.apply(2.0)
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.4})
        assert writer.scheduled() == [0.1, 0.02, 0.4]
        writer.apply(0.5)
        assert rates(optimizer) == [0.05, 0.01, 0.2]
        writer.restore()
        assert rates(optimizer) == [0.1, 0.02, 0.4]


class TestTensors:
    def test_are_filled_in_place(self) -> None:
        optimizer = make((torch.tensor(0.1), torch.tensor(0.25)))
        tensors = [group["lr"] for group in optimizer.param_groups]
        writer = LearningRateWriter(optimizer)
        writer.apply(3.0)
        assert [group["lr"] is tensor for group, tensor in zip(optimizer.param_groups, tensors, strict=True)]
        assert float(tensors[1]) == 0.75
        assert writer.scheduled() == [float(torch.tensor(0.1)), 0.25]
        writer.restore()
        assert torch.equal(tensors[0], torch.tensor(0.1))
        assert optimizer.param_groups[0]["lr"] is tensors[0]

    def test_a_shared_one_is_copied_per_group(self) -> None:
        shared = torch.tensor(0.5)
        parameters = [{"params": [torch.nn.Parameter(torch.ones(1))]} for _ in range(2)]
        optimizer = torch.optim.Adam(parameters, lr=shared, foreach=False)
        assert optimizer.param_groups[0]["lr"] is optimizer.param_groups[1]["lr"]
        writer = LearningRateWriter(optimizer)
        assert optimizer.param_groups[0]["lr"] is not optimizer.param_groups[1]["lr"]
        writer.apply(2.0)
        assert rates(optimizer) == [1.0, 1.0]
        writer.restore()
        assert rates(optimizer) == [0.5, 0.5]
