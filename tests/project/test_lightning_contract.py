"""What this package relies on and Lightning or torch do not promise: one test per touch point.

An upgrade that changes one of them fails here, with its name, instead of somewhere inside a run.
"""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, LambdaCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.loops.fit_loop import _FitLoop as FitLoop
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader

from lightning_surge import BatchSizeScheduler, ExactResume, SurgeLRCallback
from lightning_surge.schedules.sizes import ConstantSize
from tests.trainings import Memory, make_trainer, scaling, scheduled_lr


class Slope(pl.LightningModule):
    """Its loss is its only weight, so every gradient is exactly 1."""

    def __init__(self, overflow_at: int = -1) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.overflow_at = overflow_at

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (batch * self.weight).mean() * (float("inf") if batch_idx == self.overflow_at else 1.0)

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=0.5)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": ExponentialLR(optimizer, 0.5), "interval": "step"},
        }


def batches(count: int) -> DataLoader[Tensor]:
    return DataLoader(torch.ones(count, 1))  # type: ignore[arg-type]


class AtEachStep(Callback):
    """Calls a function of the Trainer, the module and the optimizer before every optimizer step."""

    def __init__(self, look: Callable[[pl.Trainer, Slope, Optimizer], Any]) -> None:
        self.look = look
        self.seen: list[Any] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        self.seen.append(self.look(trainer, pl_module, optimizer))


def test_should_update_logs_says_whether_this_very_step_is_logged(tmp_path: Any) -> None:
    callback = AtEachStep(
        lambda trainer, module, _: (
            trainer._logger_connector.should_update_logs,  # type: ignore[attr-defined]
            module.log("taken", float(trainer.global_step)),
        )
    )
    memory = Memory()
    make_trainer(callback, logger=memory, log_every_n_steps=2).fit(Slope(), batches(4))
    assert [answer for answer, _ in callback.seen] == [False, True, False, True]
    assert memory.of("taken") == [1.0, 3.0]


def test_callbacks_assigned_in_setup_are_the_ones_called_in_that_order() -> None:
    called: list[str] = []

    def reverse(trainer: Any, *_: Any, **options: Any) -> None:
        called.append("setup last")
        trainer.callbacks = trainer.callbacks[::-1]

    first, last = (
        LambdaCallback(setup=setup, on_train_batch_start=lambda *_, name=name: called.append(name))
        for name, setup in (("first", lambda *_, **options: called.append("setup first")), ("last", reverse))
    )
    make_trainer(first, last).fit(Slope(), batches(1))
    assert called == ["setup first", "setup last", "last", "first"]


def test_loggers_can_be_swapped_during_a_step_and_swapped_back(tmp_path: Any) -> None:
    logger = CSVLogger(tmp_path)

    def swap(trainer: pl.Trainer, module: Slope, _: Optimizer) -> list[bool]:
        own = trainer.loggers
        trainer.loggers = [DummyLogger() for _ in own]
        inside = isinstance(module.logger, DummyLogger)
        trainer.loggers = own
        return [inside, module.logger is logger, trainer.loggers == [logger]]

    callback = AtEachStep(swap)
    make_trainer(callback, logger=logger).fit(Slope(), batches(1))
    assert callback.seen == [[True, True, True]]


def test_instance_attributes_hide_the_modules_log_methods() -> None:
    # A replayed step must not log; deleting the attribute brings the methods back.
    module = Slope()
    vars(module)["log"] = lambda *args, **kwargs: "hidden"
    assert module.log("loss", 1.0) == "hidden"  # type: ignore[func-returns-value]
    del vars(module)["log"]
    assert module.log.__func__ is pl.LightningModule.log  # type: ignore[attr-defined]


