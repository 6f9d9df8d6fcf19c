"""A batch size that grows as the learning-rate schedule falls."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from lightning_surge.checking.arguments import store, whole
from lightning_surge.schedules.by_examples import MOST_STEPS, ExamplesClock, replayed, ticks_due, upcoming
from lightning_surge.schedules.sizes import BatchSizeRule, ConstantSize, Progress, Schedule, Unit

# Steps of the learning-rate schedule that are replayed at a time: about ten milliseconds.
CHUNK = 1_000


@dataclass(frozen=True)
class Seesaw(BatchSizeRule):
    """Trades the decay of the learning rate for batch size: `B = start / s`, within limits.

    `s` is the scheduled learning rate as a share of the largest so far, in the group where it is largest. So
    the size is `start` during warm-up and while the schedule is flat, doubles where the schedule halves, and
    is `maximum` where it is 0. `SurgeLRCallback(base_batch_size=start, law="sqrt")` multiplies by
    `sqrt(B / start)`: the rate used falls by the root of the share, to 0.71 where the schedule halves, until
    `maximum` is reached, and in proportion to the schedule from there on. With the measured law it falls as
    its ratio has it.

    Needs one optimizer with one learning-rate schedule that counts examples (`by_examples`), whose copy is
    replayed as training goes on: nothing of it is in checkpoints, and a schedule changed on resuming is
    followed. `BatchSizeScheduler` carries the sizes out by accumulation, rounded down to powers of two of
    micro-batches, or exactly, with a `ScheduledBatchSampler`.

    Args:
        start: Examples per optimizer step at the peak of the schedule.
        maximum: Largest size, in examples.
        multiple_of: Examples; sizes are rounded down to a multiple of it.

    Raises:
        ValueError: If an argument is out of range, or ``maximum < start``.

    Example:
        Along a cosine over 64 examples, in steps of 8.

        >>> import torch
        >>> from lightning_surge.schedules import by_examples, total_steps
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        >>> cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)
        >>> sizes = Seesaw(start=8, maximum=32).along(by_examples(cosine, examples_per_step=8))
        >>> [sizes(Progress(examples=examples)) for examples in (0, 16, 32, 48, 64)]
        [8, 9, 16, 32, 32]
        >>> total_steps(sizes, examples=64)
        6

    References:
        Meterez et al. 2025, arXiv:2510.14717 (Seesaw: where a schedule halves the rate, divide it by the root
        of two and double the batch).
    """

    start: int
    maximum: int
    multiple_of: int = 1

    def __post_init__(self) -> None:
        remedy = "count examples per optimizer step"
        store(self, start=whole("start", self.start, remedy), maximum=whole("maximum", self.maximum, remedy))
        store(self, multiple_of=self._limits.multiple_of)
        if self.maximum < self.start:
            raise ValueError(
                f"Expected start <= maximum, got start={self.start}, maximum={self.maximum}: swap the two, or"
                f" use ConstantSize({self.start})."
            )

    @cached_property
    def _limits(self) -> ConstantSize:
        return ConstantSize(self.start, multiple_of=self.multiple_of, maximum=self.maximum)

    @property
    def first_size(self) -> int:
        """`start`, after rounding."""
        return self.size(1.0)

    @property
    def named_sizes(self) -> dict[str, int]:
        """`start`, after rounding, and `maximum`."""
        return {"start": self.first_size, "maximum": self.maximum}

    def size(self, share: float) -> int:
        """Examples per step where the learning rate is a share of its peak."""
        falls_short = share * self.maximum > self.start
        return self._limits._limited(self.start / share) if falls_short else self.maximum

    def along(
        self, clock: ExamplesClock, *, shared: Iterable[object] = (), most: float = MOST_STEPS
    ) -> SeesawSchedule:
        """The sizes for a learning-rate schedule, as a `Schedule` that can be counted beforehand.

        Args:
            clock: What `by_examples` returns, before its first step.
            shared: What the copy of it may refer to without copying it, such as the model.
            most: Steps of the learning-rate schedule that may be replayed.

        Raises:
            ValueError: If the clock has moved already.
        """
        return SeesawSchedule(self, clock, shared, most)


class SeesawSchedule(Schedule):
    """The sizes of a `Seesaw` for one learning-rate schedule: a function of examples. `along` makes one."""

    unit: Unit = "examples"

    def __init__(self, rule: Seesaw, clock: ExamplesClock, shared: Iterable[object], most: float) -> None:
        if not isinstance(clock, ExamplesClock) or clock.ticks:
            found = f"ticks={clock.ticks}" if isinstance(clock, ExamplesClock) else type(clock).__name__
            raise ValueError(
                f"Expected by_examples(...) before its first step, got {found}: its copy is replayed from the"
                " start; wrap a scheduler that was just made."
            )
        self._rule, self._most = rule, most
        self._examples_per_step = clock.examples_per_step
        self._rates = replayed(clock, shared)
        self._peak, self._known = 0.0, 0
        # Sizes, and the steps of the learning-rate schedule from which they hold.
        self._sizes, self._points = [rule.first_size], [0]
        self._reach(0)

    @property
    def named_sizes(self) -> dict[str, int]:
        """The rule's."""
        return self._rule.named_sizes

    def __call__(self, progress: Progress, /) -> int:
        """The size for the learning rate of the step that begins at ``progress``."""
        return self._sizes[self._index(progress.examples)]

    def rises_until(self, now: float, /) -> float:
        """Where the size changes next, or as far as that has been looked at."""
        later = self._index(now) + 1
        point = self._points[later] if later < len(self._points) else self._known
        return point * self._examples_per_step

    def grows_within(self, examples: float) -> bool:
        """Whether the size changes before so many examples; True where that takes long to see."""
        last = math.ceil(examples / self._examples_per_step) - 1
        while len(self._points) == 1 and self._known <= last:
            if self._known > MOST_STEPS:
                return True
            self._reach(self._known)
        return len(self._points) > 1 and self._points[1] <= last

    def _index(self, examples: float) -> int:
        step = ticks_due(examples, self._examples_per_step)
        self._reach(step)
        return bisect_right(self._points, step) - 1

    def _reach(self, step: int) -> None:
        while self._known <= step:
            if self._known > self._most:
                raise ValueError(
                    f"Expected a learning-rate schedule of at most {self._most} steps to be counted, got one"
                    " that is longer: count a shorter training, or use a larger examples_per_step."
                )
            for step_of_lr, rate in enumerate(upcoming(self._rates, CHUNK), start=self._known):
                self._peak = max(self._peak, rate)
                size = self._rule.size(rate / self._peak if self._peak > 0.0 else 1.0)
                if size != self._sizes[-1]:
                    self._points.append(step_of_lr)
                    self._sizes.append(size)
            self._known += CHUNK
