"""What a sweep wants, compares and estimates; how it is typed; how losses are taken down."""

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_surge.sweep.cells import (
    Cell,
    Grid,
    Outcome,
    Reached,
    SweepSettings,
    best_lr,
    parse_numbers,
    planned,
)
from lightning_surge.sweep.worker import first_reached

SETTINGS = SweepSettings(("run.yaml",), config_digest="abc", examples=1024)
GRID = Grid((8, 16), (0.01, 0.1), (0,))
Records = dict[Cell, Outcome]


def done(batch_size: int, lr: float, loss: float | None, seed: int = 0, **rest: Any) -> Records:
    status = "diverged" if loss is None else "finished"
    return {Cell(batch_size, lr, seed): Outcome(**({"status": status, "loss": loss} | rest))}


@pytest.mark.parametrize(
    ("words", "whole", "expected"),
    [
        (["16", "4", "16"], True, (4, 16)),
        (["16,4,", "64,8"], True, (4, 8, 16, 64)),
        (["16:1024:4"], True, (16, 64, 256, 1024)),
        (["10:20:3"], True, (10, 14, 20)),
        (["1e-4:1e-1:4"], False, (1e-4, 1e-3, 1e-2, 1e-1)),
        (["1e-2:1:3,0.05"], False, (0.01, 0.05, 0.1, 1.0)),
        (["1e-2:1:3", "0.05"], False, (0.01, 0.05, 0.1, 1.0)),
    ],
)
def test_grids_as_they_are_typed(words: list[str], whole: bool, expected: tuple[float, ...]) -> None:
    assert parse_numbers(words, "x", whole=whole) == expected


WRONG = [
    "", "a", "0", "-1", "inf", "nan", "1:2", "2:1:3", "1:2:1", "0:1:3", "1:2:3:4", "1:inf:3", "2,,3", ",",
]  # fmt: skip


@pytest.mark.parametrize(
    ("word", "whole"), [(word, whole) for word in WRONG for whole in (0, 1)] + [("1.5", 1), ("1,024", 1)]
)
def test_what_is_no_grid_is_named(word: str, whole: bool) -> None:
    with pytest.raises(ValueError, match=r"Expected --lrs to be positive .*numbers") as caught:
        parse_numbers(["1", word], "--lrs", whole=whole)
    assert repr(word) in str(caught.value)


