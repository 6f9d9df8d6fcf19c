"""How requested batch sizes become micro-batches: pure integers, so that a run can be counted in advance.

A *window* is what lies behind one optimizer step: one micro-batch or several, whose gradients are
accumulated. Lightning zeroes gradients where ``batch_idx % accumulation == 0`` and steps where
``(batch_idx + 1) % accumulation == 0``, both counted from the start of the epoch. Windows are therefore
powers of two of micro-batches that begin at a multiple of their own length. A DataLoader's micro-batches
are accumulated as they come (`AccumulatedSchedule`); a batch sampler cuts an epoch into micro-batches of
the sizes wanted, as few as fit into memory (`plan_windows`, `SampledSchedule`).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import chain, repeat

from lightning_surge.checking.arguments import shown, store, switch, whole
from lightning_surge.schedules.sizes import Progress, Schedule

Window = tuple[int, ...]
"""Examples in each micro-batch behind one optimizer step, on one replica."""

Run = tuple[int, int]
"""Examples of an optimizer step, and how many steps of that size come in a row."""

_COUNT = "count from 1"

# What `total_steps` and `total_examples` may look at, in evaluations of a schedule: half a second or so.
MOST_EVALUATIONS = 80_000


def accumulation_for(requested: int, micro_batch_size: int, *, limit: int | None = None) -> int:
    """The largest power of two of micro-batches, over all replicas, that does not exceed the requested size.

    Powers of two, because any of them can follow a smaller one after at most one extra window (see
    ``aligned_accumulation``); a change from 7 to 8 could wait for dozens of micro-batches. At least 1, even
    where one exceeds the request, and at most those of an epoch (``limit``), at whose end Lightning steps.

    Example:
        >>> [accumulation_for(size, micro_batch_size=8) for size in (4, 8, 31, 32, 100)]
        [1, 1, 2, 4, 8]
    """
    # Somebody's own schedule may return anything.
    most = max(1, whole("requested", requested, _COUNT) // micro_batch_size)
    most = most if limit is None else min(most, limit)
    return 1 << (most.bit_length() - 1)


def aligned_accumulation(target: int, batch_idx: int) -> int:
    """The accumulation closest to ``target`` that may begin at micro-batch ``batch_idx``.

    A window of ``a`` micro-batches that begins anywhere but at a multiple of ``a`` would either step on
    gradients that were never zeroed or be cut short. For ``target`` a power of two, the largest power of two
    that divides both is ``gcd(target, batch_idx)``. Where a window of ``a`` has just ended, the result is at
    least ``min(a, target)``: the size never falls while waiting, and reaches ``2 a`` after at most one more
    window of ``a``.

    Example:
        At micro-batch 6 a window of 2 fits, but not one of 4; at 8 it does.

        >>> [aligned_accumulation(4, batch_idx) for batch_idx in (0, 6, 8)]
        [4, 2, 4]
    """
    return math.gcd(target, batch_idx)


def plan_windows(
    schedule: Schedule,
    begin: Progress,
    *,
    examples: int,
    largest: int,
    replicas: int = 1,
    drop_last: bool = False,
) -> Iterator[Window]:
    """The windows of one epoch, for a sampler that may cut micro-batches of any size.

    Every example of the epoch is in exactly one micro-batch. A window has the size requested, in the
    fewest micro-batches, a power of two, that memory allows; where twice as many begin to be needed it may
    have to wait for an aligned micro-batch, at the largest size that fits meanwhile. Micro-batches of one
    window differ by at most one example. Where memory allows one example only, sizes are powers of two.

    Args:
        schedule: Examples per optimizer step, over all replicas.
        begin: Progress at which the epoch begins.
        examples: Examples of the epoch on one replica.
        largest: Examples that a micro-batch may have.
        replicas: Number of data-parallel replicas; requests are rounded down to a multiple of it.
        drop_last: Whether to leave out the examples at the end that do not fill a window.

    Yields:
        Windows, in order.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        Micro-batches of at most 4. Step 2 would need four of them at micro-batch 2, and gets two.

        >>> from lightning_surge.schedules.sizes import Milestones
        >>> schedule = Milestones({0: 3, 1: 7, 2: 16})
        >>> list(plan_windows(schedule, Progress(), examples=40, largest=4))
        [(3,), (4,), (4, 4), (4, 4, 4, 4), (2, 2, 2, 3)]
    """
    examples = whole("examples", examples, _COUNT, least=0)
    largest = whole("largest", largest, _COUNT)
    replicas = whole("replicas", replicas, _COUNT)
    drop_last = switch("drop_last", drop_last)
    for size, parts, count in _plan(schedule, begin, examples, largest, replicas, drop_last):
        window = tuple(size * (part + 1) // parts - size * part // parts for part in range(parts))
        yield from repeat(window, count)


def _plan(
    schedule: Schedule, begin: Progress, examples: int, largest: int, replicas: int, drop_last: bool
) -> Iterator[tuple[int, int, int]]:
    """The windows of `plan_windows`: examples on a replica, micro-batches, how many such windows in a row."""
    batch_idx = done = step = 0

    def progress(ahead: int, size: int) -> Progress:
        then = done + ahead * size
        epoch = math.floor(begin.epoch) + then / examples
        return Progress(begin.step + step + ahead, begin.examples + then * replicas, epoch)

    def requested(now: Progress) -> int:
        return max(1, schedule(now) // replicas)

    while done < examples:
        request = requested(progress(0, 0))
        if drop_last and request > examples - done:
            return
        wanted = min(request, examples - done)
        # The smallest power of two of micro-batches that are small enough ...
        parts = 1 << (-(-wanted // largest) - 1).bit_length()
        # ... unless some would be empty, as where 3 examples are to be 4 micro-batches of 1.
        parts = parts if parts <= wanted else parts // 2
        aligned = aligned_accumulation(parts, batch_idx)
        size, count = min(wanted, aligned * largest), 1
        if aligned == parts:
            # Not waiting for its place, so the next window is the same if the request is, and it fits.
            # With drop_last a whole request has to fit, which micro-batches of one fall short of.
            room = examples - done - (request - size if drop_last else 0)
            count = _repeats(schedule, request, size, progress, requested, room // size)
        yield size, aligned, count
        batch_idx += aligned * count
        done += size * count
        step += count


def _repeats(
    schedule: Schedule,
    first: int,
    length: int,
    progress: Callable[[int, int], Progress],
    wanted: Callable[[Progress], int],
    most: int,
) -> int:
    """How many steps in a row are to be alike, found by doubling and halving instead of one by one.

    ``progress`` says where a step begins, given a number of steps ahead and their ``length``, ``wanted`` what
    is wanted there: ``first`` at the first of them, and nothing less up to where ``schedule`` may fall.
    At most ``most`` steps are looked at.
    """
    clock = progress(0, length).on(schedule.unit)
    rises_until = schedule.rises_until(clock)
    if rises_until <= clock:
        return 1

    def alike(ahead: int) -> bool:
        later = progress(ahead, length)
        return later.on(schedule.unit) < rises_until and wanted(later) == first

    known = stride = 1
    while known < most and alike(min(known + stride, most) - 1):
        known, stride = min(known + stride, most), 2 * stride
    while stride > 1:
        stride //= 2
        if known + stride <= most and alike(known + stride - 1):
            known += stride
    return known


@dataclass(frozen=True)
class Replay(ABC):
    """The number of examples behind every optimizer step of a run, as a schedule is carried out."""

    schedule: Schedule

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, Schedule):
            raise ValueError(
                f"Expected schedule to be a Schedule, got schedule={shown(self.schedule)}: only sizes known"
                " beforehand can be counted."
            )
        for each in fields(self)[1:]:
            size = getattr(self, each.name)
            if each.name != "drop_last" and not (size is None and each.default is None):
                store(self, **{each.name: whole(each.name, size, _COUNT)})

    def sizes(self) -> Iterator[int]:
        """Yields the actual number of examples of step 0, 1, 2, ... without end."""
        return chain.from_iterable(repeat(size, count) for size, count in self.runs())

    @abstractmethod
    def runs(self) -> Iterator[Run]:
        """Yields sizes and how many steps of each come in a row, without end."""


@dataclass(frozen=True)
class AccumulatedSchedule(Replay):
    """The sizes that optimizer steps really have when a schedule is carried out by accumulation.

    It replays, in integers, what ``BatchSizeScheduler`` and Lightning's loop do: sizes are the micro-batch
    times a power of two, a larger window waits for an aligned micro-batch, and the last window of an epoch
    takes whatever is left and steps.

    Args:
        schedule: Requested examples per optimizer step.
        micro_batch_size: Examples per micro-batch on one replica (the DataLoader's ``batch_size``).
        replicas: Number of data-parallel replicas.
        examples_per_epoch: Length of the training set over all replicas; with ``drop_last=True`` without the
            dropped rest. Each replica gets an equal share, rounded up, as from a ``DistributedSampler``.
            ``None``: one pass without an end.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        Micro-batches of 2 and an epoch of 26. The request for 8 comes at step 4, which begins at
        micro-batch 6: it waits for micro-batch 8. Step 6 gets the 2 examples that are left.

        >>> from itertools import islice
        >>> from lightning_surge.schedules.sizes import GeometricRamp
        >>> actual = AccumulatedSchedule(GeometricRamp(2, 8, duration=4), 2, examples_per_epoch=26)
        >>> list(islice(actual.sizes(), 9))
        [2, 2, 4, 4, 4, 8, 2, 8, 8]
        >>> total_steps(actual, examples=2 * 26), total_examples(actual, steps=7)
        (11, 26)
    """

    micro_batch_size: int
    replicas: int = 1
    examples_per_epoch: int | None = None

    def runs(self) -> Iterator[Run]:
        """Yields sizes and how many steps of each come in a row, without end."""
        micro, unit = self.micro_batch_size, self.micro_batch_size * self.replicas
        share = None if self.examples_per_epoch is None else -(-self.examples_per_epoch // self.replicas)
        batches = None if share is None else -(-share // micro)
        batch_idx = step = examples = epoch = 0

        def progress(ahead: int, length: int) -> Progress:
            part = 0.0 if batches is None else (batch_idx + ahead * length) / batches
            return Progress(step + ahead, examples + ahead * length * unit, epoch + part)

        def wanted(now: Progress) -> int:
            return accumulation_for(self.schedule(now), unit, limit=batches)

        while True:
            target = wanted(progress(0, 0))
            length, count = aligned_accumulation(target, batch_idx), 1
            # Windows of whole micro-batches that the epoch still has room for.
            room = 1 << 62 if share is None else (share // micro - batch_idx) // length
            if length == target and room > 1:
                count = _repeats(self.schedule, target, length, progress, wanted, room)
            size = length * unit
            if share is not None and not room:
                # The last window may lack micro-batches, and the last micro-batch examples.
                size = (min((batch_idx + length) * micro, share) - batch_idx * micro) * self.replicas
            yield size, count
            step, examples, batch_idx = step + count, examples + count * size, batch_idx + count * length
            if batches is not None and batch_idx >= batches:
                batch_idx, epoch = 0, epoch + 1


@dataclass(frozen=True)
class SampledSchedule(Replay):
    """The sizes that optimizer steps really have under a ``ScheduledBatchSampler``.

    Args:
        schedule: Requested examples per optimizer step.
        largest_micro_batch: The sampler's ``batch_size``: examples that a micro-batch may have.
        examples_per_epoch: Length of the training set over all replicas.
        replicas: Number of data-parallel replicas; each gets an equal share, rounded up.
        drop_last: The sampler's.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> from itertools import islice
        >>> from lightning_surge.schedules.sizes import LinearRamp
        >>> actual = SampledSchedule(LinearRamp(2, 10, duration=4), 8, examples_per_epoch=26)
        >>> list(islice(actual.sizes(), 8))
        [2, 4, 6, 8, 6, 10, 10, 6]
    """

    largest_micro_batch: int
    examples_per_epoch: int
    replicas: int = 1
    drop_last: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        switch("drop_last", self.drop_last)

    def runs(self) -> Iterator[Run]:
        """Yields sizes and how many steps of each come in a row, without end."""
        share = -(-self.examples_per_epoch // self.replicas)
        largest, replicas = self.largest_micro_batch, self.replicas
        step = examples = epoch = 0
        while True:
            begin, before = Progress(step, examples, epoch), step
            for size, _, count in _plan(self.schedule, begin, share, largest, replicas, self.drop_last):
                yield size * replicas, count
                step, examples = step + count, examples + count * size * replicas
            if step == before:
                raise ValueError(
                    f"Expected epochs that hold a step, got examples_per_epoch={self.examples_per_epoch}, "
                    "which drop_last leaves without one: use smaller batches or drop_last=False."
                )
            epoch += 1


def _runs(schedule: Schedule | Replay) -> Iterator[Run]:
    """Sizes, and how many steps of each come in a row, as long as counting them takes a moment only."""
    if not isinstance(schedule, (Schedule, Replay)):
        raise ValueError(
            f"Expected a Schedule, AccumulatedSchedule or SampledSchedule, got schedule={shown(schedule)}:"
            " only sizes known beforehand can be counted; make other functions a Schedule."
        )
    runs = _requested_runs(schedule) if isinstance(schedule, Schedule) else schedule.runs()
    step = evaluations = 0
    for size, count in runs:
        # A size of zero would make the counts below run for ever.
        yield whole(f"schedule at step {step}", size, _COUNT), count
        step += count
        evaluations += 2 * count.bit_length() - 1
        if evaluations > MOST_EVALUATIONS:
            raise ValueError(
                "Expected a schedule whose steps can be counted in a moment, got one that is not through"
                f" after {step} steps, of {size} examples at last: count a shorter training, use longer"
                " epochs, or give multiple_of= to a ramp, which then has fewer sizes."
            )


def _requested_runs(schedule: Schedule) -> Iterator[Run]:
    if schedule.unit == "epochs":
        raise ValueError(
            "Expected a schedule in steps or examples, got unit='epochs', whose length is not known: pass an"
            " AccumulatedSchedule or a SampledSchedule, which know examples_per_epoch."
        )
    step = examples = 0

    def progress(ahead: int, size: int) -> Progress:
        return Progress(step + ahead, examples + ahead * size)

    while True:
        size = schedule(progress(0, 0))
        count = _repeats(schedule, size, size, progress, schedule, 1 << 62)
        yield size, count
        step, examples = step + count, examples + count * size


def total_steps(schedule: Schedule | Replay, examples: int) -> int:
    """Counts the optimizer steps that a schedule takes to consume a number of examples.

    The length for a learning-rate schedule that should end with the data. The count is exact for the sizes
    given. Where a DataLoader's batches are accumulated, pass an ``AccumulatedSchedule``: requested sizes are
    rounded down, and their sum would promise too few steps. Under a ``ScheduledBatchSampler`` pass a
    ``SampledSchedule``.

    Args:
        schedule: Examples per optimizer step.
        examples: Examples to consume.

    Returns:
        The smallest ``n`` for which the first ``n`` steps hold at least ``examples``.

    Raises:
        ValueError: If ``examples`` is out of range; if the schedule returns a size below 1, counts epochs of
            unknown length, or changes its size too often to be counted in a second.

    Example:
        2 + 4 + 8 = 14 examples in three steps, so 15 need a fourth.

        >>> from lightning_surge.schedules.sizes import GeometricRamp
        >>> ramp = GeometricRamp(start=2, end=8, duration=2)
        >>> total_steps(ramp, examples=14), total_steps(ramp, examples=15)
        (3, 4)
    """
    examples = whole("examples", examples, _COUNT, least=0)
    if not examples:
        return 0
    steps = consumed = 0
    for size, count in _runs(schedule):
        needed = -(-(examples - consumed) // size)
        if needed <= count:
            return steps + needed
        steps, consumed = steps + count, consumed + count * size
    raise AssertionError("schedules have no end")


def total_examples(schedule: Schedule | Replay, steps: int) -> int:
    """Counts the examples that the first ``steps`` optimizer steps of a schedule consume.

    Args:
        schedule: Examples per optimizer step, as in `total_steps`.
        steps: Number of optimizer steps.

    Raises:
        ValueError: As for `total_steps`.

    Example:
        >>> from lightning_surge.schedules.sizes import GeometricRamp
        >>> total_examples(GeometricRamp(start=2, end=8, duration=2), steps=4)
        22
    """
    left, total = whole("steps", steps, "count optimizer steps", least=0), 0
    if not left:
        return 0
    for size, count in _runs(schedule):
        if left <= count:
            return total + left * size
        left, total = left - count, total + count * size
    raise AssertionError("schedules have no end")
