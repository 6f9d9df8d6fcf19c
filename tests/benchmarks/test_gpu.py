"""What the benchmark on a GPU makes of its times and bytes, on a device that is made up."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from benchmarks.gpu import __main__ as gpu
from lightning_surge import SurgeLRCallback

CELL = gpu.Cell("bf16-mixed", accumulation=4)


def history(count: int, grad_sq: float = 1.0, trace_cov: float = 2.0) -> Any:
    latest = SimpleNamespace(statistics=(32.0, grad_sq, trace_cov, ()))
    return SimpleNamespace(num_measurements=count, latest=latest)


def test_a_step_and_a_measurement_are_compared_with_a_step_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 bytes of parameters; a step of 100 ms takes 102, and two of five are 60 ms longer still."""
    model = torch.nn.Linear(249, 1)
    found = {
        None: ([0.1, 0.1, 9.0], 5_000),
        gpu.NEVER: ([0.102] * 3, 5_500),
        1: ([0.102, 0.162, 0.102, 0.162, 0.102], 7_500),
    }

    def train(shape: gpu.Shape, callback: SurgeLRCallback | None, cell: gpu.Cell) -> Any:
        if callback is not None:
            assert callback.base_batch_size == 4 * shape.batch
            monkeypatch.setattr(callback._learner, "history", history(3))
        return model, *found[None if callback is None else callback.settings.probe_every]

    monkeypatch.setattr(gpu, "train", train)
    assert gpu.overhead(gpu.TINY, CELL) == pytest.approx(
        {
            "name": "bf16-mixed, accumulation 4",
            "parameters": 250,
            "step_ms": 100.0,
            "ordinary": 0.02,
            "buffers_between": 0.5,
            "measurement_ms": 60.0,
            "buffers_during": 2.5,
            "measurements": 3,
        }
    )


def test_what_is_refused_is_no_target(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*args: Any) -> Any:
        raise MisconfigurationException("no 16 bits")

    monkeypatch.setattr(gpu, "train", train)
    refused = gpu.overhead(gpu.TINY, CELL)
    assert refused == {"name": "bf16-mixed, accumulation 4", "refused": "no 16 bits"}
    measured = {"name": "fast", "ordinary": 0.03, "buffers_between": 1.0, "buffers_during": 4.1}
    rows = gpu.summarised([refused, measured], 2e-3, 0.0)
    assert [(row["value"], row["bound"], row["met"]) for row in rows] == [
        (2e-3, 1e-3, False),
        (0.0, 0.0, True),
        (0.03, 0.02, False),
        (1.0, 1.0, True),
        (4.1, 4.0, False),
    ]
    assert all("fast" in row["name"] for row in rows[2:])


def test_the_largest_difference_between_devices_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"cpu": history(1, 1.0, 2.0), "auto": history(1, 1.001, 1.99)}

    def train(
        shape: gpu.Shape, callback: SurgeLRCallback, cell: gpu.Cell, accelerator: str, lr: float
    ) -> None:
        assert lr == 0.0
        monkeypatch.setattr(callback._learner, "history", found[accelerator])

    monkeypatch.setattr(gpu, "train", train)
    assert gpu.agreement(gpu.TINY) == pytest.approx(2.0 / 1.99 - 1.0)


@pytest.mark.parametrize("trace", [0.0, 1.0])
def test_a_trace_is_another_weight(trace: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(shape: gpu.Shape, callback: SurgeLRCallback | None, cell: gpu.Cell) -> Any:
        model = torch.nn.Linear(1, 1)
        with torch.no_grad():
            model.weight.fill_(1.0 if callback is None else 1.0 + trace * 1e-7)
            model.bias.zero_()
        torch.manual_seed(0)
        return model, [], 0

    monkeypatch.setattr(gpu, "train", train)
    assert gpu.traces(gpu.TINY) == trace
