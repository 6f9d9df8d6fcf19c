"""Loaders that change in mid-run, and learning-rate schedules that stop short of their end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LambdaCallback
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR
from torch.utils.data import DataLoader

from benchmarks.step_trace import trace
from lightning_surge import BatchSizeScheduler, BatchSizeWarmup, by_examples
from lightning_surge.callbacks.lightning_host import loader_batch_size, replicas_of
from lightning_surge.schedules import (
    AccumulatedSchedule,
    ConstantSize,
    GeometricRamp,
    LinearRamp,
    total_steps,
)
from tests.trainings import OneHot, heard, make_trainer, one_hot, sampled, scheduled_lr, trained

SIZE = 64


class Mean(OneHot):
    """With a loader for each epoch, and a schedule that may ask the Trainer."""

    def __init__(self, loaders: Any = None, schedule: Callable[..., Any] | None = None) -> None:
        super().__init__(
            SIZE, schedule and (lambda optimizer: {"interval": "step"} | schedule(optimizer, self))
        )
        self.lr, self.loaders = 0.1, loaders

    def train_dataloader(self) -> Any:
        loader = self.loaders[self.trainer.current_epoch]
        return loader() if callable(loader) else loader


def plain(batch_size: int) -> DataLoader[Any]:
    return one_hot(SIZE, batch_size)


def flexible(largest: int = 8) -> DataLoader[Any]:
    return sampled(torch.eye(SIZE), largest, shuffle=False)


def scheduled(size: int, **options: Any) -> BatchSizeScheduler:
    return BatchSizeScheduler(ConstantSize(size), **options)


def set_up_again(trainer: pl.Trainer, *args: Any) -> None:
    """Ask for another loader as users do who want other batches."""
    if trainer.current_epoch >= 1:
        trainer.fit_loop._combined_loader = None
        trainer.fit_loop.setup_data()


@pytest.mark.parametrize(
    ("loader", "size"),
    [
        (plain(3), 3),
        (flexible(4), 4),
        (type("Loader", (), {"batch_size": True})(), "True from Loader"),
        (type("Loader", (), {"batch_size": 2.0})(), "2.0 from Loader"),
        ({"a": plain(3)}, "None from dict"),
        (DataLoader([1], batch_size=None), "None from DataLoader"),  # type: ignore[arg-type]
    ],
)
def test_the_batch_size_of_a_loader_is_what_it_says(loader: Any, size: Any) -> None:
    if isinstance(size, int):
        assert loader_batch_size(loader, "Callback") == size
    else:
        with pytest.raises(MisconfigurationException, match=f"got batch_size={size}: pass micro_batch"):
            loader_batch_size(loader, "Callback")


class TestLoadersThatChange:
    @pytest.mark.parametrize("reloads", [True, False])
    @pytest.mark.parametrize(
        ("loaders", "schedule", "sizes"),
        [
            ([plain(16), plain(8), plain(4)], ConstantSize(32), [32] * 6),
            ([plain(4), plain(16), plain(8)], ConstantSize(32), [32] * 6),
            ([plain(8), flexible(), plain(4)], ConstantSize(16), [16] * 12),
            ([flexible(), plain(8), flexible()], ConstantSize(32), [32] * 6),
            ([plain(16), plain(8), plain(4)], GeometricRamp(16, 64, 6), [16, 16, 16, 16, 32, 32, 64]),
        ],
    )
    def test_steps_keep_the_sizes_of_the_schedule(
        self, reloads: bool, loaders: Any, schedule: Any, sizes: list[int]
    ) -> None:
        model = Mean(loaders)
        options = {"reload_dataloaders_every_n_epochs": 1} if reloads else {}
        callbacks = [] if reloads else [LambdaCallback(on_train_epoch_start=set_up_again)]
        make_trainer(BatchSizeScheduler(schedule), *callbacks, max_epochs=3, **options).fit(model)
        assert sum(model.sizes) == 3 * SIZE
        assert model.sizes == sizes

    @pytest.mark.filterwarnings("ignore:size=32 needs 8 micro-batches per optimizer step, got an epoch of 4")
    def test_a_batch_sampler_whose_size_is_written(self) -> None:
        def halve(trainer: pl.Trainer, *args: Any) -> None:
            sampler: Any = trainer.train_dataloader.batch_sampler  # type: ignore[union-attr]
            sampler.batch_size //= 2

        model = Mean([plain(16)] * 3)
        make_trainer(scheduled(32), LambdaCallback(on_train_epoch_end=halve), max_epochs=3).fit(model)
        assert model.sizes == [32, 32, 32, 16]  # Lightning takes four batches from every epoch

    @pytest.mark.parametrize(
        ("scheduler", "later", "message"),
        [
            (scheduled(8), plain(16), "got size=8: use size=16, or change the Data"),
            (scheduled(10), plain(8), "got size=10: use size=8 or size=16"),
            (scheduled(8, max_micro_batch_size=8), plain(16), "at most max_micro_batch_size=8, got 16"),
            (scheduled(64, micro_batch_size=32), plain(4), "micro_batch_size=32 was given, .* batch_size=4"),
            (BatchSizeWarmup(8, 32, 4), plain(12), r"Expected start .* \(12 x 1\) times a power of two"),
            (BatchSizeWarmup(8, 32, 4), [torch.eye(SIZE)], "pass micro_batch_size= to BatchSizeWarmup"),
            (BatchSizeWarmup(8, 32, 4), [plain(8), flexible()], "micro_batch_size= to BatchSizeWarmup"),
        ],
    )
    def test_what_cannot_be_is_an_error_as_at_the_start(
        self, scheduler: BatchSizeScheduler, later: Any, message: str
    ) -> None:
        first = flexible() if "size=10" in message else plain(8)
        trainer = make_trainer(scheduler, max_epochs=2, reload_dataloaders_every_n_epochs=1)
        with pytest.raises(MisconfigurationException, match=message):
            trainer.fit(Mean([first, later]))
        assert trainer.current_epoch == 1

    def test_one_that_is_no_different_is_not_reported_again(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level("INFO", "lightning.pytorch"):
            model = Mean([lambda: plain(8)] * 3)
            trained(model, None, scheduled(8), max_epochs=3, reload_dataloaders_every_n_epochs=1)
        assert caplog.text.count("Batch sizes are set by accumulation") == 1


def test_replicas_are_not_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    # As under tensor parallelism, where several processes share the examples of one replica.
    monkeypatch.setattr(pl.Trainer, "distributed_sampler_kwargs", {"num_replicas": 2, "rank": 0})
    monkeypatch.setattr(pl.Trainer, "world_size", 4)
    assert replicas_of(make_trainer()) == 2


def cosine(steps: Callable[[Any], float]) -> Callable[..., Any]:
    return lambda optimizer, module: {"scheduler": CosineAnnealingLR(optimizer, int(steps(module.trainer)))}


def estimated(trainer: pl.Trainer) -> float:
    return trainer.estimated_stepping_batches


RAMP = GeometricRamp(2, 16, 40)


def after_ramp(trainer: pl.Trainer) -> float:
    return total_steps(AccumulatedSchedule(RAMP, 2, examples_per_epoch=SIZE), 4 * SIZE)


SHORT = "Expected a learning-rate schedule that reaches its end"


def warned(model: Mean, callback: Any, **options: Any) -> list[str]:
    data = options.pop("loader", None) or plain(2)
    with heard() as said:
        trained(model, data, callback, **{"max_epochs": 4} | options)
    return [text for text in said if text.startswith(SHORT)]


def by_the_clock(optimizer: Any, module: Any) -> dict[str, Any]:
    return {"scheduler": by_examples(CosineAnnealingLR(optimizer, 128), examples_per_step=2)}


def one_cycle(optimizer: Any, module: Mean) -> dict[str, Any]:
    return {"scheduler": OneCycleLR(optimizer, 0.1, total_steps=int(estimated(module.trainer)))}


def warm_up(steps: int) -> Callable[..., dict[str, Any]]:
    return lambda optimizer, _: {"scheduler": LambdaLR(optimizer, lambda t: min(1.0, (t + 1) / steps))}


class TestSchedulesCutShort:
    @pytest.mark.parametrize("callback", [BatchSizeScheduler(RAMP), BatchSizeWarmup(2, 16, 40)])
    def test_the_end_that_is_told_is_the_end_that_comes(self, callback: Any) -> None:
        model = Mean(schedule=cosine(estimated))
        (message,) = warned(model, callback)
        share = scheduled_lr(model.trainer) / 0.1
        assert 0.3 < share < 0.9
        assert message.removeprefix(SHORT) == (
            f", got CosineAnnealingLR, which counts optimizer steps: under {type(callback).__name__} the"
            f" training takes {len(model.sizes)} steps where the Trainer estimates 128, and ends at"
            f" {share:.2f} of the peak learning rate. Count examples instead:"
            " by_examples(scheduler, examples_per_step=2)."
        )

    @pytest.mark.parametrize(
        ("schedule", "rule", "options", "count"),
        [
            (cosine(estimated), ConstantSize(8), {}, 1),
            (cosine(estimated), LinearRamp(2, 20, 30), {"loader": flexible()}, 1),
            (cosine(estimated), ConstantSize(2), {}, 0),
            (cosine(estimated), RAMP, {"max_epochs": -1, "max_steps": 40}, 0),
            (cosine(after_ramp), RAMP, {}, 0),
            (lambda o, m: cosine(estimated)(o, m) | {"interval": "epoch"}, RAMP, {}, 0),
            (by_the_clock, RAMP, {}, 0),
            (one_cycle, RAMP, {}, 1),
            (warm_up(9), RAMP, {}, 0),  # through in time
            (warm_up(128), RAMP, {}, 1),
        ],
    )
    def test_only_where_something_is_lost(
        self, schedule: Any, rule: Any, options: dict[str, Any], count: int
    ) -> None:
        found = warned(Mean(schedule=schedule), BatchSizeScheduler(rule), **options)
        assert len(found) == count

    @pytest.mark.parametrize("loader", [plain(24), flexible()], ids=["loader", "sampler"])
    def test_a_clock_counts_what_was_consumed_and_not_what_was_asked_for(self, loader: Any) -> None:
        model = trained(Mean(schedule=by_the_clock), loader, scheduled(24), max_epochs=2)
        assert model.trainer.lr_scheduler_configs[0].scheduler.examples == 2 * SIZE  # an epoch ends with 16

    def test_the_schedule_and_the_model_are_left_as_they_were(self) -> None:
        class Own(Mean):
            def scale(self, step: int) -> float:
                assert self is model  # not a copy
                return 1 / (1 + step)

        model = Own(schedule=lambda optimizer, module: {"scheduler": LambdaLR(optimizer, module.scale)})
        lrs: list[float] = []
        look = LambdaCallback(on_train_batch_start=lambda trainer, *_: lrs.append(scheduled_lr(trainer)))
        with pytest.warns(UserWarning, match="got LambdaLR, which counts"):
            make_trainer(scheduled(16), look).fit(model, plain(8))
        assert lrs == [0.1] * 2 + [0.1 / 2] * 2 + [0.1 / 3] * 2 + [0.1 / 4] * 2

    def test_not_when_a_run_is_resumed(self, tmp_path: Path) -> None:
        model, path = Mean(schedule=cosine(estimated)), tmp_path / "half.ckpt"
        assert warned(model, BatchSizeScheduler(RAMP), max_epochs=2)
        model.trainer.save_checkpoint(path)
        model = Mean(schedule=cosine(estimated))
        assert warned(model, BatchSizeScheduler(RAMP), resume=path) == []
        assert model.trainer.current_epoch == 4


@pytest.mark.parametrize(
    ("callbacks", "calls", "files"),
    [
        ([], 115, 14),
        ([BatchSizeScheduler(ConstantSize(16))], 150, 19),
        ([BatchSizeScheduler(GeometricRamp(16, 64, 2000))], 155, 19),
    ],
)
def test_a_step_enters_as_little_of_the_package_as_promised(callbacks: Any, calls: int, files: int) -> None:
    entered = trace(*callbacks)
    assert 50 < sum(entered.values()) <= calls
    assert len({file for file, _ in entered}) <= files
