"""Finer line searches: that they are of more directions, and take the place of the others."""

from typing import Any

import pytest

from benchmarks.fidelity import fine as bench
from benchmarks.fidelity.fine import fine, refined

POINT: dict[str, Any] = {"workload": "perceptron", "beta_2": 0.95, "phase": "start"}


def test_more_directions_tell_a_best_step_with_a_smaller_error(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = 3, 9
    found = {}
    for count in (few, many):
        monkeypatch.setattr(bench, "DIRECTIONS", {256: count})
        found[count] = fine(**POINT, seed=0)["sign"][256]
    assert 0.0 < found[many]["log2_error"] < found[few]["log2_error"]
    # The first of them are the same.
    assert found[few]["lr"] == pytest.approx(found[many]["lr"], rel=0.2)


def test_only_the_sizes_searched_again_are_replaced() -> None:
    coarse = {size: {"lr": 1.0, "log2_error": 0.3, "alignment": 5.0} for size in ("1", "16")}
    records = [POINT | {"seed": seed, "sign": coarse, "grad_sq": 2.0} for seed in (0, 1)]
    finer = {"lr": 1.5, "log2_error": 0.1}
    first, second = refined(records, [POINT | {"seed": 1, "sign": {"16": finer}}])
    assert first == records[0]
    assert second == records[1] | {"sign": {"1": coarse["1"], "16": finer | {"alignment": 5.0}}}
