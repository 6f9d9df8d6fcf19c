"""Whatever fails while measuring, wherever it fails: training goes on, or ends, with what it had."""

import gc
import itertools
import random
import re
import signal
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, LambdaCallback
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lightning_surge import BatchSizeScheduler, SurgeLRCallback
from lightning_surge.callbacks.measuring.measurer import Measurer
from lightning_surge.callbacks.measuring.repeated_loss import RepeatedLoss
from lightning_surge.measure.budget import ProbeBudget
from lightning_surge.measure.coordinates import CoordinateMeasurement
from lightning_surge.measure.measurement import LawMeasurement
from lightning_surge.schedules.sizes import ConstantSize
from tests.trainings import Memory, assert_same, make_trainer, regression_data, trained

failing = pytest.mark.filterwarnings(
    "ignore:Measuring failed and is tried again later", "ignore:The norms of an accumulation window could not"
)

MICRO = 8


class Passing(torch.autograd.Function):
    """Nothing, forward and backward, but that somebody is told of the latter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tell: Callable[[str], None]) -> Tensor:
        ctx.tell = tell
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.tell("backward")
        return gradients[0], None


class Drawing(pl.LightningModule):
    """Draws from every random stream at every step, and keeps buffers and counts."""

    def __init__(self, optimizer: str = "adamw") -> None:
        super().__init__()
        pl.seed_everything(3, verbose=False)
        self.first = nn.Linear(3, 4)
        self.drop = nn.Dropout(0.25)
        self.last = nn.Linear(4, 1)
        self.optimizer = optimizer
        self.register_buffer("seen", torch.zeros(()))
        self.count = 0
        self.notes: list[float] = []
        self.tell: Callable[[str], None] = lambda stage: None

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        self.tell("forward")
        self.seen += 1
        self.count += 1
        self.notes.append(random.random() + np.random.rand())  # noqa: NPY002
        hidden = torch.tanh(self.first(x + 0.01 * torch.randn_like(x)))
        hidden = Passing.apply(self.drop(hidden), self.tell)
        return nn.functional.mse_loss(self.last(hidden), y) * (1.0 + 1e-3 * self.notes[-1])

    def configure_optimizers(self) -> Any:
        if self.optimizer == "sgd":
            return SGD(self.parameters(), lr=0.01, momentum=0.9)
        return AdamW(self.parameters(), lr=0.01, betas=(0.9, 0.95))

    @property
    def traces(self) -> tuple[Any, ...]:
        """All that training leaves in the module, and where its random streams stand."""
        return (
            [value.tolist() for value in self.state_dict().values()],
            self.count,
            self.notes,
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),  # noqa: NPY002
        )


def data(batches: int) -> DataLoader[Any]:
    return regression_data(MICRO * batches, MICRO, features=3)


class Allocations(TorchDispatchMode):
    """Tells of every operation that makes a tensor: where memory may turn out to be too small."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__()
        self.tell = tell

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func._schema.returns
        if any(str(result.type) == "Tensor" and result.alias_info is None for result in results):
            self.tell("allocation")
        return func(*args, **(kwargs or {}))


@dataclass
class Injector:
    """Raises at the n-th event of a kind in every measurement, or every second one, with n growing.

    The training stops by itself when a measurement to be spoilt got through: every n has been tried.
    """

    stage: str
    error: type[BaseException]
    target: int = 1
    stride: int = 1
    every_second: bool = False
    quiet: int = 0
    windows: int = 0
    events: int = 0
    measuring: bool = False
    fired: bool = False
    spoilt: list[int] = field(default_factory=list)
    alive: list[weakref.ref[Any]] = field(default_factory=list)
    leaked: int = 0
    done: bool = False

    def begin_window(self) -> None:
        self.windows += 1
        self.events, self.fired = 0, False

    @property
    def armed(self) -> bool:
        due = self.windows > self.quiet and not (self.every_second and self.windows % 2)
        return due and self.measuring and not self.fired

    def tell(self, stage: str) -> None:
        if stage != self.stage or not self.armed or self.done:
            return
        self.events += 1
        if self.events == self.target:
            self.fired = True
            self.spoilt.append(self.target)
            self.target += self.stride
            # A new one each time: one that is kept keeps the frames that it went through.
            raise self.error("CUDA out of memory, or whatever it may be")

    @contextmanager
    def watched(self) -> Iterator[None]:
        """What is done inside is done for measuring."""
        self.measuring = True
        try:
            if self.stage == "allocation":
                with Allocations(self.tell):
                    yield
            else:
                yield
        finally:
            self.measuring = False

    def end_window(self) -> None:
        self.leaked += sum(ref() is not None for ref in self.alive)
        self.alive.clear()
        if not self.fired and self.events and not (self.every_second and self.windows % 2):
            self.done = True


