import copy
import math
import pickle
from dataclasses import replace
from fractions import Fraction
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_surge.schedules.sizes import (
    ConstantSize,
    CosineRamp,
    GeometricRamp,
    LinearRamp,
    Milestones,
    Phase,
    Phases,
    Progress,
    Schedule,
    Unit,
)

Ramp = LinearRamp | GeometricRamp | CosineRamp
KINDS: list[type[Ramp]] = [LinearRamp, GeometricRamp, CosineRamp]
UNITS: tuple[Unit, ...] = get_args(Unit)


def at(unit: Unit, time: float) -> Progress:
    """A time on one clock, with readings on the others that would show if they were looked at."""
    readings: dict[Unit, Progress] = {
        "steps": Progress(step=int(time), examples=1e9, epoch=1e9),
        "examples": Progress(step=10**9, examples=time, epoch=1e9),
        "epochs": Progress(step=10**9, examples=1e9, epoch=time),
    }
    return readings[unit]


def by_step(schedule: Schedule, *steps: int) -> list[int]:
    return [schedule(Progress(step=step)) for step in steps]


@st.composite
def limits(draw: st.DrawFn) -> dict[str, Any]:
    multiple_of = draw(st.integers(1, 32))
    bounds = [
        None if part is None else part * multiple_of
        for part in draw(st.lists(st.none() | st.integers(1, 60), min_size=2, max_size=2))
    ]
    if None not in bounds:
        bounds.sort(key=lambda bound: bound or 0)
    return {"multiple_of": multiple_of, "minimum": bounds[0], "maximum": bounds[1]}


@st.composite
def ramps(draw: st.DrawFn, **fixed: Any) -> Ramp:
    start = draw(st.integers(1, 300))
    end = draw(st.integers(start, 5000))
    options = {"unit": draw(st.sampled_from(UNITS))} | fixed
    return draw(st.sampled_from(KINDS))(start, end, draw(st.integers(1, 200)), **options)


@st.composite
def milestones(draw: st.DrawFn, **options: Any) -> Milestones:
    later = draw(st.dictionaries(st.integers(1, 200), st.integers(1, 5000), max_size=5))
    return Milestones({0: draw(st.integers(1, 5000))} | later, **options)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    options = draw(limits()) | {"unit": draw(st.sampled_from(UNITS))}
    constant = st.builds(ConstantSize, st.integers(1, 5000), **{k: st.just(v) for k, v in options.items()})
    return draw(ramps(**options) | milestones(**options) | constant)


def unlimited(schedule: Schedule) -> Schedule:
    return replace(schedule, multiple_of=1, minimum=None, maximum=None)  # type: ignore[type-var]


EXAMPLES: list[Schedule] = [
    ConstantSize(16),
    LinearRamp(16, 64, 4),
    GeometricRamp(16, 64, 4),
    CosineRamp(16, 64, 4),
    Milestones({0: 16, 4: 64}),
    Phases([Phase(0, 4, ConstantSize(16)), Phase(4, None, Milestones({0: 32, 8: 64}))]),
]


class TestConstantSize:
    @given(st.integers(1, 10**15), st.builds(Progress, st.integers(0), st.floats(0, 1e12), st.floats(0, 1e3)))
    def test_is_the_size_however_large(self, size: int, progress: Progress) -> None:
        assert ConstantSize(size)(progress) == ConstantSize(size).first_size == size
        assert ConstantSize(size).named_sizes == {"size": size}


class TestRamps:
    @given(ramps(), st.floats(0.0, 400.0), st.floats(0.0, 400.0))
    def test_grow_from_start_to_end(self, ramp: Ramp, one: float, other: float) -> None:
        early, late = (ramp(at(ramp.unit, time)) for time in sorted((one, other)))
        assert ramp.start <= early <= late <= ramp.end
        assert ramp(at(ramp.unit, 0.0)) == ramp.first_size == ramp.start
        assert ramp(at(ramp.unit, ramp.duration)) == ramp.end
        assert ramp(at(ramp.unit, 10 * ramp.duration)) == ramp.end

    @pytest.mark.parametrize("kind", KINDS)
    def test_before_the_beginning_they_stand_at_the_start(self, kind: type[Ramp]) -> None:
        assert kind(10, 1000, 64)(Progress(step=-1)) == 10

    @pytest.mark.parametrize("kind", KINDS)
    def test_ends_are_exact_where_the_slack_for_rounding_exceeds_an_example(self, kind: type[Ramp]) -> None:
        ramp = kind(3 * 10**9 + 1, 4 * 10**9 + 1, 4)
        assert by_step(ramp, 0, 4, 5) == [3 * 10**9 + 1, 4 * 10**9 + 1, 4 * 10**9 + 1]
        assert by_step(ramp, 0, 1, 2, 3, 4) == sorted(by_step(ramp, 0, 1, 2, 3, 4))

    @pytest.mark.parametrize("doublings", [1, 3, 5, 7, 10])
    @pytest.mark.parametrize("interval", [1, 3, 7, 100])
    def test_every_doubling_is_exact_despite_rounding(self, doublings: int, interval: int) -> None:
        ramp = GeometricRamp(start=3, end=3 * 2**doublings, duration=doublings * interval)
        steps = [interval * index for index in range(doublings + 1)]
        assert by_step(ramp, *steps) == [3 * 2**index for index in range(doublings + 1)]

    @given(st.integers(1, 300), st.integers(0, 5000), st.integers(1, 200), st.data())
    def test_linear_is_the_exact_line_rounded_down(
        self, start: int, growth: int, duration: int, data: st.DataObject
    ) -> None:
        step = data.draw(st.integers(0, duration))
        exact = start + growth * Fraction(step, duration)
        assert by_step(LinearRamp(start, start + growth, duration), step) == [math.floor(exact)]

    @given(st.integers(1, 300), st.integers(0, 5000), st.integers(1, 200), st.data())
    def test_geometric_is_the_exact_curve_rounded_down(
        self, start: int, growth: int, duration: int, data: st.DataObject
    ) -> None:
        step = data.draw(st.integers(0, duration))
        (size,) = by_step(GeometricRamp(start, start + growth, duration), step)
        # B <= curve < B + 1, raised to the power duration: integers, so nothing is rounded.
        curve = start ** (duration - step) * (start + growth) ** step
        assert size**duration <= curve < (size + 1) ** duration

    @pytest.mark.parametrize("kind", KINDS)
    def test_refuse_to_shrink(self, kind: type[Ramp]) -> None:
        with pytest.raises(ValueError, match=r"Expected start <= end, got start=64, end=16: .* swap the two"):
            kind(64, 16, 4)


