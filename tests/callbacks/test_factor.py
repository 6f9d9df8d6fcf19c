"""The factor is on the learning rate while the optimizer updates, and at no other time."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_surge import SurgeLRCallback
from tests.trainings import columns, make_trainer, scaling

LR = 1e-3


class Spied(AdamW):
    """AdamW that notes the learning rates and weight decays which its update reads."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.read: list[list[tuple[float, float]]] = []

    def _init_group(self, group: dict[str, Any], *args: Any) -> Any:
        if group is self.param_groups[0]:
            self.read.append([])
        self.read[-1].append((float(group["lr"]), float(group["weight_decay"])))
        return super()._init_group(group, *args)


class Writing(pl.LightningModule):
    """Trains two weights, and writes learning rates in whatever hook it is told to.

    Args:
        writes: by the name of a hook, functions of the module that change the optimizer's groups.
        schedule: whether an ExponentialLR moves at every step.
        options: of the optimizer.
    """

    HOOKS = (
        "on_train_batch_start",
        "training_step",
        "on_before_zero_grad",
        "on_before_backward",
        "on_after_backward",
        "on_before_optimizer_step",
        "configure_gradient_clipping",
        "optimizer_step",
        "on_train_batch_end",
    )

    def __init__(
        self,
        writes: dict[str, Callable[[Writing], object]] | None = None,
        *,
        schedule: bool = False,
        groups: int = 1,
        tensor_lr: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(torch.nn.Parameter(torch.ones(2)) for _ in range(groups))
        self.writes = writes or {}
        self.schedule = schedule
        lr: Any = torch.tensor(LR, dtype=torch.float64) if tensor_lr else LR
        self.spied = Spied(
            [{"params": [w]} for w in self.weights], lr=lr, **({"weight_decay": 0.0} | options)
        )
        self.seen: list[float] = []
        self.step = 0

    @property
    def groups(self) -> list[dict[str, Any]]:
        return self.spied.param_groups

    def _write(self, hook: str) -> None:
        self.seen.append(float(self.groups[0]["lr"]))
        if hook in self.writes:
            self.writes[hook](self)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.step = batch_idx
        self._write("training_step")
        return torch.stack([(batch[0] @ weight).square().mean() for weight in self.weights]).sum()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self._write("optimizer_step")

    def configure_optimizers(self) -> Any:
        if not self.schedule:
            return self.spied
        scheduler = ExponentialLR(self.spied, 0.9)
        return {"optimizer": self.spied, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def writing(hook: str) -> Callable[..., None]:
    return lambda self, *args, **kwargs: self._write(hook)


for hook in set(Writing.HOOKS) - {"training_step", "optimizer_step"}:
    setattr(Writing, hook, writing(hook))


def data(batches: int = 5, size: int = 8) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(batches * size, 2, generator=generator)), size)


def sqrt(base: float = 2, **options: Any) -> SurgeLRCallback:
    """The factor is 2 at batches of 8."""
    return SurgeLRCallback(base, "sqrt", **options)


def lrs(module: Writing) -> list[float]:
    return [groups[0][0] for groups in module.spied.read]


def decay(module: Writing) -> None:
    for group in module.groups:
        group["lr"] *= 0.9


def count_up(module: Writing) -> None:
    module.groups[0]["lr"] = LR * (module.step + 1)


def once(module: Writing) -> None:
    if module.step == 2:
        module.groups[0]["lr"] = 2 * LR


def change_decay(module: Writing) -> None:
    module.groups[0]["weight_decay"] = 0.04


def grow(module: Writing) -> None:
    if len(module.groups) == 1 and module.step == 2:
        module.late = torch.nn.Parameter(torch.ones(2))
        module.spied.add_param_group({"params": [module.late], "lr": module.groups[0]["lr"] / 10})


