"""The largest eigenvalue of the preconditioned Hessian, found across measurements."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from lightning_surge.measure import gradients
from lightning_surge.measure.curvature import Sample
from lightning_surge.measure.records import SizedValue
from lightning_surge.measure.sharpness import FIRST_SECANTS, SECANTS, Sharpness
from lightning_surge.optimizers.families import stability_constant

SIZE = 12
ROOTS = {8.0: torch.linspace(0.5, 2.0, SIZE).double(), 32.0: torch.linspace(0.8, 2.5, SIZE).double()}
ROOTS[128.0] = 2.0 * ROOTS[8.0]


def hessian(seed: int = 0, noise: float = 0.0) -> Tensor:
    """Symmetric, of both signs, with a positive eigenvalue of largest modulus under each preconditioner."""
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    matrix = half @ half.T - 2.0 * torch.eye(SIZE, dtype=torch.float64)
    bump = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return matrix + noise * (bump + bump.T)


def largest(batch_size: float, matrix: Tensor) -> float:
    root = ROOTS[batch_size]
    return float(torch.linalg.eigvalsh(root[:, None] * matrix * root)[-1])


def direction(batch_size: float, matrix: Tensor) -> Tensor:
    """The sharpest one, in the parameters."""
    root = ROOTS[batch_size]
    return root * torch.linalg.eigh(root[:, None] * matrix * root).eigenvectors[:, -1]


class Quadratic:
    """Its gradient is a matrix times the parameters, here of 8 and 4 elements."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        start = torch.randn(SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
        self.parameters = [start[:8].reshape(2, 4).clone(), start[8:].clone()]
        self.calls = 0

    def gradient(self, matrix: Tensor) -> list[Tensor]:
        self.calls += 1
        flat = matrix @ torch.cat([p.reshape(-1) for p in self.parameters]).double()
        flat = flat.to(self.parameters[0].dtype)
        return [flat[:8].reshape(2, 4), flat[8:]]

    def walk(self, batch_size: float) -> Iterator[Tensor]:
        for part in ROOTS[batch_size].split([8, 4]):
            for (block,) in gradients.blocks(part.to(self.parameters[0].dtype)):
                yield block

    def measure(
        self,
        sharpness: Sharpness,
        matrix: Tensor,
        sizes: tuple[float, ...] = (8.0, 32.0),
        delta: float = 0.1,
        judge: Tensor | None = None,
    ) -> tuple[SizedValue, ...]:
        samples = [
            Sample(self.gradient(each), lambda each=each: self.gradient(each))  # type: ignore[misc]
            for each in (matrix, matrix if judge is None else judge)
        ]
        return sharpness.measure(
            self.parameters,
            sizes=sizes,
            inverse_root=self.walk,
            search=samples[0],
            judge=samples[1],
            delta=delta,
        )


class TestExact:
    @pytest.mark.parametrize("delta", [1e-6, 0.1, 10.0])
    @pytest.mark.parametrize("block", [3, 1 << 20])
    def test_converges_to_the_largest_eigenvalue(
        self, delta: float, block: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gradients, "BLOCK_ELEMENTS", block)
        quadratic, sharpness = Quadratic(), Sharpness()
        for _ in range(150):
            values = quadratic.measure(sharpness, hessian(), delta=delta)
        assert [value.batch_size for value in values] == [8.0, 32.0]
        assert values[0].value == pytest.approx(largest(8.0, hessian()), rel=1e-6)
        # Along the same direction, with the other preconditioner.
        d = direction(8.0, hessian())
        other = float(d @ hessian() @ d / torch.sum((d / ROOTS[32.0]) ** 2))
        assert values[1].value == pytest.approx(other, rel=1e-5)
        assert other <= largest(32.0, hessian())

    def test_a_preconditioner_that_changes_in_proportion_has_the_same_direction(self) -> None:
        quadratic, sharpness = Quadratic(), Sharpness()
        for _ in range(150):
            values = quadratic.measure(sharpness, hessian(), (8.0, 128.0))
        assert values[1].value == pytest.approx(4.0 * values[0].value)
        assert values[1].value == pytest.approx(largest(128.0, hessian()), rel=1e-6)

    def test_one_measurement_is_two_steps_of_a_dense_power_iteration(self) -> None:
        """On one sample, then, from which the value comes, on the other."""
        quadratic, sharpness = Quadratic(), Sharpness()
        root = ROOTS[8.0]
        search, judge = (root[:, None] * hessian(seed, 1.0) * root for seed in (1, 2))
        w = root * torch.cat([g.reshape(-1) for g in quadratic.gradient(hessian(1, 1.0))])
        for _ in range(FIRST_SECANTS):
            w = search @ w
        assert quadratic.measure(sharpness, hessian(1, 1.0), (8.0,), judge=hessian(2, 1.0)) == ()
        for _ in range(3):
            (value,) = quadratic.measure(sharpness, hessian(1, 1.0), (8.0,), judge=hessian(2, 1.0))
            w = search @ w
            assert value.value == pytest.approx(float(w @ judge @ w / (w @ w)), rel=1e-8)
            w = judge @ w

    def test_a_cold_vector_tells_nothing_and_a_warm_one_costs_two_gradients(self) -> None:
        quadratic, sharpness = Quadratic(), Sharpness()
        assert sharpness.secants == FIRST_SECANTS
        assert quadratic.measure(sharpness, hessian()) == ()
        assert quadratic.calls == 2 + FIRST_SECANTS
        assert sharpness.secants == SECANTS
        assert len(quadratic.measure(sharpness, hessian())) == 2
        assert quadratic.calls == 2 + FIRST_SECANTS + 2 + SECANTS

    def test_parameters_are_put_back_bit_for_bit(self) -> None:
        quadratic, sharpness = Quadratic(torch.float32), Sharpness()
        before = [p.clone() for p in quadratic.parameters]
        for _ in range(3):
            quadratic.measure(sharpness, hessian())
        assert all(map(torch.equal, quadratic.parameters, before))

    def test_missing_gradients_and_coordinates_without_averages_are_left_out(self) -> None:
        quadratic, sharpness = Quadratic(), Sharpness()
        matrix = hessian()
        matrix[8:] = matrix[:, 8:] = 0.0
        for _ in range(200):
            sample = Sample(quadratic.gradient(matrix), lambda: [quadratic.gradient(matrix)[0], None])
            values = sharpness.measure(
                quadratic.parameters,
                sizes=[8.0, 32.0],
                inverse_root=lambda size: iter([ROOTS[size][:8], torch.zeros(4).double()]),
                search=sample,
                judge=sample,
                delta=0.1,
            )
        assert math.isfinite(values[1].value)
        assert values[0].value == pytest.approx(largest(8.0, matrix), rel=1e-6)


