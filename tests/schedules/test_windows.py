import pickle
from dataclasses import FrozenInstanceError, dataclass
from itertools import islice
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_surge.schedules.seesaw import Seesaw
from lightning_surge.schedules.sizes import (
    ConstantSize,
    GeometricRamp,
    LinearRamp,
    Milestones,
    Phase,
    Phases,
    Progress,
    Schedule,
)
from lightning_surge.schedules.windows import (
    AccumulatedSchedule,
    Replay,
    SampledSchedule,
    Window,
    accumulation_for,
    plan_windows,
    total_examples,
    total_steps,
)
from tests.schedules.test_sizes import ramps

UNITS = ["steps", "examples", "epochs"]
in_steps = ramps(unit="steps")


@st.composite
def schedules(draw: st.DrawFn, units: list[Any] = UNITS) -> Schedule:
    """Sizes that grow, fall and jump, on every clock."""
    unit = draw(st.sampled_from(units))
    sizes = st.integers(1, 100)
    if draw(st.booleans()):
        start = draw(sizes)
        duration = draw(st.integers(1, 40)) * {"steps": 1.0, "examples": 16.0, "epochs": 0.1}[unit]
        return LinearRamp(start, start + draw(sizes), duration, unit=unit)
    points = (
        st.integers(1, 400) if unit != "epochs" else st.integers(1, 60).map(lambda twentieth: twentieth / 20)
    )
    milestones = Milestones({0: draw(sizes)} | draw(st.dictionaries(points, sizes, max_size=6)), unit=unit)
    if draw(st.booleans()):
        return milestones
    middle = draw(points)
    return Phases([Phase(0, middle, milestones), Phase(middle, None, milestones)], unit)


@st.composite
def accumulated(draw: st.DrawFn) -> AccumulatedSchedule:
    return AccumulatedSchedule(
        draw(schedules() | in_steps),
        micro_batch_size=draw(st.integers(1, 20)),
        replicas=draw(st.integers(1, 3)),
        examples_per_epoch=draw(st.none() | st.integers(1, 2000)),
    )


@st.composite
def sampled(draw: st.DrawFn) -> SampledSchedule:
    return SampledSchedule(
        draw(schedules()),
        largest_micro_batch=draw(st.integers(1, 20)),
        examples_per_epoch=draw(st.integers(1, 300)),
        replicas=draw(st.integers(1, 3)),
    )


@dataclass(frozen=True)
class Epoch:
    """The arguments of `plan_windows`."""

    schedule: Schedule
    begin: Progress
    examples: int
    largest: int
    replicas: int
    drop_last: bool = False

    def windows(self) -> list[Window]:
        return list(plan_windows(**vars(self)))


@st.composite
def epochs(draw: st.DrawFn, **fixed: Any) -> Epoch:
    step = draw(st.integers(0, 100))
    arguments: dict[str, Any] = {
        "schedule": draw(schedules()),
        "begin": Progress(step, draw(st.integers(0, 400)), draw(st.integers(0, 3))),
        "examples": draw(st.integers(1, 300)),
        "largest": draw(st.integers(1, 24)),
        "replicas": draw(st.integers(1, 3)),
    }
    return Epoch(**arguments | fixed)


class TestAccumulation:
    @given(st.integers(1, 10**6), st.integers(1, 10**4), st.none() | st.integers(1, 10**4))
    def test_is_the_largest_power_of_two_that_fits(
        self, requested: int, micro: int, limit: int | None
    ) -> None:
        result = accumulation_for(requested, micro, limit=limit)
        assert result in {2**k for k in range(21)}
        assert result == 1 or result * micro <= requested
        assert limit is None or result <= limit
        assert 2 * result * micro > requested or (limit is not None and 2 * result > limit)


