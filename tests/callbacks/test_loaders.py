from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from lightning_surge.callbacks.lightning_host import (
    batches_per_epoch,
    loader_batch_size,
    refresh_epoch_length,
    refuse_scheduled_validation,
    replicas_of,
    scheduled_sampler,
)
from lightning_surge.schedules.batch_sampler import ScheduledBatchSampler

MakeTrainer = Callable[..., pl.Trainer]

DATA: Any = torch.eye(12)


def sampled() -> DataLoader[Any]:
    return DataLoader(DATA, batch_sampler=ScheduledBatchSampler(SequentialSampler(DATA), 4))


class Endless(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield torch.ones(12)


class Linear(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(12, 1)
        self.seen: list[int] = []
        self.validated: list[int] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen.append(self.trainer.current_epoch)
        return self.layer(batch).mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.validated.append(self.trainer.current_epoch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class TestBatchSize:
    def test_of_a_data_loader(self) -> None:
        assert loader_batch_size(DataLoader(DATA, batch_size=3)) == 3

    def test_of_a_batch_sampler(self) -> None:
        assert loader_batch_size(DataLoader(DATA, batch_sampler=BatchSampler(range(12), 5, False))) == 5
        assert loader_batch_size(sampled()) == 4

    @pytest.mark.parametrize("size", [0, True, 2.0, "4"])
    def test_that_is_none(self, size: Any) -> None:
        loader = type("Loader", (), {"batch_size": size})()
        with pytest.raises(
            MisconfigurationException, match=rf"got batch_size={size!r} from Loader: pass micro"
        ):
            loader_batch_size(loader)

    @pytest.mark.parametrize("loader", [[1, 2], {"a": DataLoader(DATA)}, DataLoader(DATA, batch_size=None)])
    def test_that_is_not_said(self, loader: Any) -> None:
        with pytest.raises(
            MisconfigurationException, match=rf"=None from {type(loader).__name__}: pass micro_"
        ):
            loader_batch_size(loader)


class TestScheduledSampler:
    def test_is_found(self) -> None:
        loader = sampled()
        assert scheduled_sampler(loader) is loader.batch_sampler

    @pytest.mark.parametrize(
        "loader", [DataLoader(DATA), [DataLoader(DATA)] * 2, {"a": DataLoader(DATA)}, [1, 2], None, Endless()]
    )
    def test_is_not_there(self, loader: Any) -> None:
        assert scheduled_sampler(loader) is None

    @pytest.mark.parametrize(
        "loaders", [[sampled()], (DataLoader(DATA), sampled()), {"a": DataLoader(DATA), "b": [sampled()]}]
    )
    def test_among_several(self, loaders: Any) -> None:
        with pytest.raises(
            MisconfigurationException, match=rf"one training .*, got {len(loaders)} loaders: L"
        ):
            scheduled_sampler(loaders)


class AtEpochs(pl.Callback):
    """Does something at the start of each epoch, and notes what it gives."""

    def __init__(self, do: Callable[[pl.Trainer], Any]) -> None:
        self.do = do
        self.given: list[Any] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.given.append(self.do(trainer))


class TestTrainer:
    def test_batches_per_epoch(self, make_trainer: MakeTrainer) -> None:
        for loader, options, expected in (
            (DataLoader(DATA, batch_size=5), {}, 3),
            (DataLoader(DATA, batch_size=5), {"limit_train_batches": 2}, 2),
            (DataLoader(Endless(), batch_size=5), {"max_steps": 3}, None),
            (DataLoader(Endless(), batch_size=5), {"limit_train_batches": 2}, 2),
        ):
            look = AtEpochs(batches_per_epoch)
            make_trainer(look, **options).fit(Linear(), loader, DataLoader(DATA))  # type: ignore[arg-type]
            assert look.given == [expected]

    def test_one_process_is_one_replica(self, make_trainer: MakeTrainer) -> None:
        assert replicas_of(make_trainer()) == 1

    def test_replicas_are_not_processes(
        self, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # As under tensor parallelism, where several processes share the examples of one replica.
        monkeypatch.setattr(pl.Trainer, "distributed_sampler_kwargs", {"num_replicas": 2, "rank": 0})
        monkeypatch.setattr(pl.Trainer, "world_size", 4)
        assert replicas_of(make_trainer()) == 2

    @pytest.mark.parametrize("validation", [sampled(), [DataLoader(DATA), sampled()], {"a": [sampled()]}])
    def test_validation_is_not_to_be_scheduled(self, validation: Any) -> None:
        trainer: Any = type("Trainer", (), {"val_dataloaders": validation})()
        with pytest.raises(
            MisconfigurationException, match="got one for validation, whose batches would follow"
        ):
            refuse_scheduled_validation(trainer)

    @pytest.mark.parametrize("validation", [None, DataLoader(DATA), [DataLoader(DATA)], {"a": [1]}])
    def test_other_validation_is_welcome(self, validation: Any) -> None:
        trainer: Any = type("Trainer", (), {"val_dataloaders": validation})()
        refuse_scheduled_validation(trainer)


class Growing(DataLoader[Any]):
    """Has a batch more in each epoch."""

    length = 11

    def __iter__(self) -> Iterator[Any]:
        return iter([torch.eye(12)] * self.length)

    def __len__(self) -> int:
        return self.length


class Grow(pl.Callback):
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loader: Any = trainer.train_dataloader
        loader.length += 1


class TestRefresh:
    @pytest.mark.parametrize(
        ("options", "lengths", "validations"),
        [
            ({}, [11, 12, 13], [1, 1, 1]),
            ({"limit_train_batches": 12}, [11, 12, 12], [1, 1, 1]),
            ({"limit_train_batches": 0.5}, [5, 6, 6], [1, 1, 1]),
            ({"val_check_interval": 4}, [11, 12, 13], [2, 3, 3]),
            ({"val_check_interval": 0.5}, [11, 12, 13], [2, 2, 2]),
            ({"val_check_interval": 8, "check_val_every_n_epoch": None}, [11, 12, 13], [1, 1, 2]),
            ({"check_val_every_n_epoch": 2}, [11, 12, 13], [0, 1, 0]),
        ],
    )
    def test_an_epoch_that_gets_longer(
        self,
        make_trainer: MakeTrainer,
        options: dict[str, Any],
        lengths: list[int],
        validations: list[int],
    ) -> None:
        model = Linear()
        trainer = make_trainer(
            AtEpochs(refresh_epoch_length), Grow(), max_epochs=3, num_sanity_val_steps=0, **options
        )
        trainer.fit(model, Growing(DATA), DataLoader(DATA, batch_size=12))
        assert [model.seen.count(epoch) for epoch in range(3)] == lengths
        assert [model.validated.count(epoch) for epoch in range(3)] == validations
        assert trainer.num_training_batches == lengths[-1]
