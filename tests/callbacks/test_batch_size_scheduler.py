from itertools import chain, islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler, LambdaCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_surge.callbacks.batch_size_scheduler import BatchSizeWarmup
from lightning_surge.schedules.windows import AccumulatedSchedule, total_steps
from tests.trainings import OneHot, columns, make_trainer, one_hot, trained

# 13 micro-batches of 2. Requests 2 2 4 5 8 8 ..., windows begin at micro-batches 0 1 2 4 6 8 12 of
# the first epoch; the window of 4 requested at 6 waits for 8, and the one at 12 gets a single one.
HAND = {
    "requested": [2, 2, 4, 5, 8, 8, 8, 8, 8, 8, 8],
    "scheduled": [2, 2, 4, 4, 4, 8, 8, 8, 8, 8, 8],
    "actual": [2, 2, 4, 4, 4, 8, 2, 8, 8, 8, 2],
    "first_micro_batch": [0, 1, 2, 4, 6, 8, 12, 0, 4, 8, 12],
}


class Noting(OneHot):
    """Notes at which micro-batches gradients were zeroed and used."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.zeroed_at: list[int] = []
        self.stepped_at: list[int] = []
        self.index = -1

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.index = batch_idx
        return super().training_step(batch, batch_idx)

    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        self.zeroed_at.append(self.index)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        self.stepped_at.append(self.index)


def fit(warmup: BatchSizeWarmup, size: int, batch_size: int = 2, **options: Any) -> Noting:
    return trained(Noting(size), one_hot(size, batch_size), warmup, **options)


def refused(message: str, *others: pl.Callback, model: OneHot | None = None, **options: Any) -> pl.Trainer:
    """A ramp that cannot be: the error says why, and nothing was trained."""
    trainer, model = make_trainer(BatchSizeWarmup(2, 4, 1), *others, **options), model or Noting(4)
    with pytest.raises(MisconfigurationException, match=message):
        trainer.fit(model, one_hot(4, 2))
    assert model.gradients == []
    return trainer


class Endless(IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        while True:
            yield torch.ones(4)


class TestWindows:
    def test_sizes_and_examples_by_hand_over_two_epochs(self) -> None:
        model = fit(BatchSizeWarmup(2, 8, 4), size=26, max_epochs=2)
        assert model.requested == HAND["requested"]
        assert model.planned == HAND["scheduled"]
        windows = zip(HAND["first_micro_batch"], HAND["actual"], strict=True)
        assert model.examples == [list(range(2 * first, 2 * first + actual)) for first, actual in windows]
        assert model.sizes == HAND["actual"]  # in the last window of an epoch, too, where Lightning errs
        assert model.zeroed_at == HAND["first_micro_batch"]
        assert model.stepped_at == [0, 1, 3, 5, 7, 11, 12, 3, 7, 11, 12]

    @settings(max_examples=25, deadline=None)
    @given(
        micro=st.integers(1, 3),
        low=st.integers(0, 2),
        doublings=st.integers(0, 4),
        num_steps=st.integers(1, 12),
        size=st.integers(1, 70),
        epochs=st.integers(1, 3),
    )
    @pytest.mark.filterwarnings("ignore:end=.* needs .* micro-batches per optimizer step")
    def test_no_example_is_lost_and_the_replay_agrees(
        self, micro: int, low: int, doublings: int, num_steps: int, size: int, epochs: int
    ) -> None:
        start = micro * 2**low
        warmup = BatchSizeWarmup(start, start * 2**doublings, num_steps)
        model = fit(warmup, size=size, batch_size=micro, max_epochs=epochs)
        assert list(chain.from_iterable(model.examples)) == list(range(size)) * epochs
        actual = AccumulatedSchedule(warmup.schedule, micro, examples_per_epoch=size)
        assert len(model.examples) == total_steps(actual, epochs * size)
        assert [len(window) for window in model.examples] == list(islice(actual.sizes(), len(model.examples)))

    def test_a_loader_without_a_length(self) -> None:
        loader = DataLoader(Endless(), batch_size=2)
        model = trained(Noting(4), loader, BatchSizeWarmup(2, 8, 4), max_epochs=-1, max_steps=9)
        assert model.planned == [2, 2, 4, 4, 4, 8, 8, 8, 8]

    def test_sizes_count_every_replica(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # One process stands in for two: the arithmetic is what is tested here.
        monkeypatch.setattr(pl.Trainer, "distributed_sampler_kwargs", {"num_replicas": 2, "rank": 0})
        model = fit(BatchSizeWarmup(4, 16, 4), size=26)
        assert model.planned == [4, 4, 8, 8, 8, 16, 16]
        assert [len(window) for window in model.examples] == HAND["actual"][:7]

    def test_an_epoch_shorter_than_the_last_window_caps_it(self) -> None:
        warmup = BatchSizeWarmup(2, 16, 3)
        message = "end=16 needs 8 micro-batches .* got an epoch of 3: .* at 4 or"
        with pytest.warns(UserWarning, match=message):
            model = fit(warmup, size=26, limit_train_batches=3, max_epochs=4)
        assert model.planned == [2, 2] + [4] * 7
        assert [len(window) for window in model.examples] == [2, 2, 2] + [4, 2] * 3


class TestMicroBatchSize:
    @pytest.mark.parametrize(
        ("start", "end", "message"),
        [
            (1, 8, r"Expected start .* \(2 x 1\) times a power of two, got start=1: use start=2, or"),
            (6, 8, r"got start=6: use start=4 or start=8, or change the DataLoader's batch_size"),
            (3, 8, r"got start=3: use start=2 or start=4"),
            (2, 20, r"Expected end .* got end=20: use end=16 or end=32"),
        ],
    )
    def test_error_when_start_or_end_cannot_be_reached(self, start: int, end: int, message: str) -> None:
        with pytest.raises(MisconfigurationException, match=message):
            fit(BatchSizeWarmup(start, end, 4), size=26)
        warmup = BatchSizeWarmup(start, end, 4, micro_batch_size=2)
        trainer = make_trainer(warmup)
        with pytest.raises(MisconfigurationException, match=message):
            warmup.setup(trainer, Noting(26), "fit")


class TestErrors:
    def test_shrinking_at_construction(self) -> None:
        with pytest.raises(ValueError, match="Expected start <= end, got start=8, end=2"):
            BatchSizeWarmup(8, 2, 4)

    def test_manual_optimization(self) -> None:
        model = Noting(4)
        model.automatic_optimization = False
        refused("automatic_optimization=False in Noting.* Remove", model=model)

    def test_trainer_that_accumulates(self) -> None:
        trainer = refused("got accumulate_grad_batches=4: remove it", accumulate_grad_batches=4)
        assert trainer.accumulate_grad_batches == 4

    def test_two_callbacks_for_one_job(self) -> None:
        refused("and GradientAccumulationScheduler: remove one", GradientAccumulationScheduler({0: 2}))

    def test_strategy_that_accumulates_by_itself(self) -> None:
        class LikeDeepSpeed(SingleDeviceStrategy):
            handles_gradient_accumulation = True  # as DeepSpeedStrategy says

        options = {"accelerator": "auto", "strategy": LikeDeepSpeed("cpu")}
        refused("got strategy=LikeDeepSpeed, .*: use strategy='ddp'", **options)

    @pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
    def test_step_that_takes_the_iterator(self) -> None:
        class Iterates(Noting):
            def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
                return super().training_step(*next(dataloader_iter)[:2])

        refused(r"got training_step\(dataloader_iter\) in Iterates", model=Iterates(4))

    def test_other_stages_are_left_alone(self) -> None:
        class Tested(Noting):
            def test_step(self, batch: Tensor, batch_idx: int) -> None:
                self.log("loss", batch.sum())

        trainer = make_trainer(BatchSizeWarmup(2, 4, 1), accumulate_grad_batches=4)
        trainer.test(Tested(4), one_hot(4, 2), verbose=False)
        assert trainer.accumulate_grad_batches == 4


class TestManners:
    def test_another_writer_is_left_alone_and_named_once(self) -> None:
        class OneWindow(pl.Callback):
            """Stretches the second epoch into a single window, as StochasticWeightAveraging may."""

            def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
                if trainer.current_epoch == 1:
                    self.before, trainer.accumulate_grad_batches = trainer.accumulate_grad_batches, 13

            def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
                if trainer.current_epoch == 1:
                    trainer.accumulate_grad_batches = self.before

        model = Noting(26)
        trainer = make_trainer(BatchSizeWarmup(2, 8, 4), OneWindow(), max_epochs=3)
        with pytest.warns(UserWarning, match="expected accumulate_grad_batches=4, got 13: another") as caught:
            trainer.fit(model, one_hot(26, 2))
        assert len([warning for warning in caught if "another" in str(warning.message)]) == 1
        assert [len(window) for window in model.examples] == [*HAND["actual"][:7], 26, *HAND["actual"][7:]]
        assert (model.requested[7], model.planned[7]) == (8, 26)
        assert trainer.accumulate_grad_batches == 1

    def test_logs_both_sizes_at_every_step(self, tmp_path: Path) -> None:
        logger = CSVLogger(tmp_path)
        fit(BatchSizeWarmup(2, 8, 4), size=26, logger=logger, max_epochs=2)
        logged = columns(logger)
        assert logged["step"] == list(range(11))
        assert logged["surge/batch_size_requested"] == HAND["requested"]
        assert logged["surge/batch_size_scheduled"] == HAND["scheduled"]


def test_a_window_cut_in_two_is_finished_with_what_is_left(tmp_path: Path) -> None:
    def save(trainer: pl.Trainer, *args: Any) -> None:
        if args[-1] == 9:  # the second micro-batch of the window 8 9 10 11
            trainer.save_checkpoint(path)

    path, data = tmp_path / "within.ckpt", torch.eye(26)
    saving = LambdaCallback(on_train_batch_end=save)
    trained(Noting(26), StatefulDataLoader(data, 2), BatchSizeWarmup(2, 8, 4), saving)  # type: ignore[arg-type]
    model = trained(Noting(26), StatefulDataLoader(data, 2), BatchSizeWarmup(2, 8, 4), resume=path)  # type: ignore[arg-type]
    assert model.examples == [[20, 21, 22, 23], [24, 25]]
    assert model.planned == [8, 8]
