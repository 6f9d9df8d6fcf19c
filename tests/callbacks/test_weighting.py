"""Uneven micro-batches: the gradient of a step is the mean over its examples, and nothing else changes."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor, nn
from torch.optim import LBFGS, Adam, Optimizer
from torch.utils.data import DataLoader

from lightning_surge.callbacks.batch_size_scheduler import BatchSizeScheduler
from lightning_surge.schedules.sizes import ConstantSize, LinearRamp, Milestones, Schedule
from tests.trainings import (
    MakeOptimizer,
    Ragged,
    Regression,
    assert_same,
    flat,
    sampled,
    scaling,
    sgd,
    trained,
    with_lr,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`"),
    pytest.mark.filterwarnings("ignore:train_dataloader yielded None"),
]

FEATURES = 5
RAGGED = [4, 1, 7, 2, 9, 3, 4, 4, 1, 6, 2]


def examples(size: int) -> Tensor:
    return torch.randn(size, FEATURES, generator=torch.Generator().manual_seed(3))


def ragged() -> Ragged:
    return Ragged(RAGGED, FEATURES)


class Net(Regression):
    """A regression that notes the gradient of each step, and that of one batch of all its examples."""

    def __init__(self, make_optimizer: MakeOptimizer = sgd) -> None:
        super().__init__(make_optimizer, width=7, features=FEATURES)
        self.window: list[Tensor] = []
        self.gradients: list[Tensor] = []
        self.whole: list[Tensor] = []  # the gradients that they should be
        self.clipped: list[Tensor] = []
        self.losses: list[Tensor] = []

    def loss(self, batch: Tensor) -> Tensor:
        return nn.functional.mse_loss(self.net(batch), batch.sum(-1, keepdim=True))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.window.clear()
        self.window.append(batch)
        loss = self.loss(batch)
        self.losses.append(loss.detach().clone())
        self.log("train_loss", loss, on_step=True, on_epoch=True, batch_size=len(batch))
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if not self.window:
            return
        parameters = [parameter for parameter in self.net.parameters() if parameter.requires_grad]
        self.gradients.append(flat([parameter.grad for parameter in parameters]))
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            self.whole.append(flat(torch.autograd.grad(self.loss(torch.cat(self.window)), parameters)))

    def configure_gradient_clipping(self, optimizer: Optimizer, *args: Any, **options: Any) -> None:
        super().configure_gradient_clipping(optimizer, *args, **options)
        self.clipped.append(flat([parameter.grad for parameter in self.parameters()]))

    def assert_means(self, rtol: float = 1e-6) -> None:
        assert self.gradients
        for found, expected in zip(self.gradients, self.whole, strict=True):
            assert (found - expected).norm() <= rtol * expected.norm()


def weighted(
    model: Net, schedule: Schedule, loader: Any = None, *, max_epochs: int = 2, **options: Any
) -> BatchSizeScheduler:
    """Trains, and makes sure that the gradient of every step is the mean over its examples."""
    scheduler = BatchSizeScheduler(schedule, **options)
    trained(model, ragged() if loader is None else loader, scheduler, max_epochs=max_epochs)
    model.assert_means()
    return scheduler


class TestOneBigBatch:
    @pytest.mark.parametrize(
        "schedule", [ConstantSize(4), ConstantSize(16), Milestones({0: 4, 3: 16}), Milestones({0: 32, 2: 4})]
    )
    def test_ragged_batches(self, schedule: Schedule) -> None:
        assert weighted(Net(), schedule).examples == 2 * sum(RAGGED)

    def test_tokens(self) -> None:
        # A batch of n examples has n x 5 numbers in it.
        tokens = Milestones({0: 20, 3: 80})
        scheduler = weighted(Net(), tokens, micro_batch_size=20, batch_size_fn=torch.numel)
        assert scheduler.examples == 2 * FEATURES * sum(RAGGED)
        assert scheduler.scheduled_batch_size == 80

    def test_tokens_of_a_sampler(self) -> None:
        class Padded(Net):
            """Counts only what is no padding."""

            def loss(self, batch: Tensor) -> Tensor:
                real = batch[batch[:, 0] > 0]
                return nn.functional.mse_loss(self.net(real), real.sum(-1, keepdim=True))

        data = examples(50)
        data[::4, 0] = data[::4, 0].abs() + 0.1
        data[1::4, 0] = data[1::4, 0].abs() + 0.1

        def count(batch: Tensor) -> float:
            return float((batch[:, 0] > 0).sum())

        loader = sampled(data, 8)
        scheduler = weighted(Padded(), LinearRamp(8, 30, 6), loader, max_epochs=3, batch_size_fn=count)
        assert scheduler.examples == 3 * (data[:, 0] > 0).sum()

    def test_micro_batches_without_a_loss(self) -> None:
        class Skips(Net):
            def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
                loss = super().training_step(batch, batch_idx)
                if batch_idx in (1, 5, 6):
                    del self.window[-1]
                    return None
                return loss

        model = Skips()
        scheduler = weighted(model, Milestones({0: 4, 3: 16}))
        assert len(model.gradients) == model.trainer.global_step - 1  # one step had no gradient at all
        assert scheduler.examples == 2 * sum(RAGGED)  # consumed all the same

    def test_micro_batches_that_count_for_nothing(self) -> None:
        model, empty = Net(), ragged()
        for index in (0, 4, 5):  # the first of a window, the last, and one of its own
            empty[index] = torch.zeros_like(empty[index])
        scheduler = BatchSizeScheduler(
            Milestones({0: 4, 3: 16}), batch_size_fn=lambda batch: len(batch) * float(batch.any())
        )
        trained(model, empty, scheduler)
        assert all(gradient.isfinite().all() for gradient in model.gradients)
        assert scheduler.examples == sum(RAGGED) - RAGGED[0] - RAGGED[4] - RAGGED[5]

    @pytest.mark.parametrize("missing", [3, 7, 10])
    def test_a_batch_that_is_none(self, missing: int) -> None:
        # Lightning leaves out the step at a window's end; the next window zeroes what was accumulated.
        loader = ragged()
        loader[missing] = None
        weighted(Net(), Milestones({0: 4, 2: 16}), loader)

    def test_an_epoch_cut_short(self) -> None:
        class Stops(Net):
            def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
                return -1 if self.trainer.current_epoch == 1 and batch_idx == 6 else None

        weighted(Stops(), Milestones({0: 4, 2: 16}), max_epochs=3)

    def test_parameters_that_are_frozen_or_not_used(self) -> None:
        model = Net()
        model.net[0].weight.requires_grad_(False)
        model.unused = nn.Linear(2, 2)
        weighted(model, ConstantSize(16))
        assert model.unused.weight.grad is None


class TestBitForBit:
    """Against Trainer(accumulate_grad_batches=4)."""

    @staticmethod
    def pair(scheduler: BatchSizeScheduler, loader: Callable[[], Any], **options: Any) -> tuple[Net, Net]:
        make_optimizer, options = options.pop("make_optimizer", sgd), options | {"max_epochs": 3}
        plain = trained(Net(make_optimizer), loader(), accumulate_grad_batches=4, **options)
        return plain, trained(Net(make_optimizer), loader(), scheduler, **options)

    @pytest.mark.parametrize("clip", [None, 0.1])
    def test_equal_micro_batches(self, clip: float | None) -> None:
        plain, scheduled = self.pair(
            BatchSizeScheduler(ConstantSize(16)),
            lambda: DataLoader(examples(48), batch_size=4),
            gradient_clip_val=clip,
            make_optimizer=with_lr(Adam, 0.001),
        )
        assert len(plain.gradients) == 9
        assert_same(plain.gradients, scheduled.gradients)
        assert_same(plain.losses, scheduled.losses)
        assert_same(list(plain.parameters()), list(scheduled.parameters()))

    def test_equal_micro_batches_whatever_they_are_counted_in(self) -> None:
        # micro_batch_size in one unit, batches counted in another.
        for options in ({}, {"batch_size_fn": lambda batch: 3 * len(batch)}):
            scheduler = BatchSizeScheduler(ConstantSize(28), micro_batch_size=7, **options)
            plain, scheduled = self.pair(scheduler, lambda: DataLoader(examples(48), batch_size=4))
            assert_same(plain.gradients, scheduled.gradients)

    def test_without_weights(self) -> None:
        scheduler = BatchSizeScheduler(ConstantSize(16), weight_micro_batches=False)
        plain, scheduled = self.pair(scheduler, ragged)
        assert_same(plain.gradients, scheduled.gradients)
        assert_same(list(plain.parameters()), list(scheduled.parameters()))
        with pytest.raises(AssertionError):
            scheduled.assert_means(rtol=0.01)
        assert scheduler.examples == 3 * sum(RAGGED)

    def test_the_logged_loss_is_not_touched(self) -> None:
        def look(trainer: pl.Trainer, pl_module: Any, outputs: Any, *args: Any) -> None:
            # Lightning has divided what it hands out here by the accumulation.
            handed_out = outputs["loss"] * trainer.accumulate_grad_batches
            torch.testing.assert_close(handed_out, pl_module.losses[-1], rtol=1e-6, atol=0)
            assert trainer.callback_metrics["train_loss_step"] == pl_module.losses[-1]

        looking = LambdaCallback(on_train_batch_end=look), BatchSizeScheduler(ConstantSize(16))
        model = trained(Net(), ragged(), *looking)
        assert len(model.losses) == len(RAGGED)
        mean = sum(size * loss for size, loss in zip(RAGGED, model.losses, strict=True)) / sum(RAGGED)
        torch.testing.assert_close(model.trainer.callback_metrics["train_loss_epoch"], mean)


class TestOtherParts:
    def test_gradients_are_clipped_after_the_correction(self) -> None:
        # The last window has 6 + 2 of 16 examples: uncorrected, its gradient would be half as large.
        model = trained(Net(), ragged(), BatchSizeScheduler(ConstantSize(16)), gradient_clip_val=0.5)
        model.assert_means()
        for clipped, gradient in zip(model.clipped, model.gradients, strict=True):
            assert gradient.norm() > 0.5
            torch.testing.assert_close(clipped, gradient * 0.5 / gradient.norm(), rtol=1e-5, atol=1e-7)

    def test_losses_whose_value_autograd_needs(self) -> None:
        class Rooted(Net):
            def loss(self, batch: Tensor) -> Tensor:
                return super().loss(batch).sqrt()

        class Dict(Rooted):
            def training_step(self, batch: Tensor, batch_idx: int) -> Any:
                return {"loss": super().training_step(batch, batch_idx), "more": 1}

        for cls in (Rooted, Dict):
            model, alone = trained(cls(), ragged(), BatchSizeScheduler(ConstantSize(16))), cls()
            # Not the root of the mean: that of each micro-batch, weighted by its examples.
            parameters = list(alone.parameters())
            expected = sum(
                len(batch) / 14 * flat(torch.autograd.grad(alone.loss(batch), parameters))
                for batch in ragged()[:4]
            )
            torch.testing.assert_close(model.gradients[0], expected, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("fused", [False, True])
    def test_a_gradient_scaler_that_skips_steps(self, fused: bool) -> None:
        plugin = scaling(2.0**30, growth_interval=3)

        class Scaled(Net):
            skipped = 0

            def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
                super().on_before_optimizer_step(optimizer)
                if fused:  # such an optimizer takes the scale off itself
                    self.gradients[-1] /= plugin.scaler.get_scale()  # type: ignore[union-attr]
                if not self.gradients[-1].isfinite().all():
                    self.skipped += 1
                    del self.gradients[-1], self.whole[-1]

        model = Scaled(with_lr(Adam, 0.01, fused=fused))
        scheduler = BatchSizeScheduler(Milestones({0: 4, 3: 16}))
        trained(model, ragged(), scheduler, plugins=plugin, max_epochs=6)
        model.assert_means(rtol=2e-3)  # half precision
        assert model.skipped > 10
        assert len(model.gradients) + model.skipped == model.trainer.global_step == 21
        assert scheduler.examples == 6 * sum(RAGGED)

    @pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
    def test_lbfgs_asks_several_times(self, line_search: str | None) -> None:
        make_optimizer = with_lr(LBFGS, 0.1, max_iter=4, line_search_fn=line_search)
        plain = trained(Net(make_optimizer), ragged())
        model, scheduler = Net(make_optimizer), BatchSizeScheduler(ConstantSize(4))
        trained(model, ragged(), scheduler)
        assert len(model.gradients) > 2 * model.trainer.global_step
        assert_same(list(plain.parameters()), list(model.parameters()))
        assert scheduler.examples == sum(RAGGED)
