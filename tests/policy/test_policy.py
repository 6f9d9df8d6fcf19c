"""From laws to ratios that are safe to apply."""

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from lightning_surge.laws.base import ConstantLaw, Law, LinearLaw, SGDLaw, SqrtLaw
from lightning_surge.laws.objectives import OBJECTIVES, progress_ratio
from lightning_surge.laws.theorems import Theorem3Law
from lightning_surge.policy.estimates import EstimatedLaw
from lightning_surge.policy.policy import Policy
from lightning_surge.policy.reasons import Reason
from tests.drawn import BASE, decades, halves, many, measured_law, measured_laws, sizes, through_a_checkpoint

laws = st.one_of(
    measured_laws,
    # Degenerate: noise costs nothing, so the law only falls.
    st.builds(measured_law, decades(-150, 4), decades(-2, 8), st.just(0.0), decades(-6, 6)),
    st.builds(SGDLaw, max_lr=decades(-8, 4), noise_scale=st.one_of(st.just(0.0), decades(-2, 300))),
    st.builds(Theorem3Law, noise_scale=decades(-3, 10), peak_lr=decades(-8, 2)),
    st.builds(
        Theorem3Law, noise_scale=st.just(math.inf), peak_lr=st.just(math.inf), sqrt_coefficient=decades(-8, 2)
    ),
)
reaches = st.sampled_from([(0.0, math.inf), (16.0, 64.0), (256.0, 512.0)])


@st.composite
def estimated(draw: st.DrawFn) -> EstimatedLaw:
    law = draw(laws)
    replicates = draw(st.lists(st.one_of(st.just(law), laws, st.none()), min_size=0, max_size=4))
    shares = tuple((each, 1.0 / len(replicates)) for each in replicates)
    return EstimatedLaw(law, shares, len(replicates), draw(reaches), draw(st.booleans()))


actions = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.one_of(st.none(), estimated()), sizes),
        st.tuples(st.sampled_from(["hold", "decide"]), st.none(), sizes),
    ),
    min_size=1,
    max_size=12,
)


def play(policy: Policy, script: list[Any]) -> list[Any]:
    decisions = []
    for action, law, batch_size in script:
        if action == "update":
            policy.update(law, batch_size)
        elif action == "hold":
            policy.hold("test")
        foretold = [policy.lr_scale(batch_size) for _ in range(2)]  # asking lets no step pass
        decisions.append(policy.decide(batch_size))
        assert foretold == [decisions[-1].used] * 2
    return decisions


SURGE = measured_law(2.0, 300.0, 1.0, 1.0)
CONSTANT, LINEAR, SQRT = (
    kind(base_lr=1.0, base_batch_size=BASE) for kind in (ConstantLaw, LinearLaw, SqrtLaw)
)


def following(*updates: EstimatedLaw | None, at: float = BASE, **options: Any) -> Policy:
    policy = Policy(**({"base_batch_size": BASE} | options))
    for law in updates:
        policy.update(law, at)
    return policy


def unlimited(*updates: EstimatedLaw | None, **options: Any) -> Policy:
    """Of which one decision is what is asked for, inside the bounds."""
    return following(*updates, max_drift_per_step=1e12, **options)


def used(policy: Policy, batch_size: float, steps: int) -> list[float]:
    return [policy.decide(batch_size).used for _ in range(steps)]


class TestNothingMeasured:
    @many
    @given(batch_size=sizes)
    def test_square_root_scaling_is_asked_for(self, batch_size: float) -> None:
        decision = unlimited().decide(batch_size)
        assert decision.predicted == decision.used == pytest.approx(math.sqrt(batch_size / BASE))
        assert (decision.standard_error, decision.because) == (math.inf, Reason.NOTHING_MEASURED)
        bounded = unlimited(bounds=(0.5, 1.5)).decide(64.0)
        assert (bounded.predicted, bounded.used, bounded.because) == (2.0, 1.5, Reason.BOUNDED_ABOVE)

    @pytest.mark.parametrize("unsure", [(), (EstimatedLaw(SURGE, (), 1),)], ids=["no law", "one measurement"])
    def test_and_approached_by_5_percent_a_step(self, unsure: tuple[EstimatedLaw, ...]) -> None:
        """16 to 256 in one change: 1.05^28 = 3.92 and 1.05^29 = 4.12, where sqrt scaling asks for 4."""
        policy = following(*unsure)
        assert used(policy, BASE, 5) == [1.0] * 5
        decisions = [policy.decide(256.0) for _ in range(30)]
        factors = [decision.used for decision in decisions]
        assert factors[:3] == pytest.approx([1.05, 1.1025, 1.157625])
        assert factors[27:] == pytest.approx([1.05**28, 4.0, 4.0])
        assert {decision.because for decision in decisions[:28]} == {Reason.RISING}
        assert decisions[28].because == (Reason.UNCERTAIN if unsure else Reason.NOTHING_MEASURED)

    # 29 steps from a quarter, 15 from a half.
    @pytest.mark.parametrize(("start", "factor", "steps"), [(16.0, 0.25, 29), (64.0, 0.5, 15)])
    def test_from_below_the_base_too(self, start: float, factor: float, steps: int) -> None:
        """The learning rate was tuned at 256, and the run begins below: at a quarter, or half, of it."""
        policy = following(base_batch_size=256.0)
        assert used(policy, start, 3) == [factor] * 3
        rising = used(policy, 256.0, steps)
        assert rising[:-1] == pytest.approx([factor * 1.05**k for k in range(1, steps)])
        assert rising[-2] < rising[-1] == 1.0


