"""Finer line searches: that they are of more directions, and take the place of the others."""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.fidelity import fine as bench
from benchmarks.fidelity.fine import fine, refined
from benchmarks.fidelity.training import Study
from benchmarks.fidelity.workloads import Batch

POINT: dict[str, Any] = {"workload": "perceptron", "beta_2": 0.95, "phase": "start"}


def test_every_size_is_searched_along_so_many_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[list[list[Tensor]]] = []

    def search(
        study: Study, directions: list[list[Tensor]], sample: Batch, full: list[Tensor]
    ) -> dict[str, float]:
        searched.append(directions)
        return {"lr": 0.5 * len(searched)}

    monkeypatch.setattr(bench, "DIRECTIONS", {16: 3, 256: 2})
    monkeypatch.setattr(bench, "searched", search)
    assert fine(**POINT, seed=0) == {"sign": {16: {"lr": 0.5}, 256: {"lr": 1.0}}}
    assert [len(directions) for directions in searched] == [3, 2]
    (first, *_), (second, *_) = searched
    assert {value for step in (first, second) for tensor in step for value in tensor.unique().tolist()} <= {
        -1,
        0,
        1,
    }
    assert any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_only_the_sizes_searched_again_are_replaced() -> None:
    coarse = {size: {"lr": 1.0, "log2_error": 0.3, "alignment": 5.0} for size in ("1", "16")}
    records = [POINT | {"seed": seed, "sign": coarse, "grad_sq": 2.0} for seed in (0, 1)]
    finer = {"lr": 1.5, "log2_error": 0.1}
    first, second = refined(records, [POINT | {"seed": 1, "sign": {"16": finer}}])
    assert first == records[0]
    assert second == records[1] | {"sign": {"1": coarse["1"], "16": finer | {"alignment": 5.0}}}