def test_found_inf_is_readable_before_the_scaler_skips_the_step() -> None:
    def found(trainer: pl.Trainer, _: Slope, optimizer: Optimizer) -> bool:
        scaler = trainer.precision_plugin.scaler  # type: ignore[attr-defined]
        return any(bool(value) for value in scaler._found_inf_per_device(optimizer).values())

    callback = AtEachStep(found)
    module = Slope(overflow_at=1)
    trainer = make_trainer(callback, plugins=scaling())
    # The skipped step makes torch believe that the scheduler moved before the optimizer.
    trainer.fit(module, batches(3))
    assert callback.seen == [False, True, False]
    # Steps of 0.5, none, 0.125: the scheduler moves in a skipped step too.
    assert module.weight.item() == -0.625
    assert trainer.global_step == 3


def test_the_scaler_can_be_made_to_look_before_a_fused_step() -> None:
    class Fused(Slope):
        def configure_optimizers(self) -> Any:
            return SGD(self.parameters(), lr=0.5, fused=True)

    def look(trainer: pl.Trainer, module: Fused, optimizer: Optimizer) -> tuple[bool, float, float]:
        scaler = trainer.precision_plugin.scaler  # type: ignore[attr-defined]
        assert not scaler._found_inf_per_device(optimizer)  # Lightning leaves that to the step
        found = scaler._check_inf_per_device(optimizer).values()
        return any(bool(value) for value in found), module.weight.grad.item(), scaler.get_scale()

    callback = AtEachStep(look)
    module = Fused(overflow_at=1)
    trainer = make_trainer(callback, plugins=scaling(64.0))
    trainer.fit(module, batches(3))
    # Gradients still carry the scale, and the step works as if nobody had looked.
    assert callback.seen == [(False, 64.0, 64.0), (True, float("inf"), 64.0), (False, 32.0, 32.0)]
    assert module.weight.item() == -1.0


def test_post_hooks_fire_after_the_update_and_before_schedulers() -> None:
    seen: list[tuple[float, float]] = []

    def note(trainer: pl.Trainer, weight: float) -> None:
        seen.append((weight, scheduled_lr(trainer)))

    def hook(trainer: pl.Trainer, module: Slope) -> None:
        trainer.optimizers[0].register_step_post_hook(lambda *_: note(trainer, module.weight.item()))

    callback = LambdaCallback(on_train_start=hook, on_train_batch_end=lambda trainer, *_: note(trainer, 0.0))
    make_trainer(callback).fit(Slope(), batches(2))
    assert seen == [(-0.5, 0.5), (0.0, 0.25), (-0.75, 0.25), (0.0, 0.125)]


@pytest.mark.parametrize(
    "callback",
    [SurgeLRCallback(1, law="sqrt"), BatchSizeScheduler(ConstantSize(1)), ExactResume()],
    ids=lambda one: type(one).__name__,
)
@pytest.mark.parametrize(
    ("owner", "path", "found"),
    [
        (FitLoop, "max_batches", "fit_loop.max_batches, .* got lightning 2"),
        (torch.amp.GradScaler, "_found_inf_per_device", "_found_inf_per_device, .* got torch 2"),
    ],
)
def test_what_a_version_lacks_is_named_at_the_start(
    monkeypatch: Any, callback: Any, owner: type, path: str, found: str
) -> None:
    def gone(self: Any, name: str) -> Any:
        if name == path:
            raise AttributeError(name)
        return object.__getattribute__(self, name)

    if path in vars(owner):
        monkeypatch.delattr(owner, path)
    else:
        monkeypatch.setattr(owner, "__getattribute__", gone, raising=False)
    with pytest.raises(MisconfigurationException, match=f"{type(callback).__name__} needs .*{found}"):
        callback.setup(make_trainer(), Slope(), "fit")