class TestAlways:
    @many
    @given(script=actions, bounds=st.sampled_from([None, (0.5, 1.5), (1.0, 1.0), (1e-3, 1e3)]))
    @pytest.mark.parametrize("objective", OBJECTIVES)
    def test_ratios_are_finite_inside_the_bounds_and_become_one_at_the_base(
        self, objective: str, script: list[Any], bounds: tuple[float, float] | None
    ) -> None:
        policy = following(objective=objective, bounds=bounds)
        smallest = 1.0
        for (_, _, size), decision in zip(script, play(policy, script), strict=True):
            low, high = bounds or (min(size / BASE, BASE / size), max(size / BASE, BASE / size))
            # What is approached from a smaller batch may be below the bounds that go by the size.
            smallest = min(smallest, low)
            assert (low if bounds else smallest) * (1 - 1e-12) <= decision.used <= high * (1 + 1e-12)
            assert 0.0 < decision.predicted < math.inf
            assert decision.standard_error >= 0
            assert decision.reason
        # From a thousandth on 142 steps lead to 1.
        assert used(policy, BASE, 200)[-1] == pytest.approx(1.0, rel=1e-12)


class TestShrinkage:
    def test_a_sure_law_is_followed(self) -> None:
        decision = unlimited(halves(SURGE)).decide(256.0)
        assert decision.used == pytest.approx(SURGE.lr(256.0) / SURGE.lr(BASE))
        assert decision.because == Reason.MEASURED
        assert decision.standard_error == pytest.approx(0.0, abs=1e-12)

    @pytest.mark.parametrize(
        ("error", "because"),
        [(0.4, Reason.MEASURED), (0.9, Reason.MEASURED), (1.1, Reason.UNCERTAIN), (3.0, Reason.UNCERTAIN)],
    )
    def test_weights_are_by_precision(self, error: float, because: Reason) -> None:
        """`error` is in units of what is believed beforehand, log(sqrt(64 / 16)) = log 2."""

        # lr ~ B^x: the ratio's log in two equal groups differs by log(4) x. Its error is half of that, times
        # Student's factor for two.
        class Power(ConstantLaw):
            _lr_exponent = error / scipy.stats.t.ppf(scipy.stats.norm.cdf(1.0), df=1)

        power = Power(base_lr=1.0, base_batch_size=BASE)
        decision = unlimited(halves(CONSTANT, CONSTANT, power), bounds=(1e-9, 1e9)).decide(64.0)
        assert (decision.predicted, decision.standard_error) == (1.0, pytest.approx(error * math.log(2.0)))
        assert decision.used == pytest.approx(2.0 ** (1.0 - 1.0 / (1.0 + error**2)))
        assert decision.because == because

    def test_a_law_at_the_edge_of_a_fit_is_followed_but_not_called_measured(self) -> None:
        sure, edge = (unlimited(halves(SURGE, at_edge=at_edge)).decide(64.0) for at_edge in (False, True))
        assert edge[:3] == sure[:3]
        assert (sure.because, edge.because) == (Reason.MEASURED, Reason.UNRESOLVED)
        unsure = unlimited(halves(CONSTANT, LINEAR, at_edge=True)).decide(64.0)
        assert unsure.because == Reason.UNCERTAIN

    def test_asking_outside_the_reach_is_less_sure(self) -> None:
        law = EstimatedLaw(SURGE, ((SURGE, 0.5), (SURGE, 0.5)), 2, reach=(16.0, 64.0))
        # One factor of two below the reach at the base, three above at 512.
        decision = unlimited(law, base_batch_size=8.0, at=8.0).decide(512.0)
        assert decision.standard_error / decision.predicted == pytest.approx(math.hypot(0.1, 0.3))


# Linear scaling at a cost that stays what it is, as of noisy gradients: only the lag limits it.
FLAT, STEEP = (SGDLaw(max_lr=1.0, noise_scale=scale) for scale in (0.0, 1e15))


