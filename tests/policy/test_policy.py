"""From laws to ratios that are safe to apply."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_surge.laws.base import ConstantLaw, Law, LinearLaw, MeasuredLaw, SGDLaw, SqrtLaw
from lightning_surge.laws.edge import EdgeLaw
from lightning_surge.laws.objectives import OBJECTIVES, alignment_ratio, progress_ratio, step_ratio
from lightning_surge.laws.theorems import Theorem3Law
from lightning_surge.policy.estimates import EstimatedLaw
from lightning_surge.policy.policy import Policy
from lightning_surge.policy.reasons import Reason

many = settings(max_examples=80, deadline=None)
BASE = 16.0
sizes = st.floats(0, 14).map(lambda exponent: 2.0**exponent)


def decades(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high).map(lambda exponent: 10.0**exponent)


measured_laws = st.builds(
    MeasuredLaw,
    alignment_limit=decades(-4, 4),
    alignment_scale=st.one_of(st.just(0.0), decades(-2, 8)),
    noise_curvature=decades(-6, 6),
    signal_curvature=st.one_of(st.just(0.0), decades(-6, 6)),
)
laws = st.one_of(
    measured_laws,
    # Degenerate: noise costs nothing, so the law only falls.
    st.builds(
        MeasuredLaw,
        alignment_limit=decades(-150, 4),
        alignment_scale=decades(-2, 8),
        noise_curvature=st.just(0.0),
        signal_curvature=decades(-6, 6),
    ),
    st.builds(SGDLaw, max_lr=decades(-8, 4), noise_scale=st.one_of(st.just(0.0), decades(-2, 300))),
    st.builds(Theorem3Law, noise_scale=decades(-3, 10), peak_lr=decades(-8, 2)),
    st.builds(
        Theorem3Law, noise_scale=st.just(math.inf), peak_lr=st.just(math.inf), sqrt_coefficient=decades(-8, 2)
    ),
)


@st.composite
def estimated(draw: st.DrawFn) -> EstimatedLaw:
    law = draw(laws)
    replicates = draw(st.lists(st.one_of(st.just(law), laws, st.none()), min_size=0, max_size=4))
    return EstimatedLaw(
        law,
        tuple((each, 1.0 / len(replicates)) for each in replicates),
        num_measurements=len(replicates),
        reach=draw(st.sampled_from([(0.0, math.inf), (16.0, 64.0), (256.0, 512.0)])),
    )


def sure(law: Law) -> EstimatedLaw:
    """A law without any standard error."""
    return EstimatedLaw(law, ((law, 0.5), (law, 0.5)), num_measurements=2)


SURGE = MeasuredLaw(alignment_limit=2.0, alignment_scale=300.0, noise_curvature=1.0, signal_curvature=1.0)


class TestObjectives:
    @many
    @given(law=laws, base=sizes)
    @pytest.mark.parametrize("name", OBJECTIVES)
    def test_ratio_is_one_at_the_base(self, name: str, law: Law, base: float) -> None:
        try:
            ratio = OBJECTIVES[name](law, base, base, 0.1)
        except ArithmeticError:
            return  # the policy holds then
        assert ratio == 1.0 or math.isnan(ratio)

    @many
    @given(law=measured_laws, batch_size=sizes, base=sizes)
    def test_step_is_the_ratio_of_optima(self, law: MeasuredLaw, batch_size: float, base: float) -> None:
        optima = [law.alignment(b) / law.curvature(b) for b in (batch_size, base)]
        assert step_ratio(law, batch_size, base) == pytest.approx(optima[0] / optima[1], rel=1e-9)

    @many
    @given(law=measured_laws, batch_size=sizes, base=sizes)
    def test_progress_keeps_the_gain_per_example(
        self, law: MeasuredLaw, batch_size: float, base: float
    ) -> None:
        ratio = progress_ratio(law, batch_size, base)
        closed = math.sqrt(batch_size / base) * math.sqrt(
            (batch_size + law.alignment_scale) / (base + law.alignment_scale)
        )
        assert ratio == pytest.approx(closed, rel=1e-9)
        # A small step gains lr N(B); per example that is the same as at the base.
        assert ratio * law.alignment(batch_size) / batch_size == pytest.approx(
            law.alignment(base) / base, rel=1e-9
        )

    @many
    @given(law=measured_laws, batch_size=sizes, base=sizes)
    def test_alignment_is_the_best_step_at_constant_curvature(
        self, law: MeasuredLaw, batch_size: float, base: float
    ) -> None:
        ratio = alignment_ratio(law, batch_size, base)
        flat = MeasuredLaw(
            alignment_limit=law.alignment_limit,
            alignment_scale=law.alignment_scale,
            noise_curvature=law.noise_curvature,
            signal_curvature=0.0,
        )
        assert ratio == pytest.approx(step_ratio(flat, batch_size, base), rel=1e-9)
        # Together with the progress per example, whatever the noise: B / base.
        assert ratio * progress_ratio(law, batch_size, base) == pytest.approx(batch_size / base, rel=1e-9)

    def test_alignment_of_plain_gradient_steps_is_their_law(self) -> None:
        # Steps with isotropic noise on H = 1: N = |G|^2, and D = E|V|^2 = |G|^2 (1 + 300 / B).
        law = SGDLaw(max_lr=0.1, noise_scale=300.0)
        assert alignment_ratio(law, 64.0, 16.0) == pytest.approx((1 + 300 / 16) / (1 + 300 / 64))
        assert alignment_ratio(law, 64.0, 16.0) == pytest.approx(step_ratio(law, 64.0, 16.0))

    def test_progress_of_plain_gradient_steps_is_linear(self) -> None:
        assert progress_ratio(SGDLaw(max_lr=0.1, noise_scale=300.0), 64.0, 16.0) == pytest.approx(4.0)

    def test_the_surge_falls_beyond_its_peak(self) -> None:
        assert step_ratio(SURGE, 100.0, 16.0) > step_ratio(SURGE, 1000.0, 16.0) > 1.0
        assert progress_ratio(SURGE, 1000.0, 16.0) > progress_ratio(SURGE, 100.0, 16.0)


class TestBeforeMeasuring:
    @many
    @given(batch_size=sizes)
    def test_square_root_scaling(self, batch_size: float) -> None:
        decision = Policy(base_batch_size=BASE).decide(batch_size)
        assert decision.predicted == decision.used == pytest.approx(math.sqrt(batch_size / BASE))
        assert decision.standard_error == math.inf
        assert decision.reason == "sqrt: nothing measured yet"

    def test_bounds_apply(self) -> None:
        decision = Policy(base_batch_size=BASE, bounds=(0.5, 1.5)).decide(64.0)
        assert (decision.predicted, decision.used) == (2.0, 1.5)
        assert decision.reason == "bounded above by lr_scale_bounds"


actions = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.one_of(st.none(), estimated()), sizes),
        st.tuples(st.just("hold"), st.none(), sizes),
        st.tuples(st.just("decide"), st.none(), sizes),
    ),
    min_size=1,
    max_size=12,
)


class TestAlways:
    @many
    @given(actions=actions, bounds=st.sampled_from([None, (0.5, 1.5), (1.0, 1.0), (1e-3, 1e3)]))
    @pytest.mark.parametrize("objective", OBJECTIVES)
    def test_ratios_are_finite_positive_and_inside_the_bounds(
        self, objective: str, actions: list[Any], bounds: tuple[float, float] | None
    ) -> None:
        policy = Policy(base_batch_size=BASE, objective=objective, bounds=bounds)
        for action, law, batch_size in actions:
            if action == "update":
                policy.update(law, batch_size)
            elif action == "hold":
                policy.hold("test")
            decision = policy.decide(batch_size)
            reach = max(batch_size / BASE, BASE / batch_size)
            low, high = bounds or (1 / reach, reach)
            assert low * (1 - 1e-12) <= decision.used <= high * (1 + 1e-12)
            assert decision.reason
            assert math.isfinite(decision.predicted)
            assert decision.predicted > 0
            assert decision.standard_error >= 0
            assert policy.lr_scale(batch_size) == decision.used

    @many
    @given(actions=actions)
    @pytest.mark.parametrize("objective", OBJECTIVES)
    def test_ratio_is_one_at_the_base_whatever_is_measured(self, objective: str, actions: list[Any]) -> None:
        policy = Policy(base_batch_size=BASE, objective=objective)
        for action, law, batch_size in actions:
            if action == "update":
                policy.update(law, batch_size)
            elif action == "hold":
                policy.hold("test")
            else:
                policy.decide(batch_size)
            assert policy.lr_scale(BASE) == pytest.approx(1.0, rel=1e-12)


class TestShrinkage:
    def test_a_sure_law_is_followed(self) -> None:
        policy = Policy(base_batch_size=BASE)
        policy.update(sure(SURGE), BASE)
        decision = policy.decide(256.0)
        assert decision.used == pytest.approx(SURGE.lr(256.0) / SURGE.lr(BASE))
        assert decision.reason == "measured"
        assert decision.standard_error == pytest.approx(0.0, abs=1e-12)

    def test_weights_are_by_precision(self) -> None:
        # lr(64) / lr(16) is 1 and 4 in the halves: the log has standard error log(4) / 2, as wide as
        # what is believed beforehand, log(sqrt(64 / 16)).
        policy = Policy(base_batch_size=BASE)
        linear = LinearLaw(base_lr=1.0, base_batch_size=1.0)
        constant = ConstantLaw(base_lr=1.0, base_batch_size=1.0)
        law = EstimatedLaw(constant, ((constant, 0.5), (linear, 0.5)), 2)
        error = law.standard_error(lambda law: math.log(law.lr(64.0) / law.lr(16.0)))
        policy.update(law, BASE)
        width = math.log(2.0)
        weight = width**2 / (width**2 + error**2)
        decision = policy.decide(64.0)
        assert decision.predicted == 1.0
        assert decision.standard_error == pytest.approx(error)
        assert decision.used == pytest.approx(2.0 ** (1 - weight))
        assert decision.reason == "between sqrt and measured: standard error is large"

    def test_asking_outside_the_reach_is_less_sure(self) -> None:
        law = EstimatedLaw(SURGE, ((SURGE, 0.5), (SURGE, 0.5)), 2, reach=(16.0, 64.0))
        policy = Policy(base_batch_size=8.0)
        policy.update(law, 8.0)
        # One factor of two below the reach at the base, three above at 512.
        decision = policy.decide(512.0)
        assert decision.standard_error / decision.predicted == pytest.approx(math.hypot(0.1, 0.3))

    @many
    @given(law=estimated(), batch_size=sizes)
    def test_lies_between_sqrt_and_the_prediction(self, law: EstimatedLaw, batch_size: float) -> None:
        policy = Policy(base_batch_size=BASE, bounds=(1e-30, 1e30), max_drift_per_step=1e30)
        policy.update(law, BASE)
        decision = policy.decide(batch_size)
        ends = sorted([decision.predicted, math.sqrt(batch_size / BASE)])
        assert ends[0] * (1 - 1e-9) <= min(max(decision.used, 1e-30 * 1.01), 1e30) or decision.used == 1e-30
        assert decision.used <= ends[1] * (1 + 1e-9) or decision.used == 1e-30

    def test_no_replicate_means_sqrt(self) -> None:
        policy = Policy(base_batch_size=BASE)
        policy.update(EstimatedLaw(SURGE, (), 1), BASE)
        assert policy.decide(64.0).used == pytest.approx(2.0)


class TestDrift:
    CONSTANT, LINEAR = (sure(kind(base_lr=1.0, base_batch_size=BASE)) for kind in (ConstantLaw, LinearLaw))

    @pytest.mark.parametrize("drift", [0.05, 0.5])
    def test_rises_are_limited_at_a_fixed_size(self, drift: float) -> None:
        policy = Policy(base_batch_size=BASE, max_drift_per_step=drift)
        policy.update(self.CONSTANT, 64.0)
        assert policy.decide(64.0).used == 1.0
        policy.update(self.LINEAR, 64.0)
        used = [policy.decide(64.0).used for _ in range(60)]
        assert used == pytest.approx([min((1 + drift) ** k, 4.0) for k in range(1, 61)])
        assert policy.decide(64.0).reason == "measured"

    def test_the_reason_says_so(self) -> None:
        policy = Policy(base_batch_size=BASE)
        policy.update(self.CONSTANT, 64.0)
        policy.update(self.LINEAR, 64.0)
        assert policy.decide(64.0).reason == "rising: limited by max_drift_per_step"

    def test_the_first_measurement_is_limited_too(self) -> None:
        policy = Policy(base_batch_size=BASE)
        assert policy.decide(64.0).used == 2.0
        policy.update(self.LINEAR, 64.0)
        assert policy.decide(64.0).used == pytest.approx(2.1)

    def test_falls_act_at_once(self) -> None:
        policy = Policy(base_batch_size=BASE)
        policy.update(self.LINEAR, BASE)
        for _ in range(40):
            used = policy.decide(64.0).used
        assert used == 4.0
        policy.update(self.CONSTANT, 64.0)
        assert policy.decide(64.0).used == 1.0

    def test_a_limited_rise_leaves_the_base_alone(self) -> None:
        policy = Policy(base_batch_size=BASE)
        policy.update(self.CONSTANT, 64.0)
        policy.update(self.LINEAR, 64.0)
        policy.decide(64.0)
        assert policy.decide(BASE).used == 1.0

    @many
    @given(history=st.lists(estimated(), min_size=1, max_size=5), size=sizes, drift=st.floats(0.01, 0.5))
    def test_no_step_at_one_size_rises_by_more(
        self, history: list[EstimatedLaw], size: float, drift: float
    ) -> None:
        policy = Policy(base_batch_size=BASE, max_drift_per_step=drift)
        last = policy.decide(size).used
        for law in history:
            policy.update(law, size)
            for _ in range(4):
                used = policy.decide(size).used
                assert used <= last * (1 + drift) * (1 + 1e-9)
                last = used

    def test_asking_lets_no_step_pass(self) -> None:
        policy = Policy(base_batch_size=BASE)
        policy.update(self.CONSTANT, 64.0)
        policy.update(self.LINEAR, 64.0)
        first = [policy.lr_scale(64.0) for _ in range(5)]
        assert first == [first[0]] * 5


class TestAChangeOfTheSize:
    """Progress asks for 7.2 at 256; at an unchanged cost it is 2.2."""

    LAW = MeasuredLaw(alignment_limit=1.0, alignment_scale=100.0, noise_curvature=1.0, signal_curvature=1.0)
    PROGRESS, AT_ONCE = progress_ratio(LAW, 256.0, BASE), alignment_ratio(LAW, 256.0, BASE)

    def policy(self, **options: Any) -> Policy:
        policy = Policy(base_batch_size=BASE, objective="progress", **options)
        policy.update(sure(self.LAW), BASE)
        policy.decide(BASE)
        return policy

    def test_acts_at_once_as_far_as_the_cost_of_a_step_allows(self) -> None:
        policy = self.policy()
        assert policy.lr_scale(256.0) == pytest.approx(self.AT_ONCE)
        used = [policy.decide(256.0) for _ in range(40)]
        wanted = [min(self.AT_ONCE * 1.05**k, self.PROGRESS) for k in range(1, 41)]
        assert [decision.used for decision in used] == pytest.approx(wanted)
        assert all(decision.predicted == pytest.approx(self.PROGRESS) for decision in used)
        assert (used[0].because, used[-1].because) == (Reason.RISING, Reason.MEASURED)

    @pytest.mark.parametrize("objective", ["alignment", "step"])
    def test_of_what_asks_for_no_more_all_of_it(self, objective: str) -> None:
        policy = Policy(base_batch_size=BASE, objective=objective)
        policy.update(sure(self.LAW), BASE)
        for size in (256.0, 4.0, 64.0):
            decision = policy.decide(size)
            assert (decision.used, decision.because) == (pytest.approx(decision.predicted), Reason.MEASURED)

    def test_downwards_acts_at_once(self) -> None:
        policy = self.policy()
        for _ in range(40):
            policy.decide(256.0)
        assert policy.decide(4.0).used == pytest.approx(progress_ratio(self.LAW, 4.0, BASE))
        assert policy.decide(BASE).used == 1.0

    def test_one_short_batch_does_not_undo_what_training_is_used_to(self) -> None:
        policy = self.policy()
        for _ in range(40):
            policy.decide(256.0)
        policy.decide(8.0)
        assert policy.decide(256.0).used == pytest.approx(self.PROGRESS)

    def test_many_short_batches_do(self) -> None:
        policy = self.policy()
        for _ in range(40):
            policy.decide(256.0)
        for _ in range(400):  # forgotten at a tenth of the rate
            policy.decide(8.0)
        assert policy.decide(256.0).used == pytest.approx(self.AT_ONCE * 1.05)

    @pytest.mark.parametrize("spread", [0.15, 0.3, 0.5])
    def test_batches_of_another_size_at_every_step_get_what_is_asked_for(self, spread: float) -> None:
        policy, generator = self.policy(), np.random.default_rng(0)
        sizes = 128.0 * np.exp(spread * generator.standard_normal(400))
        decisions = [policy.decide(size) for size in sizes.tolist()][100:]
        shares = np.array([decision.used / decision.predicted for decision in decisions])
        assert shares.mean() > 0.97
        assert np.mean([decision.because == Reason.RISING for decision in decisions]) < 0.15

    def test_what_is_reached_is_not_rising(self) -> None:
        """Whatever the rounding of the quotient and the product."""
        for scale in np.geomspace(1.0, 1e4, 200).tolist():
            law = MeasuredLaw(
                alignment_limit=1.0, alignment_scale=scale, noise_curvature=1.0, signal_curvature=1.0
            )
            policy = Policy(base_batch_size=BASE, objective="progress")
            policy.update(sure(law), BASE)
            for _ in range(100):
                decision = policy.decide(256.0)
            assert decision.because == Reason.MEASURED
            assert decision.used == pytest.approx(decision.predicted)

    def test_a_law_that_the_objective_cannot_use_leaves_the_limit_whole(self) -> None:
        """Resumed with the edge from a run that looked for none."""
        before = self.policy()
        policy = Policy(base_batch_size=BASE, objective="edge")
        policy.load_state_dict(before.state_dict())
        law = EdgeLaw(
            alignment_limit=1.0, alignment_scale=100.0, noise_curvature=1.0, signal_curvature=1.0,
            edge_limit=1.0, edge_sq_slope=1.0,
        )  # fmt: skip
        policy.update(sure(law), 64.0, 1e-3)
        policy.decide(64.0, 1e-3)
        rise = policy.lr_scale(256.0, 1e-3) / policy.lr_scale(64.0, 1e-3)
        assert rise <= alignment_ratio(law, 256.0, 64.0) * (1 + 1e-9)
        again = Policy(base_batch_size=BASE, objective="edge")
        again.load_state_dict(policy.state_dict())

    def test_a_slow_ramp_is_followed(self) -> None:
        policy = self.policy()
        for size in np.geomspace(BASE, 256.0, 100).tolist():
            assert policy.decide(size).used == pytest.approx(progress_ratio(self.LAW, size, BASE))

    def test_a_measurement_changes_nothing_of_what_training_is_used_to(self) -> None:
        """The same law again, at another size than the one that the ratio has risen for."""
        policy = self.policy()
        for _ in range(40):
            policy.decide(256.0)
        policy.decide(8.0)
        policy.update(sure(self.LAW), 8.0)
        assert policy.decide(256.0).used == pytest.approx(self.PROGRESS)

    @pytest.mark.parametrize("drift", [0.01, 0.5])
    def test_the_limit_is_the_drift(self, drift: float) -> None:
        assert self.policy(max_drift_per_step=drift).decide(256.0).used == pytest.approx(
            self.AT_ONCE * (1 + drift)
        )

    def test_of_an_unsure_law_it_is_nearer_to_sqrt(self) -> None:
        policy = Policy(base_batch_size=BASE, objective="progress")
        policy.update(EstimatedLaw(self.LAW, (), 1), BASE)
        assert policy.decide(256.0).used == pytest.approx(4.0)


class TestHolding:
    NOT_A_LAW = EstimatedLaw(Theorem3Law(noise_scale=1e-300, peak_lr=1e-300), ((SURGE, 0.5), (SURGE, 0.5)), 2)

    @pytest.mark.parametrize("bad", [None, NOT_A_LAW])
    def test_the_last_law_is_kept(self, bad: EstimatedLaw | None) -> None:
        policy = Policy(base_batch_size=BASE)
        policy.update(sure(SURGE), BASE)
        before = policy.decide(64.0)
        policy.update(bad, 64.0)
        after = policy.decide(64.0)
        assert after[:3] == before[:3]
        assert after.reason == "held: the measurements do not determine a law"
        policy.update(sure(SURGE), 64.0)
        assert policy.decide(64.0).reason == "measured"

    def test_the_reason_is_passed_on(self) -> None:
        policy = Policy(base_batch_size=BASE)
        policy.hold("measuring failed with RuntimeError")
        decision = policy.decide(64.0)
        assert decision.used == 2.0
        assert decision.reason == "held: measuring failed with RuntimeError"

    def test_a_hold_answers_afresh_at_sizes_seen_before(self) -> None:
        policy = Policy(base_batch_size=BASE)
        policy.update(sure(SURGE), BASE)
        policy.decide(64.0)
        policy.hold("test")
        assert policy.decide(64.0).reason == "held: test"


class TestFixedRules:
    @pytest.mark.parametrize(("rule", "ratio"), [(SqrtLaw, 2.0), (LinearLaw, 4.0), (ConstantLaw, 1.0)])
    @pytest.mark.parametrize("objective", OBJECTIVES)
    def test_are_followed_exactly(self, rule: type[Law], ratio: float, objective: str) -> None:
        policy = Policy(
            base_batch_size=BASE, objective=objective, fixed_law=rule(base_lr=1.0, base_batch_size=BASE)
        )
        reason = Reason.RULE
        assert policy.decide(64.0) == (ratio, 0.0, ratio, reason.text, reason)


class TestState:
    @many
    @given(actions=actions, later=actions)
    def test_a_resumed_policy_decides_alike(self, actions: list[Any], later: list[Any]) -> None:
        def play(policy: Policy, script: list[Any]) -> list[Any]:
            decisions = []
            for action, law, batch_size in script:
                if action == "update":
                    policy.update(law, batch_size)
                elif action == "hold":
                    policy.hold("test")
                decisions.append(policy.decide(batch_size))
            return decisions

        policy, resumed = (Policy(base_batch_size=BASE) for _ in range(2))
        play(policy, actions)
        resumed.load_state_dict(policy.state_dict())
        assert play(policy, later) == play(resumed, later)

    def test_round_trip_through_a_checkpoint(self, tmp_path: pytest.TempPathFactory) -> None:
        policy, resumed = (Policy(base_batch_size=BASE) for _ in range(2))
        policy.update(sure(ConstantLaw(base_lr=1.0, base_batch_size=BASE)), 64.0)
        policy.update(sure(SURGE), 64.0)
        policy.decide(64.0)
        policy.hold("test")
        torch.save(policy.state_dict(), tmp_path / "state.pt")
        resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert resumed.state_dict() == policy.state_dict()
        assert [resumed.decide(64.0) for _ in range(30)] == [policy.decide(64.0) for _ in range(30)]

    def test_many_sizes_are_answered(self) -> None:
        """Batches counted in tokens have a new size at every step."""
        policy = Policy(base_batch_size=BASE)
        policy.update(sure(SURGE), BASE)
        rng = np.random.default_rng(0)
        for size in rng.uniform(1, 1000, 300):
            assert policy.decide(size).used == pytest.approx(SURGE.lr(size) / SURGE.lr(BASE))
        assert len(policy._answers) < 100


@pytest.mark.parametrize("bounds", [None, (0.1, 10.0)])
def test_a_limited_rise_next_to_the_base_leaves_base_and_bounds_alone(
    bounds: tuple[float, float] | None,
) -> None:
    def sure(law: Law) -> EstimatedLaw:
        return EstimatedLaw(law, ((law, 0.5), (law, 0.5)), num_measurements=2)

    policy = Policy(base_batch_size=16, bounds=bounds)
    policy.update(sure(ConstantLaw(base_lr=1.0, base_batch_size=16)), 20)
    policy.update(sure(LinearLaw(base_lr=1.0, base_batch_size=16)), 20)
    assert policy.decide(20).reason.startswith("rising")
    assert policy.lr_scale(16) == 1.0
    low = 16 / 17 if bounds is None else bounds[0]
    assert policy.lr_scale(17) >= low
