"""Batches and modules that are hard on a measurement: the run is right, and so is what is measured."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader

from lightning_surge import SurgeLRCallback
from lightning_surge.policy.reasons import Reason
from tests.trainings import Regression, Sizes, make_trainer, trained, with_lr


class Linear(Regression):
    """A regression whose step does to its batch what `spoil` does."""

    def __init__(self, spoil: Callable[[Any], Any] = lambda batch: batch) -> None:
        super().__init__(with_lr(AdamW, 1e-3))
        self.net = nn.Sequential(nn.Linear(4, 1))
        self.spoil = spoil

    def loss(self, batch: Any) -> Tensor:
        inputs = self.spoil(batch)
        return (self.net(inputs).squeeze(-1) - inputs.sum(-1)).square().mean()


def batches(sizes: list[int], wrap: Callable[[Tensor], Any] = lambda x: x) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    made = [wrap(torch.randn(size, 4, generator=generator)) for size in sizes]
    return DataLoader(made, batch_size=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_step_that_takes_things_out_of_its_batch_is_measured(accumulation: int) -> None:
    callback = SurgeLRCallback(8, probe_every=1)
    loader = batches([16] * 24, lambda x: {"inputs": x})
    step = Linear(lambda batch: batch.pop("inputs"))
    trained(step, loader, callback, accumulate_grad_batches=accumulation)
    assert callback.history.num_measurements >= 4


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_step_that_overwrites_its_batch_is_told_and_trains_on(accumulation: int) -> None:
    module, plain = Linear(lambda x: x.mul_(0.5)), Linear(lambda x: x.mul_(0.5))
    callback = SurgeLRCallback(8, objective="step", probe_every=1, dry_run=True)
    with pytest.warns(UserWarning, match="changes a tensor of it in place: work on a copy"):
        make_trainer(callback, accumulate_grad_batches=accumulation).fit(module, batches([16] * 12))
    make_trainer(accumulate_grad_batches=accumulation).fit(plain, batches([16] * 12))
    # Norms of windows need no second pass.
    assert (callback.history.num_measurements > 0) == (accumulation > 1)
    assert torch.equal(module.weights, plain.weights)


def test_tensors_made_in_inference_mode_can_be_in_a_batch() -> None:
    with torch.inference_mode():
        loader = batches([16] * 8, lambda x: x.clone())
    callback = SurgeLRCallback(8, probe_every=1)
    trained(Linear(torch.clone), loader, callback)
    assert callback.history.num_measurements >= 4


@pytest.mark.parametrize("step", [lambda self, *args: args, lambda self, batch, *, idx=0, **others: (batch,)])
def test_a_step_gets_what_lightning_gives_it(step: Any) -> None:
    def training_step(self: Any, *args: Any, **options: Any) -> Tensor:
        return self.loss(step(self, *args, **options)[0])

    training_step.__signature__ = inspect.signature(step)  # type: ignore[attr-defined]
    module: Any = type("Step", (Linear,), {"training_step": training_step})()
    trained(module, batches([16] * 8), callback := SurgeLRCallback(8, probe_every=1))
    assert callback.history.num_measurements >= 4


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize(("every", "spacing"), [(2, 2), (2, 4), (3, 3)])
def test_batches_without_a_loss_are_not_those_that_are_waited_for(every: int, spacing: int) -> None:
    class Skips(Linear):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) if batch_idx % every else None

    callback = SurgeLRCallback(8, probe_every=spacing)
    trained(Skips(), batches([16] * 36), callback)
    assert callback.history.num_measurements >= 4


def test_nothing_is_left_of_a_training_that_failed_in_its_first_step() -> None:
    fresh, used = (SurgeLRCallback(8, objective="step", probe_every=1) for _ in range(2))
    broken = Linear(lambda _: 1 / 0)
    broken.make_optimizer = with_lr(AdamW, 1.0)
    with pytest.raises(ZeroDivisionError):
        make_trainer(used).fit(broken, batches([16] * 8))
    for callback in (fresh, used):
        trained(Linear(), batches([16] * 8), callback)
    assert used.law_history[-1].law == fresh.law_history[-1].law


@pytest.mark.slow
def test_the_budget_holds_where_sizes_vary_a_lot() -> None:
    # One batch in ten has a hundred times the examples of the others: a plan made from it would be far off.
    sizes = ([4] * 9 + [400]) * 40
    callback = SurgeLRCallback(4, objective="alignment", max_overhead=0.05)
    make_trainer(callback).fit(Linear(), batches(sizes))
    assert 0.02 < callback.overhead <= 0.06


@pytest.mark.slow
def test_a_second_training_is_measured_as_the_first_was() -> None:
    callback = SurgeLRCallback(8, objective="alignment", max_overhead=0.2, probe_examples=16)
    counts = []
    for _ in range(2):
        make_trainer(callback).fit(Linear(), batches([16] * 40))
        counts.append((callback.history.num_measurements, callback.lr_scale(64)))
    assert counts[0][0] >= 3
    assert counts[0] == counts[1]


def test_a_loss_without_any_gradient_trains_on() -> None:
    class Flat(Linear):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return 0.0 * super().training_step(batch, batch_idx)

    callback, before = SurgeLRCallback(8, probe_every=1), Flat().weights
    module = trained(Flat(), batches([32] * 40), callback)
    assert callback.decision is not None
    assert callback.decision.reason == "held: the gradients are zero"
    assert callback.decision.because is Reason.GRADIENTS_ZERO
    assert torch.allclose(module.weights, before, rtol=0.01)  # weight decay alone
    # No law follows from nothing: the factor stays at the square root.
    assert callback.lr_scale(32) == 2.0


def test_a_batch_that_cannot_be_cut_does_not_vouch_for_those_that_can() -> None:
    # The sum over a batch's rows, in batches of one row that counts many tokens and of many rows.
    class Summed(Linear):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return len(batch) * super().training_step(batch, batch_idx)

    callback = SurgeLRCallback(4, probe_every=1, batch_size_fn=lambda batch: 2.0 * len(batch))
    with pytest.warns(UserWarning, match="The mean gradient of a batch's slices is not the gradient"):
        make_trainer(callback).fit(Summed(), batches([1, 16] * 20))


@pytest.mark.filterwarnings("ignore:train_dataloader yielded None")
def test_a_window_that_a_batch_of_none_leaves_without_a_step_is_forgotten() -> None:
    given = [torch.ones(4, 4)] * 3 + [None] + [torch.ones(4, 4)] * 4
    loader = DataLoader(given, batch_size=None)  # type: ignore[arg-type]
    callback = SurgeLRCallback(4)
    sizes = Sizes([callback])
    make_trainer(callback, sizes, accumulate_grad_batches=2).fit(Linear(), loader)
    assert sizes.sizes == [[8.0, 8.0, 8.0]]
