"""The edge of stability as a law of the batch size."""

import math
from dataclasses import fields

import pytest
from hypothesis import given

from lightning_surge.laws.base import MeasuredLaw
from lightning_surge.laws.edge import EdgeLaw
from tests.drawn import BASE, edge_law, edge_laws, many, noise_alone, sizes


@many
@given(law=edge_laws, batch_size=sizes)
def test_falls_to_its_limit_and_is_otherwise_the_measured_law(law: EdgeLaw, batch_size: float) -> None:
    assert law.edge_lr(batch_size) >= law.edge_lr(2 * batch_size) >= law.edge_limit
    # By no more than the square root.
    assert law.edge_lr(batch_size) <= math.sqrt(2.0) * law.edge_lr(2 * batch_size) * (1 + 1e-12)
    plain = MeasuredLaw(**{field.name: getattr(law, field.name) for field in fields(MeasuredLaw)})
    assert (law.lr(batch_size), law.gain(batch_size)) == (plain.lr(batch_size), plain.gain(batch_size))
    assert law.peak == plain.peak
    assert math.isnan(plain.edge_lr(batch_size))


def test_falls_like_the_inverse_root_where_noise_is_all() -> None:
    law = noise_alone(0.1)
    assert law.edge_lr(BASE) == pytest.approx(0.1)
    assert law.edge_lr(100 * BASE) == pytest.approx(0.01)


@pytest.mark.parametrize("numbers", [(0.0, 0.0), (-1.0, 1.0), (1.0, math.nan), (math.inf, 1.0)])
def test_refuses(numbers: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"edge_limit|edge_sq_slope"):
        edge_law(*numbers)
