"""What a budget spends, whatever a run does."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_surge.checking.state import restore, save
from lightning_surge.measure.budget import (
    EARLY_MEASUREMENTS,
    EARLY_RATE,
    EARLY_SHARE,
    FIRST_BY,
    BudgetState,
    ProbeBudget,
)
from tests.drawn import through_a_checkpoint

many = settings(max_examples=80, deadline=None)
overheads = st.floats(0.002, 0.5)


@st.composite
def runs(draw: st.DrawFn) -> list[tuple[float, float]]:
    """Sizes of steps and costs of probes that change at every step, as with a ramp."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    steps = draw(st.integers(1, 400))
    sizes = rng.choice([8.0, 32.0, 100.0], steps)
    return list(
        zip(sizes.tolist(), (draw(st.floats(5, 500)) * rng.uniform(1, 4, steps)).tolist(), strict=True)
    )


def times(
    budget: ProbeBudget, cost: float, steps: int, *, size: float = 10.0, planned: float = math.inf
) -> list[int]:
    """Steps at which a probe of constant cost comes."""
    result = []
    for step in range(steps):
        budget.train(size)
        if budget.due(cost, planned):
            budget.start()
            budget.charge(cost)
            result.append(step)
    return result


class TestNeverMoreThanAllowed:
    @many
    @given(overhead=overheads, run=runs())
    def test_unknown_length(self, overhead: float, run: list[tuple[float, float]]) -> None:
        budget = ProbeBudget(overhead)
        for size, cost in run * 4:
            budget.train(size)
            early = budget.measurements < EARLY_MEASUREMENTS
            if budget.due(cost):
                budget.charge(cost)
                allowed = EARLY_RATE * overhead if early else overhead
                assert budget.spent <= allowed * budget.trained * (1 + 1e-9)

    @many
    @given(overhead=overheads, run=runs(), longer=st.just(1.0) | st.floats(1.0, 3.0))
    def test_known_length_and_a_run_that_goes_on_beyond_its_plan(
        self, overhead: float, run: list[tuple[float, float]], longer: float
    ) -> None:
        planned = sum(size for size, _ in run) / longer
        budget = ProbeBudget(overhead)
        for size, cost in run:
            budget.train(size)
            if budget.due(cost, planned):
                budget.charge(cost)
                # The early rate is the only thing that may run ahead, beyond the plan.
                ahead = EARLY_RATE * budget.trained if longer > 1.0 else 0.0
                assert budget.spent <= max(planned, ahead) * overhead * (1 + 1e-9)


