"""A batch sampler whose micro-batches have the sizes that a schedule asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler

from lightning_surge.checking.arguments import switch, whole
from lightning_surge.checking.state import REMEDY, restore, save
from lightning_surge.schedules.sizes import Progress, Schedule
from lightning_surge.schedules.windows import Window, plan_windows


@dataclass
class Itinerary:
    """What samplers follow: a schedule, and how far the training had come when the epoch began.

    `largest` bounds the examples in a micro-batch besides the sampler's own bound. Whoever trains moves
    `begin` on before the next epoch.
    """

    schedule: Schedule
    replicas: int = 1
    largest: int | None = None
    begin: Progress = field(default_factory=Progress)


# Lightning copies samplers, rebuilds them for every rank and asks for their length before any hook of the
# epoch runs: the only thing that every copy can reach is the module.
_followed: Itinerary | None = None


def follow(itinerary: Itinerary) -> None:
    """Let every `ScheduledBatchSampler` of this process follow an itinerary."""
    global _followed
    _followed = itinerary


def unfollow(itinerary: Itinerary) -> None:
    """Make them ordinary batch samplers again, unless they follow another itinerary by now."""
    global _followed
    if _followed is itinerary:
        _followed = None


class ScheduledBatchSampler(BatchSampler):
    """Cuts an epoch into micro-batches whose sizes follow the batch-size schedule of the training.

    While a `BatchSizeScheduler` with a `Schedule` trains, each optimizer step gets exactly the number of
    examples that the schedule asks for, in as few micro-batches of at most `batch_size` as possible
    (`windows.plan_windows`). Its length is exact in every epoch, since the schedule is a pure function of the
    progress. Outside such a training it is an ordinary batch sampler.

    Args:
        sampler: Gives the indices of an epoch; under data-parallel training Lightning puts a
            `DistributedSampler` in its place.
        batch_size: Examples that one micro-batch may have: what fits into memory.
        drop_last: Whether to leave out the examples at the end of an epoch that do not fill a step.

    Raises:
        ValueError: If the sampler has no length.

    Example:
        >>> from lightning_surge.schedules.sizes import LinearRamp
        >>> sampler = ScheduledBatchSampler(range(12), batch_size=4)
        >>> [len(batch) for batch in sampler]
        [4, 4, 4]
        >>> itinerary = Itinerary(LinearRamp(1, 5, duration=4))
        >>> follow(itinerary)
        >>> list(sampler)
        [[0], [1, 2], [3, 4, 5], [6, 7, 8, 9], [10, 11]]
        >>> unfollow(itinerary)
    """

    def __init__(self, sampler: Any, batch_size: int, drop_last: bool = False) -> None:
        if not isinstance(sampler, Sized):
            raise ValueError(
                f"Expected a sampler with a length, got {type(sampler).__name__}: an epoch is cut into steps "
                "before it begins. Use a DataLoader with batch_size= and let BatchSizeScheduler accumulate."
            )
        batch_size = whole("batch_size", batch_size, "count the examples that fit into memory")
        super().__init__(sampler, batch_size, switch("drop_last", drop_last))  # type: ignore[arg-type]
        self._planned: tuple[Any, list[Window]] = (None, [])

    @property
    def largest_micro_batch(self) -> int:
        """Examples that a micro-batch may have now: `batch_size`, or what the itinerary bounds it to."""
        bound = None if _followed is None else _followed.largest
        return min(self.batch_size, bound or self.batch_size)

    def windows(self) -> list[Window] | None:
        """The windows of the epoch that begins where the itinerary stands; None if none is followed."""
        if _followed is None:
            return None
        options: dict[str, Any] = {
            "examples": len(self.sampler),  # type: ignore[arg-type]
            "largest": self.largest_micro_batch,
            "replicas": _followed.replicas,
            "drop_last": self.drop_last,
        }
        question = (_followed.schedule, _followed.begin, options)
        if self._planned[0] != question:
            self._planned = question, list(plan_windows(*question[:2], **options))
        return self._planned[1]

    def sizes(self) -> list[int]:
        """Examples in each micro-batch of the epoch."""
        windows = self.windows()
        if windows is not None:
            return list(chain.from_iterable(windows))
        full, rest = divmod(len(self.sampler), self.batch_size)  # type: ignore[arg-type]
        return [self.batch_size] * full + ([rest] if rest and not self.drop_last else [])

    def __len__(self) -> int:
        """Micro-batches of the epoch."""
        return len(self.sizes())

    def __iter__(self) -> _MicroBatches:
        """Indices of one micro-batch after the other."""
        return _MicroBatches(self)


@dataclass(frozen=True)
class PassState:
    """How far a pass over an epoch has come, and the generator and the epoch that its order came from."""

    drawn: int
    left: int
    examples: int
    random_state: Tensor
    epoch: int | None

    def __post_init__(self) -> None:
        for name in ("drawn", "left", "examples"):
            whole(name, getattr(self, name), REMEDY, least=0)


class _MicroBatches(Iterator[list[int]]):
    """One pass over an epoch, which can be saved and taken up in its middle.

    Loaders make an iterator up to three times for an epoch and drop the others, so nothing is drawn before
    the first index is needed.
    """

    def __init__(self, owner: ScheduledBatchSampler) -> None:
        self._owner = owner
        self._indices: Iterator[int] | None = None
        self._sizes: list[int] = []
        self._drawn = 0
        self._random_state = torch.empty(0)
        self._epoch: int | None = None

    def __next__(self) -> list[int]:
        indices = self._begin() if self._indices is None else self._indices
        if self._drawn == len(self._sizes):
            raise StopIteration
        batch = list(islice(indices, self._sizes[self._drawn]))
        if not batch:
            raise StopIteration  # the sampler gave fewer indices than its length
        self._drawn += 1
        return batch

    def _generator(self) -> torch.Generator:
        own = getattr(self._owner.sampler, "generator", None)
        return own if isinstance(own, torch.Generator) else torch.default_generator

    def _begin(self) -> Iterator[int]:
        """Draw the epoch's order, and note how it was drawn."""
        self._sizes = self._owner.sizes()
        self._random_state = self._generator().get_state()
        if hasattr(self._owner.sampler, "set_epoch"):
            self._epoch = getattr(self._owner.sampler, "epoch", None)
        indices = iter(self._owner.sampler)
        # Some samplers draw at the first index: now, so that it is what follows the state noted.
        self._indices = chain(list(islice(indices, 1)), indices)
        return self._indices

    def state_dict(self) -> dict[str, Any]:
        """Which order, and how many micro-batches of it have been drawn."""
        if self._indices is None:
            self._begin()  # a loader may keep the state before the first batch for one in mid-epoch
        drawn, sizes = self._drawn, self._sizes
        examples = sum(sizes[:drawn])
        state: dict[str, Any] = save(
            PassState(drawn, len(sizes) - drawn, examples, self._random_state, self._epoch)
        )
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up an epoch where `state_dict` was taken, if it is cut into the same micro-batches."""
        saved = restore(PassState, state)
        if saved.epoch is not None:
            self._owner.sampler.set_epoch(saved.epoch)  # type: ignore[union-attr]
        generator = self._generator()
        now = generator.get_state()
        generator.set_state(saved.random_state)
        try:
            indices = self._begin()
            self._check(saved)
            for _ in islice(indices, saved.examples):
                pass
        finally:
            if generator is torch.default_generator:
                generator.set_state(now)
        # Over is over: the itinerary may have moved on, to an epoch of more micro-batches.
        self._drawn = saved.drawn if saved.left else len(self._sizes)

    def _check(self, saved: PassState) -> None:
        drawn, left, examples = saved.drawn, saved.left, saved.examples
        found = sum(self._sizes[:drawn])
        if left and (left, examples) != (len(self._sizes) - drawn, found):
            raise ValueError(
                f"Expected an epoch of {drawn + left} micro-batches with {examples} examples in the first"
                f" {drawn}, as when the checkpoint was saved, got {len(self._sizes)} with {found}: resume"
                " with the same schedule, batch_size and replicas, or from a checkpoint of an epoch's end."
            )
