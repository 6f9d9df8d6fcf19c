import math
from collections.abc import Callable
from fractions import Fraction
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiplicativeLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from lightning_surge import BatchSizeScheduler
from lightning_surge.schedules.by_examples import ExamplesClock, by_examples
from lightning_surge.schedules.sizes import ConstantSize
from tests.drawn import through_a_checkpoint
from tests.trainings import Regression, regression_data, scaling, trained, with_lr

MakeScheduler = Callable[[Optimizer], LRScheduler]
STEPS = 40  # what the schedulers below are written for


class Cosine:
    """A callable that is an object: LambdaLR saves it, and ends at exactly zero."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __call__(self, step: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * min(step / self.steps, 1.0)))


SCHEDULERS: dict[str, MakeScheduler] = {
    "step": lambda o: StepLR(o, step_size=7, gamma=0.3),
    "multi_step": lambda o: MultiStepLR(o, milestones=[5, 6, 30], gamma=0.3),
    "exponential": lambda o: ExponentialLR(o, gamma=0.9),
    "linear": lambda o: LinearLR(o, start_factor=0.1, total_iters=13),
    "polynomial": lambda o: PolynomialLR(o, total_iters=STEPS, power=1.7),
    "multiplicative": lambda o: MultiplicativeLR(o, lambda step: 1 - step / 100),
    "lambda": lambda o: LambdaLR(o, Cosine(STEPS)),
    "cosine": lambda o: CosineAnnealingLR(o, T_max=STEPS, eta_min=0.001),
    "restarts": lambda o: CosineAnnealingWarmRestarts(o, T_0=3, T_mult=2),
    "one_cycle": lambda o: OneCycleLR(o, max_lr=[0.3, 0.2], total_steps=STEPS + 1),
    "cyclic": lambda o: CyclicLR(o, base_lr=0.01, max_lr=0.2, step_size_up=6, mode="exp_range", gamma=0.9),
    "sequential": lambda o: SequentialLR(
        o, [LinearLR(o, total_iters=6), CosineAnnealingLR(o, T_max=STEPS - 6)], milestones=[6]
    ),
    "chained": lambda o: ChainedScheduler([ConstantLR(o, total_iters=9), ExponentialLR(o, gamma=0.95)]),
}


def optimizer_with_two_groups() -> Optimizer:
    one, two = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    return SGD([{"params": [one], "lr": 0.1}, {"params": [two], "lr": 0.03}], momentum=0.9)


def hyperparameters(optimizer: Optimizer) -> list[tuple[float, float]]:
    return [(group["lr"], group["momentum"]) for group in optimizer.param_groups]


def plain_run(make: MakeScheduler) -> list[list[tuple[float, float]]]:
    """What the scheduler sets after 0, 1, ..., STEPS steps of constant training."""
    optimizer = optimizer_with_two_groups()
    scheduler, seen = make(optimizer), [hyperparameters(optimizer)]
    for _ in range(STEPS):
        optimizer.step()
        scheduler.step()
        seen.append(hyperparameters(optimizer))
    return seen


def take_step(clock: ExamplesClock, examples: float) -> None:
    clock.advance(examples)
    clock.optimizer.step()
    clock.step()


def clock_of(make: MakeScheduler, examples_per_step: float = 16) -> ExamplesClock:
    return by_examples(make(optimizer_with_two_groups()), examples_per_step)


@pytest.mark.slow
class TestExactness:
    @pytest.mark.parametrize("name", SCHEDULERS)
    @settings(max_examples=8, deadline=None)
    @given(sizes=st.lists(st.integers(1, 150), min_size=1, max_size=20), examples_per_step=st.integers(1, 33))
    def test_bit_identical_to_constant_training(
        self, name: str, sizes: list[int], examples_per_step: int
    ) -> None:
        plain = plain_run(SCHEDULERS[name])
        clock = clock_of(SCHEDULERS[name], examples_per_step)
        assert hyperparameters(clock.optimizer) == plain[0]
        for examples in accumulate(sizes):
            if examples // examples_per_step > STEPS:
                break
            take_step(clock, examples - clock.examples)
            assert clock.ticks == examples // examples_per_step
            assert hyperparameters(clock.optimizer) == plain[clock.ticks]
            assert clock.get_last_lr() == [lr for lr, _ in plain[clock.ticks]]

    @pytest.mark.parametrize(
        ("size", "examples_per_step"), [("0.1", "0.3"), ("1/3", "1"), ("1000000.1", "1000")]
    )
    def test_a_million_fractional_sizes_do_not_drift(self, size: str, examples_per_step: str) -> None:
        clock = clock_of(SCHEDULERS["step"], float(Fraction(examples_per_step)))
        number = float(Fraction(size))
        for _ in range(10**6):
            clock.advance(number)
        assert clock.examples == float(10**6 * Fraction(number))
        # What is meant is 0.1, not the float next to it.
        assert clock._due() == 10**6 * Fraction(size) // Fraction(examples_per_step)

    @pytest.mark.parametrize(("size", "examples_per_step"), [(0.1, 1.0), (0.7, 4.9), (0.3, 0.9), (1.1, 3.3)])
    def test_fractional_ticks_come_with_the_step_that_completes_them(
        self, size: float, examples_per_step: float
    ) -> None:
        clock = clock_of(SCHEDULERS["step"], examples_per_step)
        per_tick = round(examples_per_step / size)
        for step in range(1, 500):
            take_step(clock, size)
            assert clock.ticks == step // per_tick

    @pytest.mark.parametrize("ticks", [1, 3, 10**6, 9 * 10**6])
    def test_one_token_short_of_a_tick(self, ticks: int) -> None:
        clock = clock_of(SCHEDULERS["step"], 10**8)
        clock.advance(10**8 * ticks - 1)
        assert clock._due() == ticks - 1
        clock.advance(1)
        assert clock._due() == ticks

    def test_announcements_add_up_until_the_scheduler_is_called(self) -> None:
        """As with frequency=2 or interval="epoch"."""
        clock = clock_of(SCHEDULERS["step"])
        for _ in range(3):
            clock.advance(12)
            clock.optimizer.step()
        assert (clock.examples, clock.ticks) == (36, 0)
        clock.step()
        assert clock.ticks == 2

    def test_public_attributes_are_the_schedulers(self) -> None:
        clock = clock_of(SCHEDULERS["one_cycle"])
        take_step(clock, 50)
        assert (clock.last_epoch, clock.total_steps, clock.cycle_momentum) == (3, STEPS + 1, True)
        assert clock.base_lrs == clock.scheduler.base_lrs
        assert (clock.examples_per_step, clock.examples) == (16, 50)
        with pytest.raises(AttributeError, match="gamma"):
            _ = clock.gamma
        with pytest.raises(AttributeError, match=r"'ExamplesClock' object has no attribute '_step_count'"):
            _ = clock._step_count


class TestEnds:
    def test_one_cycle_rests_where_its_minimum_is(self) -> None:
        """Torch goes on for a step, to -0.014 here, and raises at the next."""
        optimizer = SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
        cycle = OneCycleLR(optimizer, max_lr=0.1, total_steps=10, anneal_strategy="linear")
        clock = by_examples(cycle, 16)
        for size in (100, 30, 26, 64):  # the last step begins at 156 of 160 examples
            take_step(clock, size)
        assert clock.ticks == cycle.last_epoch == 9
        assert clock.get_last_lr() == [pytest.approx(4e-7)]
        # A step too many: constant training would have raised.
        clock.advance(0)
        with pytest.warns(UserWarning, match="got total_steps=10 in OneCycleLR, which ended after 10 x 16"):
            take_step(clock, 1)
        take_step(clock, 64)  # warns once
        assert clock.get_last_lr() == [pytest.approx(4e-7)]


class TestRefusals:
    def test_schedulers(self) -> None:
        optimizer = optimizer_with_two_groups()
        with pytest.raises(TypeError, match=r"got ReduceLROnPlateau, .*: return it as it is"):
            by_examples(ReduceLROnPlateau(optimizer), 16)
        with pytest.raises(TypeError, match=r"got an ExamplesClock, .*: wrap once"):
            by_examples(clock_of(SCHEDULERS["step"]), 16)

    @pytest.mark.parametrize(
        ("other", "name"), [(None, "NoneType"), (StepLR, "StepLR"), (object(), "object"), (len, "builtin_f")]
    )
    def test_what_is_no_scheduler(self, other: Any, name: str) -> None:
        with pytest.raises(TypeError, match=f"Expected an instance of .*LRScheduler, got {name}.*: wrap"):
            by_examples(other, 16)

    def test_a_clock_that_nobody_advances(self) -> None:
        clock = clock_of(SCHEDULERS["step"])
        with pytest.raises(
            RuntimeError,
            match=r"never advanced: add BatchSizeScheduler.*BatchSizeScheduler\(ConstantSize\(16\)\)",
        ):
            clock.step()

    def test_a_clock_inside_another_scheduler(self) -> None:
        clock = clock_of(SCHEDULERS["step"])
        with pytest.raises(RuntimeError, match="not inside another scheduler"):
            ChainedScheduler([clock]).step()
        with pytest.raises(RuntimeError, match="not inside another scheduler"):
            SequentialLR(clock.optimizer, [clock, StepLR(clock.optimizer, 1)], milestones=[3])

    def test_steps_that_were_not_announced_move_nothing(self) -> None:
        clock = clock_of(SCHEDULERS["step"])
        clock.advance(0)  # a callback that says so before training starts
        clock.step()
        take_step(clock, 20)
        clock.step()
        clock.step()
        assert (clock.examples, clock.ticks) == (20, 1)

    def test_states(self) -> None:
        clock = clock_of(SCHEDULERS["step"])
        with pytest.raises(
            ValueError, match=r"got that of a bare scheduler, \['_.*: resume with the scheduler"
        ):
            clock.load_state_dict(clock.scheduler.state_dict())
        with pytest.raises(ValueError, match=r"of the checkpoint, 32, got 16: use examples_per_step=32;"):
            clock.load_state_dict(clock_of(SCHEDULERS["step"], 32).state_dict())


class TestState:
    @pytest.mark.parametrize("name", SCHEDULERS)
    def test_goes_on_bit_identically(self, name: str) -> None:
        whole = clock_of(SCHEDULERS[name], np.int64(16))  # type: ignore[arg-type]
        for size in (3.3, 40.1, 100.0, 0.1):
            take_step(whole, size)
        state = {"clock": whole.state_dict(), "optimizer": whole.optimizer.state_dict()}
        loaded = through_a_checkpoint(state)
        resumed = clock_of(SCHEDULERS[name])
        resumed.load_state_dict(loaded["clock"])
        resumed.optimizer.load_state_dict(loaded["optimizer"])
        assert loaded["clock"].keys() == whole.state_dict().keys()  # loading takes nothing out
        assert resumed.state_dict() == whole.state_dict()
        assert loaded["clock"]["rounding"] != 0  # or the sizes test nothing
        for size in (0.1, 25.6, 70.0, 9.3):
            take_step(whole, size)
            take_step(resumed, size)
            assert hyperparameters(resumed.optimizer) == hyperparameters(whole.optimizer)
            assert (resumed.examples, resumed.ticks) == (whole.examples, whole.ticks)
        assert whole.ticks == 15

    def test_a_restored_clock_still_has_to_be_advanced(self) -> None:
        whole, resumed = clock_of(SCHEDULERS["step"]), clock_of(SCHEDULERS["step"])
        take_step(whole, 20)
        resumed.load_state_dict(whole.state_dict())
        with pytest.raises(RuntimeError, match="never advanced"):
            resumed.step()


def test_a_scaler_that_finds_infinite_gradients() -> None:
    """The data are consumed, so the clock goes on; and torch does not warn of a wrong order."""

    class Overflows(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            # In the first half of each epoch.
            return super().training_step(batch, batch_idx) * (math.inf if batch_idx < 16 else 1.0)

    module = Overflows(with_lr(SGD, 0.5), lambda optimizer: by_examples(LambdaLR(optimizer, Cosine(32)), 4))
    callback = BatchSizeScheduler(ConstantSize(8))
    trained(module, regression_data(64, 2), callback, plugins=[scaling()], max_epochs=2)
    assert module.lrs == [0.5 * Cosine(16)(step) for step in (4, 5, 6, 7, 12, 13, 14, 15)]
