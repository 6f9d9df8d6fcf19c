"""Mean and variance read off Adam's averages, against gradients of known distribution."""

import math

import pytest
import torch

from lightning_surge.optimizers.moments import AdamMoments

COORDINATES = 4000
SIGMA = 3.0


def feed(optimizer: torch.optim.Optimizer, moments: AdamMoments, sizes: list[int], seed: int = 0) -> None:
    """Gradients of batches of given sizes, through an optimizer that does not move."""
    generator = torch.Generator().manual_seed(seed)
    (parameter,) = optimizer.param_groups[0]["params"]
    moments.begin(optimizer)
    for size in sizes:
        noise = torch.randn(COORDINATES, generator=generator) * SIGMA / math.sqrt(size)
        parameter.grad = 0.5 + noise
        optimizer.step()
        moments.step(size, optimizer.param_groups[0]["betas"])


def adam(kind: type[torch.optim.Optimizer] = torch.optim.AdamW, **options: object) -> torch.optim.Optimizer:
    parameter = torch.nn.Parameter(torch.zeros(COORDINATES))
    return kind([parameter], lr=0.0, betas=(0.9, 0.99), **options)


@pytest.mark.parametrize(
    "sizes",
    [[8] * 300, [4] * 150 + [64] * 150, [64] * 200 + [4] * 40],
    ids=["constant", "growing", "shrinking"],
)
def test_variance_is_unbiased_at_constant_and_changing_batch_sizes(sizes: list[int]) -> None:
    optimizer, moments = adam(), AdamMoments()
    feed(optimizer, moments, sizes)
    assert moments.readable(optimizer)
    (parameter,) = optimizer.param_groups[0]["params"]
    # Before the clamp at zero, which nothing reaches here.
    variance = moments.variance(optimizer, parameter)
    assert variance is not None
    assert moments.deviation_l1(optimizer) == pytest.approx(float(variance.sqrt().sum()), rel=1e-5)
    error = float(variance.std()) / math.sqrt(COORDINATES)
    assert abs(float(variance.mean()) - SIGMA**2) < 4 * error
    assert error < 0.03 * SIGMA**2  # the test would notice a wrong a or b


def test_ratio_at_a_constant_batch_size() -> None:
    moments = AdamMoments()
    for _ in range(3000):
        moments.step(16.0, (0.9, 0.99))
    assert moments.second == pytest.approx(1 / 16)
    assert moments.first / moments.second == pytest.approx((1 - 0.9) / (1 + 0.9))


def test_coupled_weight_decay_is_declined_and_decoupled_is_not() -> None:
    for kind, weight_decay, readable in (
        (torch.optim.Adam, 0.1, False),
        (torch.optim.Adam, 0.0, True),
        (torch.optim.AdamW, 0.1, True),
    ):
        optimizer, moments = adam(kind, weight_decay=weight_decay), AdamMoments()
        feed(optimizer, moments, [8] * 20)
        assert moments.readable(optimizer) is readable
        assert math.isnan(moments.deviation_l1(optimizer)) is not readable


def test_averages_with_an_unseen_past_are_declined_until_it_has_faded() -> None:
    optimizer, seen = adam(), AdamMoments()
    feed(optimizer, seen, [8] * 50)
    late = AdamMoments()
    feed(optimizer, late, [8] * 50)
    assert not late.readable(optimizer)
    feed(optimizer, late, [8] * 300)
    assert late.readable(optimizer)


def test_sgd_has_no_moments() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    assert not AdamMoments().readable(torch.optim.SGD([parameter], lr=0.1))


def test_state_goes_on_where_it_was_and_a_fresh_optimizer_starts_afresh() -> None:
    optimizer, moments = adam(), AdamMoments()
    feed(optimizer, moments, [4, 8, 16, 32])
    restored = AdamMoments()
    restored.load_state_dict(moments.state_dict())
    for each in (moments, restored):
        each.step(8.0, (0.9, 0.99))
    assert (restored.first, restored.second) == (moments.first, moments.second)
    restored.begin(adam())
    assert restored.state_dict() == AdamMoments().state_dict()


@pytest.mark.parametrize(("beta_1", "readable"), [(1 / 3, False), (1 / 3 + 0.02, True)])
def test_the_least_momentum_is_that_of_a_long_run(beta_1: float, readable: bool) -> None:
    parameter = torch.nn.Parameter(torch.zeros(COORDINATES))
    optimizer, moments = torch.optim.AdamW([parameter], lr=0.0, betas=(beta_1, 0.99)), AdamMoments()
    feed(optimizer, moments, [8] * 2000)
    assert moments.readable(optimizer) is readable
