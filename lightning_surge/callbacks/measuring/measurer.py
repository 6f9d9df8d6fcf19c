"""Gathers measurements from a running training: when a window is measured, and from what."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities import rank_zero_info
from torch.optim import Optimizer

from lightning_surge.callbacks.checks import ranks_of
from lightning_surge.callbacks.lightning_host import overrides, warn
from lightning_surge.callbacks.measuring.instruments import Instruments
from lightning_surge.callbacks.measuring.plan import (
    CURVATURE_EVERY,
    SMALLEST_SLICE,
    Kind,
    MeasuringPlan,
    Pace,
    Probe,
    arrangement,
)
from lightning_surge.callbacks.measuring.pooling import COMPARED_EXAMPLES, Cutting, Pool, Versions
from lightning_surge.callbacks.measuring.repeated_loss import LossFn, RepeatedLoss
from lightning_surge.callbacks.settings import SurgeSettings
from lightning_surge.checking.arguments import number
from lightning_surge.checking.state import REMEDY
from lightning_surge.laws.base import Law
from lightning_surge.measure.batches import SplitBatch, shared_copy
from lightning_surge.measure.budget import BudgetState, probe_cost
from lightning_surge.measure.direction import Direction
from lightning_surge.measure.distributed import ALONE, RankError
from lightning_surge.measure.measurement import Whole
from lightning_surge.measure.norms import WindowNorms
from lightning_surge.measure.probing import CHECK_PASSES, Prober, silenced
from lightning_surge.measure.records import Measurement
from lightning_surge.measure.replay import Chunk, Piece, TraceError

# What the two counts of examples in a checkpoint may differ by: sums of fractions, and skipped steps.
ROUNDING = 1e-9
MOST_SKIPPED = 1e3
# Into how many slices at most that part is cut: each tells `tr Sigma` once more.
MAX_PARTS = 8


@dataclass(frozen=True)
class MeasurerState:
    """What a checkpoint holds of a `Measurer` and its parts, which document it."""

    budget: BudgetState
    seen: tuple[int, float]
    slices_checked: bool
    may_split: bool
    largest_lr: float
    off: bool
    windows: dict[str, Any]
    size: float = 0.0
    slices_exact: bool = False

    def __post_init__(self) -> None:
        batches, examples = self.seen
        for name, value in (("largest_lr", self.largest_lr), ("size", self.size), ("seen", examples)):
            number(name, value, REMEDY, least=0)
        # Their quotient is the size that the next measurement is planned with: it must be one. Examples that
        # were seen and not trained on are those of steps that a scaler skipped.
        trained = self.budget.trained
        fits = (1.0 - ROUNDING) * trained <= examples <= (MOST_SKIPPED * trained or math.inf)
        if batches < 0 or (examples > 0.0) != (batches > 0) or not fits:
            raise ValueError(
                f"Expected the batches and examples seen to hold the {trained:g} trained on, got {batches:g} "
                f"batches of {examples:g} examples: {REMEDY}."
            )


class Measurer:
    """Takes measurements from the windows of a training that `SurgeLRCallback` shows it.

    A window is what lies behind one optimizer step. Where it has several micro-batches, or there are several
    processes, the norms of their gradients tell the noise without a pass, in every window. Else, and for
    curvature, a probe recomputes gradients: of a slice of the batch at hand, measured against the rest of it,
    or of slices of batches that are pooled from window to window.

    Data-parallel processes measure the gradient over all their examples, and do everything here at the same
    time: what is decided depends on numbers that are equal on all of them, and if one fails they all give up.
    """

    # Of the run in hand; absent between runs.
    _trainer: pl.Trainer
    _loss: RepeatedLoss
    _prober: Prober
    _pace: Pace | None
    _size_ahead: Callable[[float], float] | None

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
        self._loss_fn = loss_fn
        self._plan = MeasuringPlan(settings)
        self._instruments = Instruments(settings)
        self._cutting = Cutting(split_batch)
        self._pool = Pool()
        self._norms = WindowNorms(ALONE)
        self._ranks = ALONE
        self._first_window = True
        self._told_of_first = self._told_of_failure = False
        self._at_hand: Probe | None = None
        # For good: a repeated step leaves traces in training. Norms of windows are still taken.
        self.off = False
        self.budget = self._plan.budget
        self.failure: str | None = None
        self.detach()

    def attach(
        self,
        trainer: pl.Trainer,
        optimizer: Optimizer,
        direction: Direction,
        *,
        pace: Pace | None,
        size_ahead: Callable[[float], float] | None,
    ) -> None:
        """Take hold of a run that starts."""
        self.detach()
        pl_module = trainer.lightning_module
        self._trainer, self._pace, self._size_ahead = trainer, pace, size_ahead
        self._ranks = ranks_of(trainer)
        self._loss = RepeatedLoss(trainer, pl_module, self._loss_fn, self._ranks, self.fail)
        self._norms.attach(self._ranks)
        alone = self._ranks.count > 1 and not overrides(pl_module, "backward")
        self._prober = Prober(
            (),
            compute_loss=self._loss,
            backward=None if alone else pl_module.backward,
            batch_size_fn=self._batch_size_fn,
            split_batch=None,
            ranks=self._ranks,
            uses_batch_statistics=self._loss.uses_batch_statistics,
            silenced=partial(silenced, pl_module),
        )
        self._instruments.begin(optimizer, direction, self._prober)

    def detach(self) -> None:
        """Let go of the run, and of every batch."""
        for name in ("_trainer", "_loss", "_prober"):
            vars(self).pop(name, None)
        self._pace = self._size_ahead = None
        self._instruments.end()
        # Of the batch in hand, which can see several windows where optimization is manual.
        self._versions = Versions()
        self._pool.clear()
        self._pool.broken = None
        self._micro_batches = self._begun = 0
        self.close_window()

    def close_window(self) -> None:
        """The optimizer has stepped, or skipped."""
        self._norms.close()
        if self._at_hand is not None:
            self.budget.miss()
            self._at_hand = None
        self._measured: Measurement | None = None
        self._windows_done = False

    def parameters_changed(self, *, look: bool = False) -> bool:
        """Whether other parameters are trained than at the last call, as far as it is known."""
        if look:
            self._refresh_parameters()
        changed, self._instruments.parameters_changed = self._instruments.parameters_changed, False
        return changed

    def see_lr(self, lr: float) -> None:
        """Note the scheduled learning rate of an ordinary step."""
        if lr > self._instruments.largest_lr:
            self._instruments.largest_lr = lr

    @property
    def overhead(self) -> float:
        """What measuring has cost in passes, per example trained."""
        budget = self.budget
        return (budget.spent + budget.arithmetic) / budget.trained if budget.trained else 0.0

    def foreseen(self, examples: float) -> float:
        """Examples of all processes, where this one counts so many. One message."""
        return self._ranks.examples(examples)[0]

    # ------------------------------------------------------------------ the window's hooks

    def open_window(self, batch: Any, batch_idx: int, size: float, *, base: float | None) -> None:
        """Decide at a window's first micro-batch whether and how the window is measured."""
        plan, free = self._plan, self._windows_tell
        if self.off and not free:
            return
        typical = plan.typical(size, self._ranks)
        window = plan.look_ahead(self._trainer, self._pace, batch_idx, typical)
        if free:
            self._begun, self._micro_batches = 0, int(window)
            if not self._instruments.parameters:
                self._refresh_parameters()
            self._norms.open(self._micro_batches)
        if self._pool.target:
            self._pool.open_window()
            return  # still pooling
        if self._ranks.sharded and not free and self._first_window:
            rank_zero_info(
                "Nothing will be measured: sharded parameters are measured from the micro-batches of "
                "accumulation windows, and a step has one. Use accumulate_grad_batches=2 or more."
            )
        kind = self._next_kind(free=free)
        if kind is None:
            self._first_window = False
            return
        if self._cutting.allowed and self._first_window and size >= 2:
            self._refresh_parameters()
            self._cutting.check(batch, self._prober)
        self._first_window = False
        probe = self._next_probe(kind, batch_idx, size, typical, window, base)
        if probe is not None and probe.at_hand:
            self._at_hand = probe
        elif probe is not None:
            self._kind = probe.kind
            self._pool.begin(probe.examples)

    @property
    def _windows_tell(self) -> bool:
        """Whether norms of windows tell the noise: they have several chunks, with factors that are known."""
        if self._pace is not None or self._settings.law.startswith("theorem"):
            return False
        chunks = self._trainer.accumulate_grad_batches
        return chunks * (1 if self._ranks.sharded else self._ranks.count) > 1

    def _next_probe(
        self, kind: Kind, batch_idx: int, size: float, typical: float, window: float, base: float | None
    ) -> Probe | None:
        """Ask the plan for a probe that starts with this window."""
        cuts = self._cutting.allowed and (self._cutting.exact or not self._cutting.checked)
        one = self._pace is None and self._ranks.count == 1 and window == 1
        at_hand = one and cuts and kind is Kind.NORMS and size >= 2.0 * SMALLEST_SLICE
        # The last batch of an epoch may be short.
        last = 0 < batch_idx == self._trainer.num_training_batches - 1
        whole = size if at_hand and not last else typical * window
        smallest = float(self._ranks.count) if self._cutting.allowed else typical
        if kind is not Kind.NORMS:
            # Directions smaller than the base batch are of no use to the ratio, and mostly zeros where
            # gradients are sparse.
            smallest = max(base or whole, smallest)
        check = CHECK_PASSES * min(size, COMPARED_EXAMPLES) * self._ranks.count
        return self._plan.next_probe(
            whole,
            base or whole,
            smallest,
            at_hand=at_hand,
            kind=kind,
            batch=typical,
            check=0.0 if self._cutting.checked or not self._cutting.allowed else check,
            size_ahead=self._size_ahead or (lambda examples: whole),
        )

    def _next_kind(self, *, free: bool) -> Kind | None:
        """What the next probe measures; None where no probe is needed, or possible."""
        if self.off or self._ranks.sharded:
            return None
        if self._settings.law.startswith("theorem"):
            return Kind.COORDINATES
        if not self._settings.needs_curvature:
            return None if free else Kind.NORMS
        # The greedy step is one over the curvature, and needs all of it: from three readings of twelve it
        # came out six times too short on a network with batch norm.
        every = 1 if self._settings.objective == "step" else CURVATURE_EVERY
        return Kind.LAW if free or self.budget.measurements % every == 0 else Kind.NORMS

    def _refresh_parameters(self, law: Law | None = None, base: float | None = None) -> None:
        before = [id(parameter) for parameter in self._instruments.parameters]
        self._instruments.refresh()
        self._instruments.optimal_lr = None if law is None or base is None else law.lr(base)
        self._prober.parameters = self._instruments.parameters
        self._prober.split_batch = self._cutting.split_batch
        if [id(parameter) for parameter in self._instruments.parameters] != before:
            self._norms.follow(self._instruments.parameters, afresh=bool(before))

    def drop_window(self) -> None:
        """Forget the batches of a window whose step is skipped: their gradients are not finite."""
        self._pool.drop_window()
        self._measured = None

    @property
    def gathering(self) -> bool:
        """Whether the micro-batches of this window are measured, or kept to be measured."""
        return self._norms.is_open or self._pool.target > 0.0 or self._at_hand is not None

    def before_forward(self, batch: Any) -> Any:
        """Remember what the coming pass of a batch that may be replayed begins with."""
        self._begun += 1
        if not self._pool.target and self._at_hand is None:
            return batch
        batch = shared_copy(batch)
        self._versions = Versions(batch)
        return batch

    def before_backward(self) -> None:
        """Let the coming micro-batch's gradients be seen by themselves."""
        if self._norms.is_open:
            self._norms.before_backward()

    def after_backward(self, batch: Any, batch_idx: int, size: float, weight: float = 1.0) -> None:
        """Look at, or keep, a micro-batch whose gradients have just been computed."""
        if self._norms.is_open:
            factor = weight / self._trainer.accumulate_grad_batches
            last = self._begun >= self._micro_batches
            self._norms.after_backward(size, factor, self._loss.scale if last else 1.0, last=last)
        piece = Piece(batch, batch_idx, size)
        if self._at_hand is not None:
            self._measure_at_hand(piece, self._at_hand, weight)
        elif self._pool.target:
            self._pool.add(piece, self._versions)

    def end_window(self, examples: float, batches: int) -> float:
        """Learn what the other processes had in the window that ends: the one message of an ordinary step."""
        pool, norms, total, failures = self._pool, self._norms, examples, float(self._pool.broken is not None)
        kept = pool.examples if pool.target else 0.0
        message: tuple[float, ...] = ()
        if self._ranks.count > 1:
            share = self._ranks.replica_share
            total, kept, failures, *rest = self._ranks.total(
                share * examples, share * kept, failures, *norms.message()
            )
            message = tuple(rest)
        pool.gathered = kept
        self._plan.see(total, batches)
        if norms.is_open and total > 0.0:
            norms.end(message, total)
            self.budget.charge_norms(total)
            self._windows_done = self._plan.windows_are_due(norms, total)
            self._tell_of_failure(norms.take_failure())
        if failures:
            self.fail(pool.broken or RankError("Another process could not keep its batches"))
            pool.broken = None
        return total

    # ------------------------------------------------------------------ measurements

    @property
    def ready(self) -> bool:
        """Whether the window that ends has a measurement to finish, so that `collect` has something to do."""
        return self._windows_done or self._measured is not None or self._pool.full

    def collect(self, base: float, law: Law | None) -> list[Measurement]:
        """Finish the measurements at the end of a window, as far as they are complete."""
        found, self._measured = self._measured, None
        measurements = [] if found is None else [found]
        if self._windows_done:
            windows = self._norms.take()
            if windows is not None:
                self._tell_of_the_first(windows, "the windows' own gradients")
                measurements.append(windows)
        if self._pool.full:
            self._refresh_parameters(law, base)
            probe = partial(self._probe, base)
            found = self._loss.without_trace(probe, self._instruments.parameters)
            if found is not None:
                measurements.append(self._finished(found))
        return measurements

    def _probe(self, base: float) -> Measurement | None:
        """Measure from pooled batches, after making sure once that cutting them changes nothing."""
        prober, pieces, kind = self._prober, self._pool.pieces, self._kind
        finest, fewest = arrangement(kind, base)
        chunks = prober.chunks(pieces, finest, fewest)
        if len(chunks) < (2 if kind is Kind.NORMS else fewest):
            return None  # too few whole batches, or examples: go on pooling
        self._pool.clear()
        if not self._plan.has_room(Probe(kind, sum(chunk.size for chunk in chunks))):
            return None  # the last batch was far larger than those the plan was made with
        prober.loss_scale = self._loss.scale_for(chunks, self._plan.mean_batch)
        if len(chunks) > len(pieces) and not self._cutting.agrees(pieces, prober, self.budget):
            return None
        if kind is Kind.COORDINATES:
            seed = self._trainer.global_step
            return self._instruments.coordinates(chunks, base, seed).run(chunks)
        if kind is Kind.LAW:
            return self._instruments.law().run(chunks)
        return self._instruments.norms().run(chunks)

    def _measure_at_hand(self, piece: Piece, probe: Probe, weight: float) -> None:
        """Measure a slice of the batch whose gradient is in `.grad` against the rest of it."""
        self._at_hand = None
        if not self._loss.together(partial(self._versions.check, piece.batch)) or piece.size <= 0.0:
            return
        if not self._instruments.parameters:
            self._refresh_parameters()
        self._prober.split_batch = self._cutting.split_batch
        whole = [parameter.grad for parameter in self._instruments.parameters]
        factor = weight * self._loss.scale / self._trainer.accumulate_grad_batches
        work = partial(self._slice_against_rest, piece, probe, whole, factor)
        found = self._loss.without_trace(work, self._instruments.parameters)
        if found is not None:
            self._measured = self._finished(found)

    def _slice_against_rest(
        self, piece: Piece, probe: Probe, whole: list[Any], factor: float
    ) -> Measurement | None:
        prober, cutting = self._prober, self._cutting
        if not cutting.checked:
            compared = piece._replace(size=min(piece.size, COMPARED_EXAMPLES))
            prober.loss_scale = self._loss.scale_for([Chunk((compared,))], piece.size)
            if not cutting.agrees([piece], prober, self.budget):
                return None
        length = max(probe.examples / MAX_PARTS, SMALLEST_SLICE)
        parts, examples = prober.cut(piece, int(piece.size // length)), 0.0
        chunks: list[Chunk] = []
        fewest = 1 if cutting.exact else 2
        while (examples < probe.examples or len(chunks) < fewest) and len(chunks) < len(
            parts
        ) - cutting.exact:
            chunks.append(Chunk((parts[len(chunks)],)))
            examples += chunks[-1].size
        prober.loss_scale = self._loss.scale_for(chunks, piece.size)
        # Random numbers of another pass would make a slice and the rest depend on each other.
        rest = Whole(whole, piece.size, prober.loss_scale / factor) if cutting.exact else None
        return self._instruments.norms().run(chunks, rest)

    def _finished(self, measurement: Measurement) -> Measurement:
        measurement = self._ranks.first(measurement)
        self._tell_of_the_first(measurement, "probes")
        self._pool.measured()
        self.budget.charge(probe_cost(measurement.passes))
        return self._instruments.unscaled(measurement)

    def _tell_of_the_first(self, measurement: Measurement, source: str) -> None:
        if not self._told_of_first:
            self._told_of_first = True
            rank_zero_info(
                f"First measurement of gradient noise: from {source}, "
                f"{measurement.statistics.batch_size:g} examples in {measurement.num_chunks} chunks."
            )

    def _tell_of_failure(self, failure: str | None) -> None:
        if failure is not None and not self._told_of_failure:
            self._told_of_failure = True
            warn(
                "The norms of an accumulation window could not be taken, and it says nothing of the noise; "
                f"training goes on unchanged. {failure}.",
                by=warnings.warn,  # every process by itself: the others only learn that the window is silent
            )

    def fail(self, error: Exception) -> None:
        """Give up the measurement under way, and try again at a larger spacing."""
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

    @property
    def state(self) -> MeasurerState:
        """What a checkpoint holds. Waits for the device."""
        plan, cutting = self._plan, self._cutting
        return MeasurerState(
            budget=self.budget,
            seen=plan.seen,
            size=plan.size,
            slices_checked=cutting.checked,
            slices_exact=cutting.exact,
            may_split=cutting.allowed,
            largest_lr=self._instruments.largest_lr,
            off=self.off,
            windows=self._norms.state_dict(),
        )

    def load(self, state: MeasurerState) -> None:
        """Take over what a checkpoint holds."""
        self._norms.load_state_dict(state.windows)
        vars(self.budget).update(vars(state.budget))
        self._plan.seen, self._plan.size = state.seen, state.size
        cutting = self._cutting
        cutting.checked, cutting.exact, cutting.allowed = (
            state.slices_checked,
            state.slices_exact,
            state.may_split,
        )
        self._instruments.largest_lr, self.off = state.largest_lr, state.off
        self._told_of_first = True
