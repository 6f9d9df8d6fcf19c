"""How far from the truth a noise scale counts as, and that the streams have the noise which they say."""

import math
from dataclasses import replace

import pytest
import torch

from benchmarks.noise_supply import __main__ as supply

SHARE, OCTAVES = "accumulation 4, 62", "one process at 1 %, 62"


@pytest.mark.parametrize(
    ("name", "found", "error"),
    [
        (SHARE, 62.0 * 1.3, 0.3),
        (SHARE, 62.0 * 0.7, 0.3),
        (OCTAVES, 62.0 * 2.0, 1.0),
        (OCTAVES, 62.0 / 4.0, 2.0),
        *((name, unknown, math.inf) for name in (SHARE, OCTAVES) for unknown in (0.0, math.inf, math.nan)),
    ],
)
def test_errors_are_shares_or_octaves(name: str, found: float, error: float) -> None:
    assert supply.CELLS[name].error_of(found) == pytest.approx(error)


def test_a_cell_is_its_median_and_what_is_unknown_counts_as_infinite() -> None:
    scales = [62.0, 62.0 * 1.1, None, 62.0 * 1.2, 62.0 * 1.4]
    (row,) = supply.summarised({SHARE: [{"noise_scale": scale} for scale in scales]})
    assert (row["value"], row["bound"], row["met"]) == (0.2, 0.2, True)
    assert (row["quartiles"], row["streams"]) == ([0.1, 0.4], 5)
    assert "1,000 examples, accumulation 4, 62: median error, share of the truth" in row["name"]
    (row,) = supply.summarised({OCTAVES: [{"noise_scale": scale} for scale in (31.0, math.inf, math.nan)]})
    assert (row["value"], row["met"]) == (math.inf, False)


def test_examples_have_the_noise_of_their_cell() -> None:
    cell = replace(supply.CELLS["one process at 1 %, 1146"], examples=4096)
    rows = supply.examples(cell, seed=3).double()
    assert torch.equal(rows.float(), supply.examples(cell, seed=3))
    assert not torch.equal(rows.float(), supply.examples(cell, seed=4))
    trace = float(rows.var(0).sum())
    # One standard error of the trace is its root-mean-square eigenvalue times sqrt(2 / n): 0.4 %.
    assert trace == pytest.approx(1146.0, rel=0.016)
    mean_sq = float(rows.mean(0).square().sum()) - trace / len(rows)
    assert mean_sq == pytest.approx(1.0, abs=0.1)
