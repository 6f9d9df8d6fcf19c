import math
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_surge.laws.base import MeasuredLaw, SGDLaw
from lightning_surge.laws.objectives import OBJECTIVES
from lightning_surge.laws.theorems import Theorem3Law
from lightning_surge.policy.reasons import Reason
from lightning_surge.runs.advice import Caveat, RunState, advise, run_state
from lightning_surge.runs.run_log import RunLogError
from tests.logged_runs import LAW, as_log, lawless, rows

STATE = RunState(
    step=100, batch_size=60.0, base_batch_size=60.0, lr_scheduled=1e-3, lr_scheduled_max=1e-3, lr_used=1e-3,
    lr_scale=1.0, objective="step", law=LAW, critical_error=10.0, peak_error=20.0,
    scale_errors=((60.0, 0.0), (120.0, 0.1)), measured=(30.0, 120.0), num_measurements=20, measured_step=95,
    reason=Reason.MEASURED,
)  # fmt: skip


def option(state, size):
    (one,) = [one for one in advise(state, [size]).options if one.batch_size == size]
    return one


def critical_at(size):
    """A law with that critical batch size."""
    return MeasuredLaw(
        alignment_limit=2.0, alignment_scale=5.0 * size, noise_curvature=1.0, signal_curvature=1.0
    )


class TestTradeOff:
    @given(st.floats(1.0, 1e6), st.floats(0.1, 1e5))
    def test_a_larger_batch_never_costs_steps_nor_saves_examples(self, size, critical):
        state = replace(STATE, law=critical_at(critical))
        one = option(state, size)
        sign = 1.0 if size >= state.batch_size else -1.0
        assert sign * (one.examples.value - 1.0) >= -1e-12
        assert sign * (one.steps.value - 1.0) <= 1e-12
        assert one.examples.value == pytest.approx(one.steps.value * size / state.batch_size)
        for interval in (one.examples, one.steps, one.lr):
            assert interval.low <= interval.value <= interval.high

    def test_without_noise_a_batch_saves_nothing_and_with_noise_alone_it_costs_nothing(self):
        one = option(replace(STATE, law=critical_at(0.0)), 120.0)
        assert (one.examples.value, one.steps.value) == (2.0, 1.0)
        law = Theorem3Law(noise_scale=math.inf, peak_lr=math.inf, sqrt_coefficient=0.1)
        one = option(replace(STATE, law=law, critical_error=math.inf), 120.0)
        assert (one.examples.value, one.steps.value) == (1.0, 0.5)


class TestLearningRate:
    @pytest.mark.parametrize("objective", ["step", "alignment", "progress"])
    def test_is_what_the_objective_says(self, objective):
        ratio = OBJECTIVES[objective](LAW, 120.0, 60.0)
        assert option(replace(STATE, objective=objective), 120.0).lr.value == pytest.approx(1e-3 * ratio)

    def test_is_relative_to_what_was_logged(self):
        assert option(replace(STATE, lr_scale=3.0), 120.0).lr.value == pytest.approx(
            3.0 * option(STATE, 120.0).lr.value
        )

    def test_its_error_grows_with_the_distance_from_the_base(self):
        """0.1 in the logarithm at one doubling: 0.2 at two, 0.1 at half."""
        for size, error in [(60.0, 0.0), (120.0, 0.1), (240.0, 0.2), (30.0, 0.1)]:
            scale = option(STATE, size).lr_scale
            assert math.log(scale.high / scale.value) == pytest.approx(error, abs=1e-12)
            assert math.log(scale.value / scale.low) == pytest.approx(error, abs=1e-12)

    def test_the_nearest_known_error_counts(self):
        state = replace(STATE, base_batch_size=15.0, scale_errors=((60.0, 0.2), (120.0, 0.9)))
        scale = option(state, 30.0).lr_scale
        assert math.log(scale.high / scale.value) == pytest.approx(0.1)
        unknown = option(replace(STATE, scale_errors=()), 120.0).lr_scale
        assert (unknown.low, unknown.high) == (0.0, math.inf)

    def test_a_larger_learning_rate_is_approached(self):
        state = replace(STATE, objective="progress", law=critical_at(240.0))
        lr = option(state, advise(state).suggested).lr.value
        for share, found in ((0.94, True), (0.97, False), (1.0 - 1e-7, False), (1.1, False)):
            assert (Caveat.APPROACH in advise(replace(state, lr_used=share * lr)).caveats) is found


