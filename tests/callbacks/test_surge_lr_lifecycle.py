import itertools
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, LambdaCallback
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer, lr_scheduler
from torch.utils.data import DataLoader, default_collate
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_surge import BatchSizeWarmup, SurgeLRCallback
from lightning_surge.policy.policy import Decision
from tests.trainings import (
    MakeOptimizer,
    Outside,
    Regression,
    adamw,
    make_trainer,
    probing,
    regression_data,
    scaling,
    scheduled_lr,
    trained,
    with_lr,
)

MakeSchedule = Callable[[Optimizer], Any]


class Scheduled(Regression):
    """Notes what its scheduler found and left at every move."""

    def __init__(self, make_schedule: MakeSchedule | None = None, interval: str = "step") -> None:
        super().__init__(make_schedule=make_schedule, interval=interval)
        self.scheduled: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        # Independent of the learning rate, so that plateaus come alike with and without the callback.
        self.log("metric", 1.0)
        return super().training_step(batch, batch_idx)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        self.scheduled.append(scheduled_lr(self.trainer))
        super().lr_scheduler_step(scheduler, metric)
        self.scheduled.append(scheduled_lr(self.trainer))


SCHEDULES: dict[str, MakeSchedule] = {
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.02, total_steps=40),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.8)], milestones=[3]
    ),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
}


class TestSchedules:
    # Lightning doubts it, but an epoch is as good a unit as a step.
    @pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using 'interval'")
    @pytest.mark.parametrize(("interval", "accumulation"), [("step", 1), ("epoch", 2)])
    @pytest.mark.parametrize("name", SCHEDULES)
    def test_follow_their_own_trajectory(self, name: str, interval: str, accumulation: int) -> None:
        def run(*callbacks: Callback) -> tuple[Scheduled, float]:
            module, options = Scheduled(SCHEDULES[name], interval), {"accumulate_grad_batches": accumulation}
            # The last window is partial, the last batch short.
            trained(module, regression_data(18, 4), *callbacks, max_epochs=4, **options)
            return module, scheduled_lr(module.trainer)

        plain, last = run()
        scaled, last_scaled = run(SurgeLRCallback(3, "linear"))
        assert len(plain.scheduled) >= 8
        assert len(set(plain.scheduled)) >= 2
        assert scaled.scheduled == plain.scheduled
        assert last_scaled == last
        # Lightning divides the last window as if it were whole, and its factor is that of a whole one.
        sizes = [4, 4, 4, 4, 2] if accumulation == 1 else [8, 8, 4]
        assert scaled.lrs == [lr * (size / 3) for lr, size in zip(plain.lrs, 4 * sizes, strict=True)]

    @pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
    @pytest.mark.parametrize(
        ("what", "accumulation", "where"),
        [
            ("overflow", 1, (4, 5)),
            ("overflow", 2, (4,)),
            ("none", 2, (4, 5)),
            # The scaler is not asked to step, though the window has gradients.
            ("none", 2, (5,)),
        ],
    )
    def test_survive_steps_that_a_scaler_skips(
        self, what: str, accumulation: int, where: tuple[int, ...]
    ) -> None:
        class Skipped(Scheduled):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                loss = super().training_step(batch, batch_idx)
                if batch_idx in where:
                    return loss * math.inf if what == "overflow" else None
                return loss

        def run(*callbacks: Callback) -> Scheduled:
            options = {"accumulate_grad_batches": accumulation, "plugins": scaling(16.0)}
            return trained(Skipped(SCHEDULES["exponential"]), regression_data(32, 4), *callbacks, **options)

        plain = run()
        scaled = run(SurgeLRCallback(accumulation, "linear", lr_scale_bounds=(0.1, 100.0)))
        steps = 8 // accumulation
        assert len(plain.lrs) == steps - (2 if accumulation == 1 else 1)
        assert len(plain.scheduled) == 2 * steps
        assert scaled.scheduled == plain.scheduled
        assert scaled.lrs == [4.0 * lr for lr in plain.lrs]


class TestResume:
    @pytest.mark.parametrize("longer", [False, True])
    def test_on_a_shorter_loader_comes_to_an_end(self, tmp_path: Path, longer: bool) -> None:
        # Lightning counts on where the checkpoint stopped, here past the end of the new loader.
        def run(batches: int, max_epochs: int, resume: Path | None = None) -> pl.Trainer:
            data, callback = regression_data(16 * batches, 16, kind=StatefulDataLoader), probing()
            options = {"resume": resume, "max_steps": 40, "max_epochs": max_epochs}
            return trained(Regression(), data, callback, **options).trainer

        checkpoint = tmp_path / "first.ckpt"
        run(8, 1).save_checkpoint(checkpoint)
        resumed = run(20 if longer else 3, 3, checkpoint)
        assert resumed.global_step > 8

    def test_with_another_base_batch_size_says_that_the_factor_changes(self) -> None:
        state = SurgeLRCallback(4).state_dict()
        callback = SurgeLRCallback(8)
        with pytest.warns(UserWarning, match="base_batch_size=8 replaces the checkpoint's 4: .* changes"):
            callback.load_state_dict(state)
        assert callback.base_batch_size == 8
        assert callback.lr_scale(2) == 0.5


