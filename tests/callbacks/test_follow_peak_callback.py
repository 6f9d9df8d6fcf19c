"""BatchSizeScheduler beside SurgeLRCallback: the same sizes for both, and sizes that follow the law."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.utils.data import DataLoader

from lightning_surge import SurgeLRCallback
from lightning_surge.callbacks.batch_size_scheduler import BatchSizeScheduler
from lightning_surge.schedules.follow_peak import FollowPeak
from lightning_surge.schedules.sizes import GeometricRamp, LinearRamp, Milestones, Schedule
from tests.trainings import Ragged, columns, make_trainer, sampled

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


class Valley(pl.LightningModule):
    """Example x pulls to x: the gradient's noise is that of the examples, whatever the weights are."""

    def __init__(self, make_optimizer: Callable[..., Optimizer] | None = None, begin: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((FEATURES,), begin))
        self.make_optimizer = make_optimizer or (lambda parameters: SGD(parameters, lr=BASE_LR))
        self.examples = 0
        self.sizes: list[int] = []
        self.requested: list[tuple[int, int]] = []
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
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, BatchSizeScheduler):
                self.requested.append((callback.requested_batch_size, callback.scheduled_batch_size))

    def configure_optimizers(self) -> Optimizer:
        return self.make_optimizer(self.parameters())


class Still(SGD):
    """Computes gradients, and stays where it is."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return closure()


MECHANISMS = {
    "sampler": (flexible, LinearRamp(2, 60, 8)),
    "accumulation": (plain, GeometricRamp(4, 32, 8)),
    "ragged": (ragged, Milestones({0: 4, 3: 16, 6: 32})),
}
every_mechanism = pytest.mark.parametrize(
    ("loader", "schedule"), MECHANISMS.values(), ids=list(MECHANISMS.keys())
)


class TestBeside:
    @every_mechanism
    @pytest.mark.parametrize("first", ["scheduler", "surge"])
    def test_the_learning_rate_is_that_of_the_size_each_step_has(
        self, tmp_path: Path, loader: Callable[[], Any], schedule: Schedule, first: str
    ) -> None:
        model = Valley()
        callbacks = [BatchSizeScheduler(schedule), SurgeLRCallback(4, law="sqrt", max_drift_per_step=1e9)]
        logger = CSVLogger(tmp_path)
        trainer = make_trainer(
            *(callbacks if first == "scheduler" else callbacks[::-1]), logger=logger, max_epochs=3
        )
        trainer.fit(model, loader())
        assert len(set(model.sizes)) >= 4
        assert columns(logger)["surge/batch_size"] == model.sizes
        assert columns(logger)["surge/lr_used"] == pytest.approx(
            [BASE_LR * (size / 4) ** 0.5 for size in model.sizes]
        )

    @every_mechanism
    def test_a_dry_run_is_no_callback(self, loader: Callable[[], Any], schedule: Schedule) -> None:
        alone, beside = Valley(), Valley()
        make_trainer(BatchSizeScheduler(schedule), max_epochs=3).fit(alone, loader())
        surge = SurgeLRCallback(4, probe_every=2, dry_run=True)
        make_trainer(surge, BatchSizeScheduler(schedule), max_epochs=3).fit(beside, loader())
        assert surge.history.num_measurements >= 2
        assert all(torch.equal(*pair) for pair in zip(alone.gradients, beside.gradients, strict=True))
        assert torch.equal(alone.weight, beside.weight)

    @pytest.mark.parametrize("weighted", [True, False])
    def test_weights_are_taken_off_before_micro_batches_are_measured(self, weighted: bool) -> None:
        """Windows of sixteen, as their gradients tell: for those of the last three, `sum_k a_k g_k`."""
        surge = SurgeLRCallback(8, probe_every=3)
        scheduler = BatchSizeScheduler(Milestones({0: 64}), weight_micro_batches=weighted)
        model, batches = Valley(lambda parameters: Still(parameters, lr=0.1)), ragged(6)
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


adam = partial(Adam, lr=0.1)
RULE = FollowPeak(start=4, maximum=16)
Run = tuple[Valley, BatchSizeScheduler, SurgeLRCallback]


def follow(rule: FollowPeak, batches: int = 100, **options: Any) -> Run:
    """Towards the bottom of the valley the gradient falls and its noise does not: larger batches pay."""
    surge = SurgeLRCallback(rule.start, probe_every=8, dry_run=options.pop("dry_run", False))
    scheduler, model = BatchSizeScheduler(rule), Valley(adam, **options)
    make_trainer(surge, scheduler).fit(model, plain(4 * batches))
    return model, scheduler, surge


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a training whose batch size has grown to 16."""

    model, *_ = follow(RULE)
    path = tmp_path_factory.mktemp("followed") / "followed.ckpt"
    model.trainer.save_checkpoint(path)
    return path


