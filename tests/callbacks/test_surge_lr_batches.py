"""Batches and modules that are hard on a measurement: the run is right, and so is what is measured."""

import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_surge import SurgeLRCallback
from lightning_surge.measure.direction import GRADIENT
from lightning_surge.measure.measurement import LawMeasurement
from lightning_surge.measure.replay import Chunk, Piece
from lightning_surge.policy.reasons import Reason
from tests.trainings import MakeTrainer


class Linear(pl.LightningModule):
    """A regression whose step does to its batch what `spoil` does."""

    def __init__(self, spoil: Callable[[Any], Any] = lambda batch: batch) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)
        self.spoil = spoil

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs = self.spoil(batch)
        return (self.layer(inputs).squeeze(-1) - inputs.sum(-1)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def batches(sizes: list[int], wrap: Callable[[Tensor], Any] = lambda x: x) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    made = [wrap(torch.randn(size, 4, generator=generator)) for size in sizes]
    return DataLoader(made, batch_size=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_step_that_takes_things_out_of_its_batch_is_measured(
    make_trainer: MakeTrainer, accumulation: int
) -> None:
    callback = SurgeLRCallback(8, probe_every=1)
    loader = batches([16] * 24, lambda x: {"inputs": x})
    module = Linear(lambda batch: batch.pop("inputs"))
    make_trainer(callback, accumulate_grad_batches=accumulation).fit(module, loader)
    assert callback.history.num_measurements >= 4


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_step_that_overwrites_its_batch_is_told_and_trains_on(
    make_trainer: MakeTrainer, accumulation: int
) -> None:
    module, plain = Linear(lambda x: x.mul_(0.5)), Linear(lambda x: x.mul_(0.5))
    callback = SurgeLRCallback(8, probe_every=1, dry_run=True)
    with pytest.warns(UserWarning, match="changes a tensor of it in place: work on a copy"):
        make_trainer(callback, accumulate_grad_batches=accumulation).fit(module, batches([16] * 12))
    make_trainer(accumulate_grad_batches=accumulation).fit(plain, batches([16] * 12))
    assert callback.history.num_measurements == 0
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), plain.parameters(), strict=True))