class TestRuns:
    def test_leave_the_optimizer_as_it_was_found(self) -> None:
        def crash(trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == 2:
                raise RuntimeError("the machine was switched off")

        for others in ([], [LambdaCallback(on_train_batch_start=crash)]):
            trainer = make_trainer(SurgeLRCallback(2, "linear"), *others)
            with pytest.raises(RuntimeError, match="switched off") if others else nullcontext():
                trainer.fit(Regression(with_lr(SGD, 0.25)), regression_data(16, 4))
            (optimizer,) = trainer.optimizers
            assert optimizer.param_groups[0]["lr"] == 0.25
            assert len(optimizer._optimizer_step_pre_hooks) == 0
            assert len(optimizer._optimizer_step_post_hooks) == 0

    def test_put_batch_schedules_before_and_everything_else_after(self) -> None:
        seen: list[float] = []
        look = LambdaCallback(on_train_batch_start=lambda trainer, *_: seen.append(scheduled_lr(trainer)))
        surge, warmup = SurgeLRCallback(4, "linear", lr_scale_bounds=(0.1, 10.0)), BatchSizeWarmup(4, 16, 2)
        module = Regression(with_lr(SGD, 0.125))
        trainer = make_trainer(look, surge, warmup)
        trainer.fit(module, regression_data(64, 4))
        order = [callback for callback in trainer.callbacks if callback in (look, surge, warmup)]  # type: ignore[attr-defined]
        assert order == [warmup, surge, look]
        # 4, then 8, then 16 examples from the fourth micro-batch on; others see the schedule.
        assert module.lrs == [0.125, 0.125, 0.25, 0.5, 0.5, 0.5]
        assert seen == [0.125] * 16


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"law": "teorem3"}, r"law to be one of measured, theorem2, .*constant, got law='teorem3'"),
            (
                {"objective": "speed"},
                "objective to be one of step, alignment, progress, got objective='speed'",
            ),
            ({"anchor": "law"}, r"no anchor, got anchor='law', which is retired: leave it out"),
            ({"base_batch_size": 0}, r"1e-06 <= base_batch_size <= 1e\+12, got base_batch_size=0: count"),
            ({"max_overhead": 0.0}, r"0 < max_overhead <= 1e\+12, got max_overhead=0.0: 0.01 spends"),
            ({"max_drift_per_step": 0.0}, r"0 < max_drift_per_step <= .*, got max_drift_per_step=0.0: 0.05"),
            ({"half_life": -1.0}, r"0 < half_life <= 1e\+12, got half_life=-1.0: 8 measurements"),
            ({"probe_every": 0}, r"whole number probe_every >= 1, got probe_every=0: count optimizer steps"),
            ({"probe_examples": 3}, r"whole number probe_examples >= 4, got probe_examples=3: 4 examples"),
            (
                {"lr_scale_bounds": (2.0, 0.5)},
                r"0 < lr_scale_bounds\[0\] <= 1, got lr_scale_bounds\[0\]=2.0: the factor is 1 .* first",
            ),
            ({"lr_scale_bounds": (0.0, 2.0)}, r"got lr_scale_bounds\[0\]=0.0"),
            ({"lr_scale_bounds": (math.nan, 2.0)}, r"got lr_scale_bounds\[0\]=nan"),
            ({"lr_scale_bounds": (0.5, math.inf)}, r"1 <= lr_scale_bounds\[1\] < inf, got .*=inf"),
            ({"lr_scale_bounds": (0.5, 1.0, 2.0)}, r"lr_scale_bounds=\(low, high\), two numbers"),
        ],
    )
    def test_of_arguments_name_them_with_value_and_remedy(
        self, arguments: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            SurgeLRCallback(**arguments)

    @staticmethod
    def _uneven() -> DataLoader[Any]:
        # The third tensor holds three numbers for all examples together.
        return DataLoader(
            regression_data(32, 8).dataset,
            8,
            collate_fn=lambda rows: [*default_collate(rows), torch.zeros(3)],
        )

    # Lightning says so, too, and warns that it takes the first length that it finds.
    @pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
    @pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size` from an ambiguous collection")
    @pytest.mark.parametrize(
        ("make_optimizer", "law", "message"),
        [
            (
                lambda _: None,
                "measured",
                "needs an optimizer, got 0 from configure_optimizers of Regression: return one that holds",
            ),
            (with_lr(SGD, 0.1), "theorem2", "law='theorem2' .* got SGD: use law='measured'"),
            (with_lr(SGD, 0.1), "theorem3", "law='theorem3' .* got SGD: use law='measured'"),
            (lambda _: AdamW([torch.zeros(2) * 1j]), "measured", "got dtype torch.complex64: train"),
            (adamw, "measured", r"cannot cut .* got lengths \[3, 8\]: pass split_batch=.*split_batch=False"),
        ],
    )
    def test_come_before_training(self, make_optimizer: MakeOptimizer, law: Any, message: str) -> None:
        module = Regression(make_optimizer)
        before = module.weights
        with pytest.raises(MisconfigurationException, match=message):
            make_trainer(SurgeLRCallback(4, law)).fit(module, self._uneven())
        assert module.calls == 0
        assert torch.equal(module.weights, before)

    @pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size` from an ambiguous collection")
    def test_a_batch_that_cannot_be_cut_suits_whole_batches(self) -> None:
        class First(Regression):
            def loss(self, batch: Any) -> Tensor:
                return super().loss(batch[:2])

        for options in ({"law": "sqrt"}, {"split_batch": False}):
            module = trained(First(), self._uneven(), SurgeLRCallback(4, **options))
            assert len(module.lrs) == 4

    def test_unknown_optimizer_is_named_and_its_learning_rate_scaled(self) -> None:
        class Ladder(Optimizer):
            def __init__(self, parameters: Any, lr: float) -> None:
                super().__init__(parameters, {"lr": lr})

            def _init_group(self, group: dict[str, Any]) -> None:
                """Where tests look at what an update reads."""

            def step(self, closure: Any = None) -> Any:
                loss = closure()
                self._init_group(self.param_groups[0])
                return loss

        module = Regression(with_lr(Ladder, 0.01))
        with pytest.warns(UserWarning, match="does not know Ladder: it is treated as an Adam-style"):
            make_trainer(SurgeLRCallback(4, max_overhead=1e-9)).fit(module, regression_data(48, 16))
        assert module.lrs == pytest.approx([0.01 * 1.05**k for k in (1, 2, 3)])


class Failing(Regression):
    """Tells replays from training, and fails in them."""

    def __init__(self, failure: Any) -> None:
        super().__init__()
        self.failure, self.outside = failure, Outside()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.outside.training = True

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.outside.training:
            self.outside.training = False
            return loss
        self.outside.notes.append(self.trainer.global_step)
        if isinstance(self.failure, BaseException):
            raise self.failure
        return self.failure if self.failure is None else loss * self.failure


class TestFailures:
    FAILURES = (
        ValueError("this step cannot be repeated"),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        None,
        math.nan,
        math.inf,
    )

    @pytest.mark.parametrize("failure", FAILURES, ids=["raises", "memory", "none", "nan", "inf"])
    @pytest.mark.parametrize("split_batch", [None, False], ids=["sliced", "whole"])
    def test_of_every_probe_costs_nothing_but_the_measurements(
        self, decisions: list[tuple[float, Decision]], failure: Any, split_batch: Any
    ) -> None:
        module = Failing(failure)
        # At the base batch size, where the factor is 1 whatever is measured.
        callback = probing(base_batch_size=16, split_batch=split_batch)
        # A loss that is no number says nothing of slices; without any it is left out, and tried again.
        failed = split_batch is None or not isinstance(failure, float)
        message = "Measuring failed .* training goes on" if failed else "No law was fitted to a measurement"
        with pytest.warns(UserWarning, match=message):
            make_trainer(callback).fit(module, regression_data(16 * 40, 16))
        assert torch.equal(module.weights, trained(Regression(), regression_data(16 * 40, 16)).weights)
        assert module.calls == 40
        assert callback.history.num_measurements == 0
        if not failed:
            assert all(decision.reason.startswith("held: ") for _, decision in decisions[2:])
            return
        # Twice as far apart each time.
        attempts = sorted(set(module.outside.notes))
        gaps = [after - before for before, after in itertools.pairwise(attempts)]
        assert len(gaps) >= 4
        assert all(after >= 2 * before for before, after in itertools.pairwise(gaps))
        reasons = [decision.reason for _, decision in decisions]
        assert reasons[attempts[0] - 1] == "sqrt: nothing measured yet"
        assert all(reason.startswith("held: ") for reason in reasons[attempts[0] :])

    @pytest.mark.parametrize("pooled", [False, True])
    def test_of_split_batch_later_on(self, pooled: bool) -> None:
        calls: list[int] = []

        def split(batch: Any, num_slices: int) -> list[Any]:
            calls.append(num_slices)
            if len(calls) > 3:
                raise ValueError("no more slices")
            x, y = batch
            return list(zip(x.tensor_split(num_slices), y.tensor_split(num_slices), strict=True))

        module = Regression()
        examples = 64 if pooled else 16
        callback = probing(base_batch_size=16, objective="step", probe_examples=examples, split_batch=split)
        # Four whole batches are four chunks: nothing is ever cut, nor asked for more than once.
        told = pytest.warns(UserWarning, match="ValueError: no more slices")
        with nullcontext() if pooled else told:
            trained(module, regression_data(16 * 12, 16), callback)
        assert not pooled or calls == [2]
        assert torch.equal(module.weights, trained(Regression(), regression_data(16 * 12, 16)).weights)