class TestState:
    def test_goes_on_bit_for_bit(self) -> None:
        quadratic, sharpness, resumed = Quadratic(torch.float32), Sharpness(), Sharpness()
        for seed in range(3):
            quadratic.measure(sharpness, hessian(seed, 1.0))
        resumed.load_state_dict(sharpness.state_dict())
        for seed in range(3, 6):
            left = quadratic.measure(sharpness, hessian(seed, 1.0))
            assert left == quadratic.measure(resumed, hessian(seed, 1.0))
            assert len(left) == 2

    def test_other_parameters_start_afresh(self) -> None:
        quadratic, sharpness = Quadratic(), Sharpness()
        quadratic.measure(sharpness, hessian())
        theta = torch.ones(3)
        sample = Sample([theta * 1.0], lambda: [theta * 1.0])
        values = sharpness.measure(
            [theta],
            sizes=[8.0, 32.0],
            inverse_root=lambda size: iter([torch.ones(3)]),
            search=sample,
            judge=sample,
            delta=0.1,
        )
        assert values == ()

    @pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
    def test_a_useless_product_raises_and_the_next_search_starts_afresh(self, bad: float) -> None:
        quadratic, sharpness = Quadratic(), Sharpness()
        quadratic.measure(sharpness, hessian())
        with pytest.raises(ValueError, match="starts its search afresh"):
            quadratic.measure(sharpness, torch.full((SIZE, SIZE), bad, dtype=torch.float64))
        assert sharpness.secants == FIRST_SECANTS
        assert quadratic.measure(sharpness, hessian()) == ()


FROZEN = (0.9, 1.0 - 1e-12)


class TestStabilityConstant:
    """The optimizers themselves, with a second moment that holds still, on a quadratic."""

    @pytest.mark.parametrize("beta_1", [0.0, 0.5, 0.9, 0.95])
    @pytest.mark.parametrize(
        "kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RAdam, torch.optim.NAdam]
    )
    @pytest.mark.parametrize(("share", "diverges"), [(0.97, False), (1.03, True)])
    def test_runs_just_below_converge_and_just_above_diverge(
        self, kind: Callable[..., torch.optim.Optimizer], beta_1: float, share: float, diverges: bool
    ) -> None:
        matrix = hessian() + 2.0 * torch.eye(SIZE, dtype=torch.float64)
        theta = torch.nn.Parameter(torch.full((SIZE,), 1e-3, dtype=torch.float64))
        preconditioner = 1.0 / ROOTS[8.0] ** 2
        optimizer = kind([theta], lr=1.0, betas=(beta_1, FROZEN[1]), weight_decay=0.0)
        lr = share * stability_constant(optimizer) / largest(8.0, matrix)
        optimizer.param_groups[0]["lr"] = lr
        theta.grad = torch.zeros_like(theta)
        optimizer.step()
        state = optimizer.state[theta]
        state["exp_avg_sq"] = preconditioner**2
        state["step"] = torch.tensor(1e15, dtype=torch.float64)
        if "mu_product" in state:
            state["mu_product"] = torch.tensor(0.0)
        before = growth = float(theta.detach().norm())
        for _ in range(1500):
            theta.grad = matrix @ theta.detach()
            optimizer.step()
            growth = float(theta.detach().norm()) / before
            if growth > 1e3:
                break  # far beyond, even so slow a second moment moves
        assert growth > 1e3 if diverges else growth < 1.0
