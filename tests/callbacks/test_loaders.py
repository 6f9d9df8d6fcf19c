from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_surge.callbacks.lightning_host import (
    refresh_epoch_length,
    replicas_of,
)
from tests.trainings import MakeTrainer

DATA: Any = torch.eye(12)


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


class AtEpochs(pl.Callback):
    """Does something at the start of each epoch, and notes what it gives."""

    def __init__(self, do: Callable[[pl.Trainer], Any]) -> None:
        self.do = do
        self.given: list[Any] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.given.append(self.do(trainer))


class TestTrainer:
    def test_replicas_are_not_processes(
        self, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # As under tensor parallelism, where several processes share the examples of one replica.
        monkeypatch.setattr(pl.Trainer, "distributed_sampler_kwargs", {"num_replicas": 2, "rank": 0})
        monkeypatch.setattr(pl.Trainer, "world_size", 4)
        assert replicas_of(make_trainer()) == 2


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
