"""The callback: Lightning's hooks around the rooms that measure, estimate and decide."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal, Never

import lightning.pytorch as pl
from lightning.fabric.utilities import rank_zero_info
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer

from lightning_surge.callbacks.batch_counter import BatchCounter
from lightning_surge.callbacks.batch_size_scheduler import BatchSizeScheduler
from lightning_surge.callbacks.checks import (
    check_optimizer,
    check_trainer,
    check_weight_decay,
    served_optimizer,
)
from lightning_surge.callbacks.learner import STATE_VERSION, LawRecord, Learner, StepToCome, SurgeState
from lightning_surge.callbacks.lightning_host import (
    Callback,
    callbacks_of,
    check_versions,
    is_accumulation_scheduler,
    skips_step,
    warn,
)
from lightning_surge.callbacks.logging import StepLog, StepRecord, add_layout, logs_now, optimizer_suffix
from lightning_surge.callbacks.measuring.measurer import Measurer
from lightning_surge.callbacks.measuring.plan import Pace
from lightning_surge.callbacks.measuring.repeated_loss import LossFn
from lightning_surge.callbacks.settings import LAWS, SurgeSettings, check_base, refuse_retired
from lightning_surge.callbacks.step_examples import StepExamples
from lightning_surge.checking.arguments import function, number, optional
from lightning_surge.checking.state import restore, save
from lightning_surge.laws.base import Law
from lightning_surge.measure.batches import SplitBatch
from lightning_surge.measure.direction import SIGN, Direction
from lightning_surge.optimizers.families import decay_follows_lr, direction_of, largest_lr
from lightning_surge.optimizers.lr_writer import FactorInUpdate, learning_rates
from lightning_surge.optimizers.stopwatch import Stopwatch, timed
from lightning_surge.policy.history import NoiseHistory
from lightning_surge.policy.policy import Decision
from lightning_surge.policy.reasons import Reason

log = logging.getLogger(__name__)


class SurgeLRCallback(Callback):
    r"""Sets the learning rate that is optimal for the batch size in force, from measured gradient noise.

    A small share of extra passes measures the gradient's noise, and the curvature along the optimizer's
    direction. They give the alignment `N(B)` and the curvature `D(B)` of a step with `B` examples, the
    optimal learning rate `lr(B) = N / D`, and the factor

        R(B) = lr(B) / lr(base_batch_size)

    on the scheduled learning rate. It is there during the optimizer's update only: schedulers, monitors and
    your own code see the scheduled learning rate.

    Caveats:
        * Data-parallel processes (`strategy="ddp"`, and FSDP2 through `ModelParallelStrategy`) measure
          together; other strategies raise an error.
        * Which precisions, parameters, optimizers and callbacks are served: docs/support.md.
        * In manual optimization a step's examples are those of the batches whose `manual_backward` left
          gradients in the optimizer's parameters since these were last zeroed. A batch counts once and whole:
          a `training_step` that steps on parts of its batch needs `batch_size_fn=`.
        * A learning rate that was wrong at `base_batch_size` is not repaired.
        * Batches pooled for a measurement stay on their device, up to 16 base batches.
        * Measurements are noisy: until their standard error shrinks the factor moves, by at most 5 % a step,
          towards `sqrt(B / base)`.
        * Saving a checkpoint discards the batches being pooled, so that a resumed run repeats the running one
          bit for bit. Add `ExactResume` for random streams and the places of loaders.

    Args:
        base_batch_size: Examples per optimizer step, over all processes, at which the scheduled learning rate
            was tuned. None takes the first step's.
        law: `"measured"` (Lemma 1 with measured terms; for SGD the gradient-noise law), `"theorem2"` or
            `"theorem3"` (the paper's closed forms, which assume independent noise), or a rule that
            measures nothing: `"sqrt"`, `"linear"`, `"constant"`.
        objective: `"progress"` keeps the expected progress per example: sqrt scaling far below the noise
            scale, linear scaling beyond it. `"alignment"` is sqrt scaling that saturates where the noise
            does. `"step"` is the paper's: the best next step, which can fall with the batch size. None takes
            `"progress"`, `"alignment"` with SGD, whose steps progress would scale linearly, and `"step"` with
            a law that is not measured.
        dry_run: Whether to measure and log, and leave the learning rate alone.
        max_overhead: Largest share of extra passes, in examples through probes per example trained.
        probe_every: Optimizer steps between measurements, whatever they cost; None keeps to `max_overhead`.
        probe_examples: Examples per measurement, pooled from consecutive batches; None decides by the
            budget.
        log_peak: Whether to measure curvature too where the objective needs none: then the peak of the
            learning rate, the critical batch size, alignment and curvature are measured and logged.
        lr_scale_bounds: Smallest and largest factor; None for `[1/r, r]` with `r = max(B/base, base/B)`.
        max_drift_per_step: Largest relative rise of the factor per step, which gives curvature time to adapt.
            None takes 0.05 with laws that are measured, and follows a rule to the letter; with a number a
            rule is approached, too.
        half_life: Measurements after which an old one counts half.
        scale_weight_decay: Whether decoupled weight decay, which torch multiplies with the learning rate,
            scales with the factor too. False keeps `lr * weight_decay` per step as scheduled;
            `"per_example"` keeps it per example, `B / base` times that. Both are refused for decay that is
            part of the gradient.
        batch_size_fn: Counts the examples, or tokens, in a batch; None takes the leading dimension of its
            first tensor.
        split_batch: Function of `(batch, num_slices)` that cuts a batch; None cuts every tensor along its
            leading dimension; False never cuts, and pools whole batches instead.
        loss_fn: Function of `(module, batch)` that returns the mean loss over the batch's examples and
            changes nothing; None repeats `training_step`, whose traces are removed. Manual optimization
            needs the loss that the served optimizer minimises.
        optimizer: Index of the optimizer to serve in what `configure_optimizers` returns, from 0; None for
            the only one. Each of several optimizers needs a callback of its own, which logs with `/opt<i>`.
        custom_scalars: Whether to group the scalars into TensorBoard charts: learning rates, batch size
            against the peak, noise, overhead. A layout that the run already has is left alone.
        prog_bar: Whether to show the learning rate used in the progress bar.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: Before the first step, for what cannot be combined with this callback.

    Example:
        >>> callback = SurgeLRCallback(base_batch_size=16)
        >>> callback.lr_scale(64)  # nothing measured yet: 5 % a step, towards sqrt(64 / 16)
        1.05

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
        objective: Literal["step", "alignment", "progress"] | None = None,
        *,
        dry_run: bool = False,
        max_overhead: float = 0.01,
        probe_every: int | None = None,
        probe_examples: int | None = None,
        log_peak: bool = False,
        lr_scale_bounds: tuple[float, float] | None = None,
        max_drift_per_step: float | None = None,
        half_life: float = 8.0,
        scale_weight_decay: bool | Literal["per_example"] = True,
        batch_size_fn: Callable[[Any], float] | None = None,
        split_batch: SplitBatch | Literal[False] | None = None,
        loss_fn: LossFn | None = None,
        optimizer: int | None = None,
        custom_scalars: bool = True,
        prog_bar: bool = False,
        **retired: Never,
    ) -> None:
        refuse_retired(retired)
        # Adam's for the measured law, replaced in training by that of the optimizer's direction; the paper's
        # closed forms, and fixed rules, are followed to the letter.
        default = SIGN.objective if law == "measured" else "step"
        self.settings = SurgeSettings(
            base_batch_size=base_batch_size,
            law=law,
            objective=default if objective is None else objective,
            dry_run=dry_run,
            max_overhead=max_overhead,
            probe_every=probe_every,
            probe_examples=probe_examples,
            log_peak=log_peak,
            lr_scale_bounds=lr_scale_bounds,
            max_drift_per_step=max_drift_per_step,
            half_life=half_life,
            scale_weight_decay=scale_weight_decay,
            custom_scalars=custom_scalars,
            prog_bar=prog_bar,
            optimizer=optimizer,
        )
        self._may_choose_objective = objective is None and law == "measured"
        optional(function, "loss_fn", loss_fn, of="(module, batch)")
        if split_batch is not False:
            remedy = "None cuts tensors, False never cuts"
            optional(function, "split_batch", split_batch, remedy, of="(batch, num_slices)")
        self._examples_in = BatchCounter(batch_size_fn, type(self).__name__)
        self._loss_fn = loss_fn
        self._split_batch = split_batch
        self._state_key = self._key_of(law)
        self._behind_step = StepExamples()
        self._trainer: pl.Trainer | None = None
        self._reset()
        self._stopwatch = Stopwatch()
        self._started = 0.0
        self._ended = 0.0
        self._forget_run()

    def _reset(self) -> None:
        """Drop what was learned, as a new training with the same callback does.

        Even in mid-run, where a learning-rate finder may restore a checkpoint.
        """
        self._learner = Learner(self.settings)
        self._measurer = Measurer(
            self.settings,
            batch_size_fn=self._examples_in,
            split_batch=self._split_batch,
            loss_fn=self._loss_fn,
        )
        self._behind_step.pace = Pace()
        self.decision: Decision | None = None
        if self._trainer is not None and self._factor is not None:
            self._attach(self._trainer, self._factor.optimizer)

    def _forget_run(self) -> None:
        self._trainer = None
        self._factor: FactorInUpdate | None = None
        self._direction: Direction = SIGN
        self._step_log: StepLog | None = None
        self._scheduler: BatchSizeScheduler | None = None
        self._measurer.detach()
        self._behind_step.detach()
        self._forget_step()

    def _forget_step(self) -> None:
        # The step at the end of the current accumulation window, once its gradients are complete.
        self._step: StepToCome | None = None
        self._step_decision: Decision | None = None
        self._decided_for = 0.0
        self._skipped = False

    def _close_window(self) -> None:
        self._measurer.close_window()
        self._behind_step.close()
        self._forget_step()

    # ------------------------------------------------------------------ what users ask

    @property
    def history(self) -> NoiseHistory:
        """The measurements."""
        return self._learner.history

    @property
    def law_history(self) -> deque[LawRecord]:
        """The laws that the measurements led to, with the steps."""
        return self._learner.law_history

    @property
    def base_batch_size(self) -> float | None:
        """Examples at which the scheduled learning rate was tuned; None before the first step fixes it."""
        return self._learner.base_batch_size

    @property
    def law(self) -> Law | None:
        """The law as estimated now, an `EstimatedLaw` with standard errors; None before the first estimate.

        A rule that measures nothing is returned as it is.
        """
        policy = self._learner.policy
        return None if policy is None else policy.law or policy.fixed_law

    def lr_scale(self, batch_size: float) -> float:
        """The factor on the scheduled learning rate that the next step would get at a batch size.

        Args:
            batch_size: examples per optimizer step, positive and finite.

        Returns:
            The factor; 1 while the base batch size is not known.

        Raises:
            ValueError: if the batch size is not positive and finite.
        """
        batch_size = number("batch_size", batch_size, "count the examples of a step")
        policy = self._learner.policy
        return 1.0 if policy is None else policy.lr_scale(batch_size)

    @property
    def overhead(self) -> float:
        """Examples passed through probes, times the safety factor, per example trained."""
        return self._measurer.overhead

    @property
    def overhead_time(self) -> float:
        """Share of the wall time since training started that passed in this callback's hooks."""
        elapsed = (self._ended or time.perf_counter()) - self._started
        return self._stopwatch.seconds / elapsed if self._started else 0.0

    # ------------------------------------------------------------------ set-up

    @property
    def state_key(self) -> str:
        """One per law, which needs measurements of its own; the objective may change on resuming."""
        return self._state_key

    def _key_of(self, law: str) -> str:
        if self.settings.optimizer is None:
            return self._generate_state_key(law=law)
        return self._generate_state_key(law=law, optimizer=self.settings.optimizer)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the Trainer and take a place between batch schedules and everything else."""
        if stage != "fit":
            return
        name = type(self).__name__
        check_versions(trainer, name)
        repeats_step = self.settings.measures and self._loss_fn is None
        check_trainer(trainer, pl_module, name, self.settings, repeats_step)
        ours = callbacks_of(trainer, SurgeLRCallback)
        indices = [callback.settings.optimizer for callback in ours]
        if len(indices) > 1 and (None in indices or len(set(indices)) < len(indices)):
            raise MisconfigurationException(
                f"Expected one {name}, or several with a different optimizer= each, got {len(indices)} with "
                f"optimizer={indices}: two would multiply the same learning rate."
            )
        # Schedules of the batch size must have spoken before; monitors come after. A new list: Lightning
        # iterates over the old one now.
        callbacks = callbacks_of(trainer, object)
        first = [c for c in callbacks if isinstance(c, BatchSizeScheduler) or is_accumulation_scheduler(c)]
        rest = [callback for callback in callbacks if callback not in first and callback not in ours]
        trainer.callbacks = [*first, *ours, *rest]  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the optimizer, before any time is spent on training."""
        name, index = type(self).__name__, self.settings.optimizer
        optimizer = served_optimizer(trainer, pl_module, name, index)
        check_optimizer(trainer, pl_module, optimizer, name, self.settings)
        if self.settings.scale_weight_decay is not True:
            check_weight_decay(optimizer, name, self.settings.scale_weight_decay)
        if self._may_choose_objective:
            self.settings = replace(self.settings, objective=direction_of(optimizer).objective)
            self._learner.follow(self.settings)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Install the hooks that put the factor on for the update alone."""
        if trainer.global_step == 0:
            self._reset()
        self._forget_run()
        name, index, behind = type(self).__name__, self.settings.optimizer, self._behind_step
        optimizer = served_optimizer(trainer, pl_module, name, index)
        self._trainer = trainer
        self._direction = direction_of(optimizer)
        self._scheduler = next(iter(callbacks_of(trainer, BatchSizeScheduler)), None)
        self._step_log = StepLog(optimizer, optimizer_suffix(trainer, index), prog_bar=self.settings.prog_bar)
        if not pl_module.automatic_optimization:
            behind.follow(optimizer)
        self._factor = FactorInUpdate(
            optimizer,
            self._factor_for_update,
            after=self._after_step,
            decay_factor=None if self.settings.scale_weight_decay is True else self._decay_for_update,
            tell=lambda: rank_zero_info(
                f"{type(optimizer).__name__} reads its learning rate before it asks for gradients: {name} "
                "puts the factor on before, and training_step sees the scheduled learning rate all the same."
            ),
            watch=self._stopwatch,
        )
        self._may_be_capped = math.isfinite(largest_lr(optimizer))
        self._attach(trainer, optimizer)
        self._stopwatch.seconds = 0.0
        self._started, self._ended = time.perf_counter(), 0.0
        drawn = [one for one in callbacks_of(trainer, SurgeLRCallback) if one.settings.custom_scalars]
        if drawn and drawn[0] is self:  # for all of them
            add_layout(trainer, pl_module, name, [one.settings.optimizer for one in drawn])

    def _attach(self, trainer: pl.Trainer, optimizer: Optimizer) -> None:
        self._measurer.attach(
            trainer,
            optimizer,
            self._direction,
            pace=self._behind_step.pace if self._behind_step.manual else None,
            size_ahead=None if self._scheduler is None else self._scheduler.size_ahead,
        )

    # ------------------------------------------------------------------ one optimizer step

    @timed
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count the examples, and decide whether this accumulation window is measured."""
        size = self._examples_in.first(batch, trainer.train_dataloader)
        behind, measurer = self._behind_step, self._measurer
        if behind.open and not behind.manual and batch_idx % trainer.accumulate_grad_batches == 0:
            # Lightning zeroes gradients here, even where a batch of None has left a window without a step.
            self._close_window()
        if not behind.open:
            behind.open = True
            if self.settings.measures:
                learner = self._learner
                if batch_idx == 0 and measurer.parameters_changed(look=True):
                    learner.forget()  # a callback has unfrozen some at the start of the epoch
                measurer.open_window(batch, batch_idx, size, base=learner.base_batch_size)
        behind.begin_batch(measurer.before_forward(batch), batch_idx, size=size)
        if behind.manual:
            behind.pace.begin_batch(trainer.global_step)

    @timed
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Let a micro-batch's gradients stand alone if they are measured."""
        self._behind_step.before_backward()
        self._measurer.before_backward()

    @timed
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the micro-batch, and show it to the measurer."""
        behind = self._behind_step
        size = behind.after_backward()
        if size is not None and self._measurer.gathering:
            weight = 1.0 if self._scheduler is None else self._scheduler.loss_weight
            self._measurer.after_backward(behind.batch, behind.batch_idx, size, weight)

    @timed
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Count the window and measure, where the gradients are complete and not yet clipped."""
        factor, behind = self._factor, self._behind_step
        if factor is None or optimizer is not factor.optimizer:
            return
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        if scaled:
            factor.come_last()
        name = type(self).__name__
        if behind.manual:
            behind.look_at_gradients(optimizer, name)
        if scaled and skips_step(trainer, optimizer, has_loss=behind.manual or behind.counts_batch):
            self._measurer.drop_window()
            self._skipped = True
        elif self._step is None:
            self._end_window(trainer, optimizer)

    def _end_window(self, trainer: pl.Trainer, optimizer: Optimizer) -> None:
        """Count the examples behind the step to come, and measure if the window is one to measure."""
        behind, learner, measurer = self._behind_step, self._learner, self._measurer
        examples = measurer.end_window(behind.examples, behind.batches)
        if examples <= 0.0:
            measurer.drop_window()
            return
        if learner.policy is None:
            learner.fix_base(examples)
        # The Trainer counts the steps of all optimizers.
        steps = behind.pace.steps if behind.manual else trainer.global_step
        step = self._step = StepToCome(optimizer, self._direction, steps, examples)
        if self.settings.measures and (measurer.ready or measurer.failure is not None):
            self._measure(step)
        measurer.budget.train(examples)

    def _measure(self, step: StepToCome) -> None:
        """Finish the window's measurement, and fit the law again."""
        learner, measurer = self._learner, self._measurer
        base = learner.base_batch_size
        assert base is not None
        learner.scheduled_lr = max(learning_rates(step.optimizer))
        measurements = measurer.collect(base, learner.law)
        if measurer.parameters_changed():
            learner.forget()
        if measurer.failure is not None:
            learner.hold(Reason.MEASURING_FAILED, measurer.failure)
            measurer.failure = None
        for measurement in measurements:
            learner.learn(step, measurement)

    def _factor_for_update(self, *, early: bool) -> float | None:
        """The factor for the update about to be made; by now everybody else has written the learning rate."""
        trainer, factor, learner = self._trainer, self._factor, self._learner
        if trainer is None or factor is None:
            return None
        if early:
            policy, examples = learner.policy, self._measurer.foreseen(self._behind_step.foreseen)
            if policy is None or examples <= 0.0 or self.settings.dry_run:
                return None
            self._decided_for = examples
            self._read_schedule()
            return policy.lr_scale(examples)
        if self._step is None and not self._skipped:
            self._end_window(trainer, factor.optimizer)  # a step that Lightning's hook was not called for
        if self._step is None:
            return None
        if self._step_decision is None:
            self._step_decision = self._decide(trainer, self._step)
        return None if self.settings.dry_run else self._step_decision.used

    def _decay_for_update(self, group: Mapping[str, Any]) -> float | None:
        """The factor on a group's decay per step, at the batch size that the learning rate's is for."""
        factor, base = self._factor, self._learner.base_batch_size
        if factor is None or base is None or not decay_follows_lr(factor.optimizer, group):
            return None
        return self._decided_for / base if self.settings.scale_weight_decay else 1.0

    def _read_schedule(self) -> None:
        """Note the largest scheduled learning rate, but where reading would wait for the device."""
        factor, learner = self._factor, self._learner
        assert factor is not None
        groups = factor.optimizer.param_groups
        on_device = any(isinstance(group["lr"], Tensor) and not group["lr"].is_cpu for group in groups)
        if not on_device:
            learner.scheduled_lr = max(learning_rates(factor.optimizer))
            self._measurer.see_lr(learner.scheduled_lr)

    def _decide(self, trainer: pl.Trainer, step: StepToCome) -> Decision:
        """Ask the policy for the factor of a step."""
        policy, behind = self._learner.policy, self._behind_step
        assert policy is not None
        size = step.batch_size
        accumulation = trainer.accumulate_grad_batches
        if not behind.manual and self._scheduler is None and 0 < behind.passes < accumulation:
            # Lightning divides the gradient of an epoch's last, shorter window by the whole accumulation,
            # which shortens the step already: the factor is the one of a whole window.
            size *= accumulation / behind.passes
        self._decided_for = size
        self._read_schedule()
        decision = policy.decide(size)
        if self.decision is None or decision.reason != self.decision.reason:
            suffix = self._step_log.suffix if self._step_log is not None else ""
            which = f"optimizer {self.settings.optimizer}, " if suffix else ""
            log.info("%sstep %d, %g examples: %s", which, step.number, step.batch_size, decision.reason)
        self.decision = decision
        if self._may_be_capped:
            self._warn_of_a_cap(step.optimizer, decision.used * self._learner.scheduled_lr)
        return decision

    def _after_step(self) -> None:
        behind, factor, log_, trainer = self._behind_step, self._factor, self._step_log, self._trainer
        step, decision = self._step, self._step_decision
        if step is not None and factor is not None and log_ is not None and trainer is not None:
            behind.pace.step(behind.batches)
            # Where Lightning calls the steps, what is logged in other batches is dropped.
            if decision is not None and (behind.manual or logs_now(trainer)):
                log_.unlogged = StepRecord(decision, step.batch_size, factor.scheduled, factor.used)
        self._close_window()

    def _warn_of_a_cap(self, optimizer: Optimizer, used: float) -> None:
        """Warn once if the optimizer caps the learning rate."""
        cap = largest_lr(optimizer)
        if used > cap:
            self._may_be_capped = False
            warn(
                f"{type(optimizer).__name__} uses min(lr, 1 / sqrt(step)): the learning rate used, "
                f"{used:g}, is above {cap:g} and has no effect beyond it, nor has the factor. Use a smaller "
                "learning rate."
            )

    @timed
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Log the latest step where Lightning keeps what is logged."""
        if self._factor is not None:
            self._factor.restore()
        self._behind_step.batch = None
        if self._step_log is not None and self._step_log.unlogged is not None and logs_now(trainer):
            examples = self._measurer.budget.trained
            metrics = self._learner.metrics(self._step_log.unlogged.batch_size, examples)
            metrics |= {"surge/overhead": self._measurer.overhead, "surge/overhead_time": self.overhead_time}
            self._step_log.write(pl_module, metrics)

    # ------------------------------------------------------------------ the end, and state

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Leave the optimizer as it was found."""
        if self._factor is not None:
            self._ended = time.perf_counter()
            self._factor.remove()
        self._forget_run()

    on_exception = teardown = on_train_end

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        # Within a window a checkpoint has lost gradients anyway, and `ModelCheckpoint` saves one right after
        # resuming: dropping the pool there would make the resumed run another one.
        if not self._behind_step.interrupt():
            self._measurer.drop_pool()
        return {
            "version": STATE_VERSION,
            **self._learner.state_dict(),
            "measurer": save(self._measurer.state),
            "pace": save(self._behind_step.pace),
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Start measuring afresh if the checkpoint to resume from has no state for this law."""
        states: dict[Any, Any] = checkpoint.get("callbacks") or {}
        if trainer.state.fn != TrainerFn.FITTING or states.get(self.state_key):
            return
        # The base batch size is the same whatever the law is, but not for another optimizer.
        other = next((key for key in map(self._key_of, LAWS) if key in states), None)
        found = "none" if other is None else f"that of {other}"
        self._lose_state(
            f"Expected state with law={self.settings.law!r} in the checkpoint, got {found}", states.get(other)
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; unusable state is dropped as a whole, with a warning."""
        self._reset()
        try:
            state = restore(SurgeState, state_dict, versions=(STATE_VERSION,))
            self._measurer.load(state.measurer)
            self._learner.load(state)
            vars(self._behind_step.pace).update(vars(state.pace))
        except Exception as error:
            found = f"{type(error).__name__}: {error}".partition("\n")[0].rstrip(".")
            what = f"Expected whole state in the checkpoint, got what cannot be read: {found}"
            self._lose_state(what, state_dict)
            return
        saved = state.base_batch_size
        if self.base_batch_size != saved:
            warn(
                f"base_batch_size={self.base_batch_size} replaces the checkpoint's {saved}: the factor on "
                "the learning rate changes."
            )

    def _lose_state(self, what: str, state: Any) -> None:
        """Start measuring afresh and say why; only the base batch size is kept of what was found."""
        self._reset()
        if self.base_batch_size is None and isinstance(state, dict):
            with suppress(KeyError, ValueError):
                self._learner.fix_base(check_base("base_batch_size", state["base_batch_size"]))
        consequence = (
            "that of the first step: pass base_batch_size= if the learning rate was tuned at another"
            if self.base_batch_size is None
            else f"{self.base_batch_size:g}"
        )
        warn(f"{what}: {type(self).__name__} starts measuring afresh, and base_batch_size is {consequence}.")