class TestWhoeverWrites:
    """What the update reads is the factor times what it would have read alone; nothing else changes."""

    @staticmethod
    def compare(make: Callable[[], Writing], **options: Any) -> Writing:
        alone, together = make(), make()
        make_trainer(**options).fit(alone, data())
        make_trainer(sqrt(), **options).fit(together, data())
        doubled = [[(2.0 * lr, wd) for lr, wd in groups] for groups in alone.spied.read]
        assert together.spied.read == doubled
        assert together.seen == alone.seen
        assert [group["lr"] for group in together.groups] == [group["lr"] for group in alone.groups]
        return together

    @pytest.mark.parametrize("schedule", [False, True])
    @pytest.mark.parametrize("write", [decay, count_up, once, grow])
    @pytest.mark.parametrize("hook", Writing.HOOKS)
    def test_in_any_hook(self, hook: str, write: Any, schedule: bool) -> None:
        if write is grow and schedule:
            pytest.skip("torch's schedulers do not follow groups that are added")
        self.compare(lambda: Writing({hook: write}, schedule=schedule))

    def test_the_values_of_those_cases(self) -> None:
        early = Writing({"on_train_batch_start": decay})
        make_trainer(sqrt()).fit(early, data(3))
        assert lrs(early) == pytest.approx([0.0018, 0.00162, 0.001458])
        late = Writing({"configure_gradient_clipping": count_up})
        make_trainer(sqrt()).fit(late, data(3))
        assert lrs(late) == pytest.approx([0.002, 0.004, 0.006])
        jump = Writing({"on_before_zero_grad": once})
        make_trainer(sqrt()).fit(jump, data(4))
        assert lrs(jump) == pytest.approx([0.002, 0.002, 0.004, 0.004])
        assert jump.groups[0]["lr"] == 0.002

    def test_weight_decay_that_is_kept(self) -> None:
        module = Writing({"on_before_optimizer_step": change_decay}, weight_decay=0.01)
        make_trainer(sqrt(scale_weight_decay=False)).fit(module, data(3))
        assert module.spied.read == [[(2 * LR, 0.02)]] * 3
        assert module.groups[0]["weight_decay"] == 0.04

    @pytest.mark.parametrize("seed", range(20))
    def test_at_random(self, seed: int) -> None:
        draw = random.Random(seed)
        accumulation = draw.choice([1, 1, 2, 3])
        writes = {
            hook: draw.choice([decay, count_up, once])
            for hook in draw.sample(Writing.HOOKS, draw.randint(1, 4))
        }
        groups, schedule, tensor = draw.randint(1, 3), draw.random() < 0.5, draw.random() < 0.3
        make = lambda: Writing(writes, schedule=schedule, groups=groups, tensor_lr=tensor, foreach=False)  # noqa: E731
        alone, together = make(), make()
        for module, callbacks in ((alone, []), (together, [sqrt(8 * accumulation / 4)])):
            make_trainer(*callbacks, accumulate_grad_batches=accumulation, max_epochs=2).fit(module, data(6))
        assert together.spied.read == [[(2 * lr, wd) for lr, wd in groups] for groups in alone.spied.read]
        assert together.seen == alone.seen

    def test_from_hooks_of_the_optimizer(self) -> None:
        class Hooked(Writing):
            def configure_optimizers(self) -> Any:
                self.spied.register_step_pre_hook(lambda *args: decay(self))
                self.spied.register_step_post_hook(lambda *args: decay(self))
                return self.spied

        self.compare(Hooked)

    def test_from_a_hook_that_is_there_later_under_a_scaler(self) -> None:
        class Late(Writing):
            def on_train_batch_start(self, *args: Any) -> None:
                if not self.seen:
                    self.spied.register_step_pre_hook(lambda *args: decay(self))
                super().on_train_batch_start(*args)

        module = Late()
        make_trainer(sqrt(), plugins=scaling(8.0)).fit(module, data(3))
        assert lrs(module) == pytest.approx([0.0018, 0.00162, 0.001458])