class TestAfterAMeasurement:
    """More is asked for at the batch size in force."""

    @pytest.mark.parametrize("drift", [0.05, 0.5])
    @pytest.mark.parametrize(
        ("low", "high"), [(FLAT, STEEP), (CONSTANT, LINEAR)], ids=["alignment rises", "alignment is flat"]
    )
    def test_rises_are_limited(self, low: Law, high: Law, drift: float) -> None:
        policy = following(halves(low), max_drift_per_step=drift)
        assert used(policy, 64.0, 1) == [1.0]
        policy.update(halves(high), 64.0)
        decisions = [policy.decide(64.0) for _ in range(60)]
        assert [each.used for each in decisions] == pytest.approx(
            [min((1 + drift) ** k, 4.0) for k in range(1, 61)]
        )
        assert (decisions[0].because, decisions[-1].because) == (Reason.RISING, Reason.MEASURED)

    def test_falls_act_at_once_and_are_not_remembered(self) -> None:
        policy = following(halves(STEEP))
        assert used(policy, 64.0, 29)[-1] == pytest.approx(4.0)
        for law, factors in ((FLAT, [1.0, 1.0]), (STEEP, [1.05, 1.05**2])):
            policy.update(halves(law), 64.0)
            assert used(policy, 64.0, 2) == pytest.approx(factors)

    @many
    @given(history=st.lists(estimated(), min_size=1, max_size=5), size=sizes, drift=st.floats(0.01, 0.5))
    def test_no_step_at_one_size_rises_by_more(
        self, history: list[EstimatedLaw], size: float, drift: float
    ) -> None:
        policy = following(max_drift_per_step=drift)
        last = policy.decide(size).used
        for law in history:
            policy.update(law, size)
            for factor in used(policy, size, 4):
                assert factor <= last * (1 + drift) * (1 + 1e-9)
                last = factor


class TestAfterALargerBatch:
    """Progress asks for 7.0 at 256."""

    LAW = measured_law(1.0, 100.0, 1.0, 1.0)
    PROGRESS = progress_ratio(LAW, 256.0, BASE)

    def policy(self, steps_at_256: int = 0, **options: Any) -> Policy:
        policy = following(halves(self.LAW), objective="progress", **options)
        policy.decide(BASE)
        used(policy, 256.0, steps_at_256)
        return policy

    def test_the_worked_example(self) -> None:
        """That of the module's docstring, to its digits."""
        policy = self.policy()
        factors = used(policy, 256.0, 40)
        assert np.round([*factors[:2], self.PROGRESS], 2).tolist() == [1.05, 1.10, 7.01]
        assert factors[-2] < factors[-1] == pytest.approx(self.PROGRESS)
        policy.decide(8.0)
        assert policy.state_dict()["used_to"] == pytest.approx(self.PROGRESS / 1.005)
        factors = used(following(halves(self.LAW), objective="alignment"), 256.0, 17)
        assert factors[-2] < factors[-1] == pytest.approx(2.28, abs=0.005)

    @many
    @given(base=sizes, path=st.lists(sizes, min_size=2, max_size=8))
    def test_whatever_the_base_is_called(self, base: float, path: list[float]) -> None:
        """A learning rate tuned at 16 is that tuned at another size, over the ratio there."""
        at_16 = following(halves(self.LAW), objective="progress")
        other = following(halves(self.LAW), objective="progress", base_batch_size=base)
        ratio = progress_ratio(self.LAW, base, BASE)
        path = [min(path[0], base, BASE), *path]  # so that both begin with what is asked for
        for size in path:
            assert other.decide(size).used * ratio == pytest.approx(at_16.decide(size).used, rel=1e-6)

    # Forgotten at a tenth of the rate, down to what progress asks for at 8.
    @pytest.mark.parametrize(
        ("short", "factor"), [(1, PROGRESS), (1000, progress_ratio(LAW, 8.0, BASE) * 1.05)]
    )
    def test_one_short_batch_does_not_undo_what_training_is_used_to_and_many_do(
        self, short: int, factor: float
    ) -> None:
        policy = self.policy(40)
        used(policy, 8.0, short)
        assert used(policy, 256.0, 1) == pytest.approx([factor])

    def test_a_measurement_changes_nothing_of_what_training_is_used_to(self) -> None:
        """The same law again, at another size than the one that the ratio has risen for."""
        policy = self.policy(40)
        policy.decide(8.0)
        policy.update(halves(self.LAW), 8.0)
        assert policy.decide(256.0).used == pytest.approx(self.PROGRESS)
        # Nor on the way up, where less is asked for than before: 4 instead of 7.
        policy = self.policy(3)
        policy.update(halves(SQRT), 256.0)
        assert policy.decide(256.0).used == pytest.approx(1.05**4)

    @pytest.mark.parametrize("spread", [0.15, 0.5])
    def test_batches_of_another_size_at_every_step_get_what_is_asked_for(self, spread: float) -> None:
        policy, generator = self.policy(), np.random.default_rng(0)
        drawn = 128.0 * np.exp(spread * generator.standard_normal(400))
        decisions = [policy.decide(size) for size in drawn.tolist()][100:]
        assert np.mean([decision.used / decision.predicted for decision in decisions]) > 0.97
        assert np.mean([decision.because == Reason.RISING for decision in decisions]) < 0.15


