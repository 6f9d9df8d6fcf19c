"""Batch-size schedules: pure functions from the progress of a training to a number of examples.

A *schedule* says how many examples the next optimizer step should average over. It looks at one of
three clocks: optimizer steps, examples (or tokens, if batches are counted so), or epochs. What a step
really gets is decided by the mechanism that carries the schedule out (``windows.py``). Everything here
is integers and floats: a learning-rate schedule can be sized before a Trainer or a DataLoader exists.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

from lightning_surge.checking.arguments import choice, number, optional, shown, store, whole

Unit = Literal["steps", "examples", "epochs"]

_SIZE = "count examples per optimizer step"
_TOKENS = "tokens are examples that batch_size_fn= counts"


class Progress(NamedTuple):
    """How far a training has come when a step begins.

    Attributes:
        step: optimizer steps taken.
        examples: examples, or tokens, behind them, over all data-parallel replicas.
        epoch: epochs, with the share of the present one.
    """

    step: int = 0
    examples: float = 0.0
    epoch: float = 0.0

    def on(self, unit: Unit) -> float:
        """The reading of one clock."""
        if unit == "steps":
            return float(self.step)
        return self.examples if unit == "examples" else self.epoch


class BatchSizeRule(ABC):
    """Whatever can decide the batch size of a step: a `Schedule`, or `Seesaw`, which becomes one."""

    @property
    @abstractmethod
    def first_size(self) -> int:
        """Examples of the first step."""

    @property
    @abstractmethod
    def named_sizes(self) -> dict[str, int]:
        """The sizes that the user wrote, by argument: each must be one that steps can have."""


class Schedule(BatchSizeRule):
    """A pure function from progress to the requested number of examples."""

    unit: Unit = "steps"

    @abstractmethod
    def __call__(self, progress: Progress, /) -> int:
        """Examples requested, over all data-parallel replicas, for the step that begins at ``progress``."""

    def rises_until(self, now: float, /) -> float:
        """The point of the clock up to which sizes do not fall; ``now`` where that is not known.

        Whoever counts steps skips over those of equal size, up to there, instead of looking at each.
        """
        return now

    @property
    def first_size(self) -> int:
        """Examples of the first step."""
        return self(Progress())


@dataclass(frozen=True, kw_only=True)
class _Limits:
    """What every schedule of its own shape can be told besides: its clock, and limits on its sizes."""

    unit: Unit = "steps"
    multiple_of: int = 1
    minimum: int | None = None
    maximum: int | None = None

    def __post_init__(self) -> None:
        choice("unit", self.unit, get_args(Unit), _TOKENS)
        store(self, multiple_of=whole("multiple_of", self.multiple_of, "1 allows every size"))
        for name in ("minimum", "maximum"):
            size = optional(whole, name, getattr(self, name), "leave it out for no limit")
            store(self, **{name: size})
            if size is not None and size % self.multiple_of:
                raise ValueError(
                    f"Expected {name} to be a multiple of multiple_of={self.multiple_of}, got {name}={size}:"
                    f" use {name}={max(size // self.multiple_of, 1) * self.multiple_of}."
                )
        if self.minimum is not None and self.maximum is not None and self.minimum > self.maximum:
            raise ValueError(
                f"Expected minimum <= maximum, got minimum={self.minimum}, maximum={self.maximum}: swap them."
            )

    def rises_until(self, now: float, /) -> float:
        """Constant sizes and ramps never fall."""
        return math.inf

    def _limited(self, size: float) -> int:
        # Down, as accumulation rounds too; the slack keeps a doubling that came out as 31.99999999999
        # from being a step late. Whole numbers stay what they are, however large.
        near = round(size)
        down = near if abs(near - size) <= 1e-9 * size else math.floor(size)
        down = max(down // self.multiple_of * self.multiple_of, self.multiple_of, self.minimum or 1)
        return down if self.maximum is None else min(down, self.maximum)


@dataclass(frozen=True)
class ConstantSize(_Limits, Schedule):
    """The same number of examples at every step.

    Args:
        size: Examples per optimizer step.
        unit: As in `LinearRamp`, like the limits; it makes no difference to a constant.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> ConstantSize(16)(Progress(step=1000))
        16
    """

    size: int

    def __post_init__(self) -> None:
        super().__post_init__()
        store(self, size=whole("size", self.size, _SIZE))

    @property
    def named_sizes(self) -> dict[str, int]:
        """``size``, after rounding and limits."""
        return {"size": self._limited(self.size)}

    def __call__(self, progress: Progress, /) -> int:
        """The size."""
        return self._limited(self.size)


@dataclass(frozen=True)
class _Ramp(_Limits, Schedule):
    """From ``start`` to ``end`` within ``duration``, and ``end`` from then on."""

    start: int
    end: int
    duration: float

    def __post_init__(self) -> None:
        super().__post_init__()
        store(self, start=whole("start", self.start, _SIZE), end=whole("end", self.end, _SIZE))
        store(self, duration=number("duration", self.duration, f"count {self.unit}"))
        if self.end < self.start:
            raise ValueError(
                f"Expected start <= end, got start={self.start}, end={self.end}: a ramp only grows; swap the"
                f" two, or use end={self.start} for a constant size."
            )

    @property
    def named_sizes(self) -> dict[str, int]:
        """``start`` and ``end``, after rounding and limits."""
        return {"start": self._limited(self.start), "end": self._limited(self.end)}

    def __call__(self, progress: Progress, /) -> int:
        """The requested number of examples; ``start`` at 0, ``end`` from ``duration`` on."""
        share = min(max(progress.on(self.unit) / self.duration, 0.0), 1.0)
        return self._limited(self.end if share == 1.0 else self._between(share))

    def _between(self, share: float) -> float:
        raise NotImplementedError


@dataclass(frozen=True)
class LinearRamp(_Ramp):
    """A batch size that grows by equal amounts: ``B = start + (end - start) t / duration``.

    Args:
        start: Examples at first.
        end: Examples from ``duration`` on; at least ``start``.
        duration: Length of the ramp, in ``unit``.
        unit: The clock: ``"steps"``, ``"examples"`` or ``"epochs"``.
        multiple_of: Examples; sizes are rounded down to a multiple of it.
        minimum: Smallest size, in examples; None for no limit.
        maximum: Largest size, in examples; None for no limit.

    Raises:
        ValueError: If an argument is out of range, or ``end < start``.

    Example:
        >>> ramp = LinearRamp(16, 64, duration=4, multiple_of=8)
        >>> [ramp(Progress(step=step)) for step in range(6)]
        [16, 24, 40, 48, 64, 64]
    """

    def _between(self, share: float) -> float:
        return self.start + (self.end - self.start) * share


@dataclass(frozen=True)
class GeometricRamp(_Ramp):
    """A batch size that grows by equal factors: ``B = start (end / start)^(t / duration)``.

    Each doubling takes equally long. The arguments are those of `LinearRamp`.

    Example:
        >>> ramp = GeometricRamp(start=16, end=64, duration=4)
        >>> [ramp(Progress(step=step)) for step in range(6)]
        [16, 22, 32, 45, 64, 64]
    """

    def _between(self, share: float) -> float:
        return self.start * math.pow(self.end / self.start, share)


@dataclass(frozen=True)
class CosineRamp(_Ramp):
    """A batch size that grows slowly, fast, and slowly again, along half a wave of a cosine.

    ``B = start + (end - start) (1 - cos(pi t / duration)) / 2``. The arguments are those of `LinearRamp`.

    Example:
        >>> ramp = CosineRamp(16, 64, duration=4)
        >>> [ramp(Progress(step=step)) for step in range(6)]
        [16, 23, 40, 56, 64, 64]
    """

    def _between(self, share: float) -> float:
        return self.start + (self.end - self.start) * (1 - math.cos(math.pi * share)) / 2


@dataclass(frozen=True)
class Milestones(_Limits, Schedule):
    """Explicit sizes, each from one point of the clock to the next.

    Args:
        sizes: Examples per step, by the point from which they hold. One of the points is 0.
        unit: As in `LinearRamp`, like the limits.

    Raises:
        ValueError: If an argument is out of range, or no point is 0.

    Example:
        >>> schedule = Milestones({0: 16, 2: 32, 3: 128})
        >>> [schedule(Progress(step=step)) for step in range(5)]
        [16, 16, 32, 128, 128]
    """

    sizes: Mapping[float, int] = field(hash=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.sizes, Mapping) or 0 not in self.sizes:
            raise ValueError(
                f"Expected milestones that begin at 0, got sizes={shown(self.sizes)}: say the size of the"
                " first step too, as in {0: 16, 1000: 64}."
            )
        remedy = "each size holds from one point of the clock on"
        points = {number("points of sizes", point, remedy, least=0): n for point, n in self.sizes.items()}
        sizes = {point: whole(self._name(point), n, _SIZE) for point, n in sorted(points.items())}
        store(self, sizes=sizes)

    @staticmethod
    def _name(point: float | None) -> str:
        # All digits: two points that look alike would be one size to check.
        return f"sizes[{point:.15g}]"

    @property
    def named_sizes(self) -> dict[str, int]:
        """Every size, after rounding and limits."""
        return {self._name(point): self._limited(size) for point, size in self.sizes.items()}

    def rises_until(self, now: float, /) -> float:
        """The next point."""
        return min((point for point in self.sizes if point > now), default=math.inf)

    def __call__(self, progress: Progress, /) -> int:
        """The size of the last point reached."""
        now = progress.on(self.unit)
        return self._limited([size for point, size in self.sizes.items() if point <= max(now, 0.0)][-1])


@dataclass(frozen=True)
class Phase:
    """A part of a training with a schedule of its own.

    Args:
        begin: When it begins, on the clock of `Phases`.
        end: When it ends; None for never, which only the last phase may.
        schedule: What holds in it. Its clock is the same and starts at 0 where the phase begins.

    Raises:
        ValueError: If ``begin`` or ``end`` is not a number, or ``schedule`` not a `Schedule`.
    """

    begin: float
    end: float | None
    schedule: Schedule

    def __post_init__(self) -> None:
        remedy = "count on the clock of Phases from the start of training"
        store(self, begin=number("begin", self.begin, remedy, least=0))
        store(self, end=optional(number, "end", self.end, f"{remedy}, or None for no end", least=0))
        if not isinstance(self.schedule, Schedule):
            raise ValueError(
                f"Expected the schedule of a phase to be a Schedule, got {self.schedule!r}: use"
                " ConstantSize(16) for a constant size."
            )


@dataclass(frozen=True)
class Phases(Schedule):
    """Schedules one after the other.

    Args:
        phases: The parts, which must meet: the first begins at 0 and each other one where its predecessor
            ends.
        unit: The clock that ``begin`` and ``end`` are on, and the clock of every schedule within.

    Raises:
        ValueError: If there is no phase, a gap, an overlap, or a schedule on another clock.

    Example:
        A thousand steps at 16, then four thousand from 16 to 256.

        >>> ramp = GeometricRamp(16, 256, duration=4000)
        >>> schedule = Phases([Phase(0, 1000, ConstantSize(16)), Phase(1000, None, ramp)])
        >>> [schedule(Progress(step=step)) for step in (0, 999, 3000, 9000)]
        [16, 16, 64, 256]
    """

    phases: Sequence[Phase]
    unit: Unit = "steps"

    def __post_init__(self) -> None:
        choice("unit", self.unit, get_args(Unit), _TOKENS)
        store(self, phases=tuple(self.phases) if isinstance(self.phases, Sequence) else (self.phases,))
        if not self.phases or not all(isinstance(phase, Phase) for phase in self.phases):
            raise ValueError(
                f"Expected phases to be a list of at least one Phase, got phases={shown(self.phases)}: use"
                " [Phase(begin, end, schedule), ...], or ConstantSize for a constant size."
            )
        end: float | None = 0
        for index, phase in enumerate(self.phases):
            if phase.begin != end:
                what = "a gap" if end is not None and end < phase.begin else "an overlap"
                raise ValueError(
                    "Expected each phase to begin where its predecessor ends, and the first at 0, got"
                    f" {what} before phases[{index}], end={end} and begin={phase.begin}: make the two equal."
                )
            end = phase.end
            if end is not None and end <= phase.begin:
                raise ValueError(
                    f"Expected begin < end, got begin={phase.begin}, end={end} in phases[{index}]: remove the"
                    " phase or make it longer."
                )
            if phase.schedule.unit != self.unit and not isinstance(phase.schedule, ConstantSize):
                raise ValueError(
                    f"Expected all phases on the clock unit={self.unit!r}, got"
                    f" unit={phase.schedule.unit!r} in phases[{index}]: use the same unit."
                )

    @property
    def named_sizes(self) -> dict[str, int]:
        """Those of all phases."""
        return {
            f"phases[{index}].{name}": size
            for index, phase in enumerate(self.phases)
            for name, size in phase.schedule.named_sizes.items()
        }

    def _in_force(self, now: float) -> Phase:
        return [phase for phase in self.phases if phase.begin <= now][-1]

    def rises_until(self, now: float, /) -> float:
        """The end of the phase in force, or where a size falls within it."""
        phase = self._in_force(now)
        end = math.inf if phase is self.phases[-1] or phase.end is None else phase.end
        return min(end, phase.begin + phase.schedule.rises_until(now - phase.begin))

    def __call__(self, progress: Progress, /) -> int:
        """What the phase in force requests; the last one goes on after its end."""
        now = max(progress.on(self.unit), 0.0)
        phase = self._in_force(now)
        since = now - phase.begin
        return phase.schedule(Progress(step=math.floor(since), examples=since, epoch=since))
