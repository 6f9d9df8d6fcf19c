"""What the plan chooses to measure from, and that it costs what was planned."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_surge import SurgeLRCallback
from lightning_surge.callbacks.measuring.plan import FEW_PROBES, POOLED, Kind, MeasuringPlan, Probe
from lightning_surge.measure.budget import ProbeBudget, probe_cost
from lightning_surge.measure.gradients import pairs_of
from lightning_surge.measure.probing import CHECK_PASSES
from tests.drawn import many
from tests.trainings import Regression, make_trainer, regression_data

overheads = st.floats(1e-3, 0.5)
examples_of_runs = st.one_of(st.just(math.inf), st.floats(1e2, 1e8))


def plan_of(max_overhead: float, examples: float) -> MeasuringPlan:
    plan = MeasuringPlan(SurgeLRCallback(8, objective="progress", max_overhead=max_overhead).settings)
    plan._planned = examples
    return plan


def pairs_per_pass(probe: Probe, batch: int) -> float:
    """Of examples whose gradients are independent, if each were a chunk; the rest of a batch is one more."""
    examples = int(probe.examples)
    rest = [float(batch - examples)] * probe.at_hand
    return pairs_of([1.0] * examples + rest) / examples


class TestChoice:
    """A slice of the batch at hand, or batches that are pooled."""

    @many
    @given(max_overhead=overheads, size=st.integers(8, 4096), base=st.integers(1, 4096), run=examples_of_runs)
    def test_no_other_has_more_pairs_per_pass(
        self, max_overhead: float, size: int, base: int, run: float
    ) -> None:
        plan = plan_of(max_overhead, run)
        usual, at_change = plan._options(size, base, 1.0, at_hand=True, kind=Kind.NORMS)
        pooled, _ = plan._options(size, base, 1.0, at_hand=False, kind=Kind.NORMS)
        assert at_change.at_hand  # comes at once
        assert not pooled.at_hand
        best = max(pairs_per_pass(probe, size) for probe in (pooled, at_change))
        assert pairs_per_pass(usual, size) == best

    @many
    @given(
        max_overhead=overheads,
        size=st.integers(1, 4096),
        kind=st.sampled_from([Kind.NORMS, Kind.LAW]),
        smallest=st.integers(1, 64),
        run=examples_of_runs,
    )
    def test_more_is_pooled_only_where_the_run_affords_it(
        self, max_overhead: float, size: int, kind: Kind, smallest: int, run: float
    ) -> None:
        plan = plan_of(max_overhead, run)
        probe, _ = plan._options(size, size, float(smallest), at_hand=False, kind=kind)
        doublings = math.log2(probe.examples / size)
        assert doublings == int(doublings) >= 0
        fewest = next(size * 2**k for k in range(20) if size * 2**k >= 0.75 * 4 * smallest)
        assert probe.examples >= fewest
        if probe.examples > fewest:
            assert max_overhead * run >= FEW_PROBES * plan._cost(probe)
            assert probe.examples <= max(POOLED if kind is Kind.NORMS else 0.0, 16 * size)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "batch", "cut"),
    [
        ({}, 8, False),  # 32 batches are chunks enough
        ({}, 64, True),
        ({"log_peak": True}, 16, True),
        ({"law": "theorem2"}, 16, True),
        ({"law": "theorem3"}, 16, True),
        ({"probe_examples": 64}, 16, True),
    ],
)
def test_what_is_charged_was_planned(
    options: dict[str, Any], batch: int, cut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned, charged = list[float](), list[float]()
    due, charge = ProbeBudget.due, ProbeBudget.charge

    def asked(self: ProbeBudget, cost: float, *args: Any, **kwargs: Any) -> bool:
        answer = due(self, cost, *args, **kwargs)
        planned.extend([cost] * answer)
        return answer

    def paid(self: ProbeBudget, cost: float, *, measured: bool = True) -> None:
        charge(self, cost, measured=measured)
        charged.extend([cost] * measured)

    monkeypatch.setattr(ProbeBudget, "due", asked)
    monkeypatch.setattr(ProbeBudget, "charge", paid)
    callback = SurgeLRCallback(8, max_overhead=2.0, **options)
    make_trainer(callback).fit(Regression(), regression_data(1024, batch))
    assert callback.history.num_measurements == len(charged) >= 3
    # The first one is planned with the comparison of slices, too, where any batch is cut.
    comparison = probe_cost(CHECK_PASSES * min(batch, 16)) if callback._measurer._cutting.checked else 0.0
    assert callback._measurer._cutting.checked == cut
    assert planned[: len(charged)] == [charged[0] + comparison, *charged[1:]]