@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 8))
def test_micro_batches_fit_and_make_up_the_batch(share: int, largest: int, replicas: int) -> None:
    settings = SweepSettings(("run.yaml",), max_micro_batch_size=largest, replicas=replicas)
    parts = settings.micro_batches_of(share * replicas)
    assert share % parts == 0
    assert share // parts <= largest
    # As few as possible.
    assert all(share % fewer or share // fewer > largest for fewer in range(1, parts))


def test_cells_have_equal_examples_or_equal_steps() -> None:
    assert [SETTINGS.steps_of(size) for size in (8, 16, 2048)] == [128, 64, 1]
    assert SETTINGS.examples_of(24) == 43 * 24  # 1024 / 24 is 42.7
    equal_steps = SweepSettings(("run.yaml",), steps=10)
    assert [equal_steps.examples_of(size) for size in (8, 16)] == [80, 160]


@pytest.mark.parametrize("sign", [1, -1])
def test_the_first_reaching_counts(sign: int) -> None:
    losses = [(1, 3.0), (2, 1.5), (3, 2.5), (4, 0.5), (5, 3.0)]
    looks = [(step, 8 * step, sign * loss) for step, loss in losses]
    # Down from 3 to 1.5 the line meets 2 at step 1.67; from 2.5 to 0.5 it meets 1 at step 3.75.
    for target, step in ((2.0, 2), (1.0, 4), (0.0, None)):
        expected = Reached(sign * target, step, None if step is None else 8 * step)
        assert first_reached(looks, sign * target, maximize=sign < 0) == expected


@pytest.mark.parametrize("looks", [[(7, 56, 1.0)], [(7, 56, 3.0), (7, 56, 1.0)]])
def test_a_first_look_below_the_target_and_two_at_one_step(looks: list[tuple[int, int, float]]) -> None:
    assert first_reached(looks, 2.0) == Reached(2.0, 7, 56)


def test_the_best_is_over_seeds_and_a_divergence_spoils_it() -> None:
    records = (
        done(8, 0.01, 0.5) | done(8, 0.01, 0.7, seed=1)
        | done(8, 0.1, 0.1) | done(8, 0.1, None, seed=1)
        | done(8, 0.001, 0.9) | done(16, 0.1, 0.0) | done(8, 1.0, None, status="out_of_memory")
    )  # fmt: skip
    best = best_lr(records, 8)
    assert (best.lr, best.loss, best.edge, best.steps) == (0.01, pytest.approx(0.6), None, None)
    assert best_lr(records, 32) is None
    assert best_lr(done(8, 0.1, None), 8) is None
    largest = best_lr(records, 8, maximize=True)
    assert (largest.lr, largest.loss, largest.edge) == (0.001, 0.9, "lowest")


def test_the_best_for_a_target_takes_the_fewest_steps() -> None:
    def reaching(lr: float, steps: int | None, loss: float) -> Records:
        return done(8, lr, loss, reached=(Reached(1.0, steps, 8), Reached(0.1, None, None)))

    records = reaching(0.01, 50, 0.1) | reaching(0.1, 20, 0.5) | reaching(1.0, None, 1.2)
    # Nobody reached the other one: the loss decides.
    for target, expected in ((1.0, (0.1, 20, None)), (0.1, (0.01, None, "lowest"))):
        best = best_lr(records, 8, target)
        assert (best.lr, best.steps, best.edge) == expected


def swept(grid: Grid, loss: Callable[[Cell], float | None], refine: int, maximize: bool = False) -> Records:
    """All that a sweep would run, one cell at a time."""
    records: Records = {}
    while left := [c for c in planned(grid, records, refine=refine, maximize=maximize) if c not in records]:
        records |= done(left[0].batch_size, left[0].lr, loss(left[0]), left[0].seed)
    return records


@pytest.mark.parametrize(
    ("lrs", "loss", "refine", "expected"),
    [
        ((1.0, 2.0), lambda lr: abs(math.log2(lr / 8)), 9, [1, 2, 4, 8, 16]),
        ((1.0, 2.0), lambda lr: abs(math.log2(lr / 0.25)), 9, [0.125, 0.25, 0.5, 1, 2]),
        # Bounded.
        ((1.0, 2.0, 4.0), lambda lr: -lr, 2, [1, 2, 4, 8, 16]),
        # Below where everything diverged.
        ((1.0, 2.0), lambda lr: None if lr > 0.4 else 1 / lr, 5, [0.125, 0.25, 0.5, 1, 2]),
        # A single one to both sides.
        ((1.0,), lambda lr: abs(math.log(lr)), 4, [10**-0.5, 1.0, 10**0.5]),
    ],
)
def test_refining_goes_beyond_the_edge_until_the_best_has_neighbours(
    lrs: tuple[float, ...], loss: Callable[[float], float | None], refine: int, expected: list[float]
) -> None:
    # Another batch size, which is best in the middle, is refined by itself; both seeds run.
    records = swept(
        Grid((8, 16), lrs, (0, 1)), lambda c: loss(c.lr) if c.batch_size == 8 else abs(c.lr - 2), refine
    )
    for seed in (0, 1):
        found = sorted(cell.lr for cell in records if (cell.batch_size, cell.seed) == (8, seed))
        assert found == pytest.approx(expected, rel=1e-5)
    assert len(records) == 2 * (len(expected) + len({c.lr for c in records if c.batch_size == 16}))


def test_refining_a_maximum() -> None:
    records = swept(Grid((8,), (1.0, 2.0), (0,)), lambda c: -abs(c.lr - 4), 9, maximize=True)
    assert sorted(cell.lr for cell in records) == [1, 2, 4, 8]


def test_refining_waits_for_all_cells_and_stops_where_cells_fail() -> None:
    assert planned(GRID, done(8, 0.1, 0.1), refine=3) == GRID.cells()
    assert planned(GRID, dict.fromkeys(GRID.cells(), Outcome("failed")), refine=3) == GRID.cells()
    # The edge was tried beyond, and ran out of memory.
    tried = done(8, 1.0, 0.5) | done(8, 2.0, 0.4) | done(8, 4.0, None, status="out_of_memory")
    assert len(planned(Grid((8,), (1.0, 2.0), (0,)), tried, refine=3)) == 3
