"""The measured law against a line search, on real data: the claim the package rests on."""

import math

import pytest
import torch

from benchmarks.fidelity import one_step
from benchmarks.fidelity.__main__ import HELD
from benchmarks.fidelity.one_step import ACTIVE, best_step, fresh_directions, measure, truths
from benchmarks.fidelity.switch import fixed_sample
from benchmarks.fidelity.training import train_to
from benchmarks.fidelity.workloads import WORKLOADS

# BatchNorm couples the examples of a batch: the callback says that it pools whole batches instead.
pytestmark = pytest.mark.filterwarnings("ignore:The mean gradient of a batch's slices")


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["early", "cooled"])
@pytest.mark.parametrize("workload", HELD)
def test_measured_law_agrees_with_a_line_search(workload: str, phase: str) -> None:
    """Within a factor of 1.6 at the active batch size."""
    torch.set_num_threads(1)
    study, _ = train_to(WORKLOADS[workload], beta_2=0.95, phase=phase, seed=0)
    law = measure(study, law="measured", count=12, seed=0).law
    truth, error = best_step(study, fresh_directions(study, ACTIVE, 12, seed=0), fixed_sample(study.workload))
    assert error < math.log2(1.6) / 2, "the line search itself knows too little to judge"
    assert 1 / 1.6 < law.lr(ACTIVE) / truth < 1.6


def test_more_directions_are_searched_where_they_scatter(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[int]] = {}
    monkeypatch.setattr(one_step, "DIRECTIONS", {4: 2, 16: 2})
    monkeypatch.setattr(one_step, "MORE_DIRECTIONS", {16: 5, 64: 5})
    for workload in ("perceptron", "autoencoder"):
        counts = seen.setdefault(workload, [])
        monkeypatch.setattr(
            one_step, "searched", lambda study, steps, *rest, to=counts: to.append(len(steps))
        )
        record = truths(workload, 0.95, "start", 0)
        assert list(record["sign"]) == list(record["grad_sq_of_batches"]) == [4, 16]
    assert seen == {"perceptron": [2, 5], "autoencoder": [2, 2]}
