"""The secant against the exact quadratic form, and the parameters afterwards."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from lightning_surge.measure import gradients
from lightning_surge.measure.curvature import displaced, probe_distance, realised_slope, secant_curvature

# Indefinite, as far from a network's minimum.
HESSIAN = torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
HESSIAN += HESSIAN.T.clone()
V = torch.tensor([1.0, -1.0, 1.0, 1.0, -0.5, 0.5], dtype=torch.float64)
W = torch.tensor([1.0, 1.0, -1.0, 0.5, 1.0, 2.0], dtype=torch.float64)


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
        self.before = [p.clone() for p in self.parameters]

    def flat(self) -> Tensor:
        return torch.cat([p.reshape(-1) for p in self.parameters])

    def gradient(self) -> list[Tensor]:
        g = HESSIAN @ self.flat().double() + torch.arange(6.0, dtype=torch.float64)
        g = g.to(self.parameters[0].dtype)
        return [g[:4].reshape(2, 2), g[4:]]

    def is_back(self) -> bool:
        return all(map(torch.equal, self.parameters, self.before))


def walk(vector: Tensor) -> Iterator[Tensor]:
    """Blocks as `gradients.blocks` would cut them for parameters of 4 and 2 elements."""
    for part in (vector[:4], vector[4:]):
        for (block,) in gradients.blocks(part):
            yield block


def curvature_along(
    parameters: list[Tensor],
    direction: Callable[[], Iterator[Tensor]],
    gradient: Callable[[], list[Tensor | None]],
    delta: float,
    here: list[Tensor] | None = None,
) -> float:
    """With the slope at hand, from the gradient `here` if it is another function of the parameters."""
    slope = float(realised_slope(parameters, direction, delta, gradient() if here is None else here))
    return secant_curvature(
        parameters, direction=direction, slope=slope, gradient_at_displaced=gradient, delta=delta
    )


class TestSecant:
    @pytest.mark.parametrize("delta", [1e-6, 1.0, 50.0])
    @pytest.mark.parametrize("transposed", [False, True])
    @pytest.mark.parametrize("block", [3, 1 << 20])
    def test_equals_the_quadratic_form(
        self, delta: float, transposed: bool, block: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gradients, "BLOCK_ELEMENTS", block)
        quadratic = Quadratic(transposed=transposed)
        got = curvature_along(quadratic.parameters, lambda: walk(V), quadratic.gradient, delta)
        assert got == pytest.approx(float(V @ HESSIAN @ V), rel=1e-8)
        assert quadratic.is_back()

    @pytest.mark.parametrize("difference", [False, True])
    def test_against_another_direction(self, difference: bool) -> None:
        """With the slope, or from a difference of gradients."""
        quadratic = Quadratic()
        start = quadratic.gradient()
        slope = float(W @ torch.cat([g.reshape(-1) for g in start]))

        def gradient() -> list[Tensor]:
            now = quadratic.gradient()
            return [g - was for g, was in zip(now, start, strict=True)] if difference else now

        curvature = secant_curvature(
            quadratic.parameters,
            direction=lambda: walk(V),
            slope=0.0 if difference else slope,
            gradient_at_displaced=gradient,
            delta=0.1,
            against=lambda: walk(W),
        )
        assert curvature == pytest.approx(float(W @ HESSIAN @ V), rel=1e-9)

    @pytest.mark.parametrize(
        ("theta", "gradient", "delta", "wanted", "rel"),
        [
            # The mean of a segment: theta^4 / 4 from 1 to 1/2 has (1 - (1/2)^3) / (1/2), not 3.
            (torch.ones(1).double(), lambda theta: theta**3, 0.5, 1.75, 1e-9),
            # 1 - 1.0e-7 rounds to 1 - 1.19e-7 in float32: dividing by delta would be 19 % off.
            (torch.ones(3), lambda theta: 2 * theta, 1e-7, 6.0, 1e-6),
            (torch.arange(6.0).double(), lambda theta: (3 * theta).to_sparse(), 0.25, 18.0, 1e-9),
            (torch.linspace(-1, 1, 5).bfloat16(), lambda theta: 4 * theta.float(), 0.5, 20.0, 1e-3),
            (torch.linspace(-1, 1, 5).half(), lambda theta: 4 * theta.float(), 0.5, 20.0, 1e-3),
        ],
        ids=["segment", "rounding", "sparse", "bfloat16", "float16"],
    )
    def test_of_one_parameter(
        self, theta: Tensor, gradient: Callable[[Tensor], Tensor], delta: float, wanted: float, rel: float
    ) -> None:
        before = theta.clone()
        ones = torch.ones(len(theta), dtype=torch.promote_types(theta.dtype, torch.float32))
        got = curvature_along([theta], lambda: iter([ones]), lambda: [gradient(theta)], delta)
        assert got == pytest.approx(wanted, rel=rel)
        assert torch.equal(theta, before)

    def test_no_displacement_is_not_a_number(self) -> None:
        theta = torch.ones(2)
        arguments = {"slope": 2.0, "gradient_at_displaced": lambda: [theta], "delta": 1e-12}
        assert math.isnan(secant_curvature([theta], direction=lambda: iter([torch.ones(2)]), **arguments))
        assert secant_curvature([theta], direction=lambda: iter([torch.zeros(2)]), **arguments) == 0.0

    def test_a_missing_gradient_is_zero(self) -> None:
        # The loss reads the second parameter only where it was; its gradient there was (1, 1).
        parameters = [torch.zeros(1).double(), torch.zeros(2).double()]
        ones = [torch.ones(1).double(), torch.ones(2).double()]
        got = curvature_along(
            parameters,
            lambda: iter(ones),
            lambda: [5 * parameters[0], None],
            0.5,
            here=[0.0 * ones[0], ones[1]],
        )
        assert got == pytest.approx((5 * 0.5 + 2.0) / 0.5)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_the_smallest_probe_distance_is_enough(self, dtype: torch.dtype) -> None:
        """The slope itself is 10^5 times what changes of it along the way: rounding must not enter twice."""
        generator = torch.Generator().manual_seed(0)
        theta = torch.randn(1000, generator=generator).to(dtype)
        v = torch.randn(1000, generator=generator).sign()
        stiffness, push = 0.5 + torch.rand(1000, generator=generator), torch.randn(1000, generator=generator)

        def gradient() -> list[Tensor]:
            return [(stiffness * theta.float() + push).double()]

        got = curvature_along([theta], lambda: iter([v]), gradient, probe_distance([theta], lr=0.0))
        # RESOLUTION_STEPS promises about 3 % of the displacement.
        assert got == pytest.approx(float(stiffness.sum()), rel=0.03)


class TestDisplaced:
    @pytest.mark.parametrize("transposed", [False, True])
    def test_moves_against_the_direction(self, transposed: bool) -> None:
        quadratic = Quadratic(transposed=transposed)
        before = quadratic.flat()
        with displaced(quadratic.parameters, lambda: walk(V), 0.25) as originals:
            torch.testing.assert_close(quadratic.flat(), before - 0.25 * V)
            assert torch.equal(torch.cat([p.reshape(-1) for p in originals]), before)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("transposed", [False, True])
    def test_restores_bit_for_bit_when_the_gradient_raises(
        self, dtype: torch.dtype, transposed: bool
    ) -> None:
        quadratic = Quadratic(dtype, transposed=transposed)
        strides = [p.stride() for p in quadratic.parameters]
        seen = []

        def fail() -> list[Tensor]:
            seen.append(not quadratic.is_back())
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
        assert quadratic.is_back()
        assert [p.stride() for p in quadratic.parameters] == strides

    def test_restores_when_the_direction_raises_half_way(self) -> None:
        quadratic = Quadratic()

        def direction() -> Iterator[Tensor]:
            yield V[:4]
            raise RuntimeError("no more")

        with pytest.raises(RuntimeError, match="no more"), displaced(quadratic.parameters, direction, 0.1):
            pass
        assert quadratic.is_back()

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


# The floor is 32 representable steps of a typical parameter, the root mean square over all tensors.
FLOOR = 32 * torch.finfo(torch.float32).eps * math.sqrt((3 * 4 + 1 * 16) / 4)


@pytest.mark.parametrize(
    ("parameters", "lr", "distance"),
    [
        ([torch.full((4,), 10.0)], 1e-3, 1e-3),
        ([torch.full((3,), 2.0), torch.full((1,), 4.0)], 0.0, FLOOR),
        ([torch.full((3,), 2.0), torch.full((1,), 4.0)], 1e-9, FLOOR),
        ([torch.zeros(3)], 0.0, torch.finfo(torch.float32).tiny),
        ([torch.ones(4, dtype=torch.float64)], 1e-12, 1e-12),
        ([torch.ones(4, dtype=torch.bfloat16)], 0.5, 0.5),
    ],
)
def test_a_probe_distance_is_the_learning_rate_where_the_dtype_resolves_it(
    parameters: list[Tensor], lr: float, distance: float
) -> None:
    assert probe_distance(parameters, lr=lr) == pytest.approx(distance, rel=1e-6)
