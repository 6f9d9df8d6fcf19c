"""Sizes that grow as a learning-rate schedule falls: a function of examples, from a copy that is replayed."""

import math
import time
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    SequentialLR,
    StepLR,
)

from lightning_surge.schedules import Progress, Seesaw, by_examples, plan_windows, total_steps
from lightning_surge.schedules.seesaw import SeesawSchedule

TICKS = 40
SCHEDULERS: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "cosine": lambda o: CosineAnnealingLR(o, T_max=TICKS),
    "restarts": lambda o: CosineAnnealingWarmRestarts(o, T_0=12),
    "one cycle": lambda o: OneCycleLR(o, max_lr=[0.3, 0.2], total_steps=TICKS),
    "warm-up, stable, decay": lambda o: SequentialLR(
        o,
        [LinearLR(o, 0.25, total_iters=6), LinearLR(o, 1.0, 1.0, total_iters=14),
         LinearLR(o, 1.0, 0.0, total_iters=20)],
        milestones=[6, 20],
    ),
    "dips": lambda o: LambdaLR(o, lambda step: {5: 0.5, 9: 0.25, 20: 0.125}.get(step, 1.0)),
    "from zero": lambda o: LambdaLR(o, lambda step: min(step / 8, 1.0, 2.0 - step / 20)),
}  # fmt: skip


def optimizer() -> SGD:
    """Two groups, of which the first has the larger learning rate."""
    return SGD([{"params": [torch.zeros(1)], "lr": 0.2}, {"params": [torch.zeros(1)], "lr": 0.1}])


def along(make: Callable[[Optimizer], LRScheduler], rule: Seesaw, per_step: float = 16) -> SeesawSchedule:
    return rule.along(by_examples(make(optimizer()), per_step))


def rates(make: Callable[[Optimizer], LRScheduler], steps: int) -> list[float]:
    """The largest learning rate of the groups before each step of constant training."""
    one = optimizer()
    scheduler, seen = make(one), []
    for step in range(steps):
        seen.append(max(float(group["lr"]) for group in one.param_groups))
        one.step()
        if step < steps - 1:
            scheduler.step()
    return seen


@pytest.mark.parametrize("name", SCHEDULERS)
@settings(max_examples=10, deadline=None)
@given(
    start=st.integers(1, 100),
    growth=st.integers(1, 50),
    multiple_of=st.sampled_from([1, 8]),
    per_step=st.sampled_from([0.1, 1, 16, 33]),
)
def test_are_start_over_the_share_of_the_peak(
    name: str, start: int, growth: int, multiple_of: int, per_step: float
) -> None:
    start *= multiple_of
    rule = Seesaw(start, start * growth, multiple_of)
    sizes, peak = along(SCHEDULERS[name], rule, per_step), 0.0
    for step, rate in enumerate(rates(SCHEDULERS[name], TICKS)):
        peak = max(peak, rate)
        share = rate / peak if peak else 1.0
        wanted = start / share if share > 0 else math.inf
        expected = min(math.floor(min(wanted * (1 + 1e-9), 1e6) / multiple_of) * multiple_of, rule.maximum)
        for examples in (step * per_step, (step + 0.999) * per_step):
            assert sizes(Progress(examples=examples)) == expected


def test_asked_in_any_order_they_are_the_same() -> None:
    rule = Seesaw(4, 64)
    forwards, backwards = (along(SCHEDULERS["from zero"], rule) for _ in range(2))
    points = range(0, 3000 * 16, 7 * 16)
    ahead = [forwards(Progress(examples=point)) for point in points]
    assert ahead == [backwards(Progress(examples=point)) for point in reversed(points)][::-1]
    assert ahead[-1] == 64


def test_the_schedule_itself_is_not_moved() -> None:
    one = optimizer()
    clock = by_examples(ExponentialLR(one, 0.5), 16)
    assert Seesaw(4, 64).along(clock)(Progress(examples=64)) == 64
    assert (clock.ticks, clock.get_last_lr(), clock._fed) == (0, [0.2, 0.1], False)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_windows_and_steps_are_those_of_looking_at_every_step(name: str) -> None:
    sizes, done, looked = along(SCHEDULERS[name], Seesaw(4, 32), 4), 0, []
    while done < 160:
        looked.append(min(sizes(Progress(examples=done)), 160 - done))
        done += looked[-1]
    windows = plan_windows(along(SCHEDULERS[name], Seesaw(4, 32), 4), Progress(), examples=160, largest=64)
    assert [sum(window) for window in windows] == looked
    assert total_steps(along(SCHEDULERS[name], Seesaw(4, 32), 4), 160) == len(looked)
    assert len(set(looked)) > 3


def test_counting_answers_or_refuses_in_a_second() -> None:
    plateau = along(lambda o: StepLR(o, 10**9), Seesaw(16, 64))
    assert total_steps(plateau, 16 * 50_000) == 50_000
    begin = time.perf_counter()
    with pytest.raises(ValueError, match="at most 100000 steps to be counted, got one that is longer"):
        total_steps(along(lambda o: StepLR(o, 10**9), Seesaw(16, 64)), 10**12)
    with pytest.raises(ValueError, match=r"Expected a Schedule, AccumulatedSchedule or SampledSchedule"):
        total_steps(Seesaw(16, 64), 10**12)  # type: ignore[arg-type]
    assert time.perf_counter() - begin < 5.0


def test_growth_is_seen_where_it_comes_before_the_end() -> None:
    late = along(lambda o: LambdaLR(o, lambda step: 0.5 if step >= 5_000 else 1.0), Seesaw(4, 8), 4)
    assert [late.grows_within(4 * 5_000 + more) for more in (0, 1, 400)] == [False, True, True]
    assert not along(lambda o: LinearLR(o, 0.1, total_iters=9), Seesaw(4, 8)).grows_within(10_000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": 64, "maximum": 16}, "Expected start <= maximum, got start=64, maximum=16"),
        ({"start": 8, "maximum": 20, "multiple_of": 8}, "use maximum=16"),
        ({"start": 0, "maximum": 16}, "start >= 1"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Seesaw(**arguments)


def test_a_clock_that_has_moved_is_refused() -> None:
    clock = by_examples(StepLR(optimizer(), 4), 16)
    clock.advance(32)
    clock.optimizer.step()
    clock.step()
    with pytest.raises(ValueError, match="before its first step, got ticks=2"):
        Seesaw(4, 8).along(clock)
    with pytest.raises(ValueError, match="before its first step, got StepLR"):
        Seesaw(4, 8).along(clock.scheduler)  # type: ignore[arg-type]
