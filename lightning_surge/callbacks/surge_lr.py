"""The callback: Lightning's hooks around the rooms that measure, estimate and decide."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial, wraps
from typing import Any, Literal, NamedTuple

import lightning.pytorch as pl
from lightning.fabric.utilities import rank_zero_info, rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer

from lightning_surge.batches import SplitBatch, shared_copy
from lightning_surge.callbacks.batch_size_scheduler import BatchSizeScheduler
from lightning_surge.callbacks.checks import (
    check_edge,
    check_optimizer,
    check_trainer,
    check_weight_decay,
    clips_gradients,
    served_optimizer,
    trained_optimizers,
)
from lightning_surge.callbacks.counting import BatchCounter
from lightning_surge.callbacks.hosts import Callback, is_accumulation_scheduler, overrides
from lightning_surge.callbacks.logging import (
    add_tensorboard_layout,
    group_suffixes,
    law_metrics,
    lr_metrics,
    run_metrics,
)
from lightning_surge.callbacks.loss_scaling import step_scaling
from lightning_surge.callbacks.measurer import LossFn, Measurer
from lightning_surge.callbacks.pace import Pace
from lightning_surge.callbacks.settings import (
    DEFAULT_OBJECTIVE,
    LAWS,
    REFERENCE_RULES,
    WITHOUT_EDGE,
    SurgeSettings,
    default_objective,
)
from lightning_surge.deposits import Deposits
from lightning_surge.estimates import (
    EstimatedLaw,
    Fit,
    estimate,
    fit_edge_law,
    fit_sgd_law,
    fit_sign_law,
    fit_theorem3_law,
)
from lightning_surge.laws import Law, require_number
from lightning_surge.lr_writer import LearningRateWriter
from lightning_surge.moments import AdamMoments
from lightning_surge.noise import NoiseHistory, NoiseStats
from lightning_surge.optimizer_families import OptimizerKind, optimizer_kind
from lightning_surge.optimizers import (
    decay_follows_lr,
    has_plain_averages,
    largest_lr,
    stability_constant,
)
from lightning_surge.policy import Decision, Policy
from lightning_surge.reasons import Reason
from lightning_surge.step_noise import StepNoise

__all__ = ["LawRecord", "SurgeLRCallback"]

log = logging.getLogger(__name__)

STATE_VERSION = 1
# Laws kept to look at after a run, at 35 KiB each; the oldest go first.
LAW_HISTORY = 256
# How often the noise of the steps is read, which waits for the device, and how far it must have moved since
# the last measurement for the next one to hurry.
CHANGE_CHECK_STEPS = 16
NOISE_CHANGE = 2.0
# What nobody counts in a batch: a base batch size beyond this, or below its inverse, is damage.
LARGEST_BASE = 1e12


class LawRecord(NamedTuple):
    """The law at one moment of training, and what it was fitted to.

    Attributes:
        step: optimizer steps taken before.
        law: as estimated then.
        stats: the averaged measurements behind it.
    """

    step: int
    law: EstimatedLaw
    stats: NoiseStats


class StepRecord(NamedTuple):
    """What is logged of one optimizer step.

    Attributes:
        decision: of the policy.
        batch_size: examples behind the step.
        scheduled: learning rate of each parameter group from the schedule.
        used: and with the factor.
    """

    decision: Decision
    batch_size: float
    scheduled: list[float]
    used: list[float]


class SurgeLRCallback(Callback):
    r"""Sets the learning rate that is optimal for the batch size in force, from measured gradient noise.

    While a model trains, a small share of extra passes measures the gradient's noise and the curvature
    along the optimizer's direction. From them follow the alignment `N(B)` and the curvature `D(B)` of a
    step with `B` examples, the optimal learning rate `N / D`, and the factor

        R(B) = lr(B) / lr(base_batch_size)

    by which the scheduled learning rate is multiplied for every optimizer step. Schedulers never see the
    factor: it is taken off again before they move.

    Caveats:
        * Data-parallel processes (`strategy="ddp"`, and FSDP2 through `ModelParallelStrategy`) measure
          together; other strategies raise an error.
        * Which precisions, parameters, optimizers and callbacks are served: docs/support.md.
        * In manual optimization a step's examples are those of the batches whose `manual_backward` left
          gradients in the optimizer's parameters since these were last zeroed, each batch counted once and
          whole. A `training_step` that steps on parts of its batch needs `batch_size_fn=`.
        * The factor keeps the loss level of the run that was tuned at `base_batch_size`. It does not
          repair a learning rate that was wrong there.
        * Batches that are pooled for a measurement are held where they are, up to 16 base batches.
        * Measurements are noisy: until their standard error shrinks the factor stays near `sqrt(B / base)`.
        * A checkpoint discards batches that were being pooled for the next measurement, in the running
          training too, so that a resumed run repeats it bit for bit.
        * A checkpoint holds this callback's state, not the random streams or the places of loaders, which
          Lightning does not restore either. A `BatchSizeScheduler` beside it keeps those, with
          `ConstantSize(n)` for a fixed size.

    Args:
        base_batch_size: Examples per optimizer step, over all processes, at which the scheduled learning rate
            was tuned. None takes the first step's.
        law: `"measured"` (Lemma 1 with measured terms; for SGD the gradient-noise law), `"theorem2"` or
            `"theorem3"` (the paper's closed forms, which assume independent noise), or a rule that
            measures nothing: `"sqrt"`, `"linear"`, `"constant"`.
        objective: `"edge"` keeps the expected progress per example, capped by Adam's edge of stability,
            which falls with the batch size: near the edge the factor falls too, and as the schedule decays it
            becomes that of `"progress"`. For Adam, AdamW, NAdam and RAdam in float32 with decoupled weight
            decay, without clipping; it holds one more buffer of the size of the parameters. `"progress"` has
            no cap and cannot fall. `"alignment"` follows what a step gains and takes its cost as the same at
            every batch size: sqrt scaling that saturates where the noise does. `"step"` is the paper's: it
            makes every step as good as it can be, and can fall with the batch size. None takes `"edge"`, and
            `"alignment"` where the edge cannot be measured; `"step"` with a law that is not measured.
        anchor: `"schedule"`: the scheduled learning rate is right at `base_batch_size`. `"law"`: from the
            first trusted estimate on, the level follows the law too.
        dry_run: Measure and log, never touch the learning rate.
        max_overhead: Largest share of extra passes, in examples through probes per example trained.
        probe_every: Start a measurement every so many optimizer steps instead, whatever it costs; where
            batches must be pooled it ends some steps later.
        probe_examples: Examples per measurement, pooled from consecutive batches; None decides by the
            budget.
        lr_scale_bounds: Smallest and largest factor; None for `[1/r, r]` with `r = max(B/base, base/B)`,
            ten times wider with `anchor="law"`.
        max_drift_per_step: Largest relative rise of the factor per step at an unchanged batch size.
        half_life: Measurements after which an old one counts half.
        scale_weight_decay: Whether decoupled weight decay, which torch multiplies with the learning rate,
            scales with the factor too. False divides `weight_decay` by the factor for the step, so that
            `lr * weight_decay` stays what the schedule says; refused for decay that is part of the gradient.
        batch_size_fn: Counts the examples, or tokens, in a batch; None takes the leading dimension of its
            first tensor.
        split_batch: Function of `(batch, num_slices)` that cuts a batch; None cuts every tensor along its
            leading dimension; False never cuts, and pools whole batches instead.
        loss_fn: Function of `(module, batch)` that returns the mean loss over the batch's examples and
            changes nothing; None repeats `training_step`, whose traces are removed. Manual optimization
            needs it: the loss that the optimizer served minimises.
        optimizer: Which optimizer to serve, by its place in what `configure_optimizers` returns, from 0;
            None for the only one. Where there are several, each of those that are to be served has a callback
            of its own, and what it logs ends with `/opt<i>`.
        custom_scalars: Whether to give TensorBoard charts that belong together: learning rates, batch size
            against the peak, noise, overhead. A layout that the run already has is left alone.
        prog_bar: Whether to show the learning rate used in the progress bar.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: Before the first step, for what cannot be combined with this callback.

    Example:
        >>> callback = SurgeLRCallback(base_batch_size=16)
        >>> callback.lr_scale(64)  # nothing measured yet
        2.0

    Attributes:
        decision: The latest decision: the ratio predicted and used, and the reason. A new reason also goes to
            Python's logger of this module, at level INFO.
        history: The measurements.
        law_history: The laws they led to, with the steps.

    References:
        Li et al. 2024, arXiv:2405.14578, Lemma 1 (Eq. 6, 7).
    """

    def __init__(
        self,
        base_batch_size: float | None = None,
        law: Literal["measured", "theorem2", "theorem3", "sqrt", "linear", "constant"] = "measured",
        objective: Literal["step", "alignment", "progress", "edge"] | None = None,
        anchor: Literal["schedule", "law"] = "schedule",
        *,
        dry_run: bool = False,
        max_overhead: float = 0.01,
        probe_every: int | None = None,
        probe_examples: int | None = None,
        lr_scale_bounds: tuple[float, float] | None = None,
        max_drift_per_step: float = 0.05,
        half_life: float = 8.0,
        scale_weight_decay: bool = True,
        batch_size_fn: Callable[[Any], float] | None = None,
        split_batch: SplitBatch | Literal[False] | None = None,
        loss_fn: LossFn | None = None,
        optimizer: int | None = None,
        custom_scalars: bool = True,
        prog_bar: bool = False,
    ) -> None:
        self.settings = SurgeSettings(
            base_batch_size=base_batch_size,
            law=law,
            objective=default_objective(law) if objective is None else objective,
            anchor=anchor,
            dry_run=dry_run,
            max_overhead=max_overhead,
            probe_every=probe_every,
            probe_examples=probe_examples,
            lr_scale_bounds=lr_scale_bounds,
            max_drift_per_step=max_drift_per_step,
            half_life=half_life,
            scale_weight_decay=scale_weight_decay,
            custom_scalars=custom_scalars,
            prog_bar=prog_bar,
            optimizer=optimizer,
        )
        self._may_choose_objective = objective is None and law == "measured"
        if loss_fn is not None and not callable(loss_fn):
            raise ValueError(f"Expected loss_fn to be a function or None, got loss_fn={loss_fn!r}.")
        if not (split_batch is None or split_batch is False or callable(split_batch)):
            raise ValueError(
                f"Expected split_batch to be a function of (batch, num_slices), None or False, got "
                f"split_batch={split_batch!r}."
            )
        self._examples_in = BatchCounter(batch_size_fn, type(self).__name__)
        self._loss_fn = loss_fn

        self._split_batch = split_batch
        self._begin_afresh()
        self._started = 0.0
        self._ended = 0.0
        self._forget_run()

    def _begin_afresh(self) -> None:
        """Know nothing: at first, and when a new training starts with the same callback."""
        base = self.settings.base_batch_size
        self.history = NoiseHistory(self.settings.half_life)
        self.law_history: deque[LawRecord] = deque(maxlen=LAW_HISTORY)
        self._step_noise = StepNoise()
        self._step_noise_works = True
        self._noise_at_measurement = math.nan
        # For any process, at the latest step: the next window knows.
        self._noise_changed = False
        self._moments = AdamMoments()
        self._measurer = Measurer(
            self.settings,
            batch_size_fn=self._examples_in,
            split_batch=self._split_batch,
            loss_fn=self._loss_fn,
        )
        self._base_batch_size = base
        self._policy = None if base is None else self._make_policy(base)
        self.decision: Decision | None = None
        self._law_metrics: dict[str, float] = {}
        self._scheduled_lr = math.nan
        self._pace = Pace()

    def _forget_run(self) -> None:
        self._optimizer: Optimizer | None = None
        self._kind: OptimizerKind = "unknown"
        self._writer: LearningRateWriter | None = None
        self._hook: Any = None
        # Where the user calls backward and step: what is behind the step, and a hook for an early look at it.
        self._deposits: Deposits | None = None
        self._early_hook: Any = None
        self._expected_examples = 0.0
        self._unlogged: StepRecord | None = None
        self._clipped = self._told_of_backward = False
        self._suffix = ""
        self._batch: Any = None
        self._batch_idx = 0
        self._watched: pl.LightningModule | None = None
        self._scheduler: BatchSizeScheduler | None = None
        self._cap_reached = False
        self._measurer.detach()
        self._close_window()

    def _close_window(self) -> None:
        self._window_open = False
        self._decided = False
        self._measurer.close_window()
        self._count_afresh()

    def _count_afresh(self) -> None:
        self._window_examples = 0.0
        self._window_batches = 0
        self._counted_batch: int | None = None

    # ------------------------------------------------------------------ what users ask

    @property
    def base_batch_size(self) -> float | None:
        """Examples at which the scheduled learning rate was tuned; None before the first step fixes it."""
        return self._base_batch_size

    @property
    def law(self) -> Law | None:
        """The law as estimated now, an `EstimatedLaw` with standard errors; None before the first estimate.

        A rule that measures nothing is returned as it is.
        """
        if self._policy is None:
            return None
        return self._policy.law or self._policy.fixed_law

    def lr_scale(self, batch_size: float, lr: float | None = None) -> float:
        """The factor on the scheduled learning rate that would be applied at a batch size now.

        Args:
            batch_size: examples per optimizer step, positive and finite.
            lr: the scheduled learning rate, which only `objective="edge"` follows; None for the latest one,
                of the group where it is largest.

        Returns:
            The factor; 1 while the base batch size is not known.

        Raises:
            ValueError: if the batch size is not positive and finite, or the learning rate is negative or not
                finite.
        """
        if lr is not None and not 0.0 <= lr < math.inf:
            raise ValueError(f"Expected 0 <= lr < inf, got lr={lr}: pass the scheduled learning rate.")
        if not (batch_size > 0 and math.isfinite(batch_size)):
            raise ValueError(
                f"Expected 0 < batch_size < inf, got batch_size={batch_size}: count the examples of a step."
            )
        if self._policy is None:
            return 1.0
        return self._policy.lr_scale(batch_size, self._scheduled_lr if lr is None else lr)

    @property
    def overhead(self) -> float:
        """Examples passed through probes, times the safety factor, per example trained."""
        return self._measurer.overhead

    @property
    def overhead_time(self) -> float:
        """Share of wall time since training started that went into measuring."""
        elapsed = (self._ended or time.perf_counter()) - self._started
        return self._measurer.seconds / elapsed if self._started else 0.0

    # ------------------------------------------------------------------ set-up

    @property
    def state_key(self) -> str:
        """Laws are fitted to different measurements; objectives and anchors can change on resuming."""
        return self._key_of(self.settings)

    def _key_of(self, settings: SurgeSettings) -> str:
        if settings.optimizer is None:
            return self._generate_state_key(law=settings.law)
        return self._generate_state_key(law=settings.law, optimizer=settings.optimizer)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the Trainer and take a place between batch schedules and everything else."""
        if stage != "fit":
            return
        name = type(self).__name__
        repeats_step = self._measures and self._loss_fn is None
        check_trainer(trainer, pl_module, name, measures=self._measures, repeats_step=repeats_step)
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        served = [callback for callback in callbacks if isinstance(callback, SurgeLRCallback)]
        indices = [callback.settings.optimizer for callback in served]
        if len(served) > 1 and (None in indices or len(set(indices)) < len(indices)):
            raise MisconfigurationException(
                f"Expected one {name}, or several with a different optimizer= each, got {len(served)} with "
                f"optimizer={indices}: two would multiply the same learning rate."
            )
        # Monitors must see the learning rate of the step, so they come after; schedules of the batch size
        # must have spoken, so they come before. A new list: Lightning iterates over the old one now.
        first = [
            callback
            for callback in callbacks
            if isinstance(callback, BatchSizeScheduler) or is_accumulation_scheduler(callback)
        ]
        rest = [callback for callback in callbacks if callback not in first and callback not in served]
        trainer.callbacks = [*first, *served, *rest]  # type: ignore[attr-defined]
        if self._measures:
            for callback in first:
                if isinstance(callback, BatchSizeScheduler):
                    callback.expect_law()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the optimizer, before any time is spent on training."""
        name, index = type(self).__name__, self.settings.optimizer
        check_optimizer(trainer, pl_module, name, self.settings.law, index)
        if not self.settings.scale_weight_decay:
            check_weight_decay(served_optimizer(trainer, pl_module, name, index), name)
        if self._may_choose_objective:
            self._choose_objective(trainer, pl_module)
        elif self.settings.follows_edge:
            check_edge(trainer, pl_module, index)

    def _choose_objective(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Follow the edge of stability where it can be measured."""
        objective = DEFAULT_OBJECTIVE
        try:
            check_edge(trainer, pl_module, self.settings.optimizer)
        except MisconfigurationException as error:
            objective = WITHOUT_EDGE
            rank_zero_info(f"{type(self).__name__} follows objective={objective!r}, not the default. {error}")
        self._follow_objective(objective)

    def _follow_objective(self, objective: str) -> None:
        if objective != self.settings.objective:
            self.settings = replace(self.settings, objective=objective)
            self._measurer.follow(self.settings)
            if self._policy is not None:
                state = self._policy.state_dict()
                self._policy = self._make_policy(self._policy.base_batch_size)
                self._policy.load_state_dict(state)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Install the hook that takes the factor off again."""
        if trainer.global_step == 0 and self._measurer.budget.trained > 0.0:
            self._begin_afresh()
        self._forget_run()
        index = self.settings.optimizer
        self._optimizer = served_optimizer(trainer, pl_module, type(self).__name__, index)
        self._suffix = f"/opt{index}" if len(trained_optimizers(trainer.optimizers)) > 1 else ""
        self._kind = optimizer_kind(self._optimizer)
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self._scheduler = next((one for one in callbacks if isinstance(one, BatchSizeScheduler)), None)
        keeps_decay = None if self.settings.scale_weight_decay else partial(decay_follows_lr, self._optimizer)
        self._writer = LearningRateWriter(self._optimizer, keeps_decay)
        self._hook = self._optimizer.register_step_post_hook(self._after_step)
        self._moments.begin(self._optimizer)
        pace = None
        if not pl_module.automatic_optimization:
            self._deposits, pace = Deposits(self._optimizer), self._pace
            self._early_hook = self._optimizer.register_step_pre_hook(self._before_step)
        self._measurer.attach(trainer, pl_module, self._optimizer, self._writer, self._kind, pace)
        self._watch_the_module(pl_module)
        self._started, self._ended = time.perf_counter(), 0.0
        self._add_layout(trainer, pl_module)

    def _add_layout(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give TensorBoard its charts: the first of several callbacks for all of them."""
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        drawn = [one for one in callbacks if isinstance(one, SurgeLRCallback) and one.settings.custom_scalars]
        if not drawn or drawn[0] is not self:
            return
        groups = {}
        for one in drawn:
            index = one.settings.optimizer
            suffix = f"/opt{index}" if self._suffix else ""
            optimizer = served_optimizer(trainer, pl_module, type(self).__name__, index)
            groups[suffix] = group_suffixes(optimizer, suffix)
        add_tensorboard_layout(trainer.loggers, groups)

    def _watch_the_module(self, pl_module: pl.LightningModule) -> None:
        """Take the factor off where Lightning calls the user's code and then no callback hook in time.

        When the module's own hook ends an epoch by returning -1, Lightning moves the schedulers at once. In
        manual optimization the user's `training_step` moves them.
        """
        name = "on_train_batch_start"
        manual = self._deposits is not None
        if not manual and not overrides(pl_module, name):
            return
        hook = pl_module.on_train_batch_start

        @wraps(hook)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if manual and self._writer is not None:
                self._writer.restore()
            response = hook(*args, **kwargs)
            if response == -1 and self._writer is not None:
                self._writer.restore()
                self._close_window()
            return response

        vars(pl_module)[name] = watched
        self._watched = pl_module

    def _make_policy(self, base_batch_size: float) -> Policy:
        rule = REFERENCE_RULES.get(self.settings.law)
        return Policy(
            base_batch_size=base_batch_size,
            objective=self.settings.objective,
            anchor=self.settings.anchor,
            fixed_law=None if rule is None else rule(base_lr=1.0, base_batch_size=base_batch_size),
            bounds=self.settings.lr_scale_bounds,
            max_drift_per_step=self.settings.max_drift_per_step,
        )

    @property
    def _measures(self) -> bool:
        return self.settings.law not in REFERENCE_RULES

    # ------------------------------------------------------------------ one optimizer step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Show monitors the learning rate to come, and decide whether this window is measured."""
        size = self._examples_in(batch)
        # The containers are copied: a training_step may take things out of its batch.
        self._batch, self._batch_idx = shared_copy(batch), batch_idx
        self._read_schedule()
        manual = self._deposits is not None
        batches = self._pace.batches_per_step if manual else trainer.accumulate_grad_batches
        # Equal on all processes, though their batches may differ: some optimizers read it now.
        self._expected_examples = self._measurer.expected(size) * batches
        self._apply(self.lr_scale(self._expected_examples))
        if pl_module.automatic_optimization and batch_idx % trainer.accumulate_grad_batches == 0:
            # Lightning zeroes gradients here, also of a window that a batch of None left without a step.
            self._close_window()
        if not self._window_open:
            self._window_open = True
            if self._measures:
                hurry, self._noise_changed = self._noise_changed, False
                base, delta = self._base_batch_size, self._optimal_lr()
                self._measurer.open_window(batch, batch_idx, size, base=base, delta=delta, hurry=hurry)
                if self._measurer.parameters_changed:
                    self._forget_measurements()
        self._measurer.before_forward(self._batch)
        if manual:
            self._pace.begin_batch(trainer.global_step)

    def _steps(self, trainer: pl.Trainer) -> int:
        """Steps of this optimizer; the Trainer counts those of all."""
        return trainer.global_step if self._deposits is None else self._pace.steps

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Let a micro-batch's gradients stand alone if they are measured."""
        if self._deposits is not None and self._deposits.are_zeroed():
            self._count_afresh()
        self._measurer.before_backward()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the micro-batch, and show it to the measurer."""
        if self._batch is None or (self._deposits is not None and not self._deposits.have_come()):
            return
        # Some optimizers ask for the same gradient several times in a step; the examples are the same.
        again = self._counted_batch == self._batch_idx
        size = 0.0 if again else self._examples_in(self._batch)
        self._counted_batch = self._batch_idx
        self._window_examples += size
        self._window_batches += size > 0.0
        weight = 1.0 if self._scheduler is None else self._scheduler.loss_weight
        self._measurer.after_backward(self._batch, self._batch_idx, size, weight)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Measure if it is time, decide, write the learning rate, log."""
        if self._writer is None or optimizer is not self._optimizer:
            return
        batch_size = self._window_examples
        if self._deposits is not None:
            self._look_at_gradients(trainer, self._deposits)
        has_loss = self._deposits is not None or self._counted_batch == self._batch_idx
        skipped, loss_scale = step_scaling(trainer, optimizer, has_loss=has_loss)
        if batch_size <= 0.0 or skipped:
            # Without a step no hook would take the factor off before the scheduler moves.
            self._writer.restore()
            self._measurer.drop_window()
            self._close_window()
            return
        if self._decided:
            return
        self._decided = True
        changed = self._steps(trainer) % CHANGE_CHECK_STEPS == 0 and self._noise_has_changed()
        batch_size, self._noise_changed = self._measurer.end_window(
            batch_size, self._window_batches, changed=changed
        )
        self._window_examples = batch_size
        if self._policy is None:
            self._base_batch_size = batch_size
            self._policy = self._make_policy(batch_size)
        self._read_schedule()
        if self._measures:
            self._measure(trainer, optimizer, self._policy, batch_size, loss_scale)
        self._measurer.budget.train(batch_size)
        decision = self._policy.decide(batch_size, self._scheduled_lr)
        if self.decision is None or decision.reason != self.decision.reason:
            name = f"optimizer {self.settings.optimizer}, " if self._suffix else ""
            log.info("%sstep %d, %g examples: %s", name, self._steps(trainer), batch_size, decision.reason)
        self.decision = decision
        self._apply(decision.used)
        self._warn_of_a_cap(optimizer)
        if self._deposits is None and not self._logs_now(trainer):
            return  # reading learning rates back may wait for the device
        used = [float(group["lr"]) for group in optimizer.param_groups]
        record = StepRecord(decision, batch_size, self._writer.scheduled(), used)
        if self._deposits is None:
            self._log(pl_module, record)
        else:
            self._unlogged = record

    @staticmethod
    def _logs_now(trainer: pl.Trainer) -> bool:
        return bool(trainer._logger_connector.should_update_logs or trainer.fast_dev_run)  # type: ignore[attr-defined]

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Write the learning rate for optimizers that read it before they compute the loss.

        Only in manual optimization: elsewhere it is on from the start of the batch.
        """
        if self._batch is not None and not self._decided:
            self._apply(self.lr_scale(self._window_examples or self._expected_examples))

    def _look_at_gradients(self, trainer: pl.Trainer, deposits: Deposits) -> None:
        """See what the user's `training_step` has done to the gradients of the step to come."""
        changed = deposits.have_come()
        if self._window_examples <= 0.0:
            if not self._told_of_backward and deposits.exist():
                self._told_of_backward = True
                rank_zero_warn(
                    f"{type(self).__name__} saw no manual_backward behind a step of "
                    f"{type(self._optimizer).__name__}, and leaves the learning rate of such steps as it is: "
                    "call self.manual_backward(loss) instead of loss.backward()."
                )
        elif changed and not self._clipped and getattr(trainer.precision_plugin, "scaler", None) is None:
            # A scaler unscales them.
            self._clipped = True
            why = "gradients are changed between manual_backward and the step, as by clipping"
            if self._may_choose_objective and self.settings.follows_edge:
                self._follow_objective(WITHOUT_EDGE)
                rank_zero_info(
                    f"{type(self).__name__} follows objective={WITHOUT_EDGE!r}, not the default: {why}, and "
                    "Adam's averages then do not tell the edge of stability."
                )
            elif self.settings.follows_edge:
                rank_zero_warn(
                    f"Expected no gradient clipping for objective='edge', but {why}: no edge of stability "
                    "can be told. Use objective='progress'."
                )

    def _warn_of_a_cap(self, optimizer: Optimizer) -> None:
        cap = largest_lr(optimizer)
        used = max(float(group["lr"]) for group in optimizer.param_groups) if cap < math.inf else 0.0
        if used > cap and not self._cap_reached:
            self._cap_reached = True
            rank_zero_warn(
                f"{type(optimizer).__name__} uses min(lr, 1 / sqrt(step)): the learning rate written, "
                f"{used:g}, is above {cap:g} and has no effect beyond it, nor has the factor. Use a smaller "
                "learning rate."
            )

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        betas = optimizer.param_groups[0].get("betas", ())
        if self._window_examples > 0.0 and len(betas) >= 2:
            self._moments.step(self._window_examples, (float(betas[0]), float(betas[1])))
        if self._window_examples > 0.0:
            self._pace.step(self._window_batches)
        if self._writer is not None:
            self._writer.restore()
        self._close_window()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Take the factor off between the micro-batches of a window too."""
        if self._writer is not None:
            self._writer.restore()
        self._batch = None
        # Lightning drops what is logged in other batches, and this optimizer may not step in those.
        if self._unlogged is not None and self._logs_now(trainer):
            self._log(pl_module, self._unlogged)
            self._unlogged = None

    def _forget_measurements(self) -> None:
        """Start the history afresh: what was measured of other parameters is no part of the law of these."""
        if self.history.num_measurements:
            log.info("the trained parameters have changed: measuring afresh, the last law is held")
            self.history = NoiseHistory(self.settings.half_life)
            if self._policy is not None:
                self._policy.hold(Reason.PARAMETERS_CHANGED.text, Reason.PARAMETERS_CHANGED)

    def _noise_has_changed(self) -> bool:
        """Whether the steps since the last measurement show a noise that differs from what it saw."""
        before, now = self._noise_at_measurement, self._step_noise.trace_cov
        # Not a number before the second step, and zero where the gradients are: neither tells of a change.
        if not (0.0 < before < math.inf and 0.0 < now < math.inf):
            return False
        return not 1.0 / NOISE_CHANGE < now / before < NOISE_CHANGE

    def _optimal_lr(self) -> float | None:
        """The law's learning rate at the base batch size, if it is known."""
        if self._policy is None or self._policy.law is None:
            return None
        return self._policy.law.lr(self._policy.base_batch_size)

    def _read_schedule(self) -> None:
        if self._writer is not None:
            self._scheduled_lr = max(self._writer.scheduled())

    def _apply(self, factor: float) -> None:
        if self._writer is not None and not self.settings.dry_run:
            self._writer.apply(factor)

    def _measure(
        self,
        trainer: pl.Trainer,
        optimizer: Optimizer,
        policy: Policy,
        batch_size: float,
        loss_scale: float,
    ) -> None:
        """Take what this step tells of the noise, and the window's measurement if it has one."""
        begin = time.perf_counter()
        self._follow_noise(optimizer, batch_size, loss_scale)
        # Asking whether the averages can be read walks the optimizer's state: not at every step.
        readable = (
            self._measurer.ready
            and not (self._clipped or clips_gradients(trainer, trainer.lightning_module))
            and self._moments.readable(optimizer)
        )
        moments = self._moments if readable else None
        measurement = self._measurer.collect(policy.base_batch_size, batch_size, moments)
        if self._measurer.failure is not None:
            policy.hold(self._measurer.failure)
            self._measurer.failure = None
        if measurement is not None and not any(measurement.statistics[1:3]):
            policy.hold(Reason.GRADIENTS_ZERO.text, Reason.GRADIENTS_ZERO)
        elif measurement is not None:
            # Whatever goes wrong here must not end a training.
            try:
                self.history.add(measurement)
                self._learn(self._steps(trainer), policy, batch_size, self._deviation_l1(optimizer, readable))
                if self.settings.follows_edge and not readable:
                    policy.hold(Reason.AVERAGES_UNREADABLE.text, Reason.AVERAGES_UNREADABLE)
            except Exception as error:
                policy.hold(f"fitting failed with {type(error).__name__}", Reason.FITTING_FAILED)
                rank_zero_warn(f"No law was fitted to a measurement: {type(error).__name__}: {error}")
        self._measurer.seconds += time.perf_counter() - begin

    def _deviation_l1(self, optimizer: Optimizer, readable: bool) -> float:
        """`sum_i sigma_i` from the measurements or Adam's averages; NaN if `|mu|_1` is not plain."""
        if not self._measurer.one_lr:
            return math.nan  # the alignment is then weighted by the groups' learning rates
        sums = self.history.stats().coordinate_sums
        if sums is not None:
            return sums.deviation_l1
        return self._moments.deviation_l1(optimizer) if readable else math.nan

    def _follow_noise(self, optimizer: Optimizer, batch_size: float, loss_scale: float) -> None:
        """Take what every step tells of the noise, from the optimizers that tell it."""
        # Of sharded parameters each process sees a piece: their sum would take a message at every step.
        if not self._step_noise_works or self._measurer.sharded:
            return
        try:
            self._step_noise.update(optimizer, batch_size, loss_scale)
        except Exception as error:
            self._step_noise_works = False
            rank_zero_warn(
                f"The state of {type(optimizer).__name__} is not read for its noise: {type(error).__name__}: "
                f"{error}. Measurements do not need it."
            )

    def _learn(self, step: int, policy: Policy, batch_size: float, deviation_l1: float) -> None:
        """Fit the law to the measurements, with the one just added."""
        law = estimate(self.history, self._fit())
        policy.update(law, batch_size, self._scheduled_lr)
        if law is not None:
            if self._scheduler is not None:
                self._scheduler.learn(law)
            self.law_history.append(LawRecord(step, law, self.history.stats()))
        self._law_metrics = law_metrics(self.history, law, batch_size, deviation_l1)
        self._noise_at_measurement, self._noise_changed = self._step_noise.trace_cov, False

    def _fit(self) -> Fit:
        """Which law the measurements are fitted with."""
        if self._kind == "gradient":
            return fit_sgd_law
        if self.settings.follows_edge:
            assert self._optimizer is not None
            return partial(fit_edge_law, stability=stability_constant(self._optimizer))
        return fit_theorem3_law if self.settings.law == "theorem3" else fit_sign_law

    # ------------------------------------------------------------------ logging

    def _log(self, pl_module: pl.LightningModule, record: StepRecord) -> None:
        assert self._optimizer is not None
        assert self._policy is not None
        metrics = self._law_metrics | run_metrics(
            batch_size=record.batch_size,
            base_batch_size=self._policy.base_batch_size,
            examples=self._measurer.budget.trained,
            objective=self.settings.objective,
            doubled=self._policy.predicted(2.0 * record.batch_size, self._scheduled_lr),
        )
        metrics["surge/overhead"] = self.overhead
        metrics["surge/overhead_time"] = self.overhead_time
        trace_cov = self._step_noise.trace_cov
        # Averages of clipped gradients, or with weight decay in them, are no estimate of the mean gradient.
        told = has_plain_averages(self._optimizer) and not clips_gradients(pl_module.trainer, pl_module)
        if told and math.isfinite(trace_cov):
            metrics["surge/trace_cov_steps"] = trace_cov
        metrics = {name + self._suffix: value for name, value in metrics.items()}
        metrics |= lr_metrics(
            group_suffixes(self._optimizer, self._suffix),
            self._suffix,
            scheduled=record.scheduled,
            used=record.used,
            decision=record.decision,
        )
        pl_module.log_dict(metrics, on_step=True, on_epoch=False, batch_size=1)
        if self.settings.prog_bar:
            name = f"lr_used{self._suffix}"
            pl_module.log(name, record.used[0], prog_bar=True, logger=False, batch_size=1)

    # ------------------------------------------------------------------ the end, and state

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the optimizer as it was found."""
        self._release()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Leave the optimizer as it was found."""
        self._release()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the optimizer as it was found."""
        self._release()

    def _release(self) -> None:
        if self._writer is not None:
            self._ended = time.perf_counter()
        if self._writer is not None:
            self._writer.restore()
        if self._hook is not None:
            self._hook.remove()
        if self._early_hook is not None:
            self._early_hook.remove()
        if self._watched is not None:
            vars(self._watched).pop("on_train_batch_start", None)
        self._forget_run()

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to go on with the same learning rates.

        Plain numbers, and with `objective="edge"` one tensor per parameter.
        """
        # Within a window a checkpoint has lost gradients anyway, and `ModelCheckpoint` saves one right after
        # resuming: dropping the pool there would make the resumed run another one.
        if self._deposits is not None and self._batch is None:
            # A window of one of several optimizers may last over batches that are not behind its step.
            self._window_open = False
        if not self._window_open:
            self._measurer.drop_pool()
        return {
            "version": STATE_VERSION,
            "base_batch_size": self._base_batch_size,
            "history": self.history.state_dict(),
            "policy": None if self._policy is None else self._policy.state_dict(),
            "measurer": self._measurer.state_dict(),
            "step_noise": self._step_noise.state_dict(),
            "noise_at_measurement": self._noise_at_measurement,
            "noise_changed": self._noise_changed,
            "moments": self._moments.state_dict(),
            "scheduled_lr": self._scheduled_lr,
            "law_metrics": dict(self._law_metrics),
            "pace": self._pace.state_dict(),
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Begin afresh if a run goes on from a checkpoint without state for this law; else that is loaded."""
        states: dict[Any, Any] = checkpoint.get("callbacks") or {}
        if trainer.state.fn != TrainerFn.FITTING or states.get(self.state_key):
            return
        # The base batch size is the same whatever the law is, but not for another optimizer.
        others = (replace(self.settings, law=law, objective="step", anchor="schedule") for law in LAWS)
        other = next((key for key in map(self._key_of, others) if key in states), None)
        found = "none" if other is None else f"that of {other}"
        self._lose_state(
            f"Expected state with law={self.settings.law!r} in the checkpoint, got {found}", states.get(other)
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; unusable state is left out as a whole, with a warning."""
        version = state_dict.get("version") if isinstance(state_dict, dict) else None
        if type(version) is not int or version != STATE_VERSION:
            self._lose_state(
                f"Expected state of version {STATE_VERSION} in the checkpoint, got {version!r}", state_dict
            )
            return
        self._start_over()
        try:
            saved = self._load(state_dict)
        except Exception as error:
            found = f"{type(error).__name__}: {error}".partition("\n")[0].rstrip(".")
            self._lose_state(
                f"Expected whole state in the checkpoint, got what cannot be read: {found}", state_dict
            )
            return
        if self._base_batch_size != saved:
            rank_zero_warn(
                f"base_batch_size={self._base_batch_size} replaces the checkpoint's {saved}: the factor on "
                "the learning rate will jump."
            )

    def _start_over(self) -> None:
        """Begin afresh in the middle of a run, too, where a learning-rate finder may restore a checkpoint."""
        measurer = self._measurer
        self._begin_afresh()
        self._measurer.take_over(measurer, self._pace)

    def _load(self, state: dict[str, Any]) -> float | None:
        """Take over what is in a checkpoint, and return its base batch size."""
        self._measurer.load_state_dict(state["measurer"])
        saved = _saved_base(state)
        base = self._base_batch_size = self.settings.base_batch_size or saved
        self.history.load_state_dict(state["history"])
        if base is not None:
            self._policy = self._make_policy(base)
            if state["policy"] is not None:
                self._policy.load_state_dict(state["policy"])
        self._step_noise.load_state_dict(state["step_noise"])
        self._noise_at_measurement = float(state["noise_at_measurement"])
        self._noise_changed = bool(state.get("noise_changed", False))
        self._moments.load_state_dict(state["moments"])
        scheduled_lr = float(state.get("scheduled_lr", math.nan))
        if not (math.isnan(scheduled_lr) or 0.0 <= scheduled_lr < math.inf):
            raise ValueError(f"Expected 0 <= scheduled_lr < inf, got scheduled_lr={scheduled_lr}.")
        self._scheduled_lr = scheduled_lr
        self._law_metrics = {str(name): float(value) for name, value in state["law_metrics"].items()}
        self._pace.load_state_dict(state.get("pace", {}))
        return saved

    def _lose_state(self, what: str, state: Any) -> None:
        """Start measuring afresh and say why; only the base batch size is taken from what was found."""
        self._start_over()
        base = self.settings.base_batch_size
        if base is None and isinstance(state, dict):
            with suppress(KeyError, ValueError):
                base = self._base_batch_size = _saved_base(state)
                self._policy = None if base is None else self._make_policy(base)
        consequence = (
            "that of the first step: pass base_batch_size= if the learning rate was tuned at another"
            if base is None
            else f"{base:g}"
        )
        rank_zero_warn(
            f"{what}: {type(self).__name__} starts measuring afresh, and base_batch_size is {consequence}."
        )


def _saved_base(state: dict[str, Any]) -> float | None:
    """The base batch size in a checkpoint."""
    base: float | None = state["base_batch_size"]
    if base is None:
        return None
    require_number("base_batch_size", base, "load what state_dict returned")
    if not 1.0 / LARGEST_BASE < base < LARGEST_BASE:
        raise ValueError(f"Expected base_batch_size < {LARGEST_BASE:g}, got base_batch_size={base}.")
    return base
