"""Gathers measurements from a running training: when a window is measured, and from what."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities import rank_zero_info
from torch.optim import Optimizer

from lightning_surge.callbacks.checks import ranks_of
from lightning_surge.callbacks.lightning_host import overrides, warn
from lightning_surge.callbacks.measuring.instruments import Instruments
from lightning_surge.callbacks.measuring.live import FREE_CHUNKS, LiveWindow
from lightning_surge.callbacks.measuring.plan import MeasuringPlan, Pace
from lightning_surge.callbacks.measuring.pooling import Cutting, Pool, Versions
from lightning_surge.callbacks.measuring.repeated_loss import Attempts, LossFn, RepeatedLoss
from lightning_surge.callbacks.settings import SurgeSettings
from lightning_surge.laws.base import Law
from lightning_surge.measure.batches import SplitBatch, shared_copy
from lightning_surge.measure.direction import Direction
from lightning_surge.measure.distributed import RankError
from lightning_surge.measure.measurement import ALONE, MoreSecants
from lightning_surge.measure.probing import Prober
from lightning_surge.measure.records import Measurement
from lightning_surge.measure.replay import Piece, TraceError
from lightning_surge.optimizers.moments import AdamMoments

__all__ = ["LossFn", "Measurer"]


class Measurer:
    """Takes measurements from the windows of a training that `SurgeLRCallback` shows it.

    A window is what lies behind one optimizer step. At its first micro-batch it is decided whether it
    is measured: live, from the gradients of its own micro-batches if they are many, or by a probe at its end
    that recomputes gradients of slices of its batches, pooled with those of windows before it.

    Data-parallel processes measure the gradient over all their examples, and do everything here at the same
    time: what is decided depends on numbers that are equal on all of them, and if one fails they all give up.

    Args:
        settings: the callback's.
        batch_size_fn: counts the examples in a batch.
        split_batch: cuts a batch; None for the default, False never to cut.
        loss_fn: mean loss of a batch; None repeats `training_step`.
    """

    # Of the run in hand; absent between runs.
    _run: tuple[pl.Trainer, pl.LightningModule, Optimizer, Direction]
    _trainer: pl.Trainer
    _loss: RepeatedLoss
    _attempts: Attempts
    _prober: Prober
    _pace: Pace | None

    def __init__(
        self,
        settings: SurgeSettings,
        *,
        batch_size_fn: Callable[[Any], float],
        split_batch: SplitBatch | Literal[False] | None,
        loss_fn: LossFn | None,
    ) -> None:
        self._batch_size_fn = batch_size_fn
        self._loss_fn = loss_fn
        self._plan = MeasuringPlan(settings)
        self._instruments = Instruments(settings)
        self._cutting = Cutting(split_batch)
        self._pool = Pool()
        self._live = LiveWindow()
        self._ranks = ALONE
        self._first_window = True
        # For good: a repeated step leaves traces in training.
        self.off = False
        self.budget = self._plan.budget
        self.failure: str | None = None
        self.detach()

    def attach(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        optimizer: Optimizer,
        direction: Direction,
        pace: Pace | None = None,
    ) -> None:
        """Take hold of a run that starts; `pace` is that of the optimizer where the user calls its steps."""
        self.detach()
        self._run = trainer, pl_module, optimizer, direction
        self._trainer, self._pace = trainer, pace
        self._ranks = ranks_of(trainer)
        self._loss = RepeatedLoss(trainer, pl_module, self._loss_fn, self._ranks)
        self._attempts = Attempts(self._ranks, self._loss.isolated, self.fail)
        self._live = LiveWindow(self._ranks)
        alone = self._ranks.reducer_owns_gradients and not overrides(pl_module, "backward")
        self._prober = Prober(
            (),
            compute_loss=self._loss,
            backward=None if alone else pl_module.backward,
            batch_size_fn=self._batch_size_fn,
            split_batch=None,
            ranks=self._ranks,
            uses_batch_statistics=self._loss.uses_batch_statistics,
        )
        self._instruments.begin(optimizer, direction, self._prober)

    def take_over(self, other: Measurer, pace: Pace) -> None:
        """Take hold of the run that another one has in hand, if it has one; `pace` takes the place of its."""
        if "_run" in vars(other):
            self.attach(*other._run, None if other._pace is None else pace)

    def detach(self) -> None:
        """Let go of the run, and of every batch."""
        for name in ("_run", "_trainer", "_loss", "_attempts", "_prober"):
            vars(self).pop(name, None)
        self._pace = None
        self._instruments.end()
        # Of the batch in hand, which can see several windows where optimization is manual.
        self._versions = Versions()
        self._pool.clear()
        self._pool.broken = None
        self.close_window()

    def close_window(self) -> None:
        """The optimizer has stepped, or skipped."""
        if self._live.measurement is not None:
            # A step that was skipped takes its measurement with it, but not what that has cost.
            self._plan.charge_in_vain()
            self._live.close()

    @property
    def one_lr(self) -> bool:
        """Whether all parameters move at the same learning rate, so that directions are plain signs."""
        return self._instruments.one_lr

    def parameters_changed(self, *, look: bool = False) -> bool:
        """Whether other parameters are trained than at the last call, as far as it is known.

        Args:
            look: whether to look at every parameter now, as measurements do.
        """
        if look:
            self._instruments.refresh()
        changed, self._instruments.parameters_changed = self._instruments.parameters_changed, False
        return changed

    def see_lr(self, lr: float) -> None:
        """Note the scheduled learning rate of an ordinary step."""
        if lr > self._instruments.largest_lr:
            self._instruments.largest_lr = lr

    @property
    def overhead(self) -> float:
        """Passes spent on measuring, times the safety factor, per example trained."""
        return self.budget.spent / self.budget.trained if self.budget.trained else 0.0

    def foreseen(self, examples: float) -> float:
        """Examples of all processes, where this one counts so many. One message."""
        return self._ranks.examples(examples)[0]

    # ------------------------------------------------------------------ the window's hooks

    def open_window(
        self,
        batch: Any,
        batch_idx: int,
        size: float,
        *,
        base: float | None,
        law: Law | None,
    ) -> None:
        """Decide at a window's first micro-batch whether and how the window is measured.

        Args:
            batch: the first micro-batch.
            batch_idx: its index in the epoch.
            size: examples in it, of this process.
            base: base batch size; None if this window will fix it.
            law: the latest one, which says how far curvature is wanted; None while there is none.

        Raises:
            MisconfigurationException: if batches cannot be cut, before the first step is taken.
        """
        if self.off:
            return
        if self._pool.target:
            self._pool.open_window()
            return  # still pooling
        plan, accumulation = self._plan, self._trainer.accumulate_grad_batches
        typical = plan.typical(size, self._ranks)
        if self._ranks.count > 1:
            self._live.sort_processes(accumulation, cuts=self._cutting.allowed)
        free = accumulation * self._live.groups >= FREE_CHUNKS and not plan.by_coordinates
        if self._cutting.allowed and not free and self._first_window and size >= 2:
            self._refresh_parameters()
            self._cutting.check(batch, self._prober)
        self._first_window = False
        window = plan.look_ahead(self._trainer, self._pace, batch_idx, typical)
        if free:
            self._open_live(base, typical, window, law)
        else:
            self._open_pool(base, typical, typical * window)

    def _open_live(self, base: float | None, typical: float, window: float, law: Law | None) -> None:
        groups = self._live.groups
        due = self._plan.live_is_due(typical * window, groups, self._instruments.secants)
        # A shorter window would start a pool, which the next ones need not wait for.
        num_chunks = int(window) * groups
        if due and num_chunks >= FREE_CHUNKS:
            self._refresh_parameters(law, base)
            # Directions of a base batch, if two sizes of them fit into half of the window.
            stride = round((base or typical) * groups / typical)
            self._start_live(num_chunks, stride=max(1, min(stride, num_chunks // 4)))

    def _start_live(self, num_chunks: int, stride: int) -> None:
        # Lightning divides by the accumulation that is set, also in a window that is shorter.
        self._prober.loss_scale = self._loss.scale / self._trainer.accumulate_grad_batches
        self.budget.start()
        # Its buffers may not fit into memory.
        make = partial(self._instruments.law, num_chunks, stride=stride)
        self._live.begin(self._attempts.together(make))

    def _open_pool(self, base: float | None, typical: float, batch_size: float) -> None:
        # Directions smaller than the base batch are of no use to the ratio, and mostly zeros where gradients
        # are sparse.
        smallest = max(base or batch_size, float(self._ranks.count) if self._cutting.allowed else typical)
        secants = self._instruments.secants if self._plan.follows_edge else 0
        self._pool.target = self._plan.probe_due(batch_size, base or batch_size, smallest, secants)
        if self._pool.target:
            self._pool.open_window()
            self.budget.start()

    def _refresh_parameters(self, law: Law | None = None, base: float | None = None) -> None:
        self._instruments.refresh()
        self._instruments.optimal_lr = None if law is None or base is None else law.lr(base)
        self._prober.parameters = self._instruments.parameters
        self._prober.split_batch = self._cutting.split_batch

    def drop_window(self) -> None:
        """Forget the batches of a window whose step is skipped: their gradients are not finite."""
        self._pool.drop_window()

    @property
    def gathering(self) -> bool:
        """Whether the micro-batches of this window are measured, or kept to be measured."""
        return self._live.measurement is not None or self._pool.target > 0.0

    def before_forward(self, batch: Any) -> Any:
        """Remember what the coming pass of a batch that may be replayed begins with.

        Args:
            batch: the micro-batch.

        Returns:
            The batch to replay: in containers of its own where `gathering`, because a `training_step` may
            take things out of them.
        """
        if self._live.measurement is None and not self._pool.target:
            return batch
        self._live.before_forward()
        batch = shared_copy(batch)
        self._versions = Versions(batch)
        return batch

    def before_backward(self) -> None:
        """Set the accumulated gradients aside, so that the coming micro-batch's stand alone."""
        if self._live.measurement is not None:
            self._live.before_backward(self._instruments.parameters)

    def after_backward(self, batch: Any, batch_idx: int, size: float, weight: float = 1.0) -> None:
        """Fold in, or keep, a micro-batch whose gradients have just been computed.

        Args:
            batch: the micro-batch.
            batch_idx: its index in the epoch.
            size: examples in it; 0 if it was counted before in this window.
            weight: factor that somebody put on its loss.
        """
        piece = Piece(batch, batch_idx, size)
        if self._live.measurement is not None:
            self._live.add(piece, weight, self._attempts, partial(self._versions.check, batch))
        else:
            self._pool.add(piece, self._versions)

    def end_window(self, examples: float, batches: int) -> float:
        """Learn what the other processes had in the window that ends: the one message of an ordinary step.

        Args:
            examples: behind the step, of this process.
            batches: micro-batches that hold them.

        Returns:
            The examples behind the step.
        """
        pool, total, failures = self._pool, examples, float(self._pool.broken is not None)
        kept = pool.examples if pool.target else 0.0
        if self._ranks.count > 1:
            total, pool.gathered, failures = self._ranks.examples(examples, kept, failures)
        else:
            pool.gathered = kept
        self._plan.see(total, batches)
        if failures:
            self.fail(pool.broken or RankError("Another process could not keep its batches"))
            pool.broken = None
        return total

    # ------------------------------------------------------------------ measurements

    @property
    def ready(self) -> bool:
        """Whether the window that ends has a measurement to finish, so that `collect` has something to do."""
        return self._live.measurement is not None or self._pool.full

    def collect(
        self, base: float, batch_size: float, moments: AdamMoments | None, law: Law | None
    ) -> Measurement | None:
        """Finish the measurement at the end of a window, if one is complete.

        Args:
            base: base batch size.
            batch_size: examples behind the step about to be taken.
            moments: of the optimizer; None if they are not readable now.
            law: the latest one, which says how far curvature is wanted.

        Returns:
            The measurement; None if there is none. `failure` says if one failed.
        """
        if not self.ready:
            return None
        if self._live.measurement is None or self._pace is not None:
            self._refresh_parameters(law, base)  # some may have been toggled off when the window began
        parameters = self._instruments.parameters
        sharpness = self._instruments.sharpness(moments, base, batch_size)
        live = self._live.take()
        if live is None:
            probe = partial(self._probe, base, moments, sharpness)
            return self._finished(self._attempts.without_trace(probe, parameters), free=False)
        if not live.complete:
            # Somebody ended the window early; its examples have been trained on all the same.
            self._plan.charge_in_vain()
            return None
        finish = partial(live.finish, sharpness)
        return self._finished(self._attempts.without_trace(finish, parameters), free=True)

    def _probe(
        self, base: float, moments: AdamMoments | None, sharpness: MoreSecants | None
    ) -> Measurement | None:
        """Measure from pooled batches, after making sure once that cutting them changes nothing."""
        plan, prober, pieces = self._plan, self._prober, self._pool.pieces
        chunks = prober.chunks(pieces, base, plan.fewest_chunks)
        if len(chunks) < plan.fewest_chunks:
            return None  # too few whole batches, or examples: go on pooling
        self._pool.clear()
        if not plan.has_room(sum(chunk.size for chunk in chunks)):
            return None  # the last batch was far larger than those the plan was made with
        prober.loss_scale = self._loss.scale_for(chunks, plan.mean_batch)
        if not self._cutting.agrees(pieces, chunks, prober, self.budget):
            return None
        if plan.by_coordinates:
            seed = self._trainer.global_step
            return self._instruments.coordinates(chunks, base, moments, seed).run(chunks)
        return self._instruments.law(len(chunks)).run(chunks, sharpness)

    def _finished(self, measurement: Measurement | None, *, free: bool) -> Measurement | None:
        if measurement is None:
            return None
        measurement = self._ranks.first(measurement)
        if not self.budget.measurements:
            source = "probes"
            if free:
                source = "gradient accumulation" if self._live.groups == 1 else "the processes' own gradients"
            rank_zero_info(
                f"First measurement of gradient noise: from {source}, "
                f"{measurement.statistics.batch_size:g} examples in {measurement.num_chunks} chunks."
            )
        self._pool.measured()
        self._plan.charge(measurement, free=free)
        return self._instruments.unscaled(measurement)

    def fail(self, error: Exception) -> None:
        """Give up the measurement under way, and try again at a larger spacing."""
        self._live.drop()
        self._pool.clear()
        self._plan.charge_in_vain()
        self.budget.widen()
        self.failure = f"measuring failed with {type(error).__name__}"
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        if isinstance(error, TraceError) or (isinstance(error, RankError) and error.final):
            self.off = True
            warn(f"Measuring is off from now on, and the factor stays what it is: {reason}.")
            return
        warn(
            "Measuring failed and is tried again later, at twice the spacing; training goes on unchanged. "
            f"{reason}. If training_step cannot be repeated on a part of a batch, "
            "pass loss_fn=, a function of (module, batch) that returns the mean loss."
        )

    # ------------------------------------------------------------------ state

    def drop_pool(self) -> None:
        """Drop batches being pooled when a checkpoint is saved: they cannot be saved with it."""
        self._pool.drop()

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, and the tensors of the sharpness."""
        parts = self._plan, self._cutting, self._instruments
        state = {name: value for part in parts for name, value in part.state_dict().items()}
        return {**state, "off": self.off}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of `state_dict`.

        Raises:
            ValueError: if a value is none that it can have; this object is of no use then.
            KeyError: if one is missing.
        """
        for part in (self._plan, self._cutting, self._instruments):
            part.load_state_dict(state)
        self.off = bool(state["off"])
