"""Learning-rate schedules that count examples instead of optimizer steps.

A ramp of the batch size changes how many optimizer steps an epoch has, so a schedule that counts steps
ends too late or too early. It is not rewritten here but given another clock: it advances by one of its
steps whenever a fixed number of examples has been consumed, however many optimizer steps that took.

The two halves of a step arrive separately. ``BatchSizeScheduler`` knows how many examples are behind a
step and says so before it (``advance``); Lightning calls ``step`` after it, as for any scheduler. What a
schedule will be is known from a copy of it that is replayed (``replayed``).
"""

import copy
import math
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from lightning_surge.checking.arguments import number
from lightning_surge.checking.state import restore, save

# Sizes like 0.1 and the quotient below are off by half a unit in the last place each; the slack keeps a
# tick that came out as 6.9999999999999991 from being a step late. Whole numbers below 1e15 need none,
# and are too coarse to be moved by it.
_SLACK = 1 + 4 * sys.float_info.epsilon
# Replaying takes about ten microseconds a step.
MOST_STEPS = 100_000


@dataclass(frozen=True)
class ClockState:
    """Where a clock stands: the exact sum of examples is `examples + rounding`."""

    examples_per_step: float
    examples: float
    rounding: float
    ticks: int

    def __post_init__(self) -> None:
        for name in ("examples", "ticks"):
            number(name, getattr(self, name), "the checkpoint is damaged, resume from another one", least=0)