def windows_one_by_one(epoch: Epoch) -> list[list[int]]:
    """Slow reference: deals examples out by hand, with every length of a window tried in turn."""
    windows: list[list[int]] = []
    left, batch_idx = epoch.examples, 0
    while left:
        done = epoch.examples - left
        share = int(epoch.begin.epoch) + done / epoch.examples
        now = Progress(epoch.begin.step + len(windows), epoch.begin.examples + done * epoch.replicas, share)
        wanted = max(1, epoch.schedule(now) // epoch.replicas)
        if wanted > left and epoch.drop_last:
            break
        wanted = min(wanted, left)
        aligned = [2**k for k in range(10) if batch_idx % 2**k == 0 and 2**k <= wanted]
        length = next((length for length in aligned if length * epoch.largest >= wanted), aligned[-1])
        window = [0] * length
        for example in range(min(wanted, length * epoch.largest)):
            window[example % length] += 1
        windows.append(sorted(window))
        left, batch_idx = left - sum(window), batch_idx + length
    return windows


class TestPlanWindows:
    @given(epochs(), st.booleans())
    def test_equals_dealing_out_by_hand(self, epoch: Epoch, drop_last: bool) -> None:
        epoch = Epoch(**vars(epoch) | {"drop_last": drop_last})
        assert list(map(sorted, epoch.windows())) == windows_one_by_one(epoch)

    def test_with_drop_last_a_whole_request_has_to_fit(self) -> None:
        """Of three wanted, two are had with micro-batches of one; the last two examples are left out."""
        plan = plan_windows(ConstantSize(3), Progress(), examples=8, largest=1, drop_last=True)
        assert list(plan) == [(1, 1)] * 3

    def test_an_epoch_without_examples_has_no_windows(self) -> None:
        assert Epoch(ConstantSize(7), Progress(), 0, 2, 1).windows() == []


def loop_of_lightning(actual: AccumulatedSchedule, steps: int) -> list[int]:
    """Slow reference: Lightning's two rules, one micro-batch at a time, for the first `steps` steps."""
    share = None if actual.examples_per_epoch is None else -(-actual.examples_per_epoch // actual.replicas)
    batches = None if share is None else -(-share // actual.micro_batch_size)
    sizes: list[int] = []
    gradient = 0  # examples behind the accumulated gradient; -1 after a step, until it is zeroed
    batch_idx, accumulation, epoch = 0, 1, 0
    while len(sizes) < steps:
        unit = actual.micro_batch_size * actual.replicas
        if batch_idx % accumulation == 0:
            now = Progress(len(sizes), sum(sizes), epoch + (batch_idx / batches if batches else 0.0))
            wanted = accumulation_for(actual.schedule(now), unit, limit=batches)
            while batch_idx % wanted:
                wanted //= 2
            accumulation = wanted
        if batch_idx % accumulation == 0:
            gradient = 0
        assert gradient >= 0, "stepped, and accumulated again without zeroing"
        in_batch = actual.micro_batch_size
        if share is not None:
            in_batch = min(in_batch, share - batch_idx * actual.micro_batch_size)
        gradient += in_batch * actual.replicas
        batch_idx += 1
        if batch_idx % accumulation == 0 or batch_idx == batches:
            sizes.append(gradient)
            gradient = -1
        if batch_idx == batches:
            batch_idx, epoch = 0, epoch + 1
    return sizes


class TestAccumulatedSchedule:
    def test_without_an_end_a_doubling_waits_for_its_alignment(self) -> None:
        # Requested at steps 500, 1000, 1500, 2000, which begin at micro-batches 500 (even), 1500 (a
        # multiple of 4), 3500 (not of 8: one more window of 4) and 7496 (not of 16: one more of 8).
        sizes = list(islice(AccumulatedSchedule(GeometricRamp(8, 128, 2000), 8).sizes(), 2100))
        assert [step for step in range(1, 2100) if sizes[step] != sizes[step - 1]] == [500, 1000, 1501, 2001]
        assert [sizes[step] for step in (0, 500, 1000, 1501, 2001)] == [8, 16, 32, 64, 128]

    @given(accumulated(), st.integers(1, 60))
    def test_equals_lightnings_rules_applied_one_by_one(
        self, actual: AccumulatedSchedule, steps: int
    ) -> None:
        assert list(islice(actual.sizes(), steps)) == loop_of_lightning(actual, steps)


def plans(actual: SampledSchedule, num_epochs: int) -> list[list[int]]:
    """Slow reference: the plans of so many epochs, each beginning where the one before ended."""
    share = -(-actual.examples_per_epoch // actual.replicas)
    plans: list[list[int]] = []
    for epoch in range(num_epochs):
        done = [size for plan in plans for size in plan]
        begin = Progress(len(done), sum(done), float(epoch))
        windows = plan_windows(
            actual.schedule,
            begin,
            examples=share,
            largest=actual.largest_micro_batch,
            replicas=actual.replicas,
            drop_last=actual.drop_last,
        )
        plans.append([sum(window) * actual.replicas for window in windows])
    return plans


class TestSampledSchedule:
    @given(sampled(), st.integers(1, 4), st.booleans())
    def test_equals_the_plans_of_its_epochs(
        self, actual: SampledSchedule, num_epochs: int, drop_last: bool
    ) -> None:
        actual = SampledSchedule(**vars(actual) | {"drop_last": drop_last})
        expected = []
        for plan in plans(actual, num_epochs):
            if not plan:
                message = "which drop_last leaves without one: use smaller batches or drop_last=False"
                with pytest.raises(ValueError, match=message):
                    list(islice(actual.sizes(), len(expected) + 1))
                break
            expected += plan
        assert list(islice(actual.sizes(), len(expected))) == expected


REPLAYS: list[Replay] = [
    AccumulatedSchedule(LinearRamp(2, 8, 3, unit="epochs"), 2, examples_per_epoch=16),
    SampledSchedule(LinearRamp(2, 8, 3, unit="examples"), 2, examples_per_epoch=16),
]


class TestReplays:
    @pytest.mark.parametrize("replay", REPLAYS)
    def test_are_values(self, replay: Any) -> None:
        other = pickle.loads(pickle.dumps(replay))
        assert (other, hash(other)) == (replay, hash(replay))
        with pytest.raises(FrozenInstanceError):
            replay.replicas = 2


class StandsStill(Schedule):
    @property
    def named_sizes(self) -> dict[str, int]:
        return {}

    def __call__(self, progress: Progress, /) -> int:
        return 1 - progress.step


DETOUR, BACK = Milestones({0: 2, 4: 4, 6: 2}), Milestones({0: 4, 2: 2})


class TestTotals:
    def test_by_hand(self) -> None:
        ramp = GeometricRamp(2, 8, 2)  # 2 4 8 8 ...
        assert [total_examples(ramp, steps) for steps in range(5)] == [0, 2, 6, 14, 22]
        assert [total_steps(ramp, examples) for examples in (0, 1, 2, 3, 6, 7, 22)] == [0, 1, 1, 2, 2, 3, 4]

    @pytest.mark.parametrize(
        "schedule", [ConstantSize(4, unit="epochs"), Phases([Phase(0, None, ConstantSize(4))], "epochs")]
    )
    def test_refuse_epochs_of_unknown_length(self, schedule: Schedule) -> None:
        message = r"steps or examples, got unit='epochs'.*AccumulatedSchedule or a SampledSchedule"
        with pytest.raises(ValueError, match=message):
            total_steps(schedule, 100)
        with pytest.raises(ValueError, match=message):
            total_examples(schedule, 100)
        assert total_steps(SampledSchedule(schedule, 8, 16), 100) == 25

    @given(in_steps | schedules(["steps", "examples"]) | accumulated() | sampled(), st.integers(1, 100))
    def test_are_inverse_to_each_other(self, schedule: Schedule | Replay, steps: int) -> None:
        examples = total_examples(schedule, steps)
        assert total_steps(schedule, examples) == steps
        assert total_steps(schedule, examples + 1) == steps + 1

    @pytest.mark.parametrize(
        "schedule", [DETOUR, Phases([Phase(0, 4, ConstantSize(2)), Phase(4, None, BACK)])]
    )
    def test_a_short_detour_is_not_skipped(self, schedule: Schedule) -> None:
        expected = [2] * 4 + [4] * 2 + [2] * 10
        replays = [AccumulatedSchedule(schedule, 2), SampledSchedule(schedule, 4, 36)]
        assert [list(islice(replay.sizes(), 16)) for replay in replays] == [expected] * 2
        assert [total_examples(one, 16) for one in (schedule, *replays)] == [36] * 3

    @pytest.mark.parametrize(
        ("schedule", "steps"),
        [
            (ConstantSize(1), 10**18),
            (LinearRamp(1, 10**6, 10**9), None),
            (Milestones({0: 16, 10**9: 32, 10**12: 1}), 10**18 - 15 * 10**9 - 31 * (10**12 - 10**9)),
            (AccumulatedSchedule(ConstantSize(64), 2), -(-(10**18) // 64)),
            (AccumulatedSchedule(ConstantSize(4), 2, examples_per_epoch=3), None),
            (SampledSchedule(ConstantSize(3), 2, 10**17), 10 * -(-(10**17) // 3)),
            (SampledSchedule(ConstantSize(3), 1, 1), None),
            (StandsStill(), ...),
        ],
    )
    def test_of_any_length(self, schedule: Any, steps: Any) -> None:
        if isinstance(steps, int):
            assert total_steps(schedule, 10**18) == steps
        else:
            with pytest.raises(ValueError, match="schedule at step 1=0" if steps else "in a moment, got one"):
                total_steps(schedule, 10**18)

    @given(schedules(["steps", "examples"]), st.integers(0, 60))
    def test_of_requests_are_their_sum(self, schedule: Schedule, steps: int) -> None:
        examples = 0
        for step in range(steps):
            examples += schedule(Progress(step, examples))
        assert total_examples(schedule, steps) == examples

    @pytest.mark.parametrize("schedule", [Seesaw(4, 16), lambda step: 4, 4])
    def test_refuse_what_cannot_be_counted(self, schedule: Any) -> None:
        with pytest.raises(ValueError, match=r"got .*: only sizes known beforehand can be counted"):
            total_steps(schedule, examples=5)
