"""What is measured next, from how many examples, and when: by the batch sizes and the length of the run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.fabric.utilities import rank_zero_info

from lightning_surge.callbacks.settings import SurgeSettings
from lightning_surge.checking.arguments import optional, whole
from lightning_surge.checking.state import REMEDY
from lightning_surge.measure.budget import ProbeBudget, probe_cost
from lightning_surge.measure.coordinates import CoordinateMeasurement
from lightning_surge.measure.distributed import Ranks
from lightning_surge.measure.measurement import MAX_SLICES, MIN_SLICES, slices_for
from lightning_surge.measure.norms import WindowNorms

# The mean batch is a little smaller than most where the last one of an epoch is short.
NEARLY = 0.75
# Pairs of examples tell `|G|^2`, and a probe of M has M^2 of them: it pays to pool this many, as long as the
# run affords two such probes, and more where it affords twenty, enough to follow training.
POOLED = 256.0
FEW_PROBES, ENOUGH_PROBES = 2.0, 20.0
# Smaller slices pass too slowly for what they tell.
SMALLEST_SLICE = 4.0
# A batch size that differs by this factor from the last one measured is news.
CHANGED = 2.0
# Curvature is measured in the first of so many measurements, where somebody asks for it.
CURVATURE_EVERY = 4
# A measurement from windows holds as many examples as a probe, and later this share of those trained on.
WINDOWS_SHARE = 1.0 / 64.0


class Kind(Enum):
    """What a probe measures."""

    NORMS = "norms"
    LAW = "law"
    COORDINATES = "coordinates"


class Probe(NamedTuple):
    """A measurement that starts.

    Attributes:
        kind: what it measures.
        examples: to recompute gradients of.
        at_hand: whether they are a slice of the batch at hand, measured against the rest of it. Else batches
            are pooled from window to window.
    """

    kind: Kind
    examples: float
    at_hand: bool = False


Cost = Callable[[Probe], float]


def arrangement(kind: Kind, base: float) -> tuple[float, int]:
    """Examples in the chunks that a pool is to be made of, and how many chunks at least."""
    fewest = CoordinateMeasurement.FEWEST_CHUNKS if kind is Kind.COORDINATES else MIN_SLICES
    return SMALLEST_SLICE if kind is Kind.NORMS else base, fewest


class MeasuringPlan:
    """Counts the examples of all processes, and spends the budget on them.

    Attributes:
        budget: what may be spent, and what was.
        seen: batches, and the examples in them.
        size: the batch size of the last measurement, or of the first step while there was none.
    """

    def __init__(self, settings: SurgeSettings) -> None:
        self._settings = settings
        self.budget = ProbeBudget(settings.max_overhead, settings.probe_every)
        self.seen = (0, 0.0)
        self.size = 0.0
        # Of the measurement under way: its cost, and the examples of the whole run when it was planned.
        self._cost_under_way = 0.0
        self._planned = math.inf
        self._asked: tuple[Any, ...] = ()
        self._answer: list[Probe] = []
        self._told_of_short_run = False

    # ------------------------------------------------------------------ examples

    def see(self, examples: float, batches: int) -> None:
        """Count a window of all processes."""
        self.seen = self.seen[0] + batches, self.seen[1] + examples

    def typical(self, size: float, ranks: Ranks) -> float:
        """Examples in a micro-batch to plan with: batches may differ in size, as those counted in tokens."""
        return self.mean_batch if self.seen[0] else ranks.examples(size)[0]

    @property
    def mean_batch(self) -> float:
        """Examples in a micro-batch so far, of which there must have been one."""
        return self.seen[1] / self.seen[0]

    def look_ahead(self, trainer: pl.Trainer, pace: Pace | None, batch_idx: int, typical: float) -> float:
        """Learn how long the run is as far as the Trainer knows; infinite if it does not."""
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

    # ------------------------------------------------------------------ windows

    def windows_are_due(self, norms: WindowNorms, size: float) -> bool:
        """Whether the norms of the windows so far make a measurement."""
        if self._settings.probe_every is not None:
            due = norms.windows >= self._settings.probe_every
        else:
            wanted = self._settings.probe_examples or POOLED
            due = norms.examples >= max(wanted, WINDOWS_SHARE * self.budget.trained) or self._is_new(size)
        if due:
            self.size = size
        return due

    def _is_new(self, size: float) -> bool:
        self.size = self.size or size
        return max(size / self.size, self.size / size) >= CHANGED

    # ------------------------------------------------------------------ probes

    def next_probe(
        self,
        size: float,
        base: float,
        smallest: float,
        *,
        at_hand: bool,
        kind: Kind,
        batch: float,
        check: float,
        size_ahead: Callable[[float], float],
    ) -> Probe | None:
        """The probe that starts with this window, if one is due.

        If it will cut batches of so many examples, it is to afford the passes of a check of slices, too.
        """
        question = size, base, smallest, at_hand, kind, batch, check, self._planned
        if question != self._asked:
            # The same at every step of a batch size that stays.
            def once(probe: Probe) -> float:
                return probe_cost(check * self._cuts(probe, base, batch))

            self._asked, self._answer = question, self._options(size, base, smallest, at_hand, kind, once)
            self._costs = [self._cost(probe) + once(probe) for probe in self._answer]
            self._tell_of_a_short_run(min(self._costs), size, size_ahead)
        urgent = changed = self._is_new(size)
        probe, cost = self._answer[changed], self._costs[changed]
        if not self.budget.measurements and not changed:
            # Before the first change of the batch size, if it is known: pooling takes that long.
            urgent = size_ahead(probe.examples + size) >= CHANGED * size
        if not self.budget.due(cost, self._planned, urgent=urgent):
            return None
        self._cost_under_way, self.size = cost, size
        self.budget.start(urgent=urgent)
        return probe

    def _options(
        self, size: float, base: float, smallest: float, at_hand: bool, kind: Kind, once: Cost = lambda _: 0.0
    ) -> list[Probe]:
        """A probe to follow training with, and one for the first step after a change of the batch size.

        The first probe of the run costs `once` more.
        """

        def affordable(probe: Probe) -> float:
            return self.budget.affordable(self._cost(probe), self._planned, once=once(probe))

        pooled = Probe(
            kind, self._settings.probe_examples or self._pooled(size, base, smallest, kind, affordable)
        )
        if not at_hand or self._settings.probe_examples:
            return [pooled, pooled]
        part = min(size / 2.0, POOLED)
        while (
            part >= 4.0
            and self._settings.probe_every is None
            and affordable(Probe(kind, part, at_hand=True)) < FEW_PROBES
        ):
            part /= 2.0
        part = float(math.ceil(part))
        here = Probe(kind, part, at_hand=True)
        # Pairs of examples per pass: `b (n - b) + b^2 / 2` of a slice, `M^2 / 2` of a pool.
        return [here if size - part / 2.0 > pooled.examples / 2.0 else pooled, here]

    def _pooled(self, size: float, base: float, smallest: float, kind: Kind, affordable: Cost) -> float:
        """A power-of-two multiple of the batch size, for which at least some probes are affordable."""
        _, chunks = arrangement(kind, base)
        examples = size
        while examples < NEARLY * chunks * smallest:
            examples *= 2
        while True:
            number = affordable(Probe(kind, 2 * examples))
            few = kind is Kind.NORMS and 2 * examples <= POOLED and number >= FEW_PROBES
            many = 2 * examples <= MAX_SLICES * base and number >= ENOUGH_PROBES
            if not (few or many):
                return examples
            examples *= 2

    def _cost(self, probe: Probe) -> float:
        """Passes: every slice once, and half of them for each of two sizes of direction."""
        passes = probe.examples
        if probe.kind is Kind.COORDINATES:
            passes = CoordinateMeasurement.cost(passes, self._settings.law)
        elif probe.kind is Kind.LAW:
            passes *= 2.0
        return probe_cost(passes)

    def _cuts(self, probe: Probe, base: float, batch: float) -> bool:
        """Whether a probe cuts batches of so many examples into slices."""
        return probe.at_hand or probe.examples < batch * slices_for(
            probe.examples, *arrangement(probe.kind, base)
        )

    def _tell_of_a_short_run(self, cost: float, size: float, size_ahead: Callable[[float], float]) -> None:
        if self._told_of_short_run or not math.isfinite(self._planned) or self._settings.probe_every:
            return
        self._told_of_short_run = True
        total = self._settings.max_overhead * self._planned
        if cost > total and not self.budget.measurements:
            first, free = "Nothing", ", or accumulate_grad_batches=2, which is measured without passes"
            if size_ahead(self._planned) > size:
                first, free = "Before the batch size changes, nothing", ""
            rank_zero_info(
                f"{first} will be measured: the smallest measurement passes {cost:g} examples, and "
                f"max_overhead={self._settings.max_overhead:g} of the {self._planned:g} examples of this run "
                f"affords {total:g}. The factor stays that of square-root scaling. Train longer, or pass "
                f"max_overhead={_rounded_up(cost / self._planned):g}{free}."
            )

    def has_room(self, probe: Probe) -> bool:
        """Whether a probe of what was pooled in the end stays within the budget."""
        return self.budget.has_room(self._cost(probe), self._planned)

    def charge_in_vain(self) -> None:
        """Pay for the measurement under way, of which nothing came."""
        self.budget.charge(self._cost_under_way, measured=False)


def _rounded_up(value: float) -> float:
    """To one digit."""
    unit = 10.0 ** math.floor(math.log10(value))
    return math.ceil(value / unit) * unit


@dataclass
class Pace:
    """Counts the batches that begin, and those behind one optimizer's steps.

    The Trainer's `global_step` and `max_steps` count the steps of all optimizers, and not every batch is
    behind a step of each, nor behind one step only. So the examples that an optimizer will still be trained
    on are foreseen from those of the batches and steps so far.

    Attributes:
        steps: of this optimizer.
        batches_per_step: batches behind its latest step; 1 before the first.
    """

    steps: int = 0
    batches_per_step: int = 1
    _batches: int = 0
    _steps_before: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            optional(whole, name.lstrip("_"), value, REMEDY, least=0)

    def begin_batch(self, global_step: int) -> None:
        """A batch begins."""
        if self._steps_before is None:
            self._steps_before = global_step
        self._batches += 1

    def step(self, batches: int) -> None:
        """The optimizer has stepped."""
        self.steps += 1
        self.batches_per_step = max(batches, 1)

    def examples_per_batch(self, trained: float) -> float | None:
        """Examples behind this optimizer's steps per batch so far; None before the first step."""
        return trained / self._batches if self.steps and self._batches else None

    def examples_per_step(self, trained: float, global_step: int) -> float | None:
        """Examples behind this optimizer's steps per step of any optimizer; None before the first step."""
        taken = global_step - (self._steps_before or 0)
        return trained / taken if self.steps and taken > 0 else None
