"""Ratios that a learning rate may be held to, against what they promise."""

import math

import pytest
from hypothesis import given

from lightning_surge.laws.base import Law, MeasuredLaw, SGDLaw
from lightning_surge.laws.objectives import OBJECTIVES, alignment_ratio, progress_ratio, step_ratio
from tests.drawn import many, measured_law, measured_laws, sizes


@many
@given(law=measured_laws, base=sizes)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_ratio_is_one_at_the_base(name: str, law: Law, base: float) -> None:
    assert OBJECTIVES[name](law, base, base) == 1.0


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
