"""BatchSizeScheduler beside SurgeLRCallback: the same sizes for both."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, IterableDataset

from lightning_surge import SurgeLRCallback
from lightning_surge.callbacks.batch_size_scheduler import BatchSizeScheduler
from lightning_surge.schedules.sizes import GeometricRamp, LinearRamp, Milestones, Schedule
from tests.trainings import Ragged, assert_same, columns, make_trainer, sampled, trained

FEATURES = 8
BASE_LR = 0.01
RAGGED = [4, 1, 7, 2, 9, 3, 4, 4, 1, 6, 2, 5, 3, 3, 4, 6]


def examples(size: int) -> Tensor:
    return torch.randn(size, FEATURES, generator=torch.Generator().manual_seed(3))


def ragged(times: int = 1) -> Ragged:
    return Ragged(times * RAGGED, FEATURES)


def flexible() -> DataLoader[Any]:
    return sampled(examples(100), 8, shuffle=False)


def plain(size: int = 100) -> DataLoader[Any]:
    return DataLoader(examples(size), batch_size=4)  # type: ignore[arg-type]


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        return iter(examples(100))


class Valley(pl.LightningModule):
    """Example x pulls to x: the gradient's noise is that of the examples, whatever the weights are."""

    def __init__(self, kind: type[SGD] = SGD) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(FEATURES))
        self.kind = kind
        self.examples = 0
        self.sizes: list[int] = []
        self.gradients: list[Tensor] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.examples = 0
        self.examples += len(batch)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.weight - batch).square().sum(-1).mean()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        assert self.weight.grad is not None
        self.gradients.append(self.weight.grad.clone())
        self.sizes.append(self.examples)

    def configure_optimizers(self) -> Optimizer:
        return self.kind(self.parameters(), lr=BASE_LR)


class Still(SGD):
    """Computes gradients, and stays where it is."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return closure()


MECHANISMS = {
    "sampler": (flexible, LinearRamp(2, 60, 8)),
    "accumulation": (plain, GeometricRamp(4, 32, 8)),
    "stream": (lambda: DataLoader(Stream(), batch_size=4), GeometricRamp(4, 32, 8)),
    "ragged": (ragged, Milestones({0: 4, 3: 16, 6: 32})),
}
every_mechanism = pytest.mark.parametrize(("loader", "schedule"), MECHANISMS.values(), ids=list(MECHANISMS))


class TestBeside:
    @every_mechanism
    @pytest.mark.parametrize("first", ["scheduler", "surge"])
    def test_the_learning_rate_is_that_of_the_size_each_step_has(
        self, tmp_path: Path, loader: Callable[[], Any], schedule: Schedule, first: str
    ) -> None:
        callbacks = [BatchSizeScheduler(schedule), SurgeLRCallback(4, law="sqrt", max_drift_per_step=1e9)]
        logger, order = CSVLogger(tmp_path), 1 if first == "scheduler" else -1
        model = trained(Valley(), loader(), *callbacks[::order], logger=logger, max_epochs=3)
        assert len(set(model.sizes)) >= 4
        assert columns(logger)["surge/batch_size"] == model.sizes
        assert columns(logger)["surge/lr_used"] == pytest.approx(
            [BASE_LR * (size / 4) ** 0.5 for size in model.sizes]
        )

    @every_mechanism
    def test_a_dry_run_is_no_callback(self, loader: Callable[[], Any], schedule: Schedule) -> None:
        surge = SurgeLRCallback(4, probe_every=2, dry_run=True)
        alone = trained(Valley(), loader(), BatchSizeScheduler(schedule), max_epochs=3)
        beside = trained(Valley(), loader(), surge, BatchSizeScheduler(schedule), max_epochs=3)
        assert surge.history.num_measurements >= 2
        assert_same([alone.gradients, alone.weight], [beside.gradients, beside.weight])

    @pytest.mark.parametrize("weighted", [True, False])
    def test_weights_are_taken_off_before_micro_batches_are_measured(self, weighted: bool) -> None:
        """Windows of sixteen, as their gradients tell: for those of the last three, `sum_k a_k g_k`."""
        surge = SurgeLRCallback(8, probe_every=3)
        scheduler = BatchSizeScheduler(Milestones({0: 64}), weight_micro_batches=weighted)
        model, batches = Valley(Still), ragged(6)
        make_trainer(surge, scheduler, max_epochs=3).fit(model, batches)
        assert model.sizes[0] == sum(RAGGED)  # sixteen micro-batches
        assert surge.history.num_measurements == 6
        gradients = torch.stack([2.0 * (1.0 - batch.mean(0)) for batch in batches[48:]]).double()
        sizes = torch.tensor(RAGGED, dtype=torch.float64)
        factors = sizes / sizes.sum() if weighted else torch.full((16,), 1 / 16, dtype=torch.float64)
        others = factors.outer(factors).fill_diagonal_(0.0)
        products = [(others * (window @ window.T)).sum() for window in gradients.split(16)]
        grad_sq = float(sum(products) / (3 * others.sum()))
        spread = float((sizes.repeat(3) * gradients.square().sum(1)).sum())
        latest = surge.history.latest
        assert latest is not None
        assert latest.statistics.grad_sq == pytest.approx(grad_sq, rel=1e-5)
        trace_cov = (spread - grad_sq * 3 * sum(RAGGED)) / 48
        assert latest.statistics.trace_cov == pytest.approx(trace_cov, rel=1e-5)
        # In a valley it is known: 4 times the variance of every coordinate of an example.
        assert surge.history.stats().trace_cov == pytest.approx(4 * FEATURES, rel=0.2)