class ExamplesClock(LRScheduler):
    """A learning-rate scheduler moved by examples; ``by_examples`` makes one.

    After ``n * examples_per_step`` examples the wrapped scheduler has made exactly ``n`` of its own steps,
    one by one: learning rates are bit-identical to those of constant training at ``examples_per_step``.
    Examples left over are kept for the next step. Public attributes of the wrapped scheduler
    (``last_epoch``, ``base_lrs``, ...) can be read through the clock.

    Note:
        * *Skipped steps.* The clock follows the data, not the updates. A step whose gradients a
          ``GradScaler`` found infinite, or whose ``training_step`` returned None, has been announced with the
          examples that it consumed, and counts. Where Lightning steps schedulers although no optimizer step
          was begun (a loader that yields None), nothing was announced and nothing moves.
        * *Beyond the end.* Most schedules go on as they would by steps (``CosineAnnealingLR`` rises again).
          ``OneCycleLR`` raises after ``total_steps``, and extrapolates beyond its minimum just before. The
          clock rests at ``total_steps - 1``, where the minimum is, and warns once if a further step is made.
          A ``OneCycleLR`` inside another scheduler raises.
    """

    def __init__(self, scheduler: LRScheduler, examples_per_step: float) -> None:
        # Not super().__init__: it would take a first step and write a learning rate of its own.
        if isinstance(scheduler, ReduceLROnPlateau):
            raise TypeError(
                "Expected a scheduler that counts steps, got ReduceLROnPlateau, which waits for a metric:"
                " return it as it is, with monitor= and interval='epoch'."
            )
        if isinstance(scheduler, ExamplesClock):
            raise TypeError(
                "Expected a scheduler that counts steps, got an ExamplesClock, which counts examples already:"
                " wrap once."
            )
        if not isinstance(scheduler, LRScheduler):
            found = scheduler.__name__ if isinstance(scheduler, type) else type(scheduler).__name__
            raise TypeError(
                f"Expected an instance of torch.optim.lr_scheduler.LRScheduler, got {found}: wrap a torch"
                " scheduler, or put the formula into LambdaLR(optimizer, ...)."
            )
        remedy = "use the batch size that the scheduler was written for"
        self.examples_per_step = float(number("examples_per_step", examples_per_step, remedy))
        self.optimizer = scheduler.optimizer
        self.scheduler = scheduler
        # Consumed so far, over all data-parallel replicas; the exact sum is the sum of the two: a running
        # float alone drifts, by 1e-6 over a million 0.1s.
        self.examples, self._rounding = 0.0, 0.0
        self.ticks = 0  # steps that the clock has moved the wrapped scheduler
        self._fed = False
        self._warned = False

    def advance(self, examples: float) -> None:
        """Announces an optimizer step and the examples behind it, over all data-parallel replicas.

        Called before it, perhaps several times; the learning rate moves in ``step``, where a scheduler with
        ``frequency=2`` catches up. 0 only tells the clock that somebody counts.
        """
        examples = float(number("examples", examples, "pass what this step consumes", least=0))
        if examples > 0 and self._due() > self.ticks and self._is_over() and not self._warned:
            self._warned = True
            # In mid-run, where a warning must not end the training, also under `python -W error`.
            with suppress(Warning):
                warnings.warn(
                    f"Expected a schedule as long as the training, got total_steps={self.total_steps} in"
                    f" {type(self.scheduler).__name__}, which ended after {self.total_steps} x"
                    f" {self.examples_per_step:g} examples: the learning rate stays at its minimum. Use"
                    f" total_steps=math.ceil(examples of the whole training / {self.examples_per_step:g}).",
                    stacklevel=2,
                )
        self._fed = True
        parts = (self.examples, self._rounding, examples)
        self.examples = math.fsum(parts)
        self._rounding = math.fsum((*parts, -self.examples))

    def step(self) -> None:  # type: ignore[override]
        """Moves the wrapped scheduler by the steps that have become due. Called after the optimizer step."""
        if not self._fed:
            raise RuntimeError(
                "Expected somebody to count the examples, got an ExamplesClock that was never advanced: add"
                " BatchSizeScheduler to the Trainer's callbacks, BatchSizeScheduler(ConstantSize(16)) for a"
                " constant size, and return the clock itself, not inside another scheduler."
            )
        due = self._due()
        if self.ticks == 0 and due > 0 and not self._is_over():
            with warnings.catch_warnings():
                # Lightning keeps the order, but a GradScaler may have skipped every update so far, and
                # torch takes that for a scheduler that is stepped too early. It looks at the first step only.
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
                self._tick()
        while self.ticks < due and not self._is_over():
            self._tick()

    def get_last_lr(self) -> list[float | Tensor]:
        """The learning rates that the wrapped scheduler set last, one per parameter group."""
        return self.scheduler.get_last_lr()

    def state_dict(self) -> dict[str, Any]:
        """The counts and the state of the wrapped scheduler."""
        counts = ClockState(self.examples_per_step, self.examples, self._rounding, self.ticks)
        return {**save(counts), "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where ``state_dict`` was taken; a ValueError for any other state."""
        if "scheduler" not in state_dict:
            raise ValueError(
                f"Expected the state of an ExamplesClock, got that of a bare scheduler, {sorted(state_dict)}:"
                " resume with the scheduler that was saved."
            )
        saved = restore(ClockState, state_dict)
        if saved.examples_per_step != self.examples_per_step:
            raise ValueError(
                "Expected a clock with the examples_per_step of the checkpoint,"
                f" {saved.examples_per_step:g}, got {self.examples_per_step:g}: use"
                f" examples_per_step={saved.examples_per_step:g}; the batch size is free."
            )
        self.scheduler.load_state_dict(state_dict["scheduler"])
        self.examples, self._rounding, self.ticks = saved.examples, saved.rounding, saved.ticks

    def __getattr__(self, name: str) -> Any:
        # Whoever looks for last_epoch, base_lrs or cycle_momentum means the wrapped scheduler's.
        if name.startswith("_") or name == "scheduler":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.scheduler, name)

    def _due(self) -> int:
        return ticks_due(self.examples, self.examples_per_step)

    def _is_over(self) -> bool:
        scheduler = self.scheduler
        return isinstance(scheduler, OneCycleLR) and scheduler.last_epoch >= scheduler.total_steps - 1

    def _tick(self) -> None:
        # Never several at once, as step(epoch) would: recursive schedulers know only the next value.
        self.scheduler.step()
        self.ticks += 1


def ticks_due(examples: float, examples_per_step: float) -> int:
    """Steps that a clock has moved its scheduler by after so many examples."""
    return math.floor(examples / examples_per_step * _SLACK)


