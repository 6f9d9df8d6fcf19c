"""Changes the number of examples per optimizer step while a model trains.

*Accumulation* works with every loader. Lightning decides with two different counts when to zero the gradients
(``batch_idx % accumulation`` before a backward) and when to step (``(batch_idx + 1) % accumulation`` after
it). They agree only if a window of ``a`` micro-batches begins at a multiple of ``a``: going from 2 to 3 at
micro-batch 2 steps right away, on gradients that were never zeroed. So the accumulation is written only in
``on_train_batch_start``, where the old window has ended and the new one is aligned. A *batch sampler* gives
steps of any size, if the loader has a `ScheduledBatchSampler`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer

from lightning_surge.callbacks.batch_counter import BatchCounter
from lightning_surge.callbacks.checks import check_accumulated_sizes, check_host, ranks_of
from lightning_surge.callbacks.lightning_host import (
    Callback,
    callbacks_of,
    check_versions,
    refresh_epoch_length,
    replicas_of,
    warn,
)
from lightning_surge.callbacks.resuming.exact_resume import ExactResume
from lightning_surge.callbacks.training_loader import (
    MicroBatches,
    TrainingLoader,
    plan_along,
    warn_of_no_decay,
    warn_of_schedules_cut_short,
)
from lightning_surge.checking.arguments import number, optional, shown, switch, whole
from lightning_surge.checking.state import REMEDY, restore, save
from lightning_surge.measure.distributed import Ranks
from lightning_surge.schedules.batch_sampler import Itinerary, ScheduledBatchSampler, follow, unfollow
from lightning_surge.schedules.by_examples import ExamplesClock
from lightning_surge.schedules.seesaw import Seesaw, SeesawSchedule
from lightning_surge.schedules.sizes import BatchSizeRule, GeometricRamp, Progress, Schedule
from lightning_surge.schedules.windows import Window, accumulation_for, aligned_accumulation

STATE_VERSION = 2
_MICRO = "count the examples of a micro-batch on one replica"
# Weights that differ from 1 by rounding alone are not worth a pass over the gradients.
ROUNDING = 1e-9


@dataclass(frozen=True)
class SchedulerState:
    """Where a training stands, as a checkpoint keeps it; its steps are the Trainer's ``global_step``.

    Attributes:
        accumulation: Micro-batches of the window in force.
        examples: Examples, or tokens, behind the optimizer steps taken.
        epoch_begin: Steps, examples and epochs at the beginning of the epoch.
    """

    accumulation: int
    examples: float
    epoch_begin: Progress

    def __post_init__(self) -> None:
        whole("accumulation", self.accumulation, REMEDY)
        for one in (self.examples, *self.epoch_begin):
            number("examples and epoch_begin", one, REMEDY, least=0)


class BatchSizeScheduler(Callback):
    """Sets the number of examples per optimizer step, at any step, by a schedule.

    The mechanism is chosen when training starts, and reported once:

    * Accumulation, for every kind of loader: a step gets the micro-batch size, times the data-parallel
      replicas, times the largest power of two that does not exceed the request. A larger window begins at the
      first micro-batch that it divides, at most one window later when the size doubles.
    * The batch sampler, if the training DataLoader has a `ScheduledBatchSampler`: steps have exactly the
      sizes requested, in as few micro-batches as the sampler's `batch_size` and `max_micro_batch_size`
      allow.

    Micro-batches of unequal size, and the shorter window at an epoch's end, are weighted so that the gradient
    of a step is the mean over its examples. The loader is read and checked again at every epoch.

    Logs ``surge/batch_size_requested`` and ``surge/batch_size_scheduled`` at the steps that Lightning logs,
    and moves every learning-rate schedule that counts examples (`by_examples`). A warning at the start says
    where a schedule that counts steps will stop short of its end.

    Caveats:
        * ``trainer.estimated_stepping_batches`` assumes that the accumulation never changes, so a
          learning-rate schedule sized by it has the wrong length. Use `by_examples`, or `total_steps`.
        * An accumulation longer than the epoch is capped, with a warning.
        * A checkpoint saved in the middle of a window has no gradients in it: after resuming, Lightning
          finishes that window with the micro-batches that are left. Save with ``every_n_train_steps`` or at
          the end of an epoch, and add `ExactResume` to repeat a run bit for bit.
        * The loss of a micro-batch must be the mean over its examples for the weights to be right.

    Args:
        schedule: A `Schedule` (`ConstantSize`, `LinearRamp`, `GeometricRamp`, `CosineRamp`, `Milestones`,
            `Phases`), or `Seesaw`, which needs `by_examples`.
        micro_batch_size: Examples per micro-batch on one replica, for accumulation. ``None`` reads the
            ``batch_size`` of the training DataLoader, or of its batch sampler.
        max_micro_batch_size: Examples that a micro-batch may have on one replica. A `ScheduledBatchSampler`
            heeds it beside its own ``batch_size``; a loader of larger batches is refused.
        batch_size_fn: Counts the examples, or tokens, in a batch; None takes the leading dimension of its
            first tensor. Schedules in examples and clocks count with it.
        weight_micro_batches: Whether micro-batches count by their examples; False leaves Lightning's mean
            over micro-batches.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: In ``setup``, for what cannot be combined with a changing
            accumulation; in ``on_train_start``, for sizes that steps cannot have.

    Example:
        >>> from lightning_surge.schedules.sizes import LinearRamp
        >>> scheduler = BatchSizeScheduler(LinearRamp(16, 512, duration=1_000_000, unit="examples"))
        >>> scheduler.requested_batch_size, scheduler.scheduled_batch_size
        (16, 16)
    """

    def __init__(
        self,
        schedule: BatchSizeRule,
        *,
        micro_batch_size: int | None = None,
        max_micro_batch_size: int | None = None,
        batch_size_fn: Callable[[Any], float] | None = None,
        weight_micro_batches: bool = True,
    ) -> None:
        if not isinstance(schedule, BatchSizeRule):
            raise ValueError(
                f"Expected schedule to be a Schedule or Seesaw, got schedule={shown(schedule)}:"
                " use ConstantSize(16) for a constant size."
            )
        self.schedule = schedule
        self._micro = MicroBatches(
            type(self).__name__,
            optional(whole, "micro_batch_size", micro_batch_size, _MICRO),
            optional(whole, "max_micro_batch_size", max_micro_batch_size, _MICRO),
            replicas=1,
            in_tokens=batch_size_fn is not None,
        )
        self._count = BatchCounter(batch_size_fn, type(self).__name__)
        self._weights = switch("weight_micro_batches", weight_micro_batches)
        self._trainer: pl.Trainer | None = None
        self._reset()
        self._forget_run()

    def _reset(self) -> None:
        """Drop what a training has counted."""
        self._requested = self._scheduled = self.schedule.first_size
        self._accumulation = 1  # what this callback last wrote
        self._examples = 0.0
        self._begin = Progress()

    def _forget_run(self) -> None:
        self._follow(self.schedule)
        self._loader: TrainingLoader | None = None
        self._windows: list[Window] = []
        self._window_starts: list[int] = []
        self._examples_before: list[int] = []
        self._ranks = Ranks()
        self._reference = 1.0  # examples that the micro-batches of a window should have, on average
        self._first = 1.0  # ... and its first one
        self._unit = 1.0  # examples on one replica of a micro-batch that has weight 1
        self._original_accumulation: int | None = None  # None while the Trainer's value is untouched
        self._warned_of_other_writer = False
        self._batch_idx = 0
        self._batch_examples = 0.0
        self._close_window()

    def _close_window(self) -> None:
        self._consumed = 0.0  # examples of the micro-batches in the window ...
        self._trained = 0.0  # ... and of those that had a loss
        self._window_begins = True
        self._window_ends = False
        self._counted: int | None = None

    # ------------------------------------------------------------------ what users ask

    @property
    def requested_batch_size(self) -> int:
        """Examples that the schedule asks for at the current optimizer step."""
        return self._requested

    @property
    def scheduled_batch_size(self) -> int:
        """Examples of the window now in force, over all replicas, if the loader fills its micro-batches."""
        return self._scheduled

    @property
    def examples(self) -> float:
        """Examples, or tokens, behind the optimizer steps taken, over all replicas."""
        return self._examples

    def size_ahead(self, examples: float) -> float:
        """Examples per step that the schedule asks for after so many more at the present size."""
        assert self._trainer is not None
        trainer, seen = self._trainer, self._examples + examples
        batches = trainer.num_training_batches
        per_epoch = batches * self._reference * self._micro.replicas
        steps = trainer.global_step + math.ceil(examples / self._scheduled)
        epoch = trainer.current_epoch + trainer.fit_loop.epoch_loop.batch_idx / batches + examples / per_epoch
        return float(self._plan(Progress(steps, seen, epoch)))

    # ------------------------------------------------------------------ set-up

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse whatever cannot be combined with an accumulation that changes."""
        if stage != "fit":
            return
        check_versions(trainer, type(self).__name__)
        check_host(trainer, pl_module, type(self).__name__)
        # Before a batch-size finder, whose trials step the learning-rate schedules without callbacks. A new
        # list: Lightning iterates over the old one now.
        others = [callback for callback in callbacks_of(trainer, object) if callback is not self]
        trainer.callbacks = [self, *others]  # type: ignore[attr-defined]
        self._trainer = trainer
        if trainer.global_step == 0:
            self._reset()
        self._micro = replace(self._micro, replicas=replicas_of(trainer))
        if self._micro.size is not None:
            check_accumulated_sizes(self.schedule, self._micro.size, self._micro.replicas)
        # Before the loaders exist: Lightning asks for their length, and workers for the first batches, before
        # the training starts.
        self._follow(self.schedule)

    def _follow(self, rule: BatchSizeRule) -> None:
        """Decide the sizes by a rule, and let samplers follow it, as soon as it is a plan."""
        self._itinerary: Itinerary | None = None
        if isinstance(rule, Schedule):
            self._plan = rule
            self._itinerary = Itinerary(rule, self._micro.replicas, self._micro.largest, self._begin)
            if self._trainer is not None:
                follow(self._itinerary)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let learning-rate schedules that count examples know that somebody counts."""
        for clock in clocks_of(trainer):
            clock.advance(0.0)
        if isinstance(self.schedule, Seesaw):
            self._follow(plan_along(trainer, pl_module, self.schedule, type(self).__name__))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the mechanism, and put the (possibly restored) accumulation in force."""
        self._original_accumulation = trainer.accumulate_grad_batches
        self._ranks = ranks_of(trainer)
        self._read_loader(trainer)
        assert self._loader is not None
        sizes = self._loader.replay(self._plan, self._micro.replicas)
        if trainer.global_step == 0 and sizes is not None:
            warn_of_schedules_cut_short(trainer, pl_module, sizes, type(self).__name__)
        if trainer.global_step == 0 and isinstance(self._plan, SeesawSchedule):
            warn_of_no_decay(trainer, self._plan, None if sizes is None else sizes.examples_per_epoch)
        # Before the first micro-batch, since Lightning reads it when it restores its counters.
        trainer.accumulate_grad_batches = self._accumulation
        if self._loader.sampler is None:
            self._scheduled = round(self._reference * self._micro.replicas * self._accumulation)

    def _read_loader(self, trainer: pl.Trainer) -> None:
        """Choose the mechanism for the training loader in use; one that has changed is checked again."""
        loader = TrainingLoader.read(trainer, self._micro)
        loader.admit(trainer, self._plan, self._micro, self._loader)
        self._loader = loader
        if loader.sampler is None:
            self._reference = self._first = float(loader.micro_batch_size)
        else:
            self._windows = loader.sampler.windows() or []
            self._window_starts = [0, *accumulate(map(len, self._windows))]
            self._examples_before = [0, *accumulate(map(sum, self._windows))]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the loader, which may be another one, and tell Lightning the length of this epoch."""
        # Already there, unless Lightning has left out the end of an epoch on resuming.
        self._move_to(Progress(trainer.global_step, self._examples, float(trainer.current_epoch)))
        self._read_loader(trainer)
        if self._loader is not None and self._loader.sampler is not None:
            refresh_epoch_length(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Move the itinerary on, before loaders are asked for the next epoch."""
        self._move_to(Progress(trainer.global_step, self._examples, trainer.current_epoch + 1.0))

    # ------------------------------------------------------------------ one optimizer step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Change the accumulation where a window begins."""
        if batch_idx == 0 and (self._loader is None or trainer.train_dataloader is not self._loader.loader):
            self._read_loader(trainer)  # another hook of the epoch's start has replaced it
        assert self._loader is not None
        if trainer.accumulate_grad_batches != self._accumulation:
            # Somebody else's value: StochasticWeightAveraging, say, stretches one window over the
            # pass in which it recomputes BatchNorm. Overwriting it would break that pass.
            self._warn_of_other_writer(trainer.accumulate_grad_batches)
        elif self._loader.sampler is not None:
            self._begin_sampled_window(trainer, self._loader.sampler, batch_idx)
        elif batch_idx % self._accumulation == 0:
            self._begin_accumulated_window(trainer, self._loader.batches, batch_idx)
        self._scheduled = round(self._reference * self._micro.replicas * trainer.accumulate_grad_batches)
        self._batch_idx = batch_idx
        self._batch_examples = self._count.first(batch, self._loader.loader)
        self._consumed += self._batch_examples
        if self._window_begins:
            self._window_begins = False
            self._unit = self._reference
            # One replica is free to choose its unit: weights stay near 1 where batches are counted in tokens,
            # which the loader does not know, and steps of equal micro-batches are left as they are.
            if self._micro.replicas == 1 and self._batch_examples:
                self._unit *= self._batch_examples / self._first

    def _drop_gradients(self) -> None:
        """Lightning zeroes them here, even those of a window without an end, as in an epoch cut short."""
        self._trained = 0.0
        self._window_begins = True

    def _begin_sampled_window(
        self, trainer: pl.Trainer, sampler: ScheduledBatchSampler, batch_idx: int
    ) -> None:
        index = bisect_right(self._window_starts, batch_idx) - 1
        if index >= len(self._windows):
            return
        window = self._windows[index]
        self._reference, self._first = sum(window) / len(window), float(window[0])
        if self._window_starts[index] != batch_idx:
            return  # in the middle, where a run may have been resumed
        self._drop_gradients()
        done = self._examples_before[index]
        share = done / len(sampler.sampler)  # type: ignore[arg-type]
        self._request(trainer, share, self._begin.examples + done * self._micro.replicas)
        self._accumulation = trainer.accumulate_grad_batches = len(window)

    def _begin_accumulated_window(self, trainer: pl.Trainer, limit: int | None, batch_idx: int) -> None:
        self._drop_gradients()
        self._request(trainer, 0.0 if limit is None else batch_idx / limit, self._examples)
        target = accumulation_for(self._requested, round(self._reference) * self._micro.replicas, limit=limit)
        self._accumulation = trainer.accumulate_grad_batches = aligned_accumulation(target, batch_idx)

    def _request(self, trainer: pl.Trainer, share_of_epoch: float, examples: float) -> None:
        epoch = trainer.current_epoch + share_of_epoch
        self._requested = self._plan(Progress(trainer.global_step, examples, epoch))

    @property
    def loss_weight(self) -> float:
        """The factor on the loss of the micro-batch in hand, besides Lightning's 1 / accumulation."""
        return self._batch_examples / self._unit if self._weights else 1.0

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Let the micro-batch count by its examples."""
        weight = self.loss_weight
        if abs(weight - 1.0) > ROUNDING:
            # In place, since Lightning goes on with this very tensor, which is not the one that was logged.
            loss.mul_(weight)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the examples whose gradient the step will have."""
        # Some optimizers ask for the same gradient several times in a step; the examples are the same.
        if self._counted != self._batch_idx:
            self._counted = self._batch_idx
            self._trained += self._batch_examples

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Make the gradient the mean over the examples of the step, count them, log."""
        trained, consumed = self._ranks.examples(self._trained, self._consumed)
        self._correct(trainer, optimizer, trained)
        if self._window_ends:
            return
        self._window_ends = True
        self._examples += consumed
        for clock in clocks_of(trainer):
            clock.advance(consumed)
        # Lightning would throw away what is logged at other steps, after half a millisecond each.
        if trainer.barebones or not trainer._logger_connector.should_update_logs:
            return
        pl_module.log("surge/batch_size_requested", float(self._requested), batch_size=1)
        pl_module.log("surge/batch_size_scheduled", float(self._scheduled), batch_size=1)

    def _correct(self, trainer: pl.Trainer, optimizer: Optimizer, trained: float) -> None:
        """Replace Lightning's divisor, accumulation times micro-batch, by the examples there were."""
        if not self._weights or trained == 0.0:
            return
        factor = trainer.accumulate_grad_batches * self._unit * self._micro.replicas / trained
        if abs(factor - 1.0) > ROUNDING:
            with torch.no_grad():
                for group in optimizer.param_groups:
                    for parameter in group["params"]:
                        if parameter.grad is not None:
                            parameter.grad.mul_(factor)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Close the window if the optimizer has stepped."""
        if self._window_ends:
            self._close_window()

    # ------------------------------------------------------------------ the end, and state

    def on_train_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Give the Trainer its own accumulation back."""
        # self._accumulation stays: a checkpoint may still be written in on_train_end or on_exception.
        if self._original_accumulation is not None:
            trainer.accumulate_grad_batches = self._original_accumulation
        if self._itinerary is not None:
            unfollow(self._itinerary)

    on_exception = on_train_end

    def teardown(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Give the Trainer its own accumulation back, whatever other callbacks wrote at the end."""
        self.on_train_end(trainer)
        self._trainer = None
        self._forget_run()

    @property
    def state_key(self) -> str:
        """The same for every schedule: a run may be resumed with another one, and goes on counting."""
        return "BatchSizeScheduler"

    def state_dict(self) -> dict[str, Any]:
        """Where the training stands, as plain numbers."""
        state = SchedulerState(self._accumulation, self._examples, self._begin)
        return {"version": STATE_VERSION, **save(state)}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Find the place of a run that was saved without this callback; ``load_state_dict`` comes later."""
        epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
        self._move_to(Progress(checkpoint["global_step"], 0.0, epochs))

    def _move_to(self, begin: Progress) -> None:
        self._begin = begin
        if self._itinerary is not None:
            self._itinerary.begin = begin

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken; state that cannot be used is dropped, with a warning."""
        try:
            state = restore(SchedulerState, state_dict, versions=(1, STATE_VERSION))
        except Exception as error:
            warn(
                f"Expected whole state in the checkpoint, got what cannot be read: {type(error).__name__}:"
                f" {error} {type(self).__name__} counts examples from 0."
            )
            return
        self._accumulation, self._examples = state.accumulation, state.examples
        self._move_to(state.epoch_begin)
        trainer = self._trainer  # None outside a training, where nothing goes on
        if state_dict.get("resumption") and trainer is not None and not callbacks_of(trainer, ExactResume):
            warn(
                f"Expected ExactResume beside {type(self).__name__} for a checkpoint with random streams and"
                " the places of loaders in it, got none: training goes on with other random numbers. Add"
                " lightning_surge.ExactResume() to the callbacks for the same ones."
            )

    def _warn_of_other_writer(self, found: int) -> None:
        if not self._warned_of_other_writer:
            self._warned_of_other_writer = True
            warn(
                f"{type(self).__name__} expected accumulate_grad_batches={self._accumulation}, got {found}:"
                " another callback or the LightningModule changed it. The schedule rests until it is set"
                " back."
            )


def clocks_of(trainer: pl.Trainer) -> Iterator[ExamplesClock]:
    """The learning-rate schedules that count examples; refused if Lightning steps one once an epoch."""
    for config in trainer.lr_scheduler_configs:
        if isinstance(config.scheduler, ExamplesClock):
            if config.interval != "step":
                raise MisconfigurationException(
                    "Expected interval='step' for a learning-rate schedule that counts examples, got"
                    f" interval={config.interval!r}: return"
                    " {'scheduler': by_examples(...), 'interval': 'step'} from configure_optimizers."
                )
            yield config.scheduler


class BatchSizeWarmup(BatchSizeScheduler):
    """Ramps the number of examples per optimizer step from ``start`` to ``end``, by equal factors.

    At optimizer step t (``trainer.global_step``) the ramp requests
    ``start * (end / start) ** (t / num_steps)`` examples: `BatchSizeScheduler` with a `GeometricRamp`.

    Args:
        start: Examples per optimizer step at first. Where a DataLoader's batches are accumulated: the
            micro-batch size times the replicas, times a power of two.
        end: Examples per optimizer step from ``num_steps`` on, of the same form, at least ``start``.
        num_steps: Length of the ramp in optimizer steps.
        micro_batch_size: Examples per micro-batch on one replica. ``None`` reads the ``batch_size``
            of the training DataLoader, or of its batch sampler.
        batch_size_fn: Counts the examples, or tokens, in a batch; None takes the leading dimension of its
            first tensor.

    Raises:
        ValueError: If an argument is not a positive whole number, or ``end < start``.
        MisconfigurationException: As for `BatchSizeScheduler`.

    Example:
        >>> from lightning_surge.schedules.sizes import Progress
        >>> warmup = BatchSizeWarmup(start=16, end=512, num_steps=2000)
        >>> warmup.requested_batch_size, warmup.scheduled_batch_size
        (16, 16)
        >>> [warmup.schedule(Progress(step=step)) for step in (0, 400, 2000)]
        [16, 32, 512]
    """

    def __init__(
        self,
        start: int,
        end: int,
        num_steps: int,
        *,
        micro_batch_size: int | None = None,
        batch_size_fn: Callable[[Any], float] | None = None,
    ) -> None:
        num_steps = whole("num_steps", num_steps, "count optimizer steps")
        super().__init__(
            GeometricRamp(start, end, num_steps),
            micro_batch_size=micro_batch_size,
            batch_size_fn=batch_size_fn,
        )
