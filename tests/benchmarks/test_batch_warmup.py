"""The reporting side of the warm-up bench on records whose answers are known, and the cells it runs."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.batch_warmup import __main__ as command
from benchmarks.batch_warmup import grid, training
from benchmarks.batch_warmup.analysis import KEYS, lines, runs, tuned
from benchmarks.batch_warmup.report import main_table, write_report
from benchmarks.batch_warmup.rules import (
    BASE_BATCH_SIZE,
    BUDGETS,
    CANDIDATES,
    DEFAULT,
    DEFAULT_OVERHEAD,
    FIXED_RULES,
    LARGE_BATCH_SIZE,
    LARGE_OVERHEAD,
    MORE_SEEDS,
    MULTIPLIERS,
    RAMPS,
    RULES,
    SEEDS,
    SEESAW,
    Rule,
)
from benchmarks.batch_warmup.targets import contest, targets
from benchmarks.batch_warmup.workloads import WORKLOADS, lr_factor
from benchmarks.cells import Store, run_cells
from benchmarks.fidelity.analysis import pick
from benchmarks.fidelity.markdown import targets_table
from lightning_surge.policy.policy import MAX_DRIFT

SEED_NOISE = (-0.01, 0.0, 0.01)
T_975_OF_2 = 4.302653  # Student's t with two degrees of freedom


def constants(
    batch_size: int, best: float, level: float, workload: str = "text", budget: str = "short"
) -> list[dict[str, Any]]:
    """Losses that rise by 0.1 for every doubling away from the best multiplier."""
    key = {"workload": workload, "budget": budget, "batch_size": batch_size}
    cost = {"steps": 2048 * BASE_BATCH_SIZE // batch_size}
    cost |= {"processor_seconds": 10.0 * BASE_BATCH_SIZE / batch_size}
    return [
        key | {"multiplier": factor, "seed": seed, "val_loss": level + away + noise} | cost
        for factor in MULTIPLIERS[budget, batch_size]
        for away in [0.1 * abs(math.log2(factor / best))]
        for seed, noise in zip(SEEDS, SEED_NOISE, strict=True)
    ]


def ramp(rule: Rule, losses: list[float | None], steps: int = 512, **changes: Any) -> list[dict[str, Any]]:
    """One run for each loss."""
    key = {"workload": "text", "budget": "short", **rule._asdict(), "multiplier": 1.0}
    cost = {"steps": steps, "processor_seconds": 4.0}
    return [key | {"seed": seed, "val_loss": loss} | cost | changes for seed, loss in enumerate(losses)]


SMALL = constants(BASE_BATCH_SIZE, best=1.0, level=2.0)
LARGE = constants(LARGE_BATCH_SIZE, best=2.83, level=2.1)


def every_rule(**means: float) -> list[dict[str, Any]]:
    """All rows of the table at a loss of 2.2, except for some, named `<ramp>_<rule>`."""
    found = []
    for rule in RULES:
        level = means.get(f"{rule.ramp}_{rule.rule}", 2.2)
        found += ramp(rule, [level + noise for noise in SEED_NOISE])
    return found


def tuned_at_8(records: list[dict[str, Any]]) -> Any:
    return tuned(runs(records, "constant"), "text", "short", BASE_BATCH_SIZE)


def test_the_tuned_learning_rate_is_the_one_with_the_lowest_mean_over_seeds() -> None:
    records = constants(BASE_BATCH_SIZE, best=1.41, level=2.0)
    # The lowest loss of all does not make the lowest mean.
    pick(records, multiplier=0.71, seed=0)[0]["val_loss"] = 1.9
    best = tuned_at_8(records)
    assert (best.multiplier, best.edge, best.complete) == (1.41, False, True)
    assert best.losses[1.41] == pytest.approx(2.0)
    assert list(best.losses) == list(MULTIPLIERS["short", BASE_BATCH_SIZE])


@pytest.mark.parametrize("best", [0.71, 4.0])
def test_a_best_learning_rate_at_the_edge_is_told(best: float) -> None:
    found = tuned_at_8(constants(BASE_BATCH_SIZE, best, 2.0))
    assert (found.multiplier, found.edge) == (best, True)


def test_a_multiplier_that_lacks_a_seed_cannot_win_and_the_grid_is_not_complete() -> None:
    short = [r for r in SMALL if not (r["multiplier"] == 1.0 and r["seed"] == 2)]
    found = tuned_at_8(short)
    assert (found.multiplier, found.complete) == (0.71, False)
    assert tuned_at_8(SMALL[:2]) is None
    assert tuned(SMALL, "text", "long", BASE_BATCH_SIZE) is None


def test_a_diverged_run_loses_and_is_no_gap() -> None:
    records = [dict(r) for r in SMALL]
    pick(records, multiplier=1.0, seed=0)[0]["val_loss"] = None
    found = tuned_at_8(records)
    assert (found.multiplier, found.complete, found.losses[1.0]) == (0.71, True, math.inf)


def test_a_line_compares_with_the_tuned_small_batch_seed_by_seed() -> None:
    rule = Rule("slow", "sqrt", 0.0)
    # Differences 0.10, 0.13, 0.16: mean 0.13, standard deviation 0.03.
    records = ramp(rule, [2.09, 2.13, 2.17])
    other_lr = ramp(rule, [1.0, 1.0, 1.0], multiplier=2.0)
    small, large, line = lines([*SMALL, *LARGE], [*records, *other_lr], "text", "short")
    assert (small.step_share, small.time_share, small.difference.value) == (1.0, 1.0, 0.0)
    assert (large.step_share, large.time_share) == (1 / 16, 1 / 16)
    assert large.difference.value == pytest.approx(0.1)
    assert line.rule == rule
    assert line.loss == pytest.approx(2.13)
    assert line.spread == pytest.approx(0.04)
    assert (line.step_share, line.time_share) == (0.25, 0.4)
    assert line.difference.value == pytest.approx(0.13)
    assert line.difference.half_width == pytest.approx(T_975_OF_2 * 0.03 / math.sqrt(3), rel=1e-5)
    # Seeds that only one side has do not enter.
    line = lines(SMALL, ramp(CANDIDATES[0], [2.0, 2.0]), "text", "short")[-1]
    assert (line.difference.n, line.difference.value) == (2, pytest.approx(0.005))


def test_the_contest_names_the_best_candidate_with_at_most_half_the_steps() -> None:
    slow, fast = CANDIDATES
    records = [*ramp(slow, [2.02, 2.02, 2.02]), *ramp(fast, [2.0, 2.0, 2.0], steps=1500)]
    found = contest(lines([*SMALL, *LARGE], records, "text", "short"))
    assert found.constant.batch_size == BASE_BATCH_SIZE
    assert (found.best, found.step_share) == (slow, 0.25)
    assert found.difference.value == pytest.approx(0.02)
    assert found.difference.half_width == pytest.approx(T_975_OF_2 * 0.01 / math.sqrt(3), rel=1e-5)


def test_where_no_candidate_saves_half_the_steps_the_best_is_named_and_misses() -> None:
    large_wins = constants(LARGE_BATCH_SIZE, best=2.83, level=1.9)
    records = [run for rule in CANDIDATES for run in ramp(rule, [2.0, 2.0, 2.0])]
    found = contest(lines([*SMALL, *large_wins], records, "text", "short"))
    assert found.step_share == 4.0
    rows = {row["name"]: row for row in targets([*SMALL, *large_wins], records)}
    steps = next(row for name, row in rows.items() if "optimizer steps" in name)
    assert (steps["value"], steps["bound"], steps["met"]) == (4.0, 0.5, False)


def test_seeds_that_had_no_part_in_the_choice_tell_the_distance() -> None:
    slow, fast = CANDIDATES
    chosen = [*ramp(slow, [2.02, 2.02, 2.02]), *ramp(fast, [2.05, 2.05, 2.05])]

    def again(records: list[Any], loss: float, count: int) -> list[Any]:
        return [records[0] | {"val_loss": loss + 0.001 * seed, "seed": seed} for seed in MORE_SEEDS[:count]]

    base = [run for run in SMALL if run["multiplier"] == 1.0]
    for count, seeds, expected in ((2, 3, 0.02), (4, 4, 0.07)):
        sides = [*SMALL, *LARGE, *again(base, 2.0, count)], [*chosen, *again(chosen, 2.07, count)]
        found = contest(lines(*sides, "text", "short"))
        assert found.best == slow
        assert (found.difference.n, found.difference.value) == (seeds, pytest.approx(expected))


def test_there_is_no_contest_before_all_of_it_is_run() -> None:
    complete = [run for rule in CANDIDATES for run in ramp(rule, [2.0, 2.0, 2.0])]
    assert contest(lines([*SMALL, *LARGE], complete, "text", "short")) is not None
    assert contest(lines([*SMALL, *LARGE], complete[:-1], "text", "short")) is None
    assert contest(lines(SMALL, complete, "text", "short")) is None
    # A large batch of which only one learning rate was tried is no opponent yet.
    assert contest(lines([*SMALL, *LARGE[:3]], complete, "text", "short")) is None


def test_targets_of_a_table_with_hits_and_misses() -> None:
    means = {f"slow_{DEFAULT}": 2.004, "slow_sqrt": 2.006, f"fast_{DEFAULT}": 2.1, "fast_constant": 2.08}
    means |= {"slow_sqrt, approached": 2.0, "fast_sqrt, approached": 2.2}
    found = targets([*SMALL, *LARGE], every_rule(**means))
    values = [(row["value"], row["bound"], row["met"]) for row in found]
    assert values == [
        (0.004, 0.005, True),
        (0.25, 0.5, True),
        (-0.002, 0.01, True),
        (0.004, 0.01, True),
        (0.02, 0.01, False),
        (-0.1, 0.01, True),
    ]
    names = [row["name"] for row in found]
    assert "slow ramp with SurgeLR minus constant B = 8" in names[0]
    assert "minus sqrt" in names[2]
    assert "minus sqrt, approached" in names[3]
    assert "minus constant lr" in names[4]
    assert found[0]["half_width"] == 0.0


def test_decay_traded_for_batch_size_has_targets_of_its_own_on_the_long_budget() -> None:
    small = constants(BASE_BATCH_SIZE, best=1.0, level=2.0, budget="long")
    sqrt, measured = Rule(SEESAW, "sqrt", 0.0), Rule(SEESAW, DEFAULT, DEFAULT_OVERHEAD)
    for loss, steps, met in ((2.004, 1200, True), (2.01, 1536, False)):
        losses = [loss + noise for noise in SEED_NOISE]
        records = [*ramp(sqrt, losses, steps, budget="long"), *ramp(measured, losses, budget="long")]
        found = targets(small, records)
        assert [(row["value"], row["bound"], row["met"]) for row in found] == [
            (pytest.approx(loss - 2.0), 0.005, met),
            (pytest.approx(steps / 2048, abs=1e-4), 0.7, met),
        ]
        assert "Seesaw with sqrt minus constant B = 8 at its tuned lr" in found[0]["name"]
        assert targets(small, records[1:]) == []
        assert targets(SMALL, [run | {"budget": "short"} for run in records]) == []


def test_a_rule_that_diverged_misses_and_its_rival_does_not() -> None:
    ours = ramp(Rule("slow", DEFAULT, LARGE_OVERHEAD), [2.1, None, 2.1])
    fixed = [run for rule in ("sqrt", "constant") for run in ramp(Rule("slow", rule, 0.0), [2.2, 2.2, 2.2])]
    (row,) = targets(SMALL, runs([*ours, *fixed], "ramp"))
    assert (row["value"], row["met"]) == (math.inf, False)
    theirs = [dict(run, val_loss=None) for run in fixed]
    ours = ramp(Rule("slow", DEFAULT, LARGE_OVERHEAD), [2.1, 2.1, 2.1])
    (row,) = targets(SMALL, runs([*ours, *theirs], "ramp"))
    assert (row["value"], row["met"]) == (-math.inf, True)


def test_the_table_has_all_rows_the_tuned_learning_rates_and_their_edges() -> None:
    constant = [*SMALL, *constants(LARGE_BATCH_SIZE, best=8.0, level=2.1)]
    text = main_table(WORKLOADS["text"], constant, every_rule())
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 2 + len(RULES)
    assert rows[0] == "| constant 8 | tuned | 2.0000 ± 0.0100 (2.0100) | 100.0 % | 100 % | - | - | - |"
    assert rows[1].startswith("| constant 128 | tuned | 2.1000 ± 0.0100 (2.1100) | 6.2 % |")
    assert "| slow ramp | linear, approached | 2.2000 ± 0.0100 (2.2100) | 25.0 % | 40 % | - | - | - |" in rows
    assert "B = 8 short 0.0028 (1 x 0.0028)" in text
    assert "B = 128 short 0.022 (8 x 0.0028, at the edge of the grid" in text


def test_an_unfinished_row_says_so() -> None:
    text = main_table(WORKLOADS["text"], SMALL, ramp(CANDIDATES[0], [2.0]))
    assert "2.0000 (1 of 3 seeds)" in text
    assert main_table(WORKLOADS["digits"], SMALL, []).endswith("No row is finished.")


def test_the_summary_shows_half_widths_and_misses() -> None:
    common = {"bound": 0.005, "better": "lower", "command": "make"}
    missed = common | {"name": "a", "value": 0.01, "met": False, "half_width": 0.02, "seeds": 3}
    text = targets_table([missed, common | {"name": "b", "value": 0.0, "met": True}], ".4f", ".4f")
    assert "| a | 0.0100 ± 0.0200 (3 pairs of seeds) | at most 0.005 | missed |" in text
    assert "| b | 0.0000 | at most 0.005 | met |" in text


def test_the_report_is_written_from_nothing_and_from_something(tmp_path: Path) -> None:
    store = Store(tmp_path)
    write_report(store, tmp_path, grid.sizes())
    assert not (tmp_path / "figure.png").exists()
    diverged = ramp(Rule("fast", "linear", 0.0), [None, None, None])
    for kind, records in (
        ("constant", [*SMALL, *LARGE]),
        ("ramp", [*diverged, *(r for r in every_rule() if (r["ramp"], r["rule"]) != ("fast", "linear"))]),
    ):
        for record in records:
            store.add(kind, record)
    write_report(store, tmp_path, grid.sizes())
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert "| fast ramp | linear | inf (inf) | 25.0 % |" in (tmp_path / "report.md").read_text()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {row["met"] for row in summary["targets"]} == {True, False}
    assert summary["finished"]["ramp"] == len(SEEDS) * len(RULES)


def test_ramps_wait_for_the_tuning_and_carry_its_multiplier() -> None:
    assert grid.ramps(SMALL[:-1]) == ([], ["text short", "text long", "digits short", "digits long"])
    cells, untuned = grid.ramps([*SMALL, *LARGE])
    assert untuned == ["text long", "digits short", "digits long"]
    assert len(cells) == len(RULES) * len(SEEDS)
    assert {cell.key["multiplier"] for cell in cells} == {1.0}
    assert {cell.key["workload"] for cell in cells} == {"text"}
    shifted = constants(BASE_BATCH_SIZE, best=1.41, level=2.0, workload="digits", budget="long")
    assert {cell.key["multiplier"] for cell in grid.ramps(shifted)[0]} == {1.41}


def test_the_grid_has_the_cells_that_it_says() -> None:
    tuning = [*grid.constants(BASE_BATCH_SIZE), *grid.constants(LARGE_BATCH_SIZE)]
    everything = [
        record
        for workload in WORKLOADS
        for budget in ("short", "long")
        for record in constants(BASE_BATCH_SIZE, 1.0, 2.0, workload, budget)
    ]
    cells = [*tuning, *grid.ramps(everything)[0]]
    kinds = [cell.kind for cell in cells]
    assert {kind: kinds.count(kind) for kind in grid.sizes()} == grid.sizes()
    assert len({(cell.kind, *sorted(cell.key.items())) for cell in cells}) == len(cells)
    assert all(tuple(sorted(cell.key)) == tuple(sorted(KEYS[cell.kind])) for cell in cells)
    rules = {(rule.ramp, rule.rule) for rule in RULES}
    assert {(ramp, fixed) for ramp in RAMPS for fixed in FIXED_RULES} <= rules


def test_a_run_goes_on_with_the_ramps_once_the_small_batch_is_tuned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def fake(**key: Any) -> dict[str, Any]:
        ran.append(f"{key['ramp']} {key['multiplier']}" if "ramp" in key else f"B {key['batch_size']}")
        away = abs(math.log2(key["multiplier"] / 1.41))
        return {"val_loss": 2.0 + away, "steps": 1, "processor_seconds": 1.0}

    def run(*flags: str) -> str:
        monkeypatch.setattr(sys, "argv", ["batch_warmup", "--workload", "digits", "--run-only", *flags])
        command.main()
        return capsys.readouterr().out.splitlines()[-1]

    monkeypatch.setattr(grid, "constant", fake)
    monkeypatch.setattr(grid, "ramp", fake)
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    monkeypatch.setattr("benchmarks.cells.commit", lambda: "abc")
    said = run("--length", "short")
    assert said.endswith("finished; ramps wait for the tuning of text short, text long, digits long")
    short, long = (len(SEEDS) * (len(RULES) + len(MULTIPLIERS[b, LARGE_BATCH_SIZE])) for b in BUDGETS)
    tuning = len(SEEDS) * len(MULTIPLIERS["short", BASE_BATCH_SIZE])
    assert set(ran[:tuning]) == {"B 8"}
    assert {name.partition(" ")[2] for name in ran[tuning:] if not name.startswith("B")} == {"1.41"}
    assert len(ran) == tuning + short
    run()
    # Both sides of the contest of the long budget, with seeds that had no part in it.
    more = 2 * len(MORE_SEEDS)
    assert len(ran) == tuning + short + len(SEEDS) * len(MULTIPLIERS["long", BASE_BATCH_SIZE]) + long + more
    assert len(Store(tmp_path).records("ramp")) == 2 * len(SEEDS) * len(RULES) + len(MORE_SEEDS)
    # All of them agree: the interval is narrow, and nothing is left to run.
    finished = len(ran)
    said = "every cell that could be run is finished; ramps wait for the tuning of text short, text long"
    assert (run(), len(ran)) == (said, finished)


def test_the_learning_rate_rises_to_one_and_ends_at_zero() -> None:
    factor = lr_factor(16 * 8 * BASE_BATCH_SIZE)
    values = [factor(step) for step in range(16 * 8 + 1)]
    assert max(values) == values[8] == 1.0
    assert values[:9] == sorted(values[:9])
    assert values[8:] == sorted(values[8:], reverse=True)
    assert values[-1] == pytest.approx(0.0)


def test_the_order_of_examples_depends_on_the_seed_alone() -> None:
    what = WORKLOADS["digits"]
    torch.manual_seed(1)
    first = list(what.sampler("quick", seed=3))
    torch.manual_seed(2)
    assert list(what.sampler("quick", seed=3)) == first
    assert list(what.sampler("quick", seed=4)) != first
    assert sorted(first) == list(range(what.examples["quick"]))


@pytest.mark.parametrize("budget", ["short", "long"])
@pytest.mark.parametrize("name", WORKLOADS)
def test_every_budget_is_whole_epochs_and_whole_batches(name: str, budget: str) -> None:
    what = WORKLOADS[name]
    assert what.examples["long"] == 4 * what.examples["short"]
    assert what.epochs(budget) * (what.examples[budget] // what.epochs(budget)) == what.examples[budget]
    assert (what.examples[budget] // what.epochs(budget)) % LARGE_BATCH_SIZE == 0


def test_an_approached_rule_is_that_law_with_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(training, "_run", lambda *arguments: given.append(arguments[-1]) or {})
    for rule in ("linear", "linear, approached"):
        training.ramp("digits", "quick", "fast", rule, 0.0, 1.0, 0)
    exact, approached = (callback.settings for callback in given)
    assert exact.law == approached.law == "linear"
    assert approached.max_drift_per_step == MAX_DRIFT


@pytest.mark.slow
def test_the_quick_cells_run(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    assert run_cells(grid.quick(), None, 60.0, strict=True) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert len(printed) == len(grid.quick())