class TestHolding:
    NOT_A_LAW = halves(Theorem3Law(noise_scale=1e-300, peak_lr=1e-300), SURGE, SURGE)

    @pytest.mark.parametrize("bad", [None, NOT_A_LAW])
    def test_the_last_law_is_kept(self, bad: EstimatedLaw | None) -> None:
        policy = unlimited(halves(SURGE))
        before = policy.decide(64.0)
        policy.update(bad, 64.0)
        after = policy.decide(64.0)
        assert after[:3] == before[:3]
        assert after.reason == "held: the measurements do not determine a law"
        policy.update(halves(SURGE), 64.0)
        assert policy.decide(64.0).because == Reason.MEASURED

    def test_the_reason_is_passed_on(self) -> None:
        policy = unlimited()
        assert policy.decide(64.0).because == Reason.NOTHING_MEASURED
        policy.hold("measuring failed with RuntimeError")
        decision = policy.decide(64.0)
        assert (decision.used, decision.reason) == (2.0, "held: measuring failed with RuntimeError")
        # On the way up, too.
        policy = following()
        policy.hold("test")
        assert (policy.decide(64.0).used, policy.decide(64.0).reason) == (1.05, "held: test")


@pytest.mark.parametrize(("rule", "ratio"), [(SQRT, 2.0), (LINEAR, 4.0), (CONSTANT, 1.0)])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_fixed_rules_are_followed_exactly(rule: Law, ratio: float, objective: str) -> None:
    decision = following(objective=objective, fixed_law=rule).decide(64.0)
    assert decision == (ratio, 0.0, ratio, Reason.RULE.text, Reason.RULE)


@pytest.mark.parametrize(("rule", "steps", "ratio"), [(SQRT, 8, 2.0), (LINEAR, 15, 4.0)])
def test_fixed_rules_are_approached_if_a_limit_is_chosen(rule: Law, steps: int, ratio: float) -> None:
    """By 10 % a step: 1.1^7 = 1.95 and 1.1^14 = 3.80 are below."""
    policy = following(fixed_law=rule, max_drift_per_step=0.1)
    assert used(policy, BASE, 1) == [1.0]
    decisions = [policy.decide(64.0) for _ in range(steps)]
    assert [each.used for each in decisions] == pytest.approx([*(1.1**k for k in range(1, steps)), ratio])
    assert [decisions[-2].because, decisions[-1].because] == [Reason.RISING, Reason.RULE]
    assert used(policy, 4.0, 1) == [rule.lr(4.0)]


class TestState:
    @many
    @given(script=actions, later=actions)
    def test_a_resumed_policy_decides_alike(self, script: list[Any], later: list[Any]) -> None:
        policy, resumed = (following() for _ in range(2))
        play(policy, script)
        resumed.load_state_dict(policy.state_dict())
        assert play(policy, later) == play(resumed, later)

    def test_round_trip_through_a_checkpoint(self) -> None:
        policy, resumed = following(halves(CONSTANT)), following()
        policy.decide(64.0)
        policy.update(halves(SURGE, at_edge=True), 64.0)
        assert policy.decide(64.0).because == Reason.RISING
        policy.hold("test")
        resumed.load_state_dict(through_a_checkpoint(policy.state_dict()))
        assert resumed.state_dict() == policy.state_dict()
        assert [resumed.decide(64.0) for _ in range(30)] == [policy.decide(64.0) for _ in range(30)]

    @pytest.mark.parametrize("damage", [{"used_to": 1e9}, {"held": "test"}, {"law": {"kind": 0}}])
    def test_state_that_is_refused_changes_nothing(self, damage: dict[str, Any]) -> None:
        policy = following(halves(CONSTANT))
        policy.hold("before")
        before = policy.state_dict()
        with pytest.raises((ValueError, TypeError, KeyError)):
            policy.load_state_dict(following(halves(SURGE)).state_dict() | damage)
        assert policy.state_dict() == before

    def test_many_sizes_are_answered(self) -> None:
        """Batches counted in tokens have a new size at every step."""
        policy = unlimited(halves(SURGE))
        for size in np.random.default_rng(0).uniform(1, 1000, 300):
            assert policy.decide(size).used == pytest.approx(SURGE.lr(size) / SURGE.lr(BASE))
        assert len(policy._answers) < 100