class TestSuggestion:
    @pytest.mark.parametrize(
        ("critical", "suggested"),
        [(60, 60), (80, 60), (90, 120), (30, 30), (200, 240), (1e6, 240), (0.001, 15)],
    )
    def test_is_the_nearest_doubling_within_four(self, critical, suggested):
        answer = advise(replace(STATE, law=critical_at(critical)))
        assert answer.suggested == suggested
        # A whole number of examples, and one at least.
        assert advise(replace(STATE, batch_size=1.0, law=critical_at(0.01))).suggested == 1.0
        assert (Caveat.LIMITED_MOVE in answer.caveats) == (critical in (1e6, 0.001))

    def test_is_among_the_options_in_order(self):
        options = advise(replace(STATE, law=critical_at(200.0)), [7.0, 500.0]).options
        assert [one.batch_size for one in options] == [7.0, 60.0, 120.0, 240.0, 500.0]

    @pytest.mark.parametrize("size", [0.0, -1.0, math.inf, math.nan])
    def test_a_size_that_is_none_is_refused(self, size):
        with pytest.raises(ValueError, match=f"got batch_size={size}: count the examples"):
            advise(STATE, [size])


class TestCaveats:
    def test_none_where_all_is_well(self):
        assert advise(STATE).caveats == ()

    @pytest.mark.parametrize(
        ("changes", "caveat"),
        [
            ({"reason": Reason.MEASURING_FAILED}, Caveat.HELD),
            ({"num_measurements": 4}, Caveat.FEW_MEASUREMENTS),
            ({"critical_error": 30.0}, Caveat.UNCERTAIN),
            ({"critical_error": math.inf}, Caveat.UNCERTAIN),
            ({"measured_step": 74}, Caveat.STALE),
            ({"measured": (30.0, 59.0)}, Caveat.EXTRAPOLATING),
            ({"lr_scheduled": 0.9e-4}, Caveat.DECAYED),
            ({"law": SGDLaw(max_lr=0.1, noise_scale=60.0)}, Caveat.GRADIENT_STEPS),
            ({"law": Theorem3Law(noise_scale=60.0, peak_lr=0.1)}, Caveat.INDEPENDENT_NOISE),
        ],
    )
    def test_each_has_its_reason_and_comes_alone(self, changes, caveat):
        assert advise(replace(STATE, **changes)).caveats == (caveat,)


class TestRunState:
    def test_is_what_was_logged(self):
        state = run_state(as_log(rows()))
        expected = replace(
            STATE, step=50, measured_step=50, scale_errors=((60.0, 0.0), (120.0, pytest.approx(0.1)))
        )
        assert state == expected

    def test_of_an_earlier_step(self):
        table = rows()
        table[30]["surge/batch_size"] = 30.0
        for step in (30, 35):
            assert run_state(as_log(table), step=step).batch_size == 30.0
        table[10]["surge/lr_scheduled"] = 0.5
        assert run_state(as_log(table), step=20).lr_scheduled_max == 0.5

    def test_errors_that_were_not_logged_are_not_known(self):
        names = ("critical_batch_size", "peak_batch_size", "lr_scale", "lr_scale_doubled")
        state = run_state(as_log(rows(**{f"{name}_standard_error": None for name in names})))
        assert (state.critical_error, state.peak_error, state.scale_errors) == (math.inf, math.inf, ())

    @pytest.mark.parametrize("step", [3, 9, 51])
    def test_outside_the_run(self, step):
        with pytest.raises(
            RunLogError, match=f"Expected 10 <= step <= 50, got step={step}: the run's log begins"
        ):
            run_state(as_log(rows()), step=step)

    def test_before_the_first_law(self):
        table = rows() | {step: lawless()[step] for step in (10, 20)}
        with pytest.raises(RunLogError, match=r"got 17 measurements, which .*: pass a step from 30 on"):
            run_state(as_log(table), step=25)

    def test_a_rule_that_measures_nothing(self):
        with pytest.raises(RunLogError, match="got no measurement: train longer, or raise max_overhead"):
            run_state(as_log(lawless(num_measurements=None)))
        with pytest.raises(RunLogError, match="got a rule: train with law='measured'"):
            run_state(as_log(lawless(num_measurements=None, held_because=1.0)))

    @pytest.mark.parametrize("name", ["objective", "held_because"])
    def test_codes_of_a_later_version(self, name):
        with pytest.raises(RunLogError, match=rf"Expected {name} to be one of \[0, .*, got 99: use a newer"):
            run_state(as_log(rows(**{name: 99.0})))

    @pytest.mark.parametrize("number", [0.0, -1.0, math.inf])
    @pytest.mark.parametrize("name", sorted(rows()[10]))
    def test_numbers_that_no_training_logs_have_an_answer_or_are_refused(self, name, number):
        with suppress(RunLogError):
            advise(run_state(as_log(rows(**{name.removeprefix("surge/"): number}))), [30.0, 400.0])

    def test_a_size_that_no_batch_has(self):
        message = "Expected batch_size to be finite and positive at step 50, got 0:"
        with pytest.raises(RunLogError, match=message):
            run_state(as_log(rows(batch_size=0.0)))

    def test_the_code_of_a_retired_objective(self):
        with pytest.raises(RunLogError, match="got objective='edge', which is retired: train with"):
            run_state(as_log(rows(objective=3.0)))