class TestLimits:
    @given(schedules(), st.floats(0.0, 400.0))
    def test_hold_for_every_input(self, schedule: Any, time: float) -> None:
        progress = at(schedule.unit, time)
        size, raw = schedule(progress), unlimited(schedule)(progress)
        assert type(size) is int
        assert size % schedule.multiple_of == 0
        low, high = schedule.minimum or schedule.multiple_of, schedule.maximum or math.inf
        assert low <= size <= high
        # Down, and no further than that.
        assert size == min(max(raw - raw % schedule.multiple_of, low), high)

    def test_named_sizes_are_those_that_steps_can_get(self) -> None:
        assert ConstantSize(21, multiple_of=8).named_sizes == {"size": 16}
        assert LinearRamp(1, 10, 9, multiple_of=3, minimum=6).named_sizes == {"start": 6, "end": 9}
        assert Milestones({0: 21, 5: 90}, multiple_of=8, maximum=64).named_sizes == {
            "sizes[0]": 16,
            "sizes[5]": 64,
        }

    @pytest.mark.parametrize(("value", "remedy"), [(3, 8), (20, 16)])
    @pytest.mark.parametrize("name", ["minimum", "maximum"])
    def test_refuse_bounds_that_are_no_multiples(self, name: str, value: int, remedy: int) -> None:
        message = rf"{name} to be a multiple of multiple_of=8, got {name}={value}: use {name}={remedy}"
        with pytest.raises(ValueError, match=message):
            ConstantSize(16, multiple_of=8, **{name: value})
        ConstantSize(16, multiple_of=8, **{name: remedy})

    def test_refuse_bounds_the_wrong_way_round(self) -> None:
        with pytest.raises(ValueError, match=r"got minimum=32, maximum=16: swap them"):
            ConstantSize(16, minimum=32, maximum=16)


