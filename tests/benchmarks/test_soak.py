"""A short run through the bad times of `make soak`."""

import math
from itertools import pairwise

import pytest
import torch

from benchmarks.soak.__main__ import (
    CONSTANT,
    NAN_EXAMPLES,
    NAN_LOSS,
    PHASES,
    WINDOWS,
    ZERO,
    costs,
    phase_at,
    recovery,
    run,
    slope,
    summarised,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`"),
    pytest.mark.filterwarnings("ignore:Measuring failed and is tried again later"),
    pytest.mark.filterwarnings("ignore:No law was fitted to a measurement"),
]

STEPS = 240


def test_bad_times_are_survived_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    # What the collector knows is a matter of the long run.
    monkeypatch.setattr("benchmarks.soak.__main__.gc.collect", lambda: 0)
    monkeypatch.setattr("benchmarks.soak.__main__.gc.get_objects", list)
    module, watch = run(STEPS, probe_every=2, probe_examples=32)
    assert watch.bad_factors == watch.bad_weights == 0
    assert all(bool(parameter.isfinite().all()) for parameter in module.parameters())
    assert len(watch.records) == STEPS // (STEPS // WINDOWS)
    # Windows that are not finite are dropped, and the law from before stands.
    for phase in (NAN_LOSS, NAN_EXAMPLES):
        assert watch.reasons[phase.name].keys() == {"measured"}, phase.name
    for phase in (CONSTANT, ZERO):  # where gradients are zero
        assert any(reason.startswith("held") for reason in watch.reasons[phase.name]), phase.name
    # Every failure doubles the spacing of two steps; four in a phase make it 32.
    assert max(recovery(watch.records, STEPS).values()) * STEPS <= 34
    assert not watch.records[-1]["reason"].startswith("held")
    assert all(math.isfinite(entry["value"]) for entry in summarised(watch, STEPS))


def test_phases_do_not_touch() -> None:
    assert phase_at(0.0) is None
    for before, after in pairwise(PHASES):
        assert phase_at(before.begin) is before
        assert phase_at((before.end + after.begin) / 2) is None


def test_a_slope_is_that_of_a_line_and_its_error_that_of_the_scatter() -> None:
    steps = list(range(0, 10_000, 100))
    growth, error = slope(steps, [3.0 * step / 10_000 for step in steps])
    assert growth == pytest.approx(3.0)
    assert error == pytest.approx(0.0, abs=1e-9)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(100, generator=generator).tolist()
    growth, error = slope(steps, noise)
    assert abs(growth) < 4.0 * error
    assert 0.0 < error < 1.0


def test_costs_are_those_between_two_shares_of_the_run() -> None:
    names = ("passes", "examples", "measuring", "seconds")
    records = [dict.fromkeys(names, 0.0) | {"examples": 8.0 * n, "seconds": 2.0 * n} for n in range(1, 11)]
    records[-1] |= {"passes": 4.0, "measuring": 0.5}
    assert costs(records, 0.6, 0.7) == (0.0, 0.0)
    assert costs(records, 0.9, 1.0) == (0.5, 0.25)