class TestFollowPeak:
    @pytest.mark.parametrize(
        ("rule", "dry_run"),
        [
            (RULE, False),
            (RULE, True),
            (FollowPeak(start=4, maximum=64, factor=0.5, confidence=0.0), False),
            (FollowPeak(start=8, maximum=8), False),
        ],
    )
    def test_it_grows_when_the_law_says_so(self, rule: FollowPeak, dry_run: bool) -> None:
        model, scheduler, surge = follow(rule, dry_run=dry_run)
        size, expected = rule.start, [rule.start] * len(model.sizes)
        for record in surge.law_history:
            size = rule.next_size(size, record.law)
            expected[record.step + 1 :] = [size] * (len(model.sizes) - record.step - 1)
        assert [requested for requested, _ in model.requested] == expected
        assert max(model.sizes) == min(rule.maximum, 16)
        # A larger window may wait for an aligned micro-batch; the epoch's last one has what is left.
        assert sum(requested != scheduled for requested, scheduled in model.requested) <= 2
        assert model.sizes[:-1] == [scheduled for _, scheduled in model.requested[:-1]]
        assert scheduler.examples == 400
        if dry_run:
            assert model.trainer.optimizers[0].param_groups[0]["lr"] == 0.1

    def test_it_shrinks_if_it_may(self) -> None:
        # Far from the bottom nearly all of a batch is wasted.
        rule = FollowPeak(start=16, maximum=16, minimum=4, growth_only=False)
        model, *_ = follow(rule, batches=250, begin=20.0)
        sizes = [requested for requested, _ in model.requested]
        assert sorted(set(sizes)) == [4, 8, 16]
        assert sizes == sorted(sizes, reverse=True)

    def test_it_needs_somebody_who_measures(self) -> None:
        for callbacks in ([], [SurgeLRCallback(4, law="sqrt")]):
            trainer = make_trainer(BatchSizeScheduler(RULE), *callbacks)
            message = r"SurgeLRCallback that measures .*SurgeLRCallback\(base_batch"
            with pytest.raises(MisconfigurationException, match=message):
                trainer.fit(Valley(), plain())
            assert trainer.global_step == 0

    def test_and_not_only_in_an_earlier_training(self) -> None:
        scheduler = BatchSizeScheduler(RULE)
        make_trainer(scheduler, SurgeLRCallback(4)).fit(Valley(), plain())
        with pytest.raises(MisconfigurationException, match="that measures beside FollowPeak, got none"):
            make_trainer(scheduler).fit(Valley(), plain())

    def test_a_scheduled_sampler_is_accumulated_as_it_is(self, caplog: pytest.LogCaptureFixture) -> None:
        # It cannot know sizes that are decided later.
        model = Valley(adam)
        trainer = make_trainer(SurgeLRCallback(8), BatchSizeScheduler(FollowPeak(start=8, maximum=32)))
        with caplog.at_level(logging.INFO, "lightning.pytorch"):
            trainer.fit(model, flexible())
        assert "set by accumulation, in powers of two of micro-batch 8" in caplog.text
        assert model.sizes == [8] * 12 + [4]

    @pytest.mark.parametrize(
        ("rule", "message"),
        [
            (FollowPeak(start=6, maximum=16), "got start=6: use start=4 or start=8"),
            (FollowPeak(start=4, maximum=24), "got maximum=24: use maximum=16 or maximum=32"),
            (FollowPeak(start=8, maximum=16, minimum=2), "got minimum=2: use minimum=4"),
        ],
    )
    def test_sizes_that_accumulation_cannot_make(self, rule: FollowPeak, message: str) -> None:
        with pytest.raises(MisconfigurationException, match=message):
            make_trainer(SurgeLRCallback(4), BatchSizeScheduler(rule)).fit(Valley(), plain())

    @pytest.mark.parametrize("maximum", [16, 8])
    def test_the_size_is_in_the_checkpoint(self, checkpoint: Path, maximum: int) -> None:
        state = torch.load(checkpoint, weights_only=True)["callbacks"]["BatchSizeScheduler"]
        assert state["followed"] == 16
        # A smaller maximum holds from the first step on.
        scheduler = BatchSizeScheduler(FollowPeak(start=4, maximum=maximum))
        model = Valley(adam)
        trainer = make_trainer(SurgeLRCallback(4), scheduler, max_epochs=2)
        trainer.fit(model, plain(64), ckpt_path=checkpoint, weights_only=True)
        assert model.requested == [(maximum, maximum)] * (64 // maximum)
        assert scheduler.examples == 400 + 64
