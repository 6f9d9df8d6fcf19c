"""The secant against the exact quadratic form, and the parameters afterwards."""

import math
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_surge.measure import gradients
from lightning_surge.measure.curvature import (
    Displacement,
    displaced,
    probe_distance,
    realised_slope,
    secant_curvature,
)

many = settings(max_examples=50, deadline=None)

HESSIAN = torch.tensor(
    [
        [2.0, -0.6, 0.8, 0.1, 0.0, 0.3],
        [-0.6, 1.0, -0.3, 0.2, 0.4, 0.0],
        [0.8, -0.3, 1.5, 0.4, -0.2, 0.1],
        [0.1, 0.2, 0.4, 0.9, 0.5, -0.7],
        [0.0, 0.4, -0.2, 0.5, -1.1, 0.2],
        [0.3, 0.0, 0.1, -0.7, 0.2, 0.6],
    ],
    dtype=torch.float64,
)


class Quadratic:
    """`theta' H theta / 2 + b' theta` over two parameters, of 4 and 2 elements."""

    def __init__(self, dtype: torch.dtype = torch.float64, *, transposed: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(6, generator=generator, dtype=torch.float64).to(dtype)
        first = start[:4].reshape(2, 2).clone()
        if transposed:
            first = first.T.contiguous().T
            assert not first.is_contiguous()
        self.parameters = [first, start[4:].clone()]

    def gradient(self) -> list[Tensor]:
        flat = torch.cat([p.reshape(-1) for p in self.parameters]).double()
        g = (HESSIAN @ flat + torch.arange(6.0, dtype=torch.float64)).to(self.parameters[0].dtype)
        return [g[:4].reshape(2, 2), g[4:]]


def walk(vector: Tensor) -> Iterator[Tensor]:
    """Blocks as `gradients.blocks` would cut them for parameters of 4 and 2 elements."""
    for part in (vector[:4], vector[4:]):
        for (block,) in gradients.blocks(part):
            yield block


V = torch.tensor([1.0, -1.0, 1.0, 1.0, -0.5, 0.5], dtype=torch.float64)
W = torch.tensor([1.0, 1.0, -1.0, 0.5, 1.0, 2.0], dtype=torch.float64)


def slope_along(
    parameters: list[Tensor], direction: Displacement, delta: float, gradient: list[Tensor]
) -> float:
    return float(realised_slope(parameters, direction, delta, gradient))


class TestSecant:
    @pytest.mark.parametrize("delta", [1e-6, 1e-3, 1.0, 50.0])
    @pytest.mark.parametrize("transposed", [False, True])
    @pytest.mark.parametrize("block", [3, 1 << 20])
    def test_equals_the_quadratic_form(
        self, delta: float, transposed: bool, block: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gradients, "BLOCK_ELEMENTS", block)
        quadratic = Quadratic(transposed=transposed)
        before = [p.clone() for p in quadratic.parameters]
        curvature = secant_curvature(
            quadratic.parameters,
            direction=lambda: walk(V),
            slope=slope_along(quadratic.parameters, lambda: walk(V), delta, quadratic.gradient()),
            gradient_at_displaced=quadratic.gradient,
            delta=delta,
        )
        assert curvature == pytest.approx(float(V @ HESSIAN @ V), rel=1e-8)
        for now, was in zip(quadratic.parameters, before, strict=True):
            assert torch.equal(now, was)

    @pytest.mark.parametrize("delta", [1e-3, 1.0])
    def test_against_another_direction(self, delta: float) -> None:
        quadratic = Quadratic()
        curvature = secant_curvature(
            quadratic.parameters,
            direction=lambda: walk(V),
            slope=float(W @ torch.cat([g.reshape(-1) for g in quadratic.gradient()])),
            gradient_at_displaced=quadratic.gradient,
            delta=delta,
            against=lambda: walk(W),
        )
        assert curvature == pytest.approx(float(W @ HESSIAN @ V), rel=1e-9)

    def test_from_a_difference_of_gradients(self) -> None:
        quadratic = Quadratic()
        start = quadratic.gradient()
        curvature = secant_curvature(
            quadratic.parameters,
            direction=lambda: walk(V),
            slope=0.0,
            gradient_at_displaced=lambda: [
                now - was for now, was in zip(quadratic.gradient(), start, strict=True)
            ],
            delta=0.1,
            against=lambda: walk(W),
        )
        assert curvature == pytest.approx(float(W @ HESSIAN @ V), rel=1e-9)

    def test_is_the_mean_curvature_of_the_segment(self) -> None:
        # theta^4 / 4 from 1 to 1 - delta: (1 - (1 - delta)^3) / delta, not the second derivative 3.
        theta = torch.ones(1, dtype=torch.float64)
        curvature = secant_curvature(
            [theta],
            direction=lambda: iter([torch.ones(1, dtype=torch.float64)]),
            slope=slope_along([theta], lambda: iter([torch.ones(1, dtype=torch.float64)]), 0.5, [theta**3]),
            gradient_at_displaced=lambda: [theta**3],
            delta=0.5,
        )
        assert curvature == pytest.approx((1 - 0.5**3) / 0.5)

    def test_divides_by_the_displacement_that_rounding_left(self) -> None:
        # 1 - 1.0e-7 rounds to 1 - 1.19e-7 in float32: dividing by delta would be 19 % off.
        theta = torch.ones(3)
        curvature = secant_curvature(
            [theta],
            direction=lambda: iter([torch.ones(3)]),
            slope=slope_along([theta], lambda: iter([torch.ones(3)]), 1e-7, [2 * theta]),
            gradient_at_displaced=lambda: [2 * theta],
            delta=1e-7,
        )
        assert curvature == pytest.approx(6.0, rel=1e-6)

    def test_no_displacement_is_not_a_number(self) -> None:
        theta = torch.ones(2)
        arguments = {"slope": 2.0, "gradient_at_displaced": lambda: [theta], "delta": 1e-12}
        assert math.isnan(secant_curvature([theta], direction=lambda: iter([torch.ones(2)]), **arguments))
        assert secant_curvature([theta], direction=lambda: iter([torch.zeros(2)]), **arguments) == 0.0

    def test_a_missing_gradient_is_zero(self) -> None:
        # The loss reads the second parameter only where it was; its gradient there was (1, 1).
        parameters = [torch.zeros(1, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)]
        ones = [torch.ones(1, dtype=torch.float64), torch.ones(2, dtype=torch.float64)]
        curvature = secant_curvature(
            parameters,
            direction=lambda: iter(ones),
            slope=slope_along(parameters, lambda: iter(ones), 0.5, [0.0 * ones[0], ones[1]]),
            gradient_at_displaced=lambda: [5 * parameters[0], None],
            delta=0.5,
        )
        assert curvature == pytest.approx((5 * 0.5 + 2.0) / 0.5)

    def test_sparse_gradients(self) -> None:
        theta, ones = torch.arange(6.0, dtype=torch.float64).reshape(3, 2), torch.ones(6, dtype=torch.float64)
        curvature = secant_curvature(
            [theta],
            direction=lambda: iter([ones]),
            slope=slope_along([theta], lambda: iter([ones]), 0.25, [3 * theta]),
            gradient_at_displaced=lambda: [(3 * theta).to_sparse()],
            delta=0.25,
        )
        assert curvature == pytest.approx(18.0)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_where_the_step_is_large_enough(self, dtype: torch.dtype) -> None:
        theta = torch.linspace(-1, 1, 5).to(dtype)
        before = theta.clone()
        curvature = secant_curvature(
            [theta],
            direction=lambda: iter([torch.ones(5)]),
            slope=slope_along([theta], lambda: iter([torch.ones(5)]), 0.5, [4 * theta.float()]),
            gradient_at_displaced=lambda: [4 * theta.float()],
            delta=0.5,
        )
        assert curvature == pytest.approx(20.0, rel=1e-3)
        assert torch.equal(theta, before)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_the_smallest_probe_distance_is_enough(self, dtype: torch.dtype) -> None:
        """The slope itself is 10^5 times what changes of it along the way: rounding must not enter twice."""
        generator = torch.Generator().manual_seed(0)
        theta = torch.randn(1000, generator=generator).to(dtype)
        v = torch.randn(1000, generator=generator).sign()
        stiffness, push = 0.5 + torch.rand(1000, generator=generator), torch.randn(1000, generator=generator)

        def gradient() -> list[Tensor]:
            return [(stiffness * theta.float() + push).double()]

        delta = probe_distance([theta], lr=0.0)
        curvature = secant_curvature(
            [theta],
            direction=lambda: iter([v]),
            slope=slope_along([theta], lambda: iter([v]), delta, gradient()),
            gradient_at_displaced=gradient,
            delta=delta,
        )
        # RESOLUTION_STEPS promises about 3 % of the displacement.
        assert curvature == pytest.approx(float(stiffness.sum()), rel=0.03)

    def test_nothing_of_the_direction_is_held_while_the_gradient_is_computed(self) -> None:
        """Its buffers may be given up then: the copy of the parameters takes their place."""
        parameters = [torch.ones(3), torch.ones(4)]
        made_of = [torch.ones(3), torch.ones(4)]
        references = [weakref.ref(tensor) for tensor in made_of]
        held = []

        def direction() -> Iterator[Tensor]:
            for tensor in made_of:
                for (block,) in gradients.blocks(tensor):
                    yield block.sign()

        def gradient() -> list[Tensor]:
            made_of.clear()
            held.extend(reference() is not None for reference in references)
            return [2 * parameter for parameter in parameters]

        secant_curvature(
            parameters, direction=direction, slope=0.0, gradient_at_displaced=gradient, delta=0.5
        )
        assert held == [False, False]

    @many
    @given(
        seed=st.integers(0, 2**31),
        log_delta=st.floats(-4, 2),
        loss_factor=st.floats(1e-3, 1e3),
    )
    def test_scales_with_the_loss(self, seed: int, log_delta: float, loss_factor: float) -> None:
        rng = np.random.default_rng(seed)
        hessian = torch.from_numpy(rng.normal(size=(6, 6)))
        hessian = hessian @ hessian.T
        v = torch.from_numpy(rng.normal(size=6))
        theta = torch.from_numpy(rng.normal(size=6))

        def gradient() -> list[Tensor]:
            return [loss_factor * (hessian @ theta)]

        curvature = secant_curvature(
            [theta],
            direction=lambda: iter([v]),
            slope=slope_along([theta], lambda: iter([v]), 10.0**log_delta, gradient()),
            gradient_at_displaced=gradient,
            delta=10.0**log_delta,
        )
        assert curvature == pytest.approx(loss_factor * float(v @ hessian @ v), rel=1e-6)


class TestDisplaced:
    @pytest.mark.parametrize("transposed", [False, True])
    def test_moves_against_the_direction(self, transposed: bool) -> None:
        quadratic = Quadratic(transposed=transposed)
        before = torch.cat([p.reshape(-1) for p in quadratic.parameters])
        with displaced(quadratic.parameters, lambda: walk(V), 0.25) as originals:
            moved = torch.cat([p.reshape(-1) for p in quadratic.parameters])
            torch.testing.assert_close(moved, before - 0.25 * V)
            assert torch.equal(torch.cat([p.reshape(-1) for p in originals]), before)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("transposed", [False, True])
    def test_restores_bit_for_bit_when_the_gradient_raises(
        self, dtype: torch.dtype, transposed: bool
    ) -> None:
        quadratic = Quadratic(dtype, transposed=transposed)
        before = [p.clone() for p in quadratic.parameters]
        seen = []

        def fail() -> list[Tensor]:
            seen.append(not torch.equal(quadratic.parameters[0], before[0]))
            raise RuntimeError("out of memory")

        with pytest.raises(RuntimeError, match="out of memory"):
            secant_curvature(
                quadratic.parameters,
                direction=lambda: walk(V),
                slope=0.0,
                gradient_at_displaced=fail,
                delta=0.1,
            )
        assert seen == [True]
        for now, was in zip(quadratic.parameters, before, strict=True):
            assert torch.equal(now, was)
            assert now.stride() == was.stride() or transposed

    def test_restores_when_the_direction_raises_half_way(self) -> None:
        quadratic = Quadratic()
        before = [p.clone() for p in quadratic.parameters]

        def direction() -> Iterator[Tensor]:
            yield V[:4]
            raise RuntimeError("no more")

        with pytest.raises(RuntimeError, match="no more"), displaced(quadratic.parameters, direction, 0.1):
            pass
        for now, was in zip(quadratic.parameters, before, strict=True):
            assert torch.equal(now, was)

    def test_a_graph_made_before_can_still_be_used(self) -> None:
        weight = torch.ones(3, requires_grad=True)
        loss = weight.square().sum()
        with displaced([weight], lambda: iter([torch.ones(3)]), 0.5):
            pass
        loss.backward()
        assert torch.equal(weight.grad, torch.full((3,), 2.0))

    def test_zero_times_a_step_restores_signed_zeros_and_nan(self) -> None:
        theta = torch.tensor([-0.0, 0.0, math.nan, math.inf])
        bits = theta.view(torch.int32).clone()
        with displaced([theta], lambda: iter([torch.ones(4)]), 0.5):
            pass
        assert torch.equal(theta.view(torch.int32), bits)


class TestProbeDistance:
    def test_is_the_learning_rate_where_the_dtype_resolves_it(self) -> None:
        assert probe_distance([torch.full((4,), 10.0)], lr=1e-3) == 1e-3

    @pytest.mark.parametrize("lr", [0.0, 1e-9])
    def test_floor_scales_with_the_parameters(self, lr: float) -> None:
        epsilon = torch.finfo(torch.float32).eps
        # Root mean square over both tensors: sqrt((3 * 4 + 1 * 16) / 4).
        parameters = [torch.full((3,), 2.0), torch.full((1,), 4.0)]
        assert probe_distance(parameters, lr=lr) == pytest.approx(32 * epsilon * math.sqrt(7.0), rel=1e-6)

    def test_zero_parameters_still_move(self) -> None:
        assert probe_distance([torch.zeros(3)], lr=0.0) > 0

    def test_float64_resolves_smaller_steps(self) -> None:
        assert probe_distance([torch.ones(4, dtype=torch.float64)], lr=1e-12) == 1e-12

    def test_half_precision_with_a_large_step_is_accepted(self) -> None:
        assert probe_distance([torch.ones(4, dtype=torch.bfloat16)], lr=0.5) == 0.5
