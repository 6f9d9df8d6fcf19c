"""Rules that measure nothing: what they train with, and what the table says of the callback beside them."""

import math
from typing import Any

import pytest
import torch

from benchmarks.fidelity import free as bench
from benchmarks.fidelity.free import AS_SHIPPED, CALLBACK, LARGER, REFERENCE, approached, free, gaps
from benchmarks.fidelity.switch import SEEDS

POINT: dict[str, Any] = {"workload": "perceptron", "beta_2": 0.95, "phase": "late", "examples": 8192}


def records(callback: dict[int, float], **changes: Any) -> dict[str, list[dict[str, Any]]]:
    """Sqrt approached ends at 1, 2 and 3 by seed, the other rules 0.1 above; the callback's gaps by seed."""
    by_rule = {rule: [seed + 1.1 - 0.1 * (rule == REFERENCE) for seed in SEEDS] for rule in bench.RULES}
    cell = POINT | changes | {"losses": {str(size): by_rule for size in LARGER[:2]}, "commit": "abc"}
    lives = [
        POINT | changes | AS_SHIPPED | {"seed": seed, "commit": "abc"}
        | {"by_batch_size": {"64": {"loss": seed + 1 + gap}, "256": {"loss": seed + 1 - gap}}}
        for seed, gap in callback.items()
    ]  # fmt: skip
    # A run at another cost is none at the default.
    return {"free": [cell], "ladder": [], "live": [*lives, lives[0] | {"max_overhead": 0.5}]}


def test_a_ratio_rises_from_one_by_its_rate_until_it_is_there() -> None:
    assert [approached(1.25, 0.1, step) for step in range(3)] == pytest.approx([1.1, 1.21, 1.25])
    assert approached(4.0, math.inf, 0) == 4.0
    assert approached(4.0, 0.2, 10**9) == pytest.approx(4.0)
    assert approached(1.0, 0.1, 5) == 1.0


def test_every_rule_is_trained_at_every_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[int, list[list[float]]] = {}

    def losses(workload: str, beta_2: float, phase: str, size: int, at: Any, examples: int) -> Any:
        assert (workload, beta_2, phase, examples) == ("perceptron", 0.95, "late", 8192)
        asked[size] = [at(step).tolist() for step in (0, 10_000)]
        return [[100 * seed + index for index in range(len(bench.RULES))] for seed in SEEDS]

    monkeypatch.setattr(bench, "final_losses", losses)
    record = free(**POINT)
    first, last = asked[256]
    assert first == pytest.approx([1, 4, 1.05, 16, 1.05])
    assert last == pytest.approx([1, 4, 4, 16, 16])
    assert record["losses"]["1024"]["linear, at once"] == [3, 103, 203]


def test_rules_start_from_the_same_snapshot_and_end_alike_without_a_rise() -> None:
    found = free("perceptron", 0.95, "start", 1024)["losses"]["1024"]
    assert len({tuple(losses) for losses in found.values()}) == 4  # both approaches take the same single step
    assert found[REFERENCE] == found["linear, approached"] != found["constant"]
    assert torch.tensor(list(found.values())).isfinite().all()


def test_gaps_are_against_sqrt_approached_seed_by_seed() -> None:
    found = gaps(records({0: 0.3, 1: 0.0, 2: 0.0}))
    assert found[REFERENCE].tolist() == [0.0] * 6
    assert found["linear, at once"].tolist() == pytest.approx([0.1] * 6)
    assert found[CALLBACK].tolist() == pytest.approx([0.3, 0.0, 0.0, -0.3, 0.0, 0.0])
    # In percent of the mean loss of the reference, which is 2.
    percent = gaps(records({0: 0.3, 1: 0.0, 2: 0.0}, workload="autoencoder"))
    assert percent[CALLBACK].tolist()[0] == pytest.approx(15.0)


def test_only_experiments_that_every_rule_has_are_compared() -> None:
    assert gaps(records({1: 0.3})).index.get_level_values("seed").tolist() == [1, 1]
    assert CALLBACK not in gaps(records({1: 0.3}) | {"live": []})


def test_the_table_names_the_worst_seed() -> None:
    page = bench.free_table(records({0: 0.3, 1: 0.0, 2: 0.0}))
    assert "| rule | 4 x batch, 1 x decay | 16 x batch, 1 x decay |" in page
    assert f"| {CALLBACK} | 0.1000 (0.3000) | -0.1000 (0.0000) |" in page
    assert "measured at abc." in page
    unrun = bench.free_table(records({0: 0.3}) | {"live": []})
    assert "no commit yet" in unrun
    assert "| linear, at once | 0.1000 (0.1000) |" in unrun


def test_the_largest_gap_of_a_change_is_a_target() -> None:
    rows = bench.free_targets(records({0: 0.3, 1: 0.0, 2: 0.0}), "make")
    assert [(row["value"], row["bound"], row["met"]) for row in rows] == [
        (0.1, 0.02, False),
        (0.1, 0.004, False),
        (0.0, 0.0, True),
    ]
    assert bench.free_targets({"free": [], "ladder": [], "live": []}, "make") == []


def test_the_ladder_stands_in_where_rules_were_not_run() -> None:
    ladder = {"64": {"1.0": [3.0], "2.0": [2.0], "4.0": [2.5], "8.0": [9.0]}}
    short = POINT | {"examples": 65536, "losses": ladder, "commit": "abc"}
    found = gaps(records({0: 0.3, 1: 0.0, 2: 0.0}) | {"live": [], "ladder": [short]})
    row = found.loc[found.index.get_level_values("examples") == 65536]
    assert row["constant"].tolist() == [1.0]
    assert row["linear, approached"].tolist() == [0.5]
    assert row["sqrt, at once"].isna().all()
    assert len(found) == 7
