"""What a measurement costs, and when one is due: by the examples seen and those still to come."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl

from lightning_surge.callbacks.settings import SurgeSettings
from lightning_surge.checking.arguments import number
from lightning_surge.measure.budget import ProbeBudget
from lightning_surge.measure.coordinates import CoordinateMeasurement
from lightning_surge.measure.distributed import Ranks
from lightning_surge.measure.measurement import MIN_SLICES
from lightning_surge.measure.probing import examples_wanted
from lightning_surge.measure.records import Measurement
from lightning_surge.measure.sharpness import SECANTS

__all__ = ["MeasuringPlan", "Pace"]


# Whole-gradient arithmetic on free chunks, in passes per example.
FREE_CHUNK_PASSES = 0.25

# What the two counts of examples in a checkpoint may differ by: sums of fractions, and skipped steps.
ROUNDING = 1e-9
MOST_SKIPPED = 1e3


class MeasuringPlan:
    """Counts the examples of all processes, and spends the budget on them.

    Args:
        settings: the callback's.

    Attributes:
        budget: what may be spent, and what was.
        by_coordinates: whether the law needs the gradient of every coordinate, as the theorems do.
        follows_edge: whether measurements must find Adam's edge of stability too.
        fewest_chunks: chunks that a measurement of this law takes.
    """

    def __init__(self, settings: SurgeSettings) -> None:
        self._settings = settings
        self.follows_edge = settings.follows_edge
        self.budget = ProbeBudget(settings.max_overhead, settings.probe_every)
        self.by_coordinates = settings.law.startswith("theorem")
        self.fewest_chunks = CoordinateMeasurement.FEWEST_CHUNKS if self.by_coordinates else MIN_SLICES
        self._seen_batches = 0
        self._seen_examples = 0.0
        # Of the measurement under way: its cost, and the examples of the whole run when it was planned.
        self._cost_under_way = 0.0
        self._planned = 0.0
        self._asked: tuple[float, ...] = ()
        self._wanted = self._probe_cost = 0.0

    # ------------------------------------------------------------------ examples

    def see(self, examples: float, batches: int) -> None:
        """Count a window of all processes.

        Args:
            examples: behind the step.
            batches: micro-batches that hold them.
        """
        self._seen_batches += batches
        self._seen_examples += examples

    def typical(self, size: float, ranks: Ranks) -> float:
        """Examples in a micro-batch to plan with, where batches differ in size, as those counted in tokens.

        Args:
            size: of the one at hand.
            ranks: the processes that measure together.
        """
        return self.mean_batch if self._seen_batches else ranks.examples(size)[0]

    @property
    def mean_batch(self) -> float:
        """Examples in a micro-batch so far, of which there must have been one."""
        return self._seen_examples / self._seen_batches

    def look_ahead(self, trainer: pl.Trainer, pace: Pace | None, batch_idx: int, typical: float) -> float:
        """Learn how long the run is as far as the Trainer knows; infinite if it does not.

        Args:
            trainer: at the first micro-batch of a window.
            pace: of the optimizer, where the user calls its steps.
            batch_idx: index of the micro-batch in the epoch.
            typical: examples in it.

        Returns:
            The micro-batches of this window.
        """
        # The last window of an epoch ends with the epoch. After resuming on a shorter loader, Lightning
        # counts past its end.
        batches = trainer.num_training_batches
        window = min(trainer.accumulate_grad_batches, max(batches - batch_idx, 1))
        if pace is not None:
            window = pace.batches_per_step
        trained, planned = self.budget.trained, math.inf
        per_batch, per_step = typical, typical * window
        if pace is not None:
            per_batch = pace.examples_per_batch(trained) or per_batch
            per_step = pace.examples_per_step(trained, trainer.global_step) or per_step
        if trainer.max_epochs is not None and trainer.max_epochs > 0 and math.isfinite(batches):
            left = (trainer.max_epochs - trainer.current_epoch) * batches - batch_idx
            planned = trained + max(left, 0) * per_batch
        if trainer.max_steps > 0:
            left = max(trainer.max_steps - trainer.global_step, 0)
            planned = min(planned, trained + left * per_step)
        self._planned = planned
        return window

    # ------------------------------------------------------------------ costs

    def live_is_due(self, examples: float, groups: int, secants: int) -> bool:
        """Whether to measure a window by the gradients of its own micro-batches.

        Args:
            examples: in it.
            groups: of processes that make chunks of their own: all pass whenever one of them must.
            secants: that the sharpness takes.
        """
        passes = 1.0 if groups == 1 else 0.5 * groups + 1.0
        self._cost_under_way = (passes + FREE_CHUNK_PASSES) * examples
        self._cost_under_way += self._sharpness_cost(examples, secants)
        return self.budget.due(self._cost_under_way, self._planned)

    def probe_due(self, examples: float, base: float, smallest_chunk: float, secants: int) -> float:
        """How many examples to pool for a probe; 0 if none is due.

        Args:
            examples: in a window.
            base: base batch size.
            smallest_chunk: examples, of which the fewest chunks are made.
            secants: that the sharpness takes.
        """
        question = examples, base, smallest_chunk, secants, self._planned
        if question != self._asked:
            # The same at every step of a batch size that stays.
            self._wanted = self._settings.probe_examples or examples_wanted(
                examples,
                base,
                lambda examples: self.budget.affordable(self._cost(examples), self._planned),
                smallest=self.fewest_chunks * smallest_chunk,
            )
            self._probe_cost = self._cost(self._wanted)
            self._probe_cost += self._sharpness_cost(self._wanted, secants - SECANTS)
            self._asked = question
        self._cost_under_way = self._probe_cost
        return self._wanted if self.budget.due(self._probe_cost, self._planned) else 0.0

    def has_room(self, examples: float) -> bool:
        """Whether a probe of what was pooled in the end stays within the budget.

        Args:
            examples: that were pooled.
        """
        return self.budget.has_room(self._cost(examples), self._planned)

    def charge(self, measurement: Measurement, *, free: bool) -> None:
        """Pay for a measurement.

        Args:
            measurement: that was taken.
            free: whether its chunks came without passes of their own.
        """
        arithmetic = FREE_CHUNK_PASSES * measurement.statistics.batch_size if free else 0.0
        self.budget.charge(measurement.passes + arithmetic)

    def charge_in_vain(self) -> None:
        """Pay for the measurement under way, of which nothing came."""
        self.budget.charge(self._cost_under_way, measured=False)

    def _cost(self, examples: float) -> float:
        """Passes of a probe: its slices once, and half of them for each of two sizes of direction."""
        if self.by_coordinates:
            return CoordinateMeasurement.cost(examples, self._settings.law)
        return 2.0 * examples + self._sharpness_cost(examples, SECANTS)

    def _sharpness_cost(self, examples: float, secants: int) -> float:
        """Passes of the sharpness: one half of the examples for each secant."""
        return 0.5 * secants * examples if self.follows_edge else 0.0

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"budget": self.budget.state_dict(), "seen": [self._seen_batches, self._seen_examples]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of `state_dict`.

        Raises:
            ValueError: if a value is none that it can have; this object is of no use then.
            KeyError: if one is missing.
        """
        remedy = "load what state_dict returned"
        self.budget.load_state_dict(state["budget"])
        batches, examples = (float(number("seen", one, remedy, least=0)) for one in state["seen"])
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