class TestSpending:
    def test_a_long_run_spends_what_it_may(self) -> None:
        budget = ProbeBudget(0.01)
        times(budget, 100.0, 100_000, planned=1e6)
        assert 0.97 * 1e4 < budget.spent <= 1e4
        unknown = ProbeBudget(0.01)
        times(unknown, 100.0, 100_000)
        assert 0.97 * 1e4 < unknown.spent <= 1e4

    def test_early_measurements_come_four_times_as_often(self) -> None:
        steps = times(ProbeBudget(0.05), 100.0, 20_000)
        # Every 500 examples early, every 2000 in the long run.
        assert [b - a for a, b in pairwise(steps[:10])] == [50] * 9
        assert steps[0] == 49
        # Ten measurements have spent what 20,000 examples afford; nothing more before the next is paid for.
        assert steps[10] == 2199
        assert {b - a for a, b in pairwise(steps[10:])} == {200}

    def test_early_measurements_take_no_more_than_their_share_of_a_known_run(self) -> None:
        budget = ProbeBudget(0.05)
        steps = times(budget, 100.0, 1000, planned=10_000.0)
        # The run affords five; half of them early, the others spread over what is left.
        assert len(steps) == 5
        assert steps[:2] == [19, 69]
        assert FIRST_BY == 0.02
        gaps = [b - a for a, b in pairwise(steps[1:])]
        assert min(gaps) > 200
        assert EARLY_SHARE * 5 // 1 == 2

    def test_the_rest_is_spread_evenly(self) -> None:
        steps = times(ProbeBudget(0.02), 100.0, 50_000, planned=500_000.0)
        late = [b - a for a, b in pairwise(steps[10:])]
        assert len(late) > 80
        assert max(late) - min(late) <= 5
        # What came early is taken off the rest, which lasts to the end all the same.
        assert steps[-1] > 49_400

    def test_what_was_in_vain_is_paid_and_no_measurement(self) -> None:
        budget = ProbeBudget(0.01)
        budget.charge(100.0)
        budget.charge(8.0, measured=False)
        budget.charge_norms(200.0)
        assert (budget.spent, budget.arithmetic, budget.measurements) == (108.0, 5.0, 1)

    @pytest.mark.parametrize(
        ("planned", "room"), [(100_000.0, 0.5 * 1000.0), (math.inf, 4.0 * 0.01 * 10_000.0)]
    )
    def test_urgent_ones_come_at_once_within_their_share(self, planned: float, room: float) -> None:
        budget = ProbeBudget(0.01)
        budget.train(10_000.0)
        budget.start(urgent=True)
        budget.charge(100.0)
        assert not budget.due(100.0, planned)
        assert budget.due(room - 100.0, planned, urgent=True)
        assert not budget.due(room - 99.0, planned, urgent=True)
        budget.widen()  # after a failure they wait like any other
        assert not budget.due(100.0, planned, urgent=True)

    def test_every_charge_restarts_the_spacing(self) -> None:
        budget = ProbeBudget(0.05)
        budget.train(625.0)
        assert budget.due(125.0)
        budget.charge(0.0, measured=False)
        assert not budget.due(125.0)

    def test_widening_doubles_the_spacing(self) -> None:
        plain, widened = ProbeBudget(0.05), ProbeBudget(0.05)
        widened.widen()
        assert times(plain, 100.0, 60) == [49]
        assert times(widened, 100.0, 110) == [99]


class TestProbeEvery:
    def test_counts_steps_and_nothing_else(self) -> None:
        assert times(ProbeBudget(1e-9, probe_every=7), 1e9, 30) == [6, 13, 20, 27]

    def test_widening_applies(self) -> None:
        budget = ProbeBudget(0.01, probe_every=7)
        budget.widen()
        # The one that succeeds brings the spacing back.
        assert times(budget, 1.0, 30) == [13, 20, 27]


class TestAffordable:
    @given(overhead=overheads, cost=st.floats(1, 1e4), planned=st.floats(1, 1e9))
    def test_counts_the_probes_of_a_whole_run(self, overhead: float, cost: float, planned: float) -> None:
        affordable = ProbeBudget(overhead).affordable(cost, planned)
        assert affordable * cost == pytest.approx(overhead * planned)
        assert ProbeBudget(overhead).affordable(cost, math.inf) == math.inf
        # Nothing larger than needed, where somebody else says how often.
        assert ProbeBudget(overhead, probe_every=5).affordable(cost, planned) == 0.0


class TestState:
    @pytest.mark.parametrize("planned", [math.inf, 30_000.0])
    def test_a_resumed_budget_goes_on_at_the_same_steps(self, planned: float) -> None:
        whole = times(ProbeBudget(0.05), 100.0, 3000, planned=planned)
        first = ProbeBudget(0.05)
        begin = times(first, 100.0, 1234, planned=planned)
        second = ProbeBudget(0.05)
        vars(second).update(vars(restore(BudgetState, through_a_checkpoint(save(first)))))
        assert begin + [1234 + step for step in times(second, 100.0, 1766, planned=planned)] == whole

    def test_settings_are_not_part_of_it(self) -> None:
        assert not {"max_overhead", "probe_every"} & save(ProbeBudget(0.2, probe_every=3)).keys()