@pytest.fixture
def inject(monkeypatch: pytest.MonkeyPatch) -> Callable[[Injector], None]:
    """Watches every part of a measurement, and lets failures have no effect on its spacing."""

    def install(injector: Injector) -> None:
        monkeypatch.setattr(ProbeBudget, "widen", lambda self: None)
        for name in ("after_backward", "collect"):
            monkeypatch.setattr(Measurer, name, injector.watched()(getattr(Measurer, name)))
        for kind in (LawMeasurement, CoordinateMeasurement):
            make = kind.__init__

            def made(self: Any, *args: Any, make: Any = make, **kwargs: Any) -> None:
                injector.alive.append(weakref.ref(self))
                make(self, *args, **kwargs)

            monkeypatch.setattr(kind, "__init__", made)
        compute = RepeatedLoss.__call__

        def computed(self: RepeatedLoss, *args: Any) -> Tensor:
            loss = compute(self, *args)
            injector.alive.append(weakref.ref(loss))  # and with it all that its graph holds
            return loss

        monkeypatch.setattr(RepeatedLoss, "__call__", computed)

    return install


class Steering(Callback):
    """Tells the injector of windows, and ends the training when it has tried everything."""

    def __init__(self, injector: Injector) -> None:
        self.injector = injector
        self.micro_batches = 0

    def on_train_start(self, *args: Any) -> None:
        self.injector.begin_window()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.micro_batches += 1
        if self.micro_batches % trainer.accumulate_grad_batches == 0:
            self.injector.end_window()
            self.injector.begin_window()
            trainer.should_stop = self.injector.done


CASES: dict[str, dict[str, Any]] = {
    "step": {"options": {"objective": "step"}},
    "theorem3": {"options": {"law": "theorem3"}},
    "sgd": {"options": {"objective": "step"}, "optimizer": "sgd"},
    "micro-batches": {"options": {"law": "theorem3"}, "accumulation": 4},
    "windows": {"options": {}, "accumulation": 4},
}
PROBED = [case for case in CASES if case != "windows"]  # norms of windows add no pass
# How far apart the events are that are tried; the primes differ, so that together they hit most of them.
STRIDES = {"step": 61, "theorem3": 67, "sgd": 31, "micro-batches": 61, "windows": 1}


def surge(accumulation: int, **options: Any) -> SurgeLRCallback:
    """Measures at every step, at the base batch size, where the factor is 1 whatever is measured."""
    size = MICRO * accumulation
    return SurgeLRCallback(**({"base_batch_size": size, "probe_every": 1, "probe_examples": size} | options))


