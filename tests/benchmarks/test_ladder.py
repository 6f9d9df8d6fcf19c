"""The best ratio of a ladder, and where it is only a bound."""

from typing import Any

import pytest

from benchmarks.fidelity.ladder import best_ratio_table, best_ratios

POINT: dict[str, Any] = {"workload": "perceptron", "beta_2": 0.95, "phase": "late", "examples": 65536}


def ladder(best: float, highest: int = 5) -> dict[str, list[float | None]]:
    """Parabolas over octaves around a best one, moved by half an octave a seed."""
    return {str(2.0**x): [(x - best - move) ** 2 for move in (-0.5, 0.0, 0.5)] for x in range(highest)}


def test_the_best_ratio_lies_between_those_of_the_ladder() -> None:
    by_size = {"256": ladder(1.5), "64": ladder(5.0, highest=4), "1024": ladder(3.0)}
    (inside, highest, late) = best_ratios([POINT | {"losses": by_size}])
    assert (inside["growth"], inside["open"]) == (16, False)
    assert [inside["best"], *inside["of_seeds"]] == pytest.approx([2**1.5, 2.0, 2**1.5, 4.0])
    assert (highest["best"], highest["open"]) == (8.0, True)
    # Of the 64 steps, 43 are needed for a ratio of 8: nothing that stays there for long is known.
    assert (late["best"], late["open"]) == (pytest.approx(8.0), True)


def test_nothing_is_said_of_a_few_steps_or_of_what_diverged() -> None:
    by_size = {"256": ladder(1.5) | {"16.0": [None] * 3}, "4096": ladder(1.0)}
    page = best_ratio_table({"ladder": [POINT | {"losses": by_size}]})
    assert "| workload | beta_2 | decay | phase | 16 x batch |" in page
    assert "| perceptron | 0.95 | 8 x | late | 2.8 (2.0 to 4.0) |" in page
