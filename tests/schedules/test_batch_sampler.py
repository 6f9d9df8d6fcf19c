import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import RandomSampler as StatefulRandomSampler

from lightning_surge.schedules import batch_sampler as sampling
from lightning_surge.schedules.batch_sampler import Itinerary, ScheduledBatchSampler, follow, unfollow
from lightning_surge.schedules.sizes import ConstantSize, LinearRamp, Milestones, Progress, Schedule
from lightning_surge.schedules.windows import plan_windows
from tests.drawn import through_a_checkpoint

Batches = list[list[int]]
RAMP = LinearRamp(1, 5, duration=4)


@pytest.fixture(autouse=True)
def _nothing_is_followed() -> Iterator[None]:
    torch.set_num_threads(1)
    assert sampling._followed is None
    yield
    sampling._followed = None


@contextmanager
def following(schedule: Schedule | Itinerary) -> Iterator[Itinerary]:
    itinerary = schedule if isinstance(schedule, Itinerary) else Itinerary(schedule)
    follow(itinerary)
    try:
        yield itinerary
    finally:
        unfollow(itinerary)


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def distributed(rank: int = 1, size: int = 27, replicas: int = 2) -> DistributedSampler[int]:
    return DistributedSampler(range(size), num_replicas=replicas, rank=rank, shuffle=True, seed=5)  # type: ignore[arg-type]


def move_on(itinerary: Itinerary, sampler: ScheduledBatchSampler) -> None:
    """What `BatchSizeScheduler` does at the end of an epoch."""
    windows = sampler.windows()
    examples = sum(map(sum, windows)) * itinerary.replicas
    step, before, epoch = itinerary.begin
    itinerary.begin = Progress(step + len(windows), before + examples, epoch + 1)


class TestOrdinaryBatchSampler:
    @given(st.integers(0, 60), st.integers(1, 70), st.booleans())
    def test_is_torchs(self, size: int, batch_size: int, drop_last: bool) -> None:
        mine, torchs = (
            kind(range(size), batch_size, drop_last) for kind in (ScheduledBatchSampler, BatchSampler)
        )
        assert list(mine) == list(torchs)
        assert len(mine) == len(torchs) == len(list(mine))
        assert mine.windows() is None

    @pytest.mark.parametrize("own", [True, False])
    def test_nothing_is_drawn_before_the_first_index(self, own: bool) -> None:
        source = generator() if own else torch.default_generator
        sampler = ScheduledBatchSampler(RandomSampler(range(9), generator=source if own else None), 4)
        before = source.get_state()
        batches = iter(sampler)
        assert (len(sampler), iter(batches) is batches) == (3, True)
        assert torch.equal(source.get_state(), before)
        next(batches)
        assert not torch.equal(source.get_state(), before)

    def test_a_sampler_shorter_than_it_says_gives_no_empty_batches(self) -> None:
        class Short(Sampler[int]):
            def __len__(self) -> int:
                return 9

            def __iter__(self) -> Iterator[int]:
                return iter(range(5))

        assert list(ScheduledBatchSampler(Short(), 2)) == list(BatchSampler(Short(), 2, False))
        with following(ConstantSize(4)):
            assert list(ScheduledBatchSampler(Short(), 2)) == [[0, 1], [2, 3], [4]]

    def test_refuses_a_sampler_without_a_length(self) -> None:
        message = r"a sampler with a length, got list_iterator: .* let BatchSizeScheduler accumulate"
        with pytest.raises(ValueError, match=message):
            ScheduledBatchSampler(iter([1, 2]), 4)


@st.composite
def itineraries(draw: st.DrawFn) -> Itinerary:
    unit: Any = draw(st.sampled_from(["steps", "examples", "epochs"]))
    points = st.integers(1, 200).map(lambda point: point / 40 if unit == "epochs" else point)
    sizes = {0: draw(st.integers(1, 40))} | draw(st.dictionaries(points, st.integers(1, 40), max_size=5))
    begin = Progress(draw(st.integers(0, 50)), draw(st.integers(0, 200)), draw(st.integers(0, 3)))
    largest = draw(st.none() | st.integers(1, 20))
    return Itinerary(Milestones(sizes, unit=unit), draw(st.integers(1, 3)), largest, begin)