class Pace:
    """Counts the batches that begin, and those behind one optimizer's steps.

    The Trainer's `global_step` and `max_steps` count the steps of all optimizers, and not every batch is
    behind a step of each, nor behind one step only. So the examples that an optimizer will still be trained
    on are foreseen from those of the batches and steps so far.

    Attributes:
        steps: of this optimizer.
        batches_per_step: batches behind its latest step; 1 before the first.

    Example:
        A critic takes every batch of 8, and five steps to one of the other optimizer.

        >>> pace = Pace()
        >>> for steps_of_all in (0, 1, 2, 3, 4):
        ...     pace.begin_batch(steps_of_all)
        ...     pace.step(1)
        >>> pace.examples_per_batch(40.0), pace.examples_per_step(40.0, global_step=6)
        (8.0, 6.666666666666667)
    """

    def __init__(self) -> None:
        self.steps = 0
        self.batches_per_step = 1
        self._batches = 0
        self._steps_before: int | None = None

    def begin_batch(self, global_step: int) -> None:
        """A batch begins.

        Args:
            global_step: steps of all optimizers before it.
        """
        if self._steps_before is None:
            self._steps_before = global_step
        self._batches += 1

    def step(self, batches: int) -> None:
        """The optimizer has stepped.

        Args:
            batches: whose gradients were behind the step.
        """
        self.steps += 1
        self.batches_per_step = max(batches, 1)

    def examples_per_batch(self, trained: float) -> float | None:
        """Examples behind this optimizer's steps per batch so far; None before the first step.

        Args:
            trained: examples behind its steps so far.
        """
        return trained / self._batches if self.steps and self._batches else None

    def examples_per_step(self, trained: float, global_step: int) -> float | None:
        """Examples behind this optimizer's steps per step of any optimizer; None before the first step.

        Args:
            trained: examples behind its steps so far.
            global_step: steps of all optimizers so far.
        """
        taken = global_step - (self._steps_before or 0)
        return trained / taken if self.steps and taken > 0 else None

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of `state_dict`.

        Raises:
            ValueError: if a value is none that a count can have; nothing is taken over then.
        """
        counts = {name: state.get(name, value) for name, value in vars(Pace()).items()}
        before = counts["_steps_before"]
        known = [counts[name] for name in counts if name != "_steps_before" or before is not None]
        if any(type(count) is not int or not 0 <= count < 2**63 for count in known):
            raise ValueError(
                f"Expected whole numbers of steps and batches, got {counts}: load what state_dict returned."
            )
        vars(self).update(counts)