class TestMilestones:
    @given(milestones(), st.integers(0, 250))
    def test_the_last_point_reached_counts(self, schedule: Milestones, step: int) -> None:
        # Walk there step by step, and take over whatever is written at each.
        size = 0
        for reached in range(step + 1):
            size = schedule.sizes.get(reached, size)
        assert by_step(schedule, step) == [size]

    def test_points_between_two_readings_wait_for_the_next(self) -> None:
        assert by_step(Milestones({0: 16, 1.5: 64}), 1, 2) == [16, 64]
        schedule = Milestones({0: 16, 1.5: 64}, unit="epochs")
        assert [schedule(Progress(epoch=epoch)) for epoch in (1.49, 1.5)] == [16, 64]

    def test_names_of_points_close_together_stay_apart(self) -> None:
        schedule = Milestones({0: 16, 12_345_678: 3, 12_345_679.0: 5, 1e7: 7}, unit="examples")
        assert schedule.named_sizes == {
            "sizes[0]": 16,
            "sizes[10000000]": 7,
            "sizes[12345678]": 3,
            "sizes[12345679]": 5,
        }

    def test_keeps_a_copy_of_plain_numbers(self) -> None:
        given_sizes = {np.int64(5): np.int64(64), 0: 16}
        schedule = Milestones(given_sizes)  # type: ignore[arg-type]
        given_sizes[0] = 1000
        assert schedule.first_size == 16
        assert {type(number) for pair in schedule.sizes.items() for number in pair} == {int}

    @pytest.mark.parametrize(
        ("sizes", "message"),
        [
            *(
                ({0: 16, point: 32, 9: 64}, "points of sizes < inf, got points of sizes=")
                for point in (-1, math.nan, math.inf, "5", None, True, 1j)
            ),
            *(
                (sizes, r"begin at 0, got sizes=.*as in \{0: 16, 1000: 64\}")
                for sizes in ({}, {1: 16}, [16, 32], None)
            ),
            *(
                ({0: 16, 9: size}, rf"whole number sizes\[9\] >= 1, got sizes\[9\]={size!r}: count")
                for size in (0, 2.5, True, None)
            ),
        ],
    )
    def test_refuses_what_is_no_point_or_size(self, sizes: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Milestones(sizes)


SIZE = ConstantSize(8)


def two(end: float | None, begin: float, last: float | None = None) -> list[Phase]:
    return [Phase(0, end, SIZE), Phase(begin, last, SIZE)]


class TestPhases:
    def test_each_begins_its_own_clock(self) -> None:
        schedule = Phases(
            [
                Phase(0, 3, ConstantSize(8)),
                Phase(3, 7, LinearRamp(8, 16, 4)),
                Phase(7, None, Milestones({0: 32, 2: 64})),
            ]
        )
        assert by_step(schedule, *range(11)) == [8, 8, 8, 8, 10, 12, 14, 32, 32, 64, 64]
        assert schedule.first_size == 8

    @given(
        st.lists(st.tuples(st.integers(1, 30), ramps(unit="steps")), min_size=1, max_size=5),
        st.integers(0, 160),
    )
    def test_look_up_by_walking(self, parts: list[tuple[int, Ramp]], step: int) -> None:
        ends = [sum(length for length, _ in parts[: index + 1]) for index in range(len(parts))]
        phases = [Phase(end - length, end, ramp) for end, (length, ramp) in zip(ends, parts, strict=True)]
        left = step
        while len(parts) > 1 and left >= parts[0][0]:
            left -= parts.pop(0)[0]
        assert by_step(Phases(phases), step) == by_step(parts[0][1], left)

    @pytest.mark.parametrize("unit", ["examples", "epochs"])
    def test_on_other_clocks(self, unit: Unit) -> None:
        ramp = LinearRamp(8, 16, 4.0, unit=unit)
        # A constant size has no clock, so its unit does not matter.
        schedule = Phases([Phase(0, 2.5, ConstantSize(4)), Phase(2.5, None, ramp)], unit=unit)
        assert [schedule(at(unit, time)) for time in (0.0, 2.4, 2.5, 4.5, 6.5, 9.0)] == [4, 4, 8, 12, 16, 16]

    def test_within_phases(self) -> None:
        inner = Phases([Phase(0, 2, ConstantSize(2)), Phase(2, None, ConstantSize(3))])
        outer = Phases([Phase(0, 5, ConstantSize(1)), Phase(5, None, inner)])
        assert by_step(outer, 4, 5, 6, 7) == [1, 2, 2, 3]

    def test_names_of_sizes(self) -> None:
        schedule = Phases([Phase(0, 3, ConstantSize(8)), Phase(3, None, LinearRamp(8, 16, 4, multiple_of=4))])
        assert schedule.named_sizes == {"phases[0].size": 8, "phases[1].start": 8, "phases[1].end": 16}

    @pytest.mark.parametrize(
        ("phases", "message"),
        [
            (two(4, 5), r"a gap before phases\[1\], end=4 and begin=5: make the two equal"),
            (two(6, 5), r"an overlap before phases\[1\], end=6 and begin=5: make the two equal"),
            (two(None, 5), r"an overlap before phases\[1\], end=None and begin=5: make"),
            ([Phase(1, None, SIZE)], r"a gap before phases\[0\], end=0 and begin=1: make"),
            (two(5, 5, last=5), r"begin < end, got begin=5, end=5 in phases\[1\]: remove"),
            (two(5, 5, last=4), r"begin < end, got begin=5, end=4 in phases\[1\]: remove"),
            (
                [Phase(0, None, LinearRamp(8, 16, 4, unit="epochs"))],
                r"unit='steps', got unit='epochs' in phases\[0\]: use the same unit",
            ),
            *(
                (phases, r"at least one Phase, got phases=.*use \[Phase\(begin")
                for phases in ([], None, [Phase(0, 5, SIZE), (5, None, SIZE)])
            ),
        ],
    )
    def test_refuse_what_does_not_fit_together(self, phases: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Phases(phases)

    @pytest.mark.parametrize("schedule", [16, None, LinearRamp, lambda progress: 16])
    def test_a_phase_refuses_what_is_no_schedule(self, schedule: Any) -> None:
        with pytest.raises(ValueError, match=r"to be a Schedule, got .*: use ConstantSize\(16\)"):
            Phase(0, None, schedule)


class TestValues:
    """Schedules are compared, looked up, and sent to other processes."""

    @pytest.mark.parametrize("schedule", EXAMPLES)
    def test_copies_are_equal_and_do_the_same(self, schedule: Schedule) -> None:
        for other in (pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule), copy.copy(schedule)):
            assert other == schedule
            assert hash(other) == hash(schedule)
            assert by_step(other, *range(12)) == by_step(schedule, *range(12))