class TestFollowing:
    @given(itineraries(), st.integers(0, 120), st.integers(1, 20), st.booleans())
    def test_cuts_the_samplers_order_by_the_plan(
        self, itinerary: Itinerary, size: int, batch_size: int, drop_last: bool
    ) -> None:
        order = torch.randperm(size, generator=generator()).tolist()
        sampler = ScheduledBatchSampler(order, batch_size, drop_last)
        with following(itinerary):
            batches, windows = list(sampler), sampler.windows()
            length, sizes = len(sampler), sampler.sizes()
        plan = list(
            plan_windows(
                itinerary.schedule,
                itinerary.begin,
                examples=size,
                largest=min(batch_size, itinerary.largest or batch_size),
                replicas=itinerary.replicas,
                drop_last=drop_last,
            )
        )
        assert windows == plan
        assert sizes == [len(batch) for batch in batches] == list(chain.from_iterable(plan))
        assert length == len(batches)
        drawn = list(chain.from_iterable(batches))
        assert drawn == order[: len(drawn)]
        assert drop_last or drawn == order

    def test_an_epoch_begun_keeps_its_sizes(self) -> None:
        sampler = ScheduledBatchSampler(range(12), 4)
        with following(RAMP) as itinerary:
            batches = iter(sampler)
            first = next(batches)
            itinerary.begin = Progress(step=100, epoch=1)
            assert [first, *batches] == [[0], [1, 2], [3, 4, 5], [6, 7, 8, 9], [10, 11]]
            assert (len(sampler), sampler.sizes()) == (5, [2, 3, 2, 3, 2])

    def test_every_sampler_of_the_process_follows(self) -> None:
        # Lightning copies them: they cannot be told apart.
        samplers = [ScheduledBatchSampler(range(6), 4), copy.deepcopy(ScheduledBatchSampler(range(6), 2))]
        with following(ConstantSize(3)):
            assert [list(map(len, sampler)) for sampler in samplers] == [[3, 3], [1, 2, 1, 2]]
        assert [list(map(len, sampler)) for sampler in samplers] == [[4, 2], [2, 2, 2]]

    def test_the_last_itinerary_counts(self) -> None:
        sampler = ScheduledBatchSampler(range(6), 6)
        old, new = Itinerary(ConstantSize(3)), Itinerary(ConstantSize(2))
        follow(old)
        follow(new)
        unfollow(old)
        assert sampler.sizes() == [2, 2, 2]
        unfollow(new)
        assert sampler.sizes() == [6]
        # An equal itinerary is not the same one.
        follow(new)
        unfollow(copy.copy(new))
        assert sampler.sizes() == [2, 2, 2]

    def test_a_plan_is_made_once_until_something_changes(self) -> None:
        calls = []

        class Counting(Schedule):
            @property
            def named_sizes(self) -> dict[str, int]:
                return {}

            def __call__(self, progress: Progress, /) -> int:
                calls.append(progress)
                return 3

        sampler = ScheduledBatchSampler(range(6), 4)
        with following(Counting()) as itinerary:
            for _ in range(3):
                assert (len(sampler), len(list(sampler))) == (2, 2)
            assert len(calls) == 2
            itinerary.begin = Progress(step=2, examples=6, epoch=1)
            assert len(sampler) == 2
            assert calls[2] == (2, 6, 1)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_in_a_data_loader(self, workers: int) -> None:
        sampler = ScheduledBatchSampler(RandomSampler(range(12), generator=generator()), 2)
        loader = DataLoader(range(12), batch_sampler=sampler, num_workers=workers)  # type: ignore[arg-type]
        with following(RAMP) as itinerary:
            for sizes in ([1, 2, 1, 2, 2, 2, 2], [1, 1, 1, 2, 1, 1, 1, 2, 2]):
                assert len(loader) == len(sizes)
                batches = [batch.tolist() for batch in loader]
                assert list(map(len, batches)) == sizes
                assert sorted(chain.from_iterable(batches)) == list(range(12))
                move_on(itinerary, sampler)


MakeSampler = Callable[[], Any]
SAMPLERS: dict[str, MakeSampler] = {
    "sequential": lambda: SequentialSampler(range(14)),
    "random": lambda: RandomSampler(range(14)),
    "random, own generator": lambda: RandomSampler(range(14), generator=generator()),
    "with replacement": lambda: RandomSampler(range(5), True, num_samples=70, generator=generator()),
    "subset": lambda: SubsetRandomSampler(range(3, 17)),
    "weighted": lambda: WeightedRandomSampler([1.0, 2.0, 3.0], 14),
    "distributed": distributed,
    "of torchdata": lambda: StatefulRandomSampler(range(14), generator=generator()),
}
# Those whose following epochs do not depend on the global random stream.
WITH_OWN_STREAM = ["sequential", "random, own generator", "with replacement", "distributed", "of torchdata"]


def stateful(make: MakeSampler, workers: int = 0, batch_size: int = 3) -> StatefulDataLoader[Any]:
    sampler = ScheduledBatchSampler(make(), batch_size)
    return StatefulDataLoader(range(30), batch_sampler=sampler, num_workers=workers)  # type: ignore[arg-type]


def batches_of(loader: Any) -> Batches:
    return [batch.tolist() for batch in loader]


