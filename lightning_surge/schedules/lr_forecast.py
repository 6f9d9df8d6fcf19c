"""What a learning-rate schedule will be, from a copy of it that is replayed."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import LRScheduler

from lightning_surge.schedules.by_examples import ExamplesClock

# Replaying takes about ten microseconds a step.
MOST_STEPS = 100_000


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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of steps that no optimizer step came before
            rates = list(islice(replayed(scheduler, shared), planned + 1))
    except Exception:
        return None  # somebody's own scheduler, which needs more than an optimizer
    peak, last = max(rates), rates[taken]
    falls_further = min(rates[taken:]) < 0.99 * last
    peaks_later = max(rates[: taken + 1]) < 0.99 * peak
    if not 0.0 < peak < math.inf or not (falls_further or peaks_later):
        return None
    return round(last / peak, 6)


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
