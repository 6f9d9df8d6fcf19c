"""A batch size that grows as the learning rate falls, in real fits."""

import math
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LambdaCallback
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, StepLR
from torch.utils.data import DataLoader

from lightning_surge import BatchSizeScheduler, SurgeLRCallback, by_examples
from lightning_surge.schedules import Milestones, Progress, SampledSchedule, Seesaw
from tests.trainings import OneHot, at_update, every_step, make_trainer, one_hot, sampled, trained

SIZE, EPOCHS, START, LARGEST = 64, 3, 4, 8
TICKS = SIZE * EPOCHS // START  # of the schedule, over the training
PEAK = 0.5


def wsd(optimizer: Optimizer) -> LRScheduler:
    """Warm-up over 4 ticks, stable up to 24, then in eighths to zero."""
    return LambdaLR(optimizer, lambda step: min((step + 1) / 4, 1.0, max(0.0, 8 - (step - 20) // 3) / 8))


def cosine(optimizer: Optimizer) -> LRScheduler:
    return CosineAnnealingLR(optimizer, T_max=TICKS)


def halving(optimizer: Optimizer) -> LRScheduler:
    return StepLR(optimizer, step_size=8, gamma=0.5)


class Decaying(OneHot):
    """Notes what each update reads, too."""

    def __init__(self, make: Callable[[Optimizer], LRScheduler], *, estimates: bool = False) -> None:
        super().__init__(SIZE, make)
        self.estimates = estimates
        self.used: list[float] = []

    def configure_optimizers(self) -> Any:
        if self.estimates:
            assert self.trainer.estimated_stepping_batches > 0
        optimizer = torch.optim.SGD([self.weight], lr=self.lr)
        at_update(optimizer, lambda o: self.used.append(o.param_groups[0]["lr"]))
        assert self.make_scheduler is not None
        clock = by_examples(self.make_scheduler(optimizer), START)
        return [optimizer], [{"scheduler": clock, "interval": "step"}]


def plain() -> DataLoader[Any]:
    return one_hot(SIZE, START)


def fit(model: OneHot, loader: Any, rule: Seesaw, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    ours = BatchSizeScheduler(rule), SurgeLRCallback(rule.start, law="sqrt")
    return trained(model, loader, *ours, *callbacks, max_epochs=EPOCHS, **options).trainer


def by_hand(make: Callable[[Optimizer], LRScheduler], rule: Seesaw) -> list[int]:
    """What `Seesaw` asks for at every example of the training, from a plain loop over the schedule."""
    one = torch.optim.SGD([torch.zeros(1)], lr=PEAK)
    scheduler, peak, sizes = make(one), 0.0, []
    for _ in range(TICKS):
        rate = float(one.param_groups[0]["lr"])
        peak = max(peak, rate)
        wanted = math.inf if rate <= 0 else rule.start * peak / rate
        sizes += [math.floor(min(wanted, rule.maximum) * (1 + 1e-9))] * START
        one.step()
        scheduler.step()
    return sizes


def steps_of(requests: list[int]) -> list[int]:
    """The steps of a sampler that follows the same sizes written out."""
    plan = Milestones(dict(enumerate(requests)), unit="examples")
    steps, done, sizes = [], 0, SampledSchedule(plan, LARGEST, SIZE).sizes()
    while done < SIZE * EPOCHS:
        steps.append(next(sizes))
        done += steps[-1]
    return steps


class TestSampler:
    @pytest.mark.parametrize(
        ("make", "workers", "estimates"),
        [(cosine, 0, True), (halving, 0, False), pytest.param(wsd, 2, True, marks=pytest.mark.slow)],
    )
    def test_sizes_are_exact(self, make: Any, workers: int, estimates: bool) -> None:
        """Also where Lightning has asked for the loader's length before there was a schedule."""
        rule, model = Seesaw(START, 32), Decaying(make, estimates=estimates)
        trainer = fit(model, sampled(torch.eye(SIZE), LARGEST, num_workers=workers), rule)
        assert model.sizes == steps_of(by_hand(make, rule))
        assert sorted(chain.from_iterable(model.examples)) == sorted(list(range(SIZE)) * EPOCHS)
        assert trainer.global_step < SIZE * EPOCHS / START
        assert max(model.sizes) > LARGEST

    @pytest.mark.parametrize("make", [cosine, wsd])
    def test_the_rate_used_falls_by_the_root_of_the_schedule(self, make: Any) -> None:
        model = Decaying(make)
        fit(model, sampled(torch.eye(SIZE), 32), Seesaw(START, 32))
        exact, peak = 0, 0.0
        for size, asked, used, scheduled in zip(
            model.sizes, model.requested, model.used, model.scheduled, strict=True
        ):
            peak = max(peak, scheduled)  # of the warm-up, so far
            share = scheduled / peak
            assert used == pytest.approx(scheduled * (size / START) ** 0.5, rel=1e-12)
            if size == asked < 32:  # rounded down to a whole number, and neither cut nor limited
                root = peak * share**0.5
                assert root * (1 - share / START) ** 0.5 < used <= root * (1 + 1e-12)
                exact += share < 1.0 and used == pytest.approx(root, rel=1e-12)
        assert exact >= (2 if make is wsd else 0)  # at a half, and at a quarter


class TestAccumulation:
    def test_where_the_schedule_halves_the_batch_doubles(self) -> None:
        model = Decaying(halving)
        trainer = fit(model, plain(), Seesaw(START, 32))
        # 32 examples at each level: 8 steps of 4, 4 of 8, 2 of 16, 1 of 32; then the schedule alone falls.
        assert model.sizes == [4] * 8 + [8] * 4 + [16] * 2 + [32] * 3
        levels = [0] * 8 + [1] * 4 + [2] * 2 + [3, 4, 5]
        assert model.scheduled == [PEAK * 0.5**level for level in levels]
        roots = [PEAK * 0.5 ** (level / 2 if level <= 3 else level - 1.5) for level in levels]
        assert model.used == pytest.approx(roots, rel=1e-12)
        assert trainer.global_step == 17


class TestResuming:
    @pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
    @pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
    def test_a_changed_schedule_is_followed(self, tmp_path: Path) -> None:
        """The checkpoint holds no size: 64 examples on, another decay finds the size that it has there."""
        fit(Decaying(halving), plain(), Seesaw(START, 32), every_step(tmp_path, 12))
        path = tmp_path / "step=12.ckpt"
        state = torch.load(path, weights_only=True)["callbacks"]["BatchSizeScheduler"]
        assert state.keys() == {"version", "accumulation", "examples", "epoch_begin"}
        assert state["examples"] == 64
        for make, first in ((halving, 16), (lambda o: StepLR(o, step_size=16, gamma=0.5), 8)):
            model = Decaying(make)
            fit(model, plain(), Seesaw(START, 32), resume=path)
            assert model.requested[0] == first

    def test_a_second_training_begins_afresh(self) -> None:
        rule = Seesaw(START, 32)
        scheduler = BatchSizeScheduler(rule)
        for make, steps in ((halving, 17), (cosine, None), (halving, 17)):
            model = trained(Decaying(make), plain(), scheduler, max_epochs=EPOCHS)
            assert steps in (None, model.trainer.global_step)
        assert scheduler.schedule is rule


def clock(optimizer: Optimizer, scheduler: LRScheduler | None = None) -> dict[str, Any]:
    return {"scheduler": by_examples(scheduler or halving(optimizer), START), "interval": "step"}


class Unreplayable(LambdaLR):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("cannot be copied")


class TestRefusals:
    @pytest.mark.parametrize(
        ("configure", "message"),
        [
            (lambda o: o, "got 1 and no scheduler: return .*examples_per_step=4"),
            (lambda o: ([o], [halving(o)]), "got 1 and StepLR"),
            (lambda o: ([o], [clock(o), halving(o)]), "got 1 and ExamplesClock, StepLR"),
            (lambda o: ([o], [clock(o), clock(o)]), "got 1 and ExamplesClock, ExamplesClock"),
            (lambda o: ([o], [clock(o, Unreplayable(o, float))]), "replayed .* TypeError: cannot be copied"),
        ],
    )
    def test_other_schedules(self, configure: Any, message: str) -> None:
        model = OneHot(SIZE)
        model.configure_optimizers = lambda: configure(torch.optim.SGD([model.weight], lr=PEAK))  # type: ignore[method-assign]
        with pytest.raises(MisconfigurationException, match=message):
            make_trainer(BatchSizeScheduler(Seesaw(START, 32))).fit(model, plain())
        assert model.gradients == []

    def test_sizes_that_accumulation_cannot_make(self) -> None:
        with pytest.raises(MisconfigurationException, match="Expected maximum to be micro-batch size"):
            make_trainer(BatchSizeScheduler(Seesaw(START, 24))).fit(Decaying(halving), plain())

    @pytest.mark.parametrize("options", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 32}])
    @pytest.mark.parametrize("falls", [False, True])
    def test_a_rate_that_never_falls_is_named_once(
        self, options: dict[str, Any], falls: bool, unraised: list[str]
    ) -> None:
        """Not one that falls before the last step, the 32nd, or only after it."""
        model = Decaying(lambda o: LambdaLR(o, lambda step: 0.5 if step >= (31 if falls else 32) else 1.0))
        make_trainer(BatchSizeScheduler(Seesaw(START, 32)), **options).fit(model, plain())
        assert model.requested == [START] * 31 + [2 * START if falls else START]
        assert len(unraised) == (0 if falls else 1)
        assert all("falls within the 128 examples" in said for said in unraised)
        unraised.clear()


def test_the_size_ahead_is_the_schedules() -> None:
    seen: list[float] = []
    scheduler = BatchSizeScheduler(Seesaw(START, 32))
    ahead = lambda *_: seen.append(scheduler.size_ahead(32.0 - scheduler.examples))  # noqa: E731
    trained(Decaying(halving), plain(), scheduler, LambdaCallback(on_before_optimizer_step=ahead))
    assert seen[:8] == [8.0] * 8
    assert scheduler.schedule.first_size == Seesaw(START, 32).along(
        by_examples(halving(torch.optim.SGD([torch.zeros(1)], lr=1.0)), START)
    )(Progress())
