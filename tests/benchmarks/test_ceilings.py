"""How hot a run may get: rules read off a ladder of ratios, and the exact state at a change."""

import math
from typing import Any

import pytest
import torch

from benchmarks.fidelity import ceilings as bench
from benchmarks.fidelity.free import REFERENCE
from lightning_surge.laws.base import MeasuredLaw
from lightning_surge.laws.objectives import alignment_ratio, progress_ratio

POINT: dict[str, Any] = {"workload": "perceptron", "beta_2": 0.95, "phase": "late"}
EDGE = {"16": 1.0, "64": 0.5, "256": 0.0056, "1024": 0.001}


@pytest.mark.parametrize("size", [64, 256, 1024])
def test_rules_are_those_of_the_law(size: int) -> None:
    law = MeasuredLaw(alignment_limit=1.0, alignment_scale=100.0, noise_curvature=1.0, signal_curvature=0.0)
    asked = {rule: 2.0**ratio for rule, ratio in bench.rules_at(100.0, EDGE, 0.0056, size).items()}
    assert asked["alignment"] == pytest.approx(alignment_ratio(law, size, 16))
    assert asked["progress"] == pytest.approx(progress_ratio(law, size, 16))
    assert asked["sqrt and progress, g = 0.5"] == pytest.approx(
        math.sqrt(asked["progress"] * asked[REFERENCE])
    )
    assert asked["alignment"] < asked["sqrt up to 4 noise scales"] < asked[REFERENCE]
    assert asked["linear, approached"] == size / 16


def test_edges_are_ceilings_at_the_scheduled_learning_rate() -> None:
    asked = bench.rules_at(math.inf, EDGE, 0.0056, 256)
    assert 2.0 ** asked["sqrt under 3 edges"] == pytest.approx(3.0)
    assert 2.0 ** asked["sqrt under 9 edges"] == pytest.approx(4.0)
    # Without a signal all that depends on the noise is sqrt scaling.
    assert asked["alignment"] == pytest.approx(2.0, abs=1e-6)


def test_losses_are_read_off_the_ladder_between_its_ratios() -> None:
    ladder = {
        "256": {"1.0": [3.0] * 3, "2.0": [2.0] * 3, "4.0": [1.0] * 3, "8.0": [5.0] * 3, "16.0": [None] * 3}
    }
    records: Any = {
        "ladder": [POINT | {"examples": 65536, "losses": ladder}],
        "state": [POINT | {"noise_scale": [1e9, 1e9, -1.0], "edge_lr": [EDGE | {"256": 0.0056}] * 3}],
    }
    found = bench.rule_gaps(records).set_index(["rule", "seed"])["gap"]
    assert found["constant", 0] == 2.0
    # Two edges: a ratio of 2. Three: halfway between 2 and 4 in octaves is a loss of 1.415.
    assert found["sqrt under 2 edges", 1] == pytest.approx(1.0)
    assert found["sqrt under 3 edges", 1] == pytest.approx(1.0 - math.log2(1.5))
    assert found["linear, approached", 2] == math.inf
    assert found[bench.BEST, 0] == 0.0
    page = bench.ceilings(records)
    assert "1 changes of the batch size of at least 32 steps" in page
    assert f"| {REFERENCE} | 0.0000 (0.0000) |" in page


def test_the_edge_of_a_quadratic() -> None:
    hessian = torch.tensor([2.0, 6.0], dtype=torch.float64)
    edges = bench.edge_lrs(lambda v: hessian * v, torch.zeros(2).double(), torch.tensor([1.0, 16.0]).double())
    # P = sqrt(variance) at the base: 2 / 1 and 6 / 4. Four times the batch halves P.
    assert edges["16"] == pytest.approx(38.0 / 2.0, rel=1e-4)
    assert edges["64"] == pytest.approx(38.0 / 4.0, rel=1e-4)


def test_damping_is_a_share_of_each_parameters_mean() -> None:
    damped = bench.damp(torch.tensor([0.0, 2.0, 5.0]), [2, 1], 0.1)
    assert damped.tolist() == pytest.approx([0.1, 2.1, 5.5])
