"""Ratios that a learning rate may be held to, against what they promise."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_surge.laws.base import ConstantLaw, Law, MeasuredLaw, SGDLaw
from lightning_surge.laws.edge import EdgeLaw
from lightning_surge.laws.objectives import (
    OBJECTIVES,
    alignment_ratio,
    edge_ratio,
    progress_ratio,
    step_ratio,
)
from lightning_surge.laws.theorems import Theorem3Law
from tests.drawn import BASE, decades, edge_laws, many, measured_law, measured_laws, noise_alone, sizes


@many
@given(law=st.one_of(measured_laws, edge_laws), lr=st.one_of(st.just(0.0), decades(-8, 2)), base=sizes)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_ratio_is_one_at_the_base(name: str, law: Law, lr: float, base: float) -> None:
    ratio = OBJECTIVES[name](law, base, base, lr)
    assert ratio == 1.0 or (name == "edge" and not isinstance(law, EdgeLaw) and math.isnan(ratio))


@many
@given(law=measured_laws, batch_size=sizes, base=sizes)
def test_ratios_of_the_measured_law(law: MeasuredLaw, batch_size: float, base: float) -> None:
    optima = [law.alignment(b) / law.curvature(b) for b in (batch_size, base)]
    assert step_ratio(law, batch_size, base) == pytest.approx(optima[0] / optima[1], rel=1e-9)
    progress, alignment = (ratio(law, batch_size, base) for ratio in (progress_ratio, alignment_ratio))
    closed = math.sqrt(batch_size / base * (batch_size + law.alignment_scale) / (base + law.alignment_scale))
    assert progress == pytest.approx(closed, rel=1e-9)
    # A small step gains lr N(B); per example that is the same as at the base.
    gains = progress * law.alignment(batch_size) / batch_size, law.alignment(base) / base
    assert gains[0] == pytest.approx(gains[1], rel=1e-9)
    flat = measured_law(law.alignment_limit, law.alignment_scale, law.noise_curvature, 0.0)
    assert alignment == pytest.approx(step_ratio(flat, batch_size, base), rel=1e-9)
    # Whatever the noise.
    assert alignment * progress == pytest.approx(batch_size / base, rel=1e-9)


def test_ratios_of_plain_gradient_steps() -> None:
    # Steps with isotropic noise on H = 1: N = |G|^2, and D = E|V|^2 = |G|^2 (1 + 300 / B).
    law = SGDLaw(max_lr=0.1, noise_scale=300.0)
    for ratio in (alignment_ratio, step_ratio):
        assert ratio(law, 64.0, 16.0) == pytest.approx((1 + 300 / 16) / (1 + 300 / 64))
    assert progress_ratio(law, 64.0, 16.0) == pytest.approx(4.0)


def test_the_surge_falls_beyond_its_peak() -> None:
    law = measured_law(2.0, 300.0, 1.0, 1.0)
    assert step_ratio(law, 100.0, 16.0) > step_ratio(law, 1000.0, 16.0) > 1.0
    assert progress_ratio(law, 1000.0, 16.0) > progress_ratio(law, 100.0, 16.0)


class TestEdge:
    @many
    @given(law=edge_laws, batch_size=sizes, lr=decades(-6, 2))
    def test_limits_add_like_resistances(self, law: EdgeLaw, batch_size: float, lr: float) -> None:
        def h(size: float) -> float:
            return 1.0 / (1.0 / (lr * progress_ratio(law, size, BASE)) + 1.0 / law.edge_lr(size))

        assert edge_ratio(law, batch_size, BASE, lr) == pytest.approx(h(batch_size) / h(BASE), rel=1e-9)
        progress = progress_ratio(law, batch_size, BASE)
        assert edge_ratio(law, batch_size, BASE, 0.0) == pytest.approx(progress, rel=1e-12)
        # Far above the edges, which the smallest batches are farthest from.
        edges = law.edge_lr(batch_size) / law.edge_lr(BASE)
        assert edge_ratio(law, batch_size, BASE, 1e12) == pytest.approx(edges, rel=1e-3)

    @many
    @given(at_base=decades(-2, 2), lr=decades(-3, 2), batch_size=sizes)
    def test_has_the_form_of_theorem_3_where_noise_is_all(
        self, at_base: float, lr: float, batch_size: float
    ) -> None:
        theorem = Theorem3Law(noise_scale=BASE * at_base / lr, peak_lr=1.0)
        ratio = edge_ratio(noise_alone(at_base), batch_size, BASE, lr)
        assert ratio == pytest.approx(theorem.lr(batch_size) / theorem.lr(BASE), rel=1e-6)

    def test_a_law_without_an_edge_has_no_ratio(self) -> None:
        assert math.isnan(edge_ratio(ConstantLaw(base_lr=1.0, base_batch_size=1.0), 64.0, BASE, 0.1))