def by_examples(scheduler: LRScheduler, examples_per_step: float) -> ExamplesClock:
    """Makes a learning-rate scheduler count examples, so that it ends with the data under any batch size.

    With ``examples_per_step`` the batch size of a constant training, a scheduler written for that training is
    taken over as it is: ``T_max = total_examples / batch_size``. Every one of its steps is carried out, so
    ``examples_per_step=1`` would be slow.

    Needs ``BatchSizeScheduler`` among the Trainer's callbacks, also for a constant size, and
    ``interval="step"``.

    Args:
        scheduler: Any torch scheduler but ``ReduceLROnPlateau``, the outermost if they are nested.
        examples_per_step: Examples per step of the scheduler; tokens if ``batch_size_fn`` counts those.

    Returns:
        What ``configure_optimizers`` returns as ``{"scheduler": ..., "interval": "step"}``.

    Raises:
        TypeError: If ``scheduler`` is not a torch scheduler that steps without a metric, or is a clock.
        ValueError: If ``examples_per_step`` is out of range.

    Example:
        A cosine over 64 examples, written for batches of 16. Batches of 8 and 16 and 40 end it just as
        well. In a training, the callback calls ``advance`` and Lightning calls ``step``.

        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        >>> cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=64 // 16)
        >>> clock = by_examples(cosine, examples_per_step=16)
        >>> for batch_size in (8, 16, 40):
        ...     clock.advance(batch_size)
        ...     _ = optimizer.step()
        ...     clock.step()
        ...     print(clock.examples, clock.ticks, round(clock.get_last_lr()[0], 3))
        8.0 0 1.0
        24.0 1 0.854
        64.0 4 0.0
    """
    return ExamplesClock(scheduler, examples_per_step)


def share_of_peak(
    scheduler: LRScheduler, *, planned: int, taken: int, shared: Iterable[object] = ()
) -> float | None:
    """The learning rate at which a schedule is left, as a share of its peak.

    A copy of the schedule, before its first step, is replayed for the steps that it was ``planned`` for, of
    which so many will be ``taken``, on an optimizer without a model; it may refer to what is ``shared``. None
    if the schedule loses nothing (its peak is behind, and it would fall no further), or cannot be replayed.

    Example:
        >>> optimizer = SGD([torch.zeros(1)], lr=0.1)
        >>> cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
        >>> share_of_peak(cosine, planned=100, taken=50)
        0.5
        >>> share_of_peak(cosine, planned=150, taken=100) is None
        True
    """
    if not 0 < taken < planned <= MOST_STEPS:
        return None
    try:
        rates = upcoming(replayed(scheduler, shared), planned + 1)
    except Exception:
        return None  # somebody's own scheduler, which needs more than an optimizer
    peak, last = max(rates), rates[taken]
    falls_further = min(rates[taken:]) < 0.99 * last
    peaks_later = max(rates[: taken + 1]) < 0.99 * peak
    if not 0.0 < peak < math.inf or not (falls_further or peaks_later):
        return None
    return round(last / peak, 6)


def upcoming(rates: Iterator[float], count: int) -> list[float]:
    """The next learning rates of a schedule that is being replayed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of steps that no optimizer step came before
        return list(islice(rates, count))


def replayed(scheduler: LRScheduler, shared: Iterable[object] = ()) -> Iterator[float]:
    """The largest learning rate of all groups, before the first step and after each, without end."""
    optimizer = scheduler.optimizer
    stand_in = SGD([{"params": [torch.zeros(1)]} for _ in optimizer.param_groups], lr=0.0)
    for group, original in zip(stand_in.param_groups, optimizer.param_groups, strict=True):
        group |= {name: copy.deepcopy(value) for name, value in original.items() if name != "params"}
    # What the memo holds counts as copied: every scheduler within finds the stand-in where the optimizer was.
    memo = {id(one): one for one in shared} | {id(optimizer): stand_in}
    replay = copy.deepcopy(scheduler, memo)
    while True:
        yield max(float(group["lr"]) for group in stand_in.param_groups)
        if not isinstance(replay, ExamplesClock):
            replay.step()
        elif not replay._is_over():
            replay._tick()
