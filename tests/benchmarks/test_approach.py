"""Ratios that rise after a change of the batch size: what is trained with, and what the table says of it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cells import Store
from benchmarks.fidelity import approach as bench
from benchmarks.fidelity.approach import (
    BASES,
    DRIFT,
    RATES,
    approach,
    approach_rows,
    approach_table,
    at_once,
    rising,
)
from benchmarks.fidelity.regrets import DEFAULT, sweeps_of
from benchmarks.fidelity.training import CONTINUED_EXAMPLES
from lightning_surge.laws.base import MeasuredLaw
from lightning_surge.laws.objectives import alignment_ratio, progress_ratio
from lightning_surge.policy.estimates import EstimatedLaw
from lightning_surge.policy.policy import Policy
from lightning_surge.policy.reasons import Reason

POINT: dict[str, Any] = {"workload": "perceptron", "beta_2": 0.95, "phase": "late"}
GRID = [0.25, 0.5, 1.0, 2.0, 4.0]


def sweep_record(batch_size: int, best: float) -> dict[str, Any]:
    losses = [[seed + math.log2(m / best) ** 2 for m in GRID] for seed in range(3)]
    key = POINT | {"batch_size": batch_size, "examples": CONTINUED_EXAMPLES}
    return key | {"multipliers": GRID, "seeds": [0, 1, 2], "losses": losses}


def live_record(seed: int, used: float) -> dict[str, Any]:
    """Its first step has risen already."""
    changes = {"64": {"used": used * (1 + DRIFT), "reason": Reason.RISING.text, "predicted": 4.0 * used}}
    return POINT | DEFAULT | {"seed": seed, "examples": CONTINUED_EXAMPLES, "by_batch_size": changes}


def filled(directory: Path, seeds: int = 3) -> Store:
    """The best base learning rate is half of that in use; ratios of 1, 2 and 4 are used."""
    lines = {
        "sweep": [sweep_record(16, 0.5), sweep_record(64, 1.0)],
        "live": [live_record(seed, 2.0**seed) for seed in range(seeds)],
    }
    for kind, records in lines.items():
        (directory / f"{kind}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    return Store(directory)


def test_a_ratio_rises_by_its_rate_until_it_is_there() -> None:
    assert [rising(2.0, 2.5, 0.1, step) for step in range(3)] == pytest.approx([2.2, 2.42, 2.5])
    assert [rising(2.0, 2.4, 0.0, step) for step in (0, 1000)] == [2.0, 2.0]
    assert rising(2.0, 2.4, math.inf, 0) == 2.4
    assert rising(2.0, 1.5, 0.1, 0) == 1.5  # falls act at once
    assert rising(2.0, 2.4, 0.2, 10**9) == pytest.approx(2.4)


def test_it_rises_as_the_callbacks_does() -> None:
    """The policy, with a law whose two ratios are known."""
    law = MeasuredLaw(alignment_limit=2.0, alignment_scale=48.0, noise_curvature=1.0, signal_curvature=1.0)
    policy = Policy(base_batch_size=16.0, objective="progress", bounds=(1e-3, 1e3))
    policy.update(EstimatedLaw(law, ((law, 0.5), (law, 0.5)), num_measurements=2), 16.0)
    start, end = alignment_ratio(law, 256.0, 16.0), progress_ratio(law, 256.0, 16.0)
    used = [policy.decide(256.0).used for _ in range(40)]
    assert used[0] < used[20] < used[-1] == pytest.approx(end)
    assert used == pytest.approx([rising(start, end, DRIFT, step) for step in range(40)])


def test_every_base_end_and_rate_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[float]] = []

    def losses(*key: Any) -> list[list[float]]:
        *point, multipliers_at = key
        assert point == ["perceptron", 0.95, "late", 64]
        asked.extend(multipliers_at(step).tolist() for step in (0, 10_000))
        return [[100 * seed + index for index in range(len(asked[0]))] for seed in range(3)]

    monkeypatch.setattr(bench, "final_losses", losses)
    record = approach(filled(tmp_path), **POINT, batch_size=64)
    # The ratio used is 2 in the mean of the logarithm, that asked for 8; sqrt scaling asks for 2.
    assert record["start"] == pytest.approx(2.0)
    assert record["ends"] == pytest.approx({DEFAULT["objective"]: 8.0, "sqrt": 2.0})
    assert record["bases"] == pytest.approx({"as run": 1.0, "best base lr": 0.5})
    count = len(RATES)
    first, last = asked
    to_8, to_2 = [2.0 * (1 + rate) for rate in RATES[:-1]] + [8.0], [2.0] * count
    assert first == pytest.approx([*to_8, *to_2, *(m / 2 for m in (*to_8, *to_2))])
    to_8 = [2.0] + [8.0] * (count - 1)
    assert last == pytest.approx([*to_8, *to_2, *(m / 2 for m in (*to_8, *to_2))])
    # Losses are numbered as the multipliers are.
    assert record["losses"]["as run"]["sqrt"][0] == list(range(count, 2 * count))
    assert record["losses"]["best base lr"][DEFAULT["objective"]][2][0] == 200 + 2 * count


def test_without_the_callbacks_runs_there_is_nothing_to_approach(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match=r"runs have to come first.*perceptron"):
        approach(filled(tmp_path, seeds=2), **POINT, batch_size=64)


def test_without_a_rise_the_first_step_is_all_that_is_allowed_at_once() -> None:
    assert at_once({"used": 2.1, "reason": Reason.RISING.text}) == pytest.approx(2.0)
    assert at_once({"used": 2.1, "reason": Reason.MEASURED.text}) == 2.1


def rising_record(workload: str = "perceptron", slope: float = 0.1) -> dict[str, Any]:
    """Staying costs 0.2, each faster rate less by a slope, and the fastest diverges."""
    losses = [[seed + 0.2 - slope * index for index in range(len(RATES) - 1)] + [None] for seed in range(3)]
    by_base = {base: {DEFAULT["objective"]: losses} for base in BASES}
    key = POINT | {"workload": workload, "batch_size": 64, "seeds": [0, 1, 2], "rates": [*RATES[:-1], None]}
    return key | {"losses": by_base, "bases": dict(zip(BASES, (1.0, 0.5), strict=True))}


def test_regrets_are_against_the_best_constant_ratio_of_the_same_seed() -> None:
    sweeps = sweeps_of([sweep_record(64, 1.0)])
    rows = approach_rows([rising_record(), rising_record() | {"batch_size": 256}], sweeps)
    by_rate = {row["rate"]: row["regret"] for row in rows if row["seed"] == 2 and row["base"] == BASES[0]}
    expected = [*(0.2 - 0.1 * index for index in range(len(RATES) - 1)), math.inf]
    assert by_rate == pytest.approx(dict(zip(RATES, expected, strict=True)))
    assert {row["batch_size"] for row in rows} == {64}


def test_the_page_of_rates() -> None:
    """One workload likes a rise, the other does not."""
    other = {"workload": "convnet"}
    records = [rising_record(), rising_record("convnet", slope=-0.1)]
    sweeps = [sweep_record(64, 2.0), sweep_record(64, 2.0) | other]
    page = approach_table({"approach": records, "sweep": sweeps})
    means, gaps = [line for line in page.splitlines() if line.startswith(f"| perceptron | {BASES[0]} |")]
    assert "| 3 | 0.200 | 0.100 | 0.000 | -0.100 |" in means
    assert means.endswith("| inf |")
    assert "| 3 | 0.300 ± 0.000 | 0.200 ± 0.000 | 0.100 ± 0.000 | 0.000 ± 0.000 |" in gaps