def test_sparse_gradients_are_measured(make_trainer: MakeTrainer) -> None:
    class Bag(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Embedding(10, 4, sparse=True)  # type: ignore[assignment]

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return (self.layer(batch.abs().mul(3).long().clamp(max=9)) - 1).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SparseAdam(list(self.parameters()), lr=1e-3)

    callback = SurgeLRCallback(8, probe_every=1)
    make_trainer(callback).fit(Bag(), batches([32] * 8))
    assert callback.history.num_measurements >= 4
    assert callback.history.stats().trace_cov > 0


def test_the_budget_holds_where_sizes_vary_a_lot(make_trainer: MakeTrainer) -> None:
    # One batch in ten has a hundred times the examples of the others: a plan made from it would be far off.
    sizes = ([4] * 9 + [400]) * 30
    callback = SurgeLRCallback(4, objective="alignment", max_overhead=0.05)
    make_trainer(callback, max_epochs=2).fit(Linear(), batches(sizes))
    assert 0.02 < callback.overhead <= 0.06


def test_a_second_training_is_measured_as_the_first_was(make_trainer: MakeTrainer) -> None:
    callback = SurgeLRCallback(8, objective="alignment", max_overhead=0.2)
    counts = []
    for _ in range(2):
        make_trainer(callback).fit(Linear(), batches([16] * 100))
        counts.append((callback.history.num_measurements, callback.lr_scale(64)))
    assert counts[0][0] >= 3
    assert counts[0] == counts[1]


@pytest.mark.parametrize("scale", [1 / 8, 65536.0])
def test_gradient_directions_go_as_far_under_a_loss_scale(scale: float) -> None:
    """On a loss that is no quadratic the distance of the secant matters."""

    def measure(factor: float) -> Any:
        theta = torch.full((3,), 0.5, dtype=torch.float64)

        def replay(piece: Piece, weight: float) -> None:
            gradient = factor * weight * (theta**3 + piece.batch)
            theta.grad = gradient if theta.grad is None else theta.grad + gradient

        generator = torch.Generator().manual_seed(0)
        noise = [torch.randn(3, generator=generator, dtype=torch.float64) for _ in range(4)]
        measurement = LawMeasurement(
            [theta],
            num_chunks=4,
            replay=replay,
            delta=0.3 / factor,
            scales=[1.0],
            direction=GRADIENT,
        )
        done = measurement.run([Chunk((Piece(value, 0, 1.0),)) for value in noise])
        return done.unscaled(factor, direction=GRADIENT)

    plain, scaled = measure(1.0), measure(scale)
    for mine, theirs in zip(scaled.curvatures, plain.curvatures, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6)


def test_live_directions_are_of_a_base_batch(make_trainer: MakeTrainer) -> None:
    callback = SurgeLRCallback(8, probe_every=1)
    make_trainer(callback, accumulate_grad_batches=16).fit(Linear(), batches([2] * 64))
    record = callback.history.state_dict()["records"][0]
    # 16 micro-batches of 2: half of them make directions of 8 and 16 examples.
    assert [size for size, _ in record["curvatures"]] == [8.0, 16.0]
    assert min(size for size, _ in record["alignments"]) == 8.0


def test_the_progress_bar_can_show_the_learning_rate_used(make_trainer: MakeTrainer) -> None:
    seen = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            seen.append(trainer.progress_bar_metrics.get("lr_used", math.nan))

    callback = SurgeLRCallback(4, "sqrt", prog_bar=True)
    make_trainer(callback, Look(), log_every_n_steps=1).fit(Linear(), batches([16] * 3))
    assert seen == pytest.approx([2e-3] * 3)


def test_several_steps_on_one_batch_while_batches_are_pooled(make_trainer: MakeTrainer) -> None:
    """The second window sees the same batch, untouched: that is no failure."""

    class Manual(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            optimizer = self.optimizers()
            for _ in range(2):
                optimizer.zero_grad()
                self.manual_backward(loss_of(self, batch))
                optimizer.step()

    def loss_of(module: Any, batch: Tensor) -> Tensor:
        return (module.layer(batch).squeeze(-1) - batch.sum(-1)).square().mean()

    callback = SurgeLRCallback(8, probe_every=1, probe_examples=64, loss_fn=loss_of)
    make_trainer(callback).fit(Manual(), batches([16] * 12))
    assert callback.history.num_measurements >= 2


def test_a_loss_without_any_gradient_trains_on(make_trainer: MakeTrainer) -> None:
    class Flat(Linear):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return 0.0 * super().training_step(batch, batch_idx)

    callback = SurgeLRCallback(8, probe_every=1)
    module = Flat()
    before = module.layer.weight.clone()
    make_trainer(callback).fit(module, batches([32] * 40))
    assert callback.decision is not None
    assert callback.decision.reason == "held: the gradients are zero"
    assert callback.decision.because is Reason.GRADIENTS_ZERO
    assert torch.allclose(module.layer.weight, before, rtol=0.01)  # weight decay alone
    # No law follows from nothing: the factor stays at the square root.
    assert callback.lr_scale(32) == 2.0


def test_a_batch_that_cannot_be_cut_does_not_vouch_for_those_that_can(make_trainer: MakeTrainer) -> None:
    # The sum over a batch's rows, in batches of one row that counts many tokens and of many rows.
    class Summed(Linear):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return len(batch) * super().training_step(batch, batch_idx)

    callback = SurgeLRCallback(4, probe_every=1, batch_size_fn=lambda batch: 2.0 * len(batch))
    with pytest.warns(UserWarning, match="The mean gradient of a batch's slices is not the gradient"):
        make_trainer(callback).fit(Summed(), batches([1, 16] * 20))


@pytest.mark.filterwarnings("ignore:train_dataloader yielded None")
def test_a_window_that_a_batch_of_none_leaves_without_a_step_is_forgotten(make_trainer: MakeTrainer) -> None:
    class Sizes(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any) -> None:
            self.seen.append(trainer.callbacks[0]._behind_step.examples)  # type: ignore[attr-defined]

    given = [torch.ones(4, 4)] * 3 + [None] + [torch.ones(4, 4)] * 4
    loader = DataLoader(given, batch_size=None)  # type: ignore[arg-type]
    sizes = Sizes()
    make_trainer(SurgeLRCallback(4), sizes, accumulate_grad_batches=2).fit(Linear(), loader)
    assert sizes.seen == [8.0, 8.0, 8.0]