@pytest.mark.slow
@failing
class TestAnywhere:
    """A failure at every single place of a measurement, one after the other, in one training."""

    # Every second measurement is spoilt, after a whole one; or all are, after another failure.
    @pytest.mark.parametrize(
        ("case", "stage", "every_second"),
        [
            *itertools.product(CASES, ["allocation"], [True, False]),
            *itertools.product(PROBED, ["forward"], [True]),
            *itertools.product(PROBED, ["backward"], [False]),
        ],
    )
    def test_it_leaves_the_training_that_there_was(
        self, inject: Callable[[Injector], None], case: str, stage: str, every_second: bool
    ) -> None:
        accumulation = CASES[case].get("accumulation", 1)
        optimizer = CASES[case].get("optimizer", "adamw")
        error = torch.OutOfMemoryError if stage == "allocation" else RuntimeError
        stride = STRIDES[case] if stage == "allocation" else 1
        injector = Injector(stage, error, stride=stride, every_second=every_second)
        inject(injector)
        module = Drawing(optimizer)
        module.tell = injector.tell
        callback = surge(accumulation, **CASES[case]["options"])
        trainer = make_trainer(
            callback, Steering(injector), accumulate_grad_batches=accumulation, max_epochs=40
        )
        gc.disable()  # what is left must go by itself
        try:
            trainer.fit(module, data(60 * accumulation))
        finally:
            gc.enable()
        found = module.traces
        assert injector.done
        assert len(injector.spoilt) >= 4
        assert injector.leaked == 0
        assert callback.history.num_measurements >= (len(injector.spoilt) - 2 if every_second else 1)

        stop = {"max_epochs": -1, "max_steps": trainer.global_step}
        again = Drawing(optimizer), data(60 * accumulation)
        assert trained(*again, accumulate_grad_batches=accumulation, **stop).traces == found

    def test_errors_of_the_users_code_are_told_wherever_they_are_raised(
        self, inject: Callable[[Injector], None]
    ) -> None:
        # ValueError and ZeroDivisionError are what measuring itself raises where there is nothing to measure.
        for error in (ValueError, ZeroDivisionError):
            injector = Injector("forward", error, stride=4, every_second=True)
            inject(injector)
            module = Drawing()
            module.tell = injector.tell
            callback = surge(1, objective="step")
            trainer = make_trainer(callback, Steering(injector), max_epochs=40)
            with pytest.warns(UserWarning, match=f"Measuring failed .* {error.__name__}: CUDA") as told:
                trainer.fit(module, data(60))
            assert sum(error.__name__ in str(warning.message) for warning in told) == len(injector.spoilt)


class EndIn(Callback):
    """Ends a training without the callback where another was ended while measuring."""

    def __init__(self, batch_idx: int) -> None:
        self.batch_idx = batch_idx
        self.batch = -1

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.batch = batch_idx

    def on_after_backward(self, *args: Any) -> None:
        if self.batch == self.batch_idx:
            raise KeyboardInterrupt


@pytest.fixture
def _interrupts_stay_possible() -> Iterator[None]:
    # Lightning ignores further ones, for the rest of the process.
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.usefixtures("_interrupts_stay_possible")
@failing
class TestInterrupts:
    # In slices, a secant, or the reference; or in a probe of micro-batches that were kept.
    @pytest.mark.parametrize(
        ("case", "stage", "event", "error"),
        [
            ("step", "forward", 1, KeyboardInterrupt),
            ("step", "forward", 4, SystemExit),
            ("step", "backward", 8, KeyboardInterrupt),
            ("step", "allocation", 150, SystemExit),
            ("theorem3", "forward", 6, KeyboardInterrupt),
            ("micro-batches", "forward", 1, SystemExit),
            ("micro-batches", "backward", 3, KeyboardInterrupt),
            ("micro-batches", "allocation", 90, KeyboardInterrupt),
        ],
    )
    def test_end_the_training_as_if_nothing_had_been_measured(
        self, inject: Callable[[Injector], None], case: str, stage: str, event: int, error: Any
    ) -> None:
        def ended(*callbacks: Callback, tell: Any = None) -> tuple[Drawing, pl.Trainer]:
            module = Drawing(CASES[case].get("optimizer", "adamw"))
            module.tell = tell or module.tell
            trainer = make_trainer(*callbacks, accumulate_grad_batches=accumulation)
            with pytest.raises((KeyboardInterrupt, SystemExit)):
                trainer.fit(module, data(60 * accumulation))
            return module, trainer

        accumulation = CASES[case].get("accumulation", 1)
        injector = Injector(stage, error, event, quiet=6)
        inject(injector)
        noting = EndIn(-2)  # never, but it knows the micro-batch in hand
        callback = surge(accumulation, **CASES[case]["options"])
        found, trainer = ended(callback, Steering(injector), noting, tell=injector.tell)
        assert injector.spoilt == [event]
        assert callback.history.num_measurements == 5
        expected, _ = ended(EndIn(noting.batch))
        assert found.traces == expected.traces
        assert_same(*([parameter.grad for parameter in one.parameters()] for one in (found, expected)))
        assert "log" not in vars(found)
        assert all(group["lr"] == 0.01 for group in trainer.optimizers[0].param_groups)