def test_the_strategy_repeats_the_training_step_in_the_precision_of_training() -> None:
    dtypes: list[tuple[torch.dtype, int]] = []

    class Typed(Slope):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            dtypes.append(((batch @ self.weight[:, None]).dtype, batch_idx))
            return super().training_step(batch, batch_idx)

    def again(trainer: pl.Trainer, _: Slope, __: Optimizer) -> tuple[float, bool]:
        loss = trainer.strategy.training_step(torch.ones(1, 1), 7)
        assert isinstance(loss, Tensor)
        return loss.item(), loss.requires_grad

    callback = AtEachStep(again)
    make_trainer(callback, precision="bf16-mixed").fit(Typed(), batches(1))
    assert dtypes == [(torch.bfloat16, 0), (torch.bfloat16, 7)]
    assert callback.seen == [(0.0, True)]


def test_gradients_are_zeroed_before_on_before_backward() -> None:
    seen: list[float | None] = []

    def look(trainer: pl.Trainer, module: Slope, loss: Tensor) -> None:
        seen.append(None if module.weight.grad is None else module.weight.grad.item())

    make_trainer(LambdaCallback(on_before_backward=look), accumulate_grad_batches=2).fit(Slope(), batches(5))
    # A first micro-batch starts from nothing, a second one from half a gradient.
    assert seen == [None, 0.5, None, 0.5, None]


def test_a_batch_hook_may_skip_the_epoch_after_callbacks_have_started_the_batch() -> None:
    # The scheduler then moves without a step, and without on_train_batch_end.
    events: list[str] = []

    class Skipping(Slope):
        def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> int | None:
            return -1 if batch_idx == 1 else None

        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            events.append("schedule")
            super().lr_scheduler_step(scheduler, metric)

    look = LambdaCallback(
        on_train_batch_start=lambda *_: events.append("start"),
        on_train_batch_end=lambda *_: events.append("end"),
    )
    make_trainer(look).fit(Skipping(), batches(3))
    assert events == ["start", "schedule", "end", "start", "schedule"]


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_the_loss_before_backward_may_be_changed_in_place(precision: str) -> None:
    class Biased(Slope):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx) + 5.0
            self.log("loss", loss)
            self.returned = loss
            return loss

    module = Biased()
    gradients = AtEachStep(lambda _, module, __: module.weight.grad.item())
    plugins = [scaling(4.0)] if precision == "16-mixed" else []
    threefold = LambdaCallback(on_before_backward=lambda trainer, module, loss: loss.mul_(3.0))
    trainer = make_trainer(threefold, gradients, plugins=plugins)
    trainer.fit(module, batches(1))
    assert gradients.seen == [3.0]
    # What was returned, and logged, is another tensor.
    assert module.returned.item() == trainer.callback_metrics["loss"].item() == 5.0


@pytest.mark.parametrize("lengths", [(2, 5, 3), (5, 2, 4)])
def test_an_epoch_may_be_given_another_length_when_it_starts(lengths: tuple[int, int, int]) -> None:
    seen: list[str] = []

    class Uneven:
        """Batches of one index, another number of them in every epoch."""

        batch_size, drop_last = 1, False
        epoch = 0

        def __len__(self) -> int:
            return lengths[self.epoch]

        def __iter__(self) -> Any:
            return iter([[0]] * len(self))

    sampler = Uneven()

    def begin(trainer: pl.Trainer, module: Slope) -> None:
        sampler.epoch = trainer.current_epoch
        combined = trainer.fit_loop._combined_loader
        combined.limits = [len(sampler)]
        trainer.fit_loop.max_batches = trainer.val_check_batch = len(sampler)

    callback = LambdaCallback(
        on_train_epoch_start=begin,
        on_train_batch_start=lambda *_: seen.append("batch"),
        on_validation_epoch_end=lambda *_: seen.append("validation"),
    )

    class Validated(Slope):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            pass

    loader = DataLoader(torch.ones(1, 1), batch_sampler=sampler)  # type: ignore[arg-type, var-annotated]
    make_trainer(callback, max_epochs=3, num_sanity_val_steps=0).fit(Validated(), loader, batches(1))
    assert seen == [event for length in lengths for event in [*["batch"] * length, "validation"]]