def epoch_with_states(loader: StatefulDataLoader[Any]) -> tuple[Batches, list[Any]]:
    """One epoch, and the loader's state before it and after every batch."""
    states, batches = [through_a_checkpoint(loader.state_dict())], []
    for batch in loader:
        batches.append(batch.tolist())
        states.append(through_a_checkpoint(loader.state_dict()))
    return batches, states


@pytest.mark.slow
class TestResuming:
    @pytest.mark.parametrize(
        ("name", "workers", "epochs"),
        [*((name, 0, 2) for name in SAMPLERS)]
        + [(name, 2, 1) for name in ("random", "random, own generator", "distributed")],
    )
    def test_at_every_position(self, name: str, workers: int, epochs: int) -> None:
        with following(Milestones({0: 1, 1: 3, 2: 5, 3: 2})):
            torch.manual_seed(1)
            loader = stateful(SAMPLERS[name], workers)
            batches, states = epoch_with_states(loader)
            assert len(states) == len(batches) + 1 == len(loader) + 1
            later = [batches_of(loader) for _ in range(epochs)]
            for position, state in enumerate(states):
                torch.manual_seed(100 + position)
                resumed = stateful(SAMPLERS[name], workers)
                resumed.load_state_dict(state)
                assert batches_of(resumed) == batches[position:]
                if name in WITH_OWN_STREAM:
                    assert [batches_of(resumed) for _ in range(epochs)] == later

    def test_leaves_the_global_random_stream_alone(self) -> None:
        for name in ("random", "subset", "weighted"):
            taken = iter(ScheduledBatchSampler(SAMPLERS[name](), 3))
            list(islice(taken, 2))
            state, rest = taken.state_dict(), list(taken)
            resumed = iter(ScheduledBatchSampler(SAMPLERS[name](), 3))
            before = torch.get_rng_state()
            resumed.load_state_dict(state)
            assert torch.equal(torch.get_rng_state(), before)
            assert list(resumed) == rest

    def test_takes_up_the_epoch_of_the_order(self) -> None:
        sampler = distributed()
        sampler.set_epoch(4)
        taken = iter(ScheduledBatchSampler(sampler, 3))
        list(islice(taken, 2))
        state, rest = taken.state_dict(), list(taken)
        anew = distributed()
        resumed = iter(ScheduledBatchSampler(anew, 3))
        resumed.load_state_dict(state)
        assert (list(resumed), anew.epoch) == (rest, 4)

    @pytest.mark.parametrize("finished", [True, False])
    def test_an_epoch_that_is_over_stays_over_when_the_next_is_longer(self, finished: bool) -> None:
        loader = stateful(lambda: range(12), batch_size=2)
        with following(RAMP) as itinerary:
            batches = iter(loader)
            assert len(list(batches if finished else islice(batches, len(loader)))) == 7
            state = through_a_checkpoint(loader.state_dict())
            move_on(itinerary, loader.batch_sampler)  # type: ignore[arg-type]
            resumed = stateful(lambda: range(12), batch_size=2)
            resumed.load_state_dict(state)
            # A loader that has seen the end goes on with the next epoch at once.
            if not finished:
                assert batches_of(resumed) == []
            assert list(map(len, batches_of(resumed))) == [1, 1, 1, 2, 1, 1, 1, 2, 2]

    @pytest.mark.parametrize(
        ("schedule", "batch_size", "found"),
        [
            (RAMP, 2, "7 with 3"),
            (ConstantSize(4), 4, "3 with 8"),
            (Milestones({0: 1, 1: 3, 4: 2}), 4, "5 with 4"),
        ],
    )
    def test_refuses_an_epoch_cut_otherwise(self, schedule: Schedule, batch_size: int, found: str) -> None:
        taken = iter(ScheduledBatchSampler(RandomSampler(range(12)), 4))
        with following(RAMP):
            list(islice(taken, 2))
            state = taken.state_dict()
        resumed = iter(ScheduledBatchSampler(RandomSampler(range(12)), batch_size))
        before = torch.get_rng_state()
        message = (
            rf"5 micro-batches with 3 examples in the first 2, .*, got {found}: resume with the same sched"
        )
        with following(schedule), pytest.raises(ValueError, match=message):
            resumed.load_state_dict(state)
        assert torch.equal(torch.get_rng_state(), before)

    def test_another_schedule_may_take_over_where_the_epoch_is_the_same(self) -> None:
        taken = iter(ScheduledBatchSampler(range(12), 4))
        with following(RAMP):
            list(islice(taken, 2))
            state = taken.state_dict()
        with following(Milestones({0: 2, 1: 1, 2: 3})):
            resumed = iter(ScheduledBatchSampler(range(12), 4))
            resumed.load_state_dict(state)
            assert list(resumed) == [[3, 4, 5], [6, 7, 8], [9, 10, 11]]
