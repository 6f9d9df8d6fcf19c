"""Gathers measurements from a running training: when, from which batches, and without a trace."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import rank_zero_info, rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer

from lightning_surge.batches import (
    BatchError,
    SplitBatch,
    split_leading_dimension,
    tensors_in,
)
from lightning_surge.budget import ProbeBudget
from lightning_surge.callbacks.attempts import Attempts
from lightning_surge.callbacks.pace import Pace
from lightning_surge.callbacks.processes import ranks_of
from lightning_surge.callbacks.repeated_loss import LossFn, RepeatedLoss
from lightning_surge.callbacks.settings import SurgeSettings
from lightning_surge.coordinates import CoordinateMeasurement
from lightning_surge.curvature import Sample, probe_distance
from lightning_surge.gradients import SizedValue
from lightning_surge.laws import require_number
from lightning_surge.lr_writer import LearningRateWriter
from lightning_surge.measuring import ALONE, MIN_SLICES, LawMeasurement, Measurement, MoreSecants
from lightning_surge.micro_batches import HookedGradients, MicroBatchGradients, StashedGradients
from lightning_surge.moments import AdamMoments
from lightning_surge.optimizer_families import OptimizerKind
from lightning_surge.optimizers import lr_scales, parameter_scales
from lightning_surge.probing import Prober, examples_wanted
from lightning_surge.ranks import RankError
from lightning_surge.replay import Chunk, Piece, RandomState, TraceError
from lightning_surge.sharpness import SECANTS, Sharpness, SharpnessError

__all__ = ["LossFn", "Measurer"]

# Every micro-batch of a window that is at least this long is a chunk: no extra backward for the norms.
FREE_CHUNKS = MIN_SLICES
# Whole-gradient arithmetic on free chunks, in passes per example.
FREE_CHUNK_PASSES = 0.25
# Where the schedule's learning rate is (nearly) zero, curvature is measured over this share of its largest.
SMALLEST_DELTA = 0.03
# The curvature wanted is that over the optimal step. Until it is known, this share of the learning rate.
FIRST_DELTA = 0.125

# A second batch size for the sharpness: the one in force if it is far enough from the base, else this
# multiple of the base.
FAR_ENOUGH = 2.0
FAR = 4.0
# The edge is about curvature at the point itself. A search for the largest over longer moves finds cliffs
# nearby: on the demo it told up to twice the limit at the secants' distance, and at this share the limit.
SHARPNESS_DELTA = 0.03

# What the two counts of examples in a checkpoint may differ by: sums of fractions, and skipped steps.
ROUNDING = 1e-9
MOST_SKIPPED = 1e3

# Checkpoints in a row that may interrupt a measurement before the user is told.
PATIENCE = 3


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
    _trainer: pl.Trainer
    _module: pl.LightningModule
    _optimizer: Optimizer
    _writer: LearningRateWriter
    _loss: RepeatedLoss
    _attempts: Attempts
    _prober: Prober
    _kind: OptimizerKind
    parameters: list[Tensor]
    _scales: list[float]
    _delta_wanted: float | None
    _planned: float
    _pace: Pace | None

    def __init__(
        self,
        settings: SurgeSettings,
        *,
        batch_size_fn: Callable[[Any], float],
        split_batch: SplitBatch | Literal[False] | None,
        loss_fn: LossFn | None,
    ) -> None:
        self._settings = settings
        self._batch_size_fn = batch_size_fn
        self._split_batch = split_batch or split_leading_dimension
        self._loss_fn = loss_fn
        self._by_coordinates = settings.law.startswith("theorem")
        self._fewest_chunks = CoordinateMeasurement.FEWEST_CHUNKS if self._by_coordinates else MIN_SLICES
        self._may_split = split_batch is not False
        self._first_window = True
        self._seen_batches = 0
        self._seen_examples = 0.0
        self._dropped_pools = 0
        self._ranks = ALONE
        # One in every group of processes makes chunks of its own; a single group is all of them together.
        self._rank_groups = 1
        self._own: MicroBatchGradients = StashedGradients()
        self._slices_checked = False
        self._largest_lr = 0.0
        self._sharpness = Sharpness()
        self.budget = ProbeBudget(settings.max_overhead, settings.probe_every)
        self.seconds = 0.0
        self.failure: str | None = None
        self._cost_under_way = 0.0
        self.detach()

    def follow(self, settings: SurgeSettings) -> None:
        """Take over settings that differ in their objective."""
        self._settings = settings

    def attach(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        optimizer: Optimizer,
        writer: LearningRateWriter,
        kind: OptimizerKind,
        pace: Pace | None = None,
    ) -> None:
        """Take hold of a run that starts; `pace` is that of the optimizer where the user calls its steps."""
        self.detach()
        self._pace = pace
        self._trainer, self._module = trainer, pl_module
        self._optimizer, self._writer, self._kind = optimizer, writer, kind
        self._ranks = ranks_of(trainer)
        self._own = HookedGradients() if self._ranks.reducer_owns_gradients else StashedGradients()
        self._loss = RepeatedLoss(trainer, pl_module, self._loss_fn, self._ranks)
        self._attempts = Attempts(self._ranks, self._loss.isolated, self.fail)
        self._prober = Prober(
            (),
            compute_loss=self._loss,
            backward=pl_module.backward,
            batch_size_fn=self._batch_size_fn,
            split_batch=None,
            ranks=self._ranks,
        )
        self.seconds = 0.0

    def take_over(self, other: Measurer, pace: Pace) -> None:
        """Take hold of the run that another one has in hand, if it has one; `pace` takes the place of its."""
        if "_trainer" in vars(other):
            run = other._trainer, other._module, other._optimizer, other._writer, other._kind
            self.attach(*run, None if other._pace is None else pace)
            self.seconds = other.seconds

    def detach(self) -> None:
        """Let go of the run, and of every batch."""
        for name in ("_trainer", "_module", "_optimizer", "_writer", "_loss", "_attempts", "_prober"):
            vars(self).pop(name, None)
        self._pace = None
        self.parameters = []
        # Since the window before, as where a callback unfreezes some.
        self.parameters_changed = False
        self._scales = []
        # Of the batch in hand, which can see several windows where optimization is manual.
        self._versions: list[int] = []
        self._broken: Exception | None = None
        self._latest = 0.0
        self.forget_pool()
        self.close_window()

    def forget_pool(self) -> None:
        """Start pooling afresh: batches cannot be saved in a checkpoint."""
        self._pool: list[Piece] = []
        self._pooled = 0.0  # examples in it, over all processes
        self._pooled_before = 0
        self._pool_target = 0.0

    def close_window(self) -> None:
        """The optimizer has stepped, or skipped."""
        if getattr(self, "_live", None) is not None:
            # A step that was skipped takes its measurement with it, but not what that has cost.
            self.budget.charge(self._cost_under_way, measured=False)
        self._live: LawMeasurement | None = None
        self._own.end()
        self._random_state: RandomState | None = None

    @property
    def sharded(self) -> bool:
        """Whether each process holds only a piece of the parameters."""
        return self._ranks.reduces

    @property
    def one_lr(self) -> bool:
        """Whether all parameters move at the same learning rate, so that directions are plain signs."""
        return len(set(self._scales)) == 1

    @property
    def overhead(self) -> float:
        """Passes spent on measuring, times the safety factor, per example trained."""
        return self.budget.spent / self.budget.trained if self.budget.trained else 0.0

    # ------------------------------------------------------------------ the window's hooks

    def open_window(
        self,
        batch: Any,
        batch_idx: int,
        size: float,
        *,
        base: float | None,
        delta: float | None,
        hurry: bool = False,
    ) -> None:
        """Decide at a window's first micro-batch whether and how the window is measured.

        Args:
            batch: the first micro-batch.
            batch_idx: its index in the epoch.
            size: examples in it, of this process.
            base: base batch size; None if this window will fix it.
            delta: the optimal learning rate as far as it is known.
            hurry: whether something has changed since the last measurement.

        Raises:
            MisconfigurationException: if batches cannot be cut, before the first step is taken.
        """
        self._refresh_parameters()
        self._pooled_before = len(self._pool)
        self._delta_wanted = delta
        accumulation = self._trainer.accumulate_grad_batches
        # Batches differ in size, most of all where tokens are counted: the plan is made with their mean.
        typical = self._seen_examples / self._seen_batches if self._seen_batches else self.expected(size)
        self._rank_groups = self._groups_for(accumulation)
        free = accumulation * self._rank_groups >= FREE_CHUNKS and not self._by_coordinates
        if self._may_split and not free and self._first_window and size >= 2:
            self._check_cutting(batch)
        self._first_window = False
        if hurry:
            self.budget.hurry()
        if self._pool_target:
            return  # still pooling
        # The last window of an epoch ends with the epoch. After resuming on a shorter loader, Lightning
        # counts past its end.
        window = min(accumulation, max(self._trainer.num_training_batches - batch_idx, 1))
        if self._pace is not None:
            window = self._pace.batches_per_step
        batch_size = typical * window
        planned = self._planned = self._planned_examples(typical, batch_size, batch_idx)
        if free:
            # Where groups of processes make chunks of their own, all of them pass whenever one of them must.
            passes = 1.0 if self._rank_groups == 1 else 0.5 * self._rank_groups + 1.0
            self._cost_under_way = (passes + FREE_CHUNK_PASSES) * batch_size
            self._cost_under_way += self._sharpness_cost(batch_size, self._sharpness.secants)
            # A shorter window would start a pool, which the next ones need not wait for.
            num_chunks = int(window) * self._rank_groups
            if num_chunks >= FREE_CHUNKS and self.budget.due(self._cost_under_way, planned):
                # Directions of a base batch, if two sizes of them fit into half of the window.
                stride = round((base or typical) * self._rank_groups / typical)
                self._start_live(num_chunks, stride=max(1, min(stride, num_chunks // 4)))
            return
        wanted = self._settings.probe_examples or examples_wanted(
            batch_size,
            base or batch_size,
            lambda examples: self.budget.affordable(self._cost(examples), planned),
            # Directions smaller than the base batch are of no use to the ratio, and mostly zeros where
            # gradients are sparse.
            smallest=self._fewest_chunks
            * max(base or batch_size, float(self._ranks.count) if self._may_split else typical),
        )
        self._cost_under_way = self._cost(wanted)
        self._cost_under_way += self._sharpness_cost(wanted, self._sharpness.secants - SECANTS)
        if self.budget.due(self._cost_under_way, planned):
            self._pool_target = wanted
            self.budget.start()

    def expected(self, size: float) -> float:
        """Examples that a micro-batch of all processes will have: as many as those before it.

        Args:
            size: of this process's, which is the answer where there is no other.
        """
        if self._ranks.count == 1:
            return size
        if not self._latest:
            self._latest = self._ranks.examples(size)[0]
        return self._latest

    def _groups_for(self, accumulation: int) -> int:
        """Into how many groups to sort the processes, so that a window has chunks enough by itself.

        Cutting batches costs less, since all processes then share each pass. But not every batch can be cut.
        """
        wanted = math.ceil(FREE_CHUNKS / accumulation)
        alone = self._may_split or self._by_coordinates or not self._ranks.reducer_owns_gradients
        return 1 if alone or wanted > self._ranks.count else wanted

    def _start_live(self, num_chunks: int, stride: int) -> None:
        # Lightning divides by the accumulation that is set, also in a window that is shorter.
        self._prober.loss_scale = self._loss.scale / self._trainer.accumulate_grad_batches
        self.budget.start()
        # Its buffers may not fit into memory.
        self._live = self._attempts.together(partial(self._new_measurement, num_chunks, stride=stride))

    def drop_window(self) -> None:
        """Forget the batches of a window whose step is skipped: their gradients are not finite."""
        del self._pool[self._pooled_before :]

    def before_forward(self, batch: Any) -> None:
        """Remember what the coming pass of a batch that may be replayed begins with.

        Args:
            batch: the micro-batch.
        """
        if self._live is not None:
            self._random_state = RandomState.capture()
        if self._live is not None or self._pool_target:
            self._versions = [tensor._version for tensor in tensors_in(batch)]

    def before_backward(self) -> None:
        """Set the accumulated gradients aside, so that the coming micro-batch's stand alone."""
        if self._live is not None:
            self._own.begin(self.parameters)

    def after_backward(self, batch: Any, batch_idx: int, size: float, weight: float = 1.0) -> None:
        """Fold in, or keep, a micro-batch whose gradients have just been computed.

        Args:
            batch: the micro-batch.
            batch_idx: its index in the epoch.
            size: examples in it; 0 if it was counted before in this window.
            weight: factor that somebody put on its loss.
        """
        if self._live is not None:
            self._add_live(Piece(batch, batch_idx, size, self._random_state), weight)
        elif self._pool_target and size > 0.0 and not (self._pool and self._pool[-1].batch is batch):
            # Several steps on one batch see the same examples, which are no news of the noise.
            try:
                self._untouched(batch)
            except TraceError as error:
                self._broken = error  # the other processes must hear of it
            else:
                self._pool.append(Piece(batch, batch_idx, size))

    def _untouched(self, batch: Any) -> bool:
        if self._versions != [tensor._version for tensor in tensors_in(batch)]:
            raise TraceError(
                "Expected a training_step that leaves its batch alone, but it changes a tensor of it in "
                "place: work on a copy"
            )
        return True

    def end_window(self, examples: float, batches: int, *, changed: bool) -> tuple[float, bool]:
        """Learn what the other processes had in the window that ends: the one message of an ordinary step.

        Args:
            examples: behind the step, of this process.
            batches: micro-batches that hold them.
            changed: whether this process saw the noise change.

        Returns:
            The examples behind the step, and whether the noise has changed for any process.
        """
        pooled = sum(piece.size for piece in self._pool)
        total, self._pooled, changes, failures = self._ranks.examples(
            examples, pooled, float(changed), float(self._broken is not None)
        )
        self._seen_batches += batches
        self._seen_examples += total
        self._latest = total / max(batches, 1)
        if failures:
            self.fail(self._broken or RankError("Another process could not keep its batches"))
            self._broken = None
        return total, changes > 0.0

    @property
    def ready(self) -> bool:
        """Whether the window that ends has a measurement to finish, so that `collect` has something to do."""
        if self._live is not None:
            return True
        return self._pool_target > 0.0 and self._pooled >= self._pool_target

    def collect(self, base: float, batch_size: float, moments: AdamMoments | None) -> Measurement | None:
        """Finish the measurement at the end of a window, if one is complete.

        Args:
            base: base batch size.
            batch_size: examples behind the step about to be taken.
            moments: of the optimizer; None if they are not readable now.

        Returns:
            The measurement; None if there is none. `failure` says if one failed.
        """
        if not self.ready:
            return None
        if self._pace is not None:
            self._refresh_parameters()  # some may have been toggled off when the window began
        sharpness = None
        if self._settings.follows_edge and moments is not None:
            sharpness = self._follow_sharpness(moments, base, batch_size)
        if self._live is not None:
            live, self._live = self._live, None
            if not live.complete:
                # Somebody ended the window early; its examples have been trained on all the same.
                self.budget.charge(self._cost_under_way, measured=False)
                return None
            finish = partial(live.finish, sharpness)
            return self._finished(self._attempts.without_trace(finish, self.parameters), free=True)
        probe = partial(self._probe, base, moments, sharpness)
        return self._finished(self._attempts.without_trace(probe, self.parameters), free=False)

    def _follow_sharpness(self, moments: AdamMoments, base: float, batch_size: float) -> MoreSecants:
        far = max(batch_size / base, base / batch_size) >= FAR_ENOUGH
        sizes = (base, batch_size if far else FAR * base)

        def follow(search: Sample, judge: Sample) -> tuple[SizedValue, ...]:
            def inverse_root(size: float) -> Iterator[Tensor]:
                averages = self._optimizer, self.parameters, self._scales
                return moments.inverse_root(*averages, size, damping[size])

            try:
                damping = {size: moments.damping(self._optimizer, self.parameters, size) for size in sizes}
                return self._sharpness.measure(
                    self.parameters,
                    sizes=sizes,
                    inverse_root=inverse_root,
                    search=search,
                    judge=judge,
                    delta=self._delta(SHARPNESS_DELTA),
                )
            except SharpnessError:
                return ()  # gradients of zero; the rest of the measurement is good

        return follow

    def _finished(self, measurement: Measurement | None, *, free: bool) -> Measurement | None:
        if measurement is None:
            return None
        measurement = self._ranks.first(measurement)
        examples = measurement.statistics.batch_size
        if not self.budget.measurements:
            source = "probes"
            if free:
                source = "gradient accumulation" if self._rank_groups == 1 else "the processes' own gradients"
            rank_zero_info(
                f"First measurement of gradient noise: from {source}, {examples:g} examples in "
                f"{measurement.num_chunks} chunks."
            )
        self._dropped_pools = 0
        self.budget.charge(measurement.passes + (FREE_CHUNK_PASSES * examples if free else 0.0))
        power = 1 if self._kind == "gradient" else 0
        return measurement.unscaled(self._prober.loss_scale, direction_power=power)

    # ------------------------------------------------------------------ live, from accumulation

    def _add_live(self, piece: Piece, weight: float) -> None:
        """Give the measurement this micro-batch's own gradient, then put the accumulated one back."""
        live = self._live
        assert live is not None
        begin = time.perf_counter()
        try:
            if self._attempts.together(partial(self._untouched, piece.batch)) and piece.size > 0.0:
                self._add_groups(live, piece, weight)
        finally:
            self._own.end()
        self.seconds += time.perf_counter() - begin

    def _add_groups(self, live: LawMeasurement, piece: Piece, weight: float) -> None:
        """Fold in a micro-batch, or each group of processes' part of it."""
        for group in range(self._rank_groups):
            # No name for the gradients: it would keep them alive during the secant.
            due = self._attempts.together(partial(self._fold_in, live, piece, weight, group))
            if group == self._rank_groups - 1:
                self._own.end()
            if due:
                self._attempts.without_trace(live.measure_curvature, self.parameters)
            if self._live is None:
                return

    def _fold_in(self, live: LawMeasurement, piece: Piece, weight: float, group: int) -> bool:
        """Add the chunk that a group of processes makes of a micro-batch."""
        if self._ranks.count == 1:
            return live.add(Chunk((piece,)), _scaled(self._own.gradients(), 1.0 / weight))
        mine = self._ranks.rank * self._rank_groups // self._ranks.count == group
        whole, size, weights = self._ranks.total(piece.size, piece.size * mine, weight)
        chunk = Chunk((piece,), total=size, mine=mine, idle=whole - size)
        if self._ranks.reduces:
            # A mean over processes of weighted gradients.
            return live.add(chunk, _scaled(self._own.gradients(), self._ranks.count / weights))
        share = piece.size / (size * weight) if mine else 0.0
        gradients = [
            torch.zeros_like(parameter) if own is None else own.mul(share)
            for parameter, own in zip(self.parameters, self._own.gradients(), strict=True)
        ]
        self._ranks.sum(gradients)
        return live.add(chunk, gradients)

    # ------------------------------------------------------------------ probes

    def _probe(
        self, base: float, moments: AdamMoments | None, sharpness: MoreSecants | None
    ) -> Measurement | None:
        """Measure from pooled batches, after making sure once that cutting them changes nothing."""
        pieces = self._pool
        chunks = self._prober.chunks(pieces, base, self._fewest_chunks)
        if len(chunks) < self._fewest_chunks:
            return None  # too few whole batches, or examples: go on pooling
        self.forget_pool()
        if not self.budget.has_room(self._cost(sum(chunk.size for chunk in chunks)), self._planned):
            return None  # the last batch was far larger than those the plan was made with
        self._prober.loss_scale = self._loss.scale_for(chunks, self._seen_examples / self._seen_batches)
        if not self._slices_checked and len(chunks) > len(pieces) and not self._slices_agree(pieces, chunks):
            return None
        if self._by_coordinates:
            return CoordinateMeasurement(
                self.parameters,
                replay=self._prober.replay,
                delta=self._delta(),
                scales=self._scales,
                sizes=CoordinateMeasurement.sizes_for(chunks, base),
                law=self._settings.law,
                seed=self._trainer.global_step,
                variance_of=None if moments is None else partial(self._variance, moments),
                ranks=self._ranks,
            ).run(chunks)
        return self._new_measurement(len(chunks)).run(chunks, sharpness)

    def _variance(self, moments: AdamMoments, parameter: Tensor) -> Tensor | None:
        """Adam's averages are of unscaled gradients, those of the probe carry its loss scale."""
        variance = moments.variance(self._optimizer, parameter)
        return None if variance is None else variance.mul_(self._prober.loss_scale**2)

    def _slices_agree(self, pieces: list[Piece], chunks: list[Chunk]) -> bool:
        num_slices = max(len(chunks) // len(pieces), 2)
        # The cheapest that can be cut: a size may count tokens, and a batch be a single row.
        piece = next(
            (
                piece
                for piece in sorted(pieces, key=lambda piece: piece.size)
                if len(self._prober.cut(piece, num_slices)) > 1
            ),
            None,
        )
        self._ranks.meet()
        if not any(self._ranks.total(float(piece is not None))):
            return True  # nothing was cut
        agree, passes = self._prober.slices_agree(piece or pieces[0], num_slices)
        self._slices_checked = True
        self.budget.charge(passes, measured=False)
        if not agree:
            self._may_split = False
            rank_zero_warn(
                "The mean gradient of a batch's slices is not the gradient of the batch: the loss couples "
                "examples (BatchNorm, a contrastive loss), is a sum over them, or a mean over something "
                "else, as tokens without padding (then pass batch_size_fn=). Whole batches are pooled "
                "instead of sliced; pass loss_fn= or split_batch= if slices can be made to agree."
            )
        return agree

    def _check_cutting(self, batch: Any) -> None:
        try:
            self._prober.cut(Piece(batch, 0, 2.0), 2)
        except Exception as error:
            reason = str(error) if isinstance(error, BatchError) else f"{type(error).__name__}: {error}."
            raise MisconfigurationException(
                f"SurgeLRCallback cannot cut a batch into slices. {reason} Or pass split_batch=False to "
                "measure from whole, pooled batches."
            ) from error

    def _cost(self, examples: float) -> float:
        """Passes of a probe: its slices once, and half of them for each of two sizes of direction."""
        if self._by_coordinates:
            return CoordinateMeasurement.cost(examples, self._settings.law)
        return 2.0 * examples + self._sharpness_cost(examples, SECANTS)

    def _sharpness_cost(self, examples: float, secants: int) -> float:
        """Passes of the sharpness: one half of the examples for each secant."""
        return 0.5 * secants * examples if self._settings.follows_edge else 0.0

    def _planned_examples(self, typical: float, batch_size: float, batch_idx: int) -> float:
        """Examples of the whole run as far as the Trainer knows; infinite if it does not."""
        trainer, planned = self._trainer, math.inf
        per_batch, per_step = typical, batch_size
        if self._pace is not None:
            trained = self.budget.trained
            per_batch = self._pace.examples_per_batch(trained) or typical
            per_step = self._pace.examples_per_step(trained, trainer.global_step) or batch_size
        batches = trainer.num_training_batches
        if trainer.max_epochs is not None and trainer.max_epochs > 0 and math.isfinite(batches):
            left = (trainer.max_epochs - trainer.current_epoch) * batches - batch_idx
            planned = self.budget.trained + max(left, 0) * per_batch
        if trainer.max_steps > 0:
            left = max(trainer.max_steps - trainer.global_step, 0)
            planned = min(planned, self.budget.trained + left * per_step)
        return planned

    # ------------------------------------------------------------------ shared

    def _refresh_parameters(self) -> None:
        """Read the parameter groups afresh: fine-tuning callbacks unfreeze and add."""
        lrs = self._writer.scheduled()
        self._largest_lr = max(self._largest_lr, *lrs)
        groups = zip(self._optimizer.param_groups, lr_scales(lrs), strict=True)
        rows = [
            (p, scale * distance)
            for group, scale in groups
            for p, distance in zip(group["params"], parameter_scales(self._optimizer, group), strict=True)
            if p.requires_grad
        ]
        before = [id(parameter) for parameter in self.parameters]
        self.parameters = [parameter for parameter, _ in rows]
        self.parameters_changed = bool(before) and before != [id(parameter) for parameter, _ in rows]
        self._scales = [scale for _, scale in rows]
        self._prober.parameters = self.parameters
        self._prober.split_batch = self._split_batch if self._may_split else None

    def _new_measurement(self, num_chunks: int, stride: int = 1) -> LawMeasurement:
        return LawMeasurement(
            self.parameters,
            num_chunks=num_chunks,
            replay=self._prober.replay,
            # Along the gradient the direction itself carries the loss scale.
            delta=self._delta() / (self._prober.loss_scale if self._kind == "gradient" else 1.0),
            scales=self._scales,
            direction=_identity if self._kind == "gradient" else torch.sign,
            stride=stride,
            keep_all=self._settings.follows_edge,
            ranks=self._ranks,
        )

    def _delta(self, share: float = 1.0) -> float:
        """Distance of the secants: the optimal step as far as it is known, within the schedule's scale."""
        lr = max(*self._writer.scheduled(), SMALLEST_DELTA * self._largest_lr)
        wanted = FIRST_DELTA * lr if self._delta_wanted is None else self._delta_wanted
        return probe_distance(self.parameters, share * min(max(wanted, SMALLEST_DELTA * lr), lr))

    def fail(self, error: Exception) -> None:
        """Give up the measurement under way, and try again at a larger spacing."""
        self._live = None
        self.forget_pool()
        self.budget.charge(self._cost_under_way, measured=False)
        self.budget.widen()
        self.failure = f"measuring failed with {type(error).__name__}"
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        rank_zero_warn(
            "Measuring failed and is tried again later, at twice the spacing; training goes on unchanged. "
            f"{reason}. If training_step cannot be repeated on a part of a batch, "
            "pass loss_fn=, a function of (module, batch) that returns the mean loss."
        )

    # ------------------------------------------------------------------ state

    def drop_pool(self) -> None:
        """Drop batches being pooled when a checkpoint is saved, as a run that resumes from it has none."""
        if self._pool:
            self._dropped_pools += 1
            if self._dropped_pools == PATIENCE:
                rank_zero_warn(
                    f"The last {PATIENCE} checkpoints each came while batches were being pooled for a "
                    "measurement, and dropped them: nothing is measured. Save less often, or set "
                    "probe_examples= lower."
                )
        self.forget_pool()

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, and the tensors of the sharpness."""
        return {
            "budget": self.budget.state_dict(),
            "largest_lr": self._largest_lr,
            "slices_checked": self._slices_checked,
            "may_split": self._may_split,
            "seen": [self._seen_batches, self._seen_examples],
            # A checkpoint keeps what the first process has. Pieces of the others would be missing.
            "sharpness": {"vector": []} if self.sharded else self._sharpness.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of `state_dict`.

        Raises:
            ValueError: if a value is none that it can have; this object is of no use then.
            KeyError: if one is missing.
        """
        remedy = "load what state_dict returned"
        self.budget.load_state_dict(state["budget"])
        self._largest_lr = require_number("largest_lr", state["largest_lr"], remedy, zero=True)
        self._slices_checked, self._may_split = bool(state["slices_checked"]), bool(state["may_split"])
        batches, examples = (require_number("seen", number, remedy, zero=True) for number in state["seen"])
        # Their quotient is the size that the next measurement is planned with: it must be one. Examples that
        # were seen and not trained on are those of steps that a scaler skipped.
        trained = self.budget.trained
        fits = (1.0 - ROUNDING) * trained <= examples <= (MOST_SKIPPED * trained or math.inf)
        if not batches.is_integer() or (examples > 0.0) != (batches > 0.0) or not fits:
            raise ValueError(
                f"Expected the batches and examples seen to hold the {trained:g} trained on, got {batches:g} "
                f"batches of {examples:g} examples: {remedy}."
            )
        self._seen_batches, self._seen_examples = int(batches), examples
        if self._settings.follows_edge and "sharpness" in state:
            self._sharpness.load_state_dict(state["sharpness"])


def _identity(gradient: Tensor) -> Tensor:
    return gradient


def _scaled(gradients: list[Tensor | None], factor: float) -> list[Tensor | None]:
    if factor == 1.0:
        return gradients
    return [None if gradient is None else gradient * factor for gradient in gradients]
