"""Batch sizes that a ScheduledBatchSampler sets: real fits, in one process and in two."""

from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from lightning_surge import ScheduledBatchSampler, by_examples
from lightning_surge.callbacks.batch_size_scheduler import BatchSizeScheduler, BatchSizeWarmup
from lightning_surge.schedules import (
    AccumulatedSchedule,
    ConstantSize,
    GeometricRamp,
    LinearRamp,
    Milestones,
    SampledSchedule,
)
from lightning_surge.schedules.sizes import Phase, Phases, Schedule
from tests.processes import Reporting
from tests.trainings import OneHot, make_trainer, one_hot, sampled, scheduled_lr, trained

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")

forks = pytest.mark.skipif(
    torch.cuda.is_available(), reason="autograd's threads for a GPU do not survive a fork"
)

SIZE = 50
LARGEST = 8  # examples that fit into a micro-batch
# Epochs of 7 to 25 micro-batches, that get longer, shorter, or both.
SCHEDULES = {
    "up and down": Milestones({0: 3, 7: 11, 9: 40, 12: 5}),
    "longer": Milestones({0: 40, 4: 3}),
    "shorter": LinearRamp(2, 50, 10),
    "epochs": Milestones({0: 40, 1: 3, 2: 50}, unit="epochs"),
    "examples": GeometricRamp(2, 32, 120, unit="examples"),
    "phases": Phases([Phase(0, 5, ConstantSize(7)), Phase(5, None, LinearRamp(7, 30, 8))]),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


class Noting(OneHot):
    """Notes micro-batches and validations, too."""

    def __init__(self, size: int = SIZE, make_scheduler: Callable[..., Any] | None = None) -> None:
        super().__init__(size, make_scheduler)
        self.micro_batches: list[tuple[int, int]] = []  # with their epochs
        self.validated: list[tuple[int, int]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.micro_batches.append((self.trainer.current_epoch, len(batch)))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        if batch_idx == 0:
            self.validated.append((self.trainer.current_epoch, self.trainer.global_step))

    def seen(self, epoch: int) -> list[int]:
        windows = zip(self.epochs, self.examples, strict=True)
        return sorted(chain.from_iterable(examples for e, examples in windows if e == epoch))

    @property
    def epoch_lengths(self) -> list[int]:
        """Micro-batches in each epoch."""
        return [len(list(group)) for _, group in groupby(epoch for epoch, _ in self.micro_batches)]


class Validated(Noting):
    def val_dataloader(self) -> DataLoader[Any]:
        return plain(25)


def loader(size: int = SIZE, largest: int = LARGEST, **options: Any) -> DataLoader[Any]:
    return sampled(torch.eye(size), largest, **options)


def plain(batch_size: int) -> DataLoader[Any]:
    return one_hot(SIZE, batch_size)


def replayed(schedule: Schedule, steps: int, *, size: int = SIZE, **options: Any) -> list[int]:
    return list(islice(SampledSchedule(schedule, LARGEST, size, **options).sizes(), steps))


class TestEpochs:
    """Every epoch has every example once, whatever its length in micro-batches."""

    @pytest.mark.slow
    @every_schedule
    @pytest.mark.parametrize("workers", [0, 2])
    def test_sizes_are_exact_and_every_example_comes_once(self, schedule: Schedule, workers: int) -> None:
        model = Validated(make_scheduler=lambda optimizer: StepLR(optimizer, 1))  # by epochs
        scheduler = BatchSizeScheduler(schedule)
        trainer = make_trainer(scheduler, max_epochs=4)
        trainer.fit(model, loader(num_workers=workers))
        assert model.sizes == replayed(schedule, len(model.sizes))
        assert [model.seen(epoch) for epoch in range(4)] == [list(range(SIZE))] * 4
        assert scheduler.examples == 4 * SIZE
        assert max(size for _, size in model.micro_batches) <= LARGEST
        # What Lightning thinks of it.
        assert trainer.global_step == len(model.sizes)
        assert trainer.current_epoch == 4
        assert trainer.fit_loop.epoch_loop.batch_progress.total.completed == len(model.micro_batches)
        assert trainer.num_training_batches == model.epoch_lengths[-1]
        assert len(set(model.epoch_lengths)) > 1
        assert [epoch for epoch, _ in model.validated] == [0, 0, 1, 2, 3]  # the first is the sanity check
        assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 4

    @settings(max_examples=20, deadline=None)
    @given(
        start=st.integers(1, 9),
        growth=st.integers(0, 40),
        duration=st.integers(1, 20),
        unit=st.sampled_from(["steps", "examples", "epochs"]),
        size=st.integers(1, 60),
        largest=st.integers(1, 9),
        epochs=st.integers(1, 3),
    )
    def test_any_ramp(
        self, start: int, growth: int, duration: int, unit: Any, size: int, largest: int, epochs: int
    ) -> None:
        schedule = LinearRamp(start, start + growth, duration, unit=unit)
        model = Noting(size)
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            barebones=True,  # the fastest, and one that may not log
            callbacks=[BatchSizeScheduler(schedule)],
        )
        trainer.fit(model, loader(size, largest))
        expected = SampledSchedule(schedule, largest, size).sizes()
        assert model.sizes == list(islice(expected, len(model.sizes)))
        assert [model.seen(epoch) for epoch in range(epochs)] == [list(range(size))] * epochs
        assert max(examples for _, examples in model.micro_batches) <= largest

    def test_micro_batches_of_a_sampler_that_gives_more(self) -> None:
        scheduler = BatchSizeScheduler(SCHEDULES["shorter"], max_micro_batch_size=LARGEST)
        model = trained(Noting(), loader(largest=1000), scheduler, max_epochs=3)
        assert model.sizes == replayed(SCHEDULES["shorter"], len(model.sizes))
        assert max(size for _, size in model.micro_batches) == LARGEST

    def test_drop_last_leaves_out_what_fills_no_step(self) -> None:
        schedule = SCHEDULES["up and down"]
        scheduler = BatchSizeScheduler(schedule)
        model = trained(Noting(), loader(drop_last=True), scheduler, max_epochs=4)
        assert model.sizes == [*[3] * 7, 8, 11, 40, 40, 40, 5, 5]
        assert model.sizes == replayed(schedule, 14, drop_last=True)
        assert scheduler.examples == sum(model.sizes)

    def test_an_epoch_cut_short_by_the_module(self) -> None:
        class Skips(Noting):
            def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
                return -1 if self.trainer.current_epoch == 1 and batch_idx == 5 else None

        for workers in (0, 2):
            model = Skips()
            trainer = make_trainer(BatchSizeScheduler(Milestones({0: 4, 13: 16})), max_epochs=3)
            trainer.fit(model, loader(num_workers=workers))
            # The second epoch ends within a window, whose gradients are zeroed by the next.
            assert model.sizes == [*[4] * 12, 2, 16, 16, 16, 16, 16, 2]
            assert model.epochs == [0] * 13 + [1] * 2 + [2] * 4

    def test_a_constant_size_is_plain_training_bit_for_bit(self) -> None:
        class Order(Noting):
            def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
                return super().training_step(batch, batch_idx).sin()

        def weights(data: Any, *callbacks: pl.Callback) -> Tensor:
            pl.seed_everything(0, verbose=False)
            return trained(Order(), data, *callbacks, max_epochs=3).weight

        plain = weights(one_hot(SIZE, LARGEST, shuffle=True))
        assert torch.equal(weights(loader(), BatchSizeScheduler(ConstantSize(LARGEST))), plain)

    @pytest.mark.parametrize("where", [None, "setup", "on_train_epoch_end"])
    def test_outside_a_training_the_sampler_is_an_ordinary_one(self, where: str | None) -> None:
        """Also where the training has ended with an exception."""

        def fail(trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
            if trainer.state.fn == "fit":
                raise RuntimeError("the machine was switched off")

        data, model, scheduler = loader(shuffle=False), Noting(), BatchSizeScheduler(SCHEDULES["shorter"])
        trainer = make_trainer(scheduler, *([LambdaCallback(**{where: fail})] if where else []))
        with pytest.raises(RuntimeError, match="switched off") if where else nullcontext():
            trainer.fit(model, data)
        assert trainer.accumulate_grad_batches == 1
        assert scheduler.state_dict()["accumulation"] == (1 if where == "setup" else 2)
        assert [len(batch) for batch in data] == [8] * 6 + [2]
        trainer.validate(model, data, verbose=False)
        assert trainer.num_val_batches == [7]


class TestTrainerOptions:
    @every_schedule
    @pytest.mark.parametrize("limit", [5, 0.5])
    def test_limit_train_batches(self, schedule: Schedule, limit: int | float) -> None:
        whole: list[int] = []
        look = LambdaCallback(on_train_epoch_start=lambda now, _: whole.append(len(now.train_dataloader)))
        model, scheduler = Validated(), BatchSizeScheduler(schedule)
        trainer = trained(model, loader(), scheduler, look, max_epochs=4, limit_train_batches=limit).trainer
        assert trainer.global_step == len(model.sizes)
        assert scheduler.examples == sum(model.sizes) == sum(size for _, size in model.micro_batches)
        assert [epoch for epoch, _ in model.validated] == [0, 0, 1, 2, 3]
        assert model.epoch_lengths == [5 if limit == 5 else length // 2 for length in whole]
        assert trainer.num_training_batches == model.epoch_lengths[-1]

    @every_schedule
    @pytest.mark.parametrize("interval", [2, 7, 0.25])
    def test_val_check_interval(self, schedule: Schedule, interval: int | float) -> None:
        options = {"max_epochs": 4, "val_check_interval": interval, "num_sanity_val_steps": 0}
        model = trained(Validated(), loader(), BatchSizeScheduler(schedule), **options)
        assert model.sizes == replayed(schedule, len(model.sizes))
        validations = [
            length // (min(interval, length) if isinstance(interval, int) else int(length * interval))
            for length in model.epoch_lengths
        ]
        assert [sum(e == epoch for e, _ in model.validated) for epoch in range(4)] == validations

    def test_validation_by_batches_of_the_whole_training_or_in_every_second_epoch(self) -> None:
        def validated(**options: Any) -> Validated:
            scheduler = BatchSizeScheduler(SCHEDULES["up and down"])
            return trained(Validated(), loader(), scheduler, max_epochs=4, num_sanity_val_steps=0, **options)

        model = validated(val_check_interval=5, check_val_every_n_epoch=None)
        assert len(model.validated) == len(model.micro_batches) // 5
        assert [epoch for epoch, _ in validated(check_val_every_n_epoch=2).validated] == [1, 3]

    def test_the_progress_bar_knows_the_length_of_the_epoch(self) -> None:
        totals = []

        class Bar(pl.callbacks.TQDMProgressBar):
            def on_train_epoch_start(self, trainer: pl.Trainer, *args: Any) -> None:
                super().on_train_epoch_start(trainer, *args)
                totals.append(self.train_progress_bar.total)

        callbacks = Bar(), BatchSizeScheduler(SCHEDULES["up and down"])
        model = trained(Noting(), loader(), *callbacks, max_epochs=4, enable_progress_bar=True)
        assert totals == model.epoch_lengths


class TestLoaders:
    def test_reloaded_every_epoch_with_another_length(self) -> None:
        class Grows(Validated):
            def train_dataloader(self) -> DataLoader[Any]:
                return sampled(torch.eye(SIZE)[: 20 + 15 * self.trainer.current_epoch], LARGEST)

        model = Grows()
        scheduler = BatchSizeScheduler(Milestones({0: 3, 7: 12, 12: 16}))
        make_trainer(scheduler, max_epochs=3, reload_dataloaders_every_n_epochs=1).fit(model)
        assert [model.seen(epoch) for epoch in range(3)] == [list(range(size)) for size in (20, 35, 50)]
        assert model.sizes == [*[3] * 6, 2, 12, 12, 11, 12, 12, 16, 10]
        assert scheduler.examples == 105
        assert [epoch for epoch, _ in model.validated] == [0, 0, 1, 2]

    def test_a_sampler_that_gives_fewer_or_more_than_its_length(self) -> None:
        class Vague(list[int]):
            def __len__(self) -> int:
                return 48

        for indices in (45, 50):
            batches = ScheduledBatchSampler(Vague(range(indices)), LARGEST)
            data: Any = DataLoader(torch.eye(SIZE), batch_sampler=batches)  # type: ignore[arg-type]
            model = trained(Noting(), data, BatchSizeScheduler(SCHEDULES["shorter"]), max_epochs=3)
            assert [len(model.seen(epoch)) for epoch in range(3)] == [min(indices, 48)] * 3

    def test_validation_with_the_same_kind_of_sampler_is_refused(self) -> None:
        # It would be cut like an epoch of training, and Lightning would read its length only once.
        trainer = make_trainer(BatchSizeScheduler(SCHEDULES["shorter"]))
        with pytest.raises(MisconfigurationException, match="in the training DataLoader only, got one for v"):
            trainer.fit(Noting(), loader(), loader(shuffle=False))

    def test_several_loaders(self) -> None:
        message = r"one training DataLoader with a Sch.* got 2 loaders.*Use D"
        for loaders in ([plain(2), loader()], {"a": loader(), "b": plain(2)}):
            with pytest.raises(MisconfigurationException, match=message):
                make_trainer(BatchSizeScheduler(ConstantSize(4))).fit(Noting(), loaders)


class TestFinders:
    def test_a_learning_rate_finder_before(self, tmp_path: Path) -> None:
        finder = pl.callbacks.LearningRateFinder(1e-8, 1e-2, 12, early_stop_threshold=None)
        model, scheduler = Noting(), BatchSizeScheduler(SCHEDULES["shorter"])
        trainer = make_trainer(finder, scheduler, max_epochs=3, default_root_dir=tmp_path)
        trainer.fit(model, loader())
        tried = len(model.gradients) - trainer.global_step
        assert tried == 12
        del model.gradients[:tried], model.epochs[:tried]
        assert model.sizes == replayed(SCHEDULES["shorter"], len(model.sizes))
        assert [model.seen(epoch) for epoch in range(3)] == [list(range(SIZE))] * 3
        assert scheduler.examples == 3 * SIZE

    def test_a_batch_size_finder_before(self, tmp_path: Path) -> None:
        class Sized(Validated):
            batch_size = 4

            def train_dataloader(self) -> DataLoader[Any]:
                return plain(self.batch_size)

        ramp = GeometricRamp(8, 32, 6)
        finder = pl.callbacks.BatchSizeFinder(steps_per_trial=1, max_trials=2, init_val=1)
        model, scheduler = Sized(), BatchSizeScheduler(ramp)
        make_trainer(finder, scheduler, max_epochs=2, default_root_dir=tmp_path).fit(model)
        assert model.batch_size == 2
        replay = AccumulatedSchedule(ramp, 2, examples_per_epoch=SIZE).sizes()
        steps = model.trainer.global_step
        assert model.sizes[-steps:] == list(islice(replay, steps))
        assert scheduler.examples == 2 * SIZE

    def test_weight_averaging(self) -> None:
        class Normalized(Noting):
            def __init__(self) -> None:
                super().__init__()
                self.norm = torch.nn.BatchNorm1d(SIZE)

            def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
                self.norm(batch)
                return super().training_step(batch, batch_idx)

        model = Normalized()
        averaging = pl.callbacks.StochasticWeightAveraging(0.1, swa_epoch_start=2)
        trainer = make_trainer(averaging, BatchSizeScheduler(SCHEDULES["shorter"]), max_epochs=3)
        with pytest.warns(UserWarning, match="expected accumulate_grad_batches=2, got 1.: another callback"):
            trainer.fit(model, loader())
        # The fourth pass recomputes the statistics of BatchNorm.
        assert sum(size for epoch, size in model.micro_batches if epoch == 3) == SIZE
        assert model.epochs[-1] == 3
        del model.gradients[-1], model.epochs[-1]
        assert model.sizes == replayed(SCHEDULES["shorter"], len(model.sizes))


class TestReports:
    def test_sizes_that_replicas_cannot_share(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # One process stands in for three: the check is what is tested here.
        monkeypatch.setattr(pl.Trainer, "distributed_sampler_kwargs", {"num_replicas": 3, "rank": 0})
        for schedule, message in (
            (LinearRamp(3, 40, 5), r"Expected end to be a multiple of the 3 .* got end=40: use end=39"),
            (LinearRamp(2, 39, 5), "got start=2: use start=3"),
            (Milestones({0: 3, 7: 5}), r"Expected sizes\[7\] .* use sizes\[7\]=3"),
        ):
            model = Noting()
            with pytest.raises(MisconfigurationException, match=message):
                make_trainer(BatchSizeScheduler(schedule)).fit(model, loader())
            assert model.gradients == []

    @pytest.mark.parametrize(
        ("schedule", "count", "drop_last", "message"),
        [
            (
                LinearRamp(4, 16, 9, unit="examples"),
                torch.numel,
                False,
                "batch_size_fn=, got unit='examples'",
            ),
            (LinearRamp(4, 64, 90), None, True, "at most the 50 examples of an epoch, .* got end=64"),
        ],
    )
    def test_what_a_sampler_cannot_do(
        self, schedule: Schedule, count: Any, drop_last: bool, message: str
    ) -> None:
        trainer = make_trainer(BatchSizeScheduler(schedule, batch_size_fn=count))
        with pytest.raises(MisconfigurationException, match=message):
            trainer.fit(Noting(), loader(drop_last=drop_last))


def clock(total: int) -> Callable[[torch.optim.Optimizer], dict[str, Any]]:
    """A cosine written for a constant training with batches of 5."""

    def make(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        cosine = CosineAnnealingLR(optimizer, total // 5)
        return {"scheduler": by_examples(cosine, examples_per_step=5), "interval": "step"}

    return make


class TestOtherRuns:
    """Checkpoints of epochs' ends, taken up with something else."""

    @pytest.mark.parametrize("first", ["sampler", "accumulation"])
    @pytest.mark.parametrize("second", ["sampler", "accumulation"])
    def test_with_another_schedule_and_mechanism(self, tmp_path: Path, first: str, second: str) -> None:
        loaders = {"sampler": loader(), "accumulation": plain(2)}
        path, ramp = tmp_path / "other.ckpt", BatchSizeScheduler(GeometricRamp(4, 16, 9))
        trained(Noting(), loaders[first], ramp, max_epochs=2).trainer.save_checkpoint(path)
        # Its place is counted in examples: 20 more at 4, then 16.
        scheduler = BatchSizeScheduler(Milestones({0: 8, 100: 4, 120: 16}, unit="examples"))
        model = trained(Noting(), loaders[second], scheduler, max_epochs=4, resume=path)
        # Windows of 2 to 8 micro-batches wait for a place that they divide.
        waiting = [8, 16, 6] if second == "sampler" else [4, 8, 16, 2]
        assert model.sizes == [4, 4, 4, 4, 4, *waiting, 16, 16, 16, 2]
        assert scheduler.examples == 4 * SIZE

    @pytest.mark.parametrize("mechanism", ["sampler", "accumulation"])
    @pytest.mark.parametrize(
        "schedule", [Milestones({0: 16, 13: 4, 26: 8}), Milestones({0: 16, 1: 4, 2: 8}, unit="epochs")]
    )
    def test_of_a_training_without_the_callback(
        self, tmp_path: Path, mechanism: str, schedule: Schedule
    ) -> None:
        path, data = tmp_path / "plain.ckpt", loader() if mechanism == "sampler" else plain(4)
        trained(Noting(), plain(4), max_epochs=2).trainer.save_checkpoint(path)
        model = trained(Noting(), data, BatchSizeScheduler(schedule), max_epochs=4, resume=path)
        assert model.sizes == [8, 8, 8, 8, 8, 8, 2] * 2


@pytest.mark.slow
@forks
class TestTwoProcesses:
    """Two gloo processes, three epochs. Gradients are reduced, so both see the examples of both."""

    RAMP = LinearRamp(2, 40, 10)

    def fit(
        self, model: Noting, path: Path, *data: Any, scheduler: Any = None, **options: Any
    ) -> dict[str, Any]:
        scheduler = scheduler or BatchSizeScheduler(self.RAMP)

        def report(trainer: pl.Trainer, model: Noting) -> dict[str, Any]:
            return {
                "sizes": model.sizes,
                "examples": model.examples,
                "seen": [model.seen(epoch) for epoch in range(3)],
                "micro_batches": model.micro_batches,
                "validated": [epoch for epoch, _ in model.validated],
                "counted": scheduler.examples,
                "steps": trainer.global_step,
                "lr": scheduled_lr(trainer),
            }

        reporting = Reporting(path, report)
        options |= {"strategy": "ddp_fork", "devices": 2, "max_epochs": 3}
        make_trainer(scheduler, reporting, **options).fit(model, *data)
        first, second = reporting.read()
        shared = ["sizes", "examples", "counted", "steps", "lr"]
        assert [first[key] for key in shared] == [second[key] for key in shared]
        assert first["steps"] == len(first["sizes"])
        return first

    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_loader_passed_to_fit(self, tmp_path: Path, workers: int) -> None:
        report = self.fit(Validated(), tmp_path, loader(num_workers=workers))
        assert report["sizes"] == replayed(self.RAMP, report["steps"], replicas=2)
        assert report["seen"] == [list(range(SIZE))] * 3
        assert report["counted"] == 3 * SIZE
        assert report["validated"] == [0, 0, 1, 2]
        assert max(size for _, size in report["micro_batches"]) <= LARGEST

    def test_a_loader_from_a_hook_that_is_reloaded(self, tmp_path: Path) -> None:
        class Own(Validated):
            def train_dataloader(self) -> DataLoader[Any]:
                return loader(drop_last=True)

        report = self.fit(Own(), tmp_path, reload_dataloaders_every_n_epochs=1)
        assert report["sizes"] == replayed(self.RAMP, report["steps"], replicas=2, drop_last=True)

    def test_an_own_distributed_sampler(self, tmp_path: Path) -> None:
        class Own(Validated):
            def train_dataloader(self) -> DataLoader[Any]:
                data: Any = torch.eye(SIZE)
                own = DistributedSampler(data, num_replicas=2, rank=self.trainer.global_rank)
                return DataLoader(data, batch_sampler=ScheduledBatchSampler(own, LARGEST))

        report = self.fit(Own(), tmp_path, use_distributed_sampler=False)
        assert report["sizes"] == replayed(self.RAMP, report["steps"], replicas=2)
        assert report["seen"] == [list(range(SIZE))] * 3

    def test_micro_batches_that_differ_between_processes(self, tmp_path: Path) -> None:
        class Ragged(Validated):
            def train_dataloader(self) -> DataLoader[Any]:
                rank = self.trainer.global_rank
                sizes = [[4, 1, 3, 4, 2, 4, 4, 3], [2, 4, 4, 4, 4, 1, 4, 2]][rank]
                batches: Any = torch.eye(SIZE)[25 * rank :][:25].split(sizes)
                return DataLoader(batches, batch_size=None)

        scheduler = BatchSizeScheduler(Milestones({0: 8, 3: 16}), micro_batch_size=4)
        report = self.fit(Ragged(), tmp_path, scheduler=scheduler, use_distributed_sampler=False)
        # That gradients are means over the examples of both is checked with their sizes.
        assert report["sizes"] == [6, 5, 7, 8, 11, 13, *[11, 15, 11, 13] * 2]
        assert report["counted"] == 3 * SIZE

    @pytest.mark.parametrize("mechanism", ["sampler", "accumulation"])
    def test_a_clock(self, tmp_path: Path, mechanism: str) -> None:
        data = loader() if mechanism == "sampler" else plain(2)
        model = Validated(make_scheduler=clock(3 * SIZE))
        report = self.fit(model, tmp_path, data, scheduler=BatchSizeWarmup(4, 16, 8))
        assert report["lr"] == 0.0
        assert report["counted"] == 3 * SIZE