@failing
class TestElsewhere:
    def test_a_logger_is_never_asked_within_a_measurement(self) -> None:
        class Logging(Drawing):
            def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
                loss = super().training_step(batch, batch_idx)
                self.log("loss", loss)
                assert self.logger is not None
                self.logger.log_metrics({"direct": loss.item()}, step=self.count)
                return loss

        logger = Memory()
        callback = surge(1)
        make_trainer(callback, logger=logger).fit(Logging(), data(12))
        assert callback.history.num_measurements == 11
        assert len(logger.rows) == 2 * 12  # by training_step itself, and by the Trainer for it

    def test_batch_size_fn_that_fails_on_a_slice_costs_the_measurement(self) -> None:
        # The first batch is cut before training begins, and would be refused there.
        slices: list[bool] = []

        def count(batch: list[Tensor]) -> float:
            slices.append(len(batch[0]) < MICRO)
            if slices[-1] and sum(slices) > 4:
                raise KeyError("lengths")
            return float(len(batch[0]))

        module = Drawing()
        callback = surge(1, batch_size_fn=count)
        with pytest.warns(UserWarning, match="Measuring failed .* KeyError: 'lengths'"):
            make_trainer(callback).fit(module, data(12))
        found = module.traces
        plain = trained(Drawing(), data(12))
        assert plain.traces == found
        assert callback.history.num_measurements == 0

    def test_a_trace_that_cannot_be_undone_leaves_nothing_of_the_measurement_behind(
        self, inject: Callable[[Injector], None]
    ) -> None:
        class Scribbling(Drawing):
            def __init__(self) -> None:
                super().__init__()
                self.large = torch.zeros((1 << 20) + 1)  # too large to copy

            def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
                self.large[0] += 1
                return super().training_step(batch, batch_idx)

        watching = Injector("nothing", RuntimeError)
        inject(watching)
        gc.disable()
        try:
            with pytest.warns(UserWarning, match="Measuring is off from now on.* TraceError"):
                make_trainer(surge(1), Steering(watching)).fit(Scribbling(), data(8))
        finally:
            gc.enable()
        assert watching.leaked == 0


def stretch(trainer: pl.Trainer, *args: Any) -> None:
    """Writes the accumulation in mid-run."""
    if trainer.global_step == 2:
        trainer.accumulate_grad_batches = 4


class TestWarningsAsErrors:
    """As under `python -W error`, which the tests have for a rule: what would be warned of is logged."""

    @pytest.mark.parametrize(
        ("callbacks", "message"),
        [
            ([surge(1, loss_fn=lambda module, batch: int("not today"))], "Measuring failed .* 'not today'"),
            ([surge(1, loss_fn=lambda m, _: m.last.bias.sum() * torch.nan, split_batch=False)], "No law was"),
            ([surge(1, loss_fn=lambda module, batch: module.first(batch[0]).sum())], "couples examples"),
            ([BatchSizeScheduler(ConstantSize(512))], "size=512 needs 64 micro-batches"),
            (
                [BatchSizeScheduler(ConstantSize(16)), LambdaCallback(on_train_batch_end=stretch)],
                "another callback or the Lightning",
            ),
        ],
    )
    def test_end_no_training(self, unraised: list[str], callbacks: Any, message: str) -> None:
        trainer = make_trainer(*callbacks)
        trainer.fit(Drawing(), data(12))
        assert trainer.state.finished
        assert any(re.search(message, said) for said in unraised)
        unraised.clear()

    def test_leave_state_to_be_loaded(self, unraised: list[str]) -> None:
        callback, scheduler = surge(1), BatchSizeScheduler(ConstantSize(8))
        callback.load_state_dict({"version": 0})
        scheduler.load_state_dict({"version": 0})
        assert ["afresh" in unraised[0], "counts examples from 0" in unraised[1]] == [True, True]
        unraised.clear()
