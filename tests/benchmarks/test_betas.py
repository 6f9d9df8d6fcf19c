"""Betas that change in mid-run, copy by copy, and what is chosen from what they gain."""

import copy
import math
from typing import Any

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from benchmarks.fidelity.betas import EXPONENTS, beta_gaps, betas_table
from benchmarks.fidelity.ensemble import EPS, Ensemble, Snapshot, shared_batch
from benchmarks.fidelity.workloads import WORKLOADS

CHANGED = ((0.9, 0.95), (0.81, 0.9), (0.65, 0.999))
LR = 1e-3


def snapshot(network: torch.nn.Module) -> Snapshot:
    """Of a training that has not begun."""
    zeros = {name: torch.zeros_like(value) for name, value in network.named_parameters()}
    averages = [{name: value.clone() for name, value in zeros.items()} for _ in range(2)]
    return Snapshot(network.state_dict(), *averages, 0)


def reference_losses(
    network: torch.nn.Module, batches: list[Any], after: tuple[float, float]
) -> torch.Tensor:
    """Weights after torch's own optimizer has used one pair of betas for two steps, and then another.

    It corrects by `beta ** step`, as if the betas had always been those of the moment. Its rate and epsilon
    are set so that what it does is a correction by the product of the betas used.
    """
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=0.0)
    (group,) = optimizer.param_groups
    left = [1.0, 1.0]
    for step, batch in enumerate(batches, start=1):
        group["betas"] = CHANGED[0] if step <= 2 else after
        left = [one * beta for one, beta in zip(left, group["betas"], strict=True)]
        first, second = ((1 - beta**step) / (1 - one) for one, beta in zip(left, group["betas"], strict=True))
        group["lr"], group["eps"] = LR * first / math.sqrt(second), EPS / math.sqrt(second)
        optimizer.zero_grad()
        WORKLOADS["perceptron"].loss(network, batch).backward()
        optimizer.step()
    return parameters_to_vector(network.parameters()).detach()


def test_betas_of_a_copy_change_in_mid_run() -> None:
    what = WORKLOADS["perceptron"]
    torch.manual_seed(0)
    network = what.network()
    ensemble = Ensemble(what, [snapshot(network)] * len(CHANGED), CHANGED[0])
    generator = torch.Generator().manual_seed(0)
    batches = [shared_batch(what.data(), 8, [generator], len(CHANGED)) for _ in range(5)]
    for step, batch in enumerate(batches):
        if step == 2:
            ensemble.use_betas(*torch.tensor(CHANGED).T)
        ensemble.step(batch, torch.full((len(CHANGED),), LR))
    for index, after in enumerate(CHANGED):
        own = [tuple(tensor[index] for tensor in batch) for batch in batches]
        expected = reference_losses(copy.deepcopy(network), own, after)
        found = torch.cat([value[index].flatten() for value in ensemble.parameters.values()])
        moved = (expected - parameters_to_vector(network.parameters()).detach()).abs().max()
        assert (found - expected).abs().max() < 1e-4 * moved


def cell(workload: str, best: str, kept: float = 2.0, **changes: Any) -> dict[str, Any]:
    """One setting ends 0.1 below the kept betas, 0.2 with the last seed; all others 0.1 above."""
    losses = {f"{first:g}, {second:g}": [kept + 0.1] * 3 for first, second in EXPONENTS}
    losses |= {best: [kept - 0.1, kept - 0.1, kept - 0.2], "0, 0": [kept] * 3}
    point = {"workload": workload, "beta_2": 0.95, "phase": "late", "examples": 8192}
    return point | {"losses": losses} | changes


def test_gaps_are_against_the_betas_kept() -> None:
    found = beta_gaps([cell("perceptron", "0.5, 0"), cell("autoencoder", "0.5, 0")])
    gaps = found.set_index(["workload", "exponents", "seed"])["gap"]
    assert gaps["perceptron", "0.5, 0", 2] == pytest.approx(-0.2)
    assert gaps["autoencoder", "0.5, 0", 2] == pytest.approx(-10.0)
    assert (gaps.xs("0, 0", level="exponents") == 0.0).all()


def test_others_choose_what_the_page_judges() -> None:
    cells = [cell("perceptron", "0.5, 0"), cell("convnet", "0, 0.25"), cell("autoencoder", "0, 0.25")]
    page = betas_table({"betas": cells})
    assert "| 0.5, 0 | -0.1333 (-0.1000) | 0.1000 (0.1000) | 5.0000 (5.0000) |" in page
    assert "| perceptron | mean | 0, 0.25 | 0.1000 ± 0.0000 | 0.5, 0 | -0.1333 ± 0.1434 |" in page