class TestStepsLeftOut:
    def test_by_the_module(self) -> None:
        class Skipping(Writing):
            def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
                closure = kwargs.get("optimizer_closure") or args[3]
                if self.step % 2:
                    closure()
                else:
                    super().optimizer_step(*args, **kwargs)

        alone, together = Skipping(schedule=True), Skipping(schedule=True)
        make_trainer().fit(alone, data(6))
        make_trainer(sqrt()).fit(together, data(6))
        assert lrs(together) == [2 * lr for lr in lrs(alone)]
        assert together.groups[0]["lr"] == alone.groups[0]["lr"]
        assert together.seen == alone.seen

    @pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
    def test_by_a_scaler(self) -> None:
        class Overflowing(Writing):
            def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
                return super().training_step(batch, batch_idx) * (float("inf") if batch_idx == 1 else 1.0)

        alone, together = Overflowing(schedule=True), Overflowing(schedule=True)
        for module, callbacks in ((alone, []), (together, [sqrt()])):
            make_trainer(*callbacks, plugins=scaling(8.0)).fit(module, data(4))
        assert lrs(together) == [2 * lr for lr in lrs(alone)]
        assert together.groups[0]["lr"] == alone.groups[0]["lr"]

    @pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
    def test_by_a_batch_without_a_loss(self) -> None:
        class Empty(Writing):
            def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
                loss = super().training_step(batch, batch_idx)
                return None if batch_idx == 1 else loss

        module = Empty()
        make_trainer(sqrt()).fit(module, data(4))
        assert lrs(module) == [2 * LR, LR, 2 * LR, 2 * LR]
        assert module.groups[0]["lr"] == LR

    def test_by_an_error_in_the_update(self) -> None:
        class Failing(Writing):
            def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
                with contextlib.suppress(ArithmeticError):
                    super().optimizer_step(*args, **kwargs)

        module = Failing()
        healthy = module.spied._init_group

        def fails(group: dict[str, Any], *args: Any) -> Any:
            result = healthy(group, *args)
            if module.step == 1:
                raise ArithmeticError
            return result

        module.spied._init_group = fails  # type: ignore[method-assign]
        make_trainer(sqrt()).fit(module, data(4))
        assert lrs(module) == [2 * LR] * 4
        assert set(module.seen) == {LR}


class TestOptimizers:
    def test_that_read_before_the_closure_are_named(self, caplog: pytest.LogCaptureFixture) -> None:
        class Early(Spied):
            def step(self, closure: Any = None) -> Any:
                ahead = [group["lr"] for group in self.param_groups]
                loss = closure()
                self.read.append([(lr, 0.0) for lr in ahead])
                return loss

        class Module(Writing):
            def configure_optimizers(self) -> Any:
                self.spied = Early(self.parameters(), lr=LR)
                return self.spied

        module = Module()
        callback = sqrt()
        with caplog.at_level("INFO"):
            make_trainer(callback, accumulate_grad_batches=2).fit(module, data(4, 4))
        assert lrs(module) == [2 * LR, 2 * LR]
        assert len([row for row in caplog.messages if "Early reads its learning rate before" in row]) == 1
        assert set(module.seen) == {LR}


class TestLogs:
    def test_what_the_update_read(self, tmp_path: Any) -> None:
        module = Writing({"configure_gradient_clipping": count_up, "on_train_batch_end": decay})
        logger = CSVLogger(tmp_path)
        make_trainer(LearningRateMonitor("step"), sqrt(), logger=logger).fit(module, data(4))
        assert columns(logger)["surge/lr_used"] == pytest.approx(lrs(module))
        assert columns(logger)["surge/lr_scheduled"] == pytest.approx([lr / 2 for lr in lrs(module)])

    def test_the_schedule_in_the_monitor(self, tmp_path: Any) -> None:
        module, logger = Writing(schedule=True), CSVLogger(tmp_path)
        make_trainer(LearningRateMonitor("step"), sqrt(), logger=logger).fit(module, data(4))
        assert columns(logger)["lr-Spied"] == pytest.approx([LR * 0.9**step for step in range(4)])


def test_manual_optimization_takes_the_same_path() -> None:
    class Manual(Writing):
        def __init__(self) -> None:
            super().__init__(schedule=True)
            self.automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            self.seen.append(float(self.groups[0]["lr"]))
            optimizer.step()
            self.seen.append(float(self.groups[0]["lr"]))
            self.lr_schedulers().step()  # type: ignore[union-attr]

    alone, together = Manual(), Manual()
    make_trainer().fit(alone, data())
    make_trainer(sqrt()).fit(together, data())
    assert lrs(together) == [2 * lr for lr in lrs(alone)]
    assert together.seen == alone.seen
