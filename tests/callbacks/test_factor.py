"""The factor is on the learning rate while the optimizer updates, and at no other time."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader

from lightning_surge import SurgeLRCallback
from tests.trainings import (
    Regression,
    at_update,
    columns,
    entries,
    make_trainer,
    regression_data,
    scaling,
    trained,
)

LR = 1e-3


class Writing(Regression):
    """Writes learning rates in whatever hook it is told to, and notes what it finds there.

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
        lr: Any = torch.tensor(LR, dtype=torch.float64) if tensor_lr else LR

        def make_optimizer(module: Any) -> Optimizer:
            parameters = list(module.parameters())
            parts = [{"params": parameters[index::groups]} for index in range(groups)]
            return AdamW(parts, lr=lr, weight_decay=0.0, **options)

        super().__init__(make_optimizer, (lambda o: ExponentialLR(o, 0.9)) if schedule else None)
        self.writes = writes or {}
        self.seen: list[float] = []
        self.step = 0

    @property
    def adamw(self) -> Optimizer:
        return self.trainer.optimizers[0]

    @property
    def groups(self) -> list[dict[str, Any]]:
        return self.adamw.param_groups

    def _write(self, hook: str) -> None:
        self.seen.append(float(self.groups[0]["lr"]))
        if hook in self.writes:
            self.writes[hook](self)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.step = batch_idx
        self._write("training_step")
        return self.loss(batch)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self._write("optimizer_step")


def writing(hook: str) -> Callable[..., None]:
    return lambda self, *args, **kwargs: self._write(hook)


for hook in set(Writing.HOOKS) - {"training_step", "optimizer_step"}:
    setattr(Writing, hook, writing(hook))


def data(batches: int = 6, size: int = 8) -> DataLoader[Any]:
    return regression_data(batches * size, size)


def sqrt(base: float = 2) -> SurgeLRCallback:
    """The factor is 2 at batches of 8."""
    return SurgeLRCallback(base, "sqrt")


def decay(module: Writing) -> None:
    for group in module.groups:
        group["lr"] *= 0.9


def count_up(module: Writing) -> None:
    module.groups[0]["lr"] = LR * (module.step + 1)


def once(module: Writing) -> None:
    if module.step == 2:
        module.groups[0]["lr"] = 2 * LR


def grow(module: Writing) -> None:
    if len(module.groups) == 1 and module.step == 2:
        module.late = torch.nn.Parameter(torch.ones(2))
        module.adamw.add_param_group({"params": [module.late], "lr": module.groups[0]["lr"] / 10})


def assert_doubled(make: Callable[[], Writing], base: float = 2, **options: Any) -> None:
    """What the update reads is the factor times what it would have read alone; nothing else changes."""
    alone = trained(make(), data(), **options)
    together = trained(make(), data(), sqrt(base), **options)
    assert len(alone.read) >= 2
    assert together.read == [[(2.0 * lr, wd) for lr, wd in groups] for groups in alone.read]
    assert together.seen == alone.seen
    left, expected = ([(type(g["lr"]), g["lr"]) for g in module.groups] for module in (together, alone))
    assert left == expected


class TestWhoeverWrites:
    # torch's schedulers do not follow groups that are added.
    @pytest.mark.parametrize(
        ("write", "options"),
        [
            (decay, {"schedule": True}),
            (decay, {"groups": 2, "tensor_lr": True, "foreach": False}),  # one tensor for both
            (count_up, {"groups": 3}),
            (once, {"schedule": True}),
            (once, {"schedule": True, "tensor_lr": True, "foreach": False}),
            (grow, {}),
        ],
    )
    @pytest.mark.parametrize("accumulation", [1, 2])
    @pytest.mark.parametrize("hook", Writing.HOOKS)
    def test_in_any_hook(self, hook: str, write: Any, options: dict[str, Any], accumulation: int) -> None:
        twice = {"accumulate_grad_batches": accumulation, "max_epochs": 2}
        assert_doubled(lambda: Writing({hook: write}, **options), 2 * accumulation, **twice)

    @pytest.mark.parametrize("seed", range(12))
    def test_in_several_hooks_at_random(self, seed: int) -> None:
        draw = random.Random(seed)
        hooks = draw.sample(Writing.HOOKS, draw.randint(2, 4))
        writes = {hook: draw.choice([decay, count_up, once]) for hook in hooks}
        options = {"groups": draw.randint(1, 3), "schedule": draw.random() < 0.5}
        accumulation = draw.choice([1, 1, 2, 3])
        twice = {"accumulate_grad_batches": accumulation, "max_epochs": 2}
        assert_doubled(lambda: Writing(writes, **options), 2 * accumulation, **twice)

    def test_from_hooks_of_the_optimizer(self) -> None:
        class Hooked(Writing):
            def configure_optimizers(self) -> Any:
                optimizer = super().configure_optimizers()
                optimizer.register_step_pre_hook(lambda *args: decay(self))
                optimizer.register_step_post_hook(lambda *args: decay(self))
                return optimizer

        assert_doubled(Hooked)

    def test_from_a_hook_that_is_there_later_under_a_scaler(self) -> None:
        class Late(Writing):
            def on_train_batch_start(self, *args: Any) -> None:
                if not self.seen:
                    self.adamw.register_step_pre_hook(lambda *args: decay(self))
                super().on_train_batch_start(*args)

        module = trained(Late(), data(3), sqrt(), plugins=scaling(8.0))
        assert module.lrs == pytest.approx([0.0018, 0.00162, 0.001458])


class TestStepsLeftOut:
    def test_by_the_module(self) -> None:
        class Skipping(Writing):
            def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
                closure = kwargs.get("optimizer_closure") or args[3]
                if self.step % 2:
                    closure()
                else:
                    super().optimizer_step(*args, **kwargs)

        assert_doubled(lambda: Skipping(schedule=True))

    @pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
    def test_by_a_batch_without_a_loss(self) -> None:
        class Empty(Writing):
            def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
                loss = super().training_step(batch, batch_idx)
                return None if batch_idx == 1 else loss

        module = trained(Empty(), data(4), sqrt())
        assert module.lrs == [2 * LR, LR, 2 * LR, 2 * LR]
        assert module.groups[0]["lr"] == LR

    def test_by_an_error_in_the_update(self) -> None:
        class Failing(Writing):
            def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
                with contextlib.suppress(ArithmeticError):
                    super().optimizer_step(*args, **kwargs)

            def configure_optimizers(self) -> Any:
                optimizer = super().configure_optimizers()
                at_update(optimizer, fail)
                return optimizer

        def fail(optimizer: Optimizer) -> None:
            assert optimizer.param_groups[0]["lr"] == 2 * LR
            if module.step == 1:
                raise ArithmeticError

        module = Failing()
        make_trainer(sqrt()).fit(module, data(4))
        assert module.lrs == [2 * LR] * 3
        assert set(module.seen) == {LR}


class TestOptimizers:
    def test_that_read_before_the_closure_are_named(self, caplog: pytest.LogCaptureFixture) -> None:
        class Early(AdamW):
            def step(self, closure: Any = None) -> Any:
                module.read.append(entries(self))
                return closure()

        module = Writing()
        module.make_optimizer = lambda module: Early(module.parameters(), lr=LR)
        with caplog.at_level("INFO"):
            make_trainer(sqrt(), accumulate_grad_batches=2).fit(module, data(4, 4))
        assert module.lrs == [2 * LR, 2 * LR]
        assert len([row for row in caplog.messages if "Early reads its learning rate before" in row]) == 1
        assert set(module.seen) == {LR}


class TestLogs:
    def test_what_the_update_read(self, tmp_path: Any) -> None:
        module = Writing({"configure_gradient_clipping": count_up, "on_train_batch_end": decay})
        logger = CSVLogger(tmp_path)
        make_trainer(LearningRateMonitor("step"), sqrt(), logger=logger).fit(module, data(4))
        assert columns(logger)["surge/lr_used"] == pytest.approx(module.lrs)
        assert columns(logger)["surge/lr_scheduled"] == pytest.approx([lr / 2 for lr in module.lrs])

    def test_the_schedule_in_the_monitor(self, tmp_path: Any) -> None:
        module, logger = Writing(schedule=True), CSVLogger(tmp_path)
        make_trainer(LearningRateMonitor("step"), sqrt(), logger=logger).fit(module, data(4))
        assert columns(logger)["lr-AdamW"] == pytest.approx([LR * 0.9**step for step in range(4)])


@pytest.mark.filterwarnings("ignore:The lr scheduler dict contains the key")
def test_manual_optimization_takes_the_same_path() -> None:
    class Manual(Writing):
        def __init__(self) -> None:
            super().__init__(schedule=True)
            self.automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            self._write("before")
            optimizer.step()
            self._write("after")
            self.lr_schedulers().step()  # type: ignore[union-attr]

    assert_doubled(Manual)
