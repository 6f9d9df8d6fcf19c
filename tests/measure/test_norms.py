"""Norms that pass by: what they say of the noise, for any sizes and factors; gradients stay as they are."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_surge.measure.distributed import ALONE, Ranks
from lightning_surge.measure.gradients import squared_norm
from lightning_surge.measure.norms import (
    HookedNorms,
    NormSums,
    Row,
    StashedNorms,
    WindowNorms,
    gradient_norms,
)
from tests.drawn import within
from tests.processes import on_ranks

SIZES, FACTORS = [3.0, 1.0, 8.0, 2.0], [0.25, 0.05, 0.4, 0.3]


def own_loss(weight: Tensor, batch: Tensor) -> Tensor:
    return torch.tanh(batch @ weight).square().mean()


def batches(sizes: Sequence[float], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(int(size), 5, generator=generator, dtype=torch.float64) for size in sizes]


def window(norms: WindowNorms, weight: Tensor, rows: Sequence[Tensor], factors: Sequence[float]) -> None:
    """Accumulate as a training does, with every loss multiplied by 8 besides."""
    norms.open(len(rows))
    for index, (batch, factor) in enumerate(zip(rows, factors, strict=True)):
        norms.before_backward()
        (8.0 * factor * own_loss(weight, batch)).backward()
        norms.after_backward(len(batch), factor, 8.0, last=index == len(rows) - 1)
    norms.end((), float(sum(map(len, rows))))


def exact(weight: Tensor, rows: Sequence[Tensor], factors: Sequence[float]) -> NormSums:
    """From the gradients themselves: products of different chunks, and their squares."""
    grads = [torch.autograd.grad(own_loss(weight, batch), weight)[0] for batch in rows]
    n = float(sum(map(len, rows)))
    others = [(j, k) for j in range(len(rows)) for k in range(len(rows)) if j != k]
    return NormSums(
        cross=n**2 * sum(factors[j] * factors[k] * float(grads[j] @ grads[k]) for j, k in others),
        pairs=n**2 * sum(factors[j] * factors[k] for j, k in others),
        spread=sum(len(batch) * float(g @ g) for batch, g in zip(rows, grads, strict=True)),
        examples=n,
        chunks=float(len(rows)),
        windows=1.0,
    )


def numbers(sums: NormSums) -> list[float]:
    return list(vars(sums).values())


def weight_of(*, watched: bool = False) -> Tensor:
    weight = torch.linspace(-0.5, 0.5, 5, dtype=torch.float64).requires_grad_()
    if watched:
        weight.register_post_accumulate_grad_hook(lambda parameter: None)
    return weight


class TestSums:
    @pytest.mark.parametrize("factors", [FACTORS, [size / 14.0 for size in SIZES], [0.25] * 4], ids=str)
    def test_are_unbiased_for_any_sizes_and_factors(self, factors: list[float]) -> None:
        """Correlated Gaussian noise: |G|^2 = 0.51, tr Sigma = 10."""
        rng = np.random.default_rng(3)
        mean, root = (
            np.array([0.5, -0.5, 0.1]),
            np.array([[2.0, 0, 0], [1.0, 1.0, 0], [-1.0, 1.0, math.sqrt(2)]]),
        )
        found = []
        for _ in range(3000):
            grads = [mean + root @ rng.normal(size=3) / math.sqrt(size) for size in SIZES]
            total = sum(a * g for a, g in zip(factors, grads, strict=True))
            rows = [Row(a**2 * float(g @ g), n, a) for a, g, n in zip(factors, grads, SIZES, strict=True)]
            found.append(NormSums.of_window(float(total @ total), rows).measurement().statistics)
        within([statistics.grad_sq for statistics in found], float(mean @ mean))
        within([statistics.trace_cov for statistics in found], float(np.trace(root @ root.T)))
        assert {statistics.batch_size for statistics in found} == {14.0}

    def test_of_several_windows_count_by_pairs_of_examples(self) -> None:
        small = NormSums.of_window(2.0, [Row(0.5, 1.0, 0.5)] * 2)
        large = NormSums.of_window(1.5, [Row(0.25, 4.0, 0.5)] * 2)
        measured = (small + large).measurement()
        # |G|^2 is 2 from 2 pairs and 2 from 32.
        assert measured.statistics[:3] == pytest.approx((5.0, 2.0, (2 * 2.0 + 8 * 1.0 - 2.0 * 10) / 4))
        assert (measured.pairs, measured.num_chunks, measured.passes) == (34.0, 2, 0.0)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_leave_out_what_is_not_finite_or_shows_no_noise(self, bad: float) -> None:
        assert NormSums.of_window(bad, [Row(0.5, 1.0, 0.5)] * 2) == NormSums()
        assert NormSums.of_window(2.0, [Row(2.0, 1.0, 1.0)]) == NormSums()


class TestWindows:
    @pytest.mark.parametrize("watched", [False, True])
    def test_say_what_the_gradients_say_and_leave_them_alone(self, watched: bool) -> None:
        weight, plain = weight_of(watched=watched), weight_of()
        norms = WindowNorms(ALONE)
        norms.follow([weight], afresh=False)
        sums = NormSums()
        for seed in range(3):
            rows = batches(SIZES, seed)
            window(norms, weight, rows, FACTORS)
            for batch, factor in zip(rows, FACTORS, strict=True):
                (8.0 * factor * own_loss(plain, batch)).backward()
            assert torch.equal(weight.grad, plain.grad)
            weight.grad = plain.grad = None
            sums += exact(weight, rows, FACTORS)
        assert (norms.windows, norms.examples) == (3, 42.0)
        assert numbers(NormSums(*norms.state_dict()["sums"])) == pytest.approx(numbers(sums))
        assert norms.take() is not None
        assert norms.take() is None
        assert not weight._backward_hooks

    def test_take_whoever_watches_what_accumulates_as_he_is(self) -> None:
        assert type(gradient_norms(ALONE, [weight_of()])) is StashedNorms
        assert type(gradient_norms(ALONE, [weight_of(watched=True)])) is HookedNorms

    @pytest.mark.parametrize("kind", [StashedNorms, HookedNorms])
    def test_sparse_half_and_missing_gradients(self, kind: Any) -> None:
        torch.manual_seed(0)
        embedding, half = (
            nn.Embedding(4, 2, sparse=True),
            torch.ones(3, dtype=torch.bfloat16, requires_grad=True),
        )
        unused = torch.ones(2, requires_grad=True)
        norms = kind(ALONE)
        for index in (1, 2):
            norms.begin([embedding.weight, half, unused])
            (3.0 * embedding(torch.tensor([index])).sum() + 2.0 * half.sum().float()).backward()
            assert norms.end().item() == pytest.approx(2 * 9.0 + 3 * 4.0)
        assert norms.total().item() == pytest.approx(4 * 9.0 + 3 * 16.0)
        assert unused.grad is None
        norms.begin([embedding.weight, half, unused.requires_grad_(False)])  # frozen meanwhile
        embedding.weight.sum().backward()
        norms.end()
        assert embedding.weight.grad.to_dense().sum() == 12.0 + 8.0

    def test_that_fail_or_ask_twice_for_a_gradient_say_nothing(self) -> None:
        weight = weight_of()
        norms = WindowNorms(ALONE)
        norms.follow([weight], afresh=False)
        rows = batches(SIZES)
        norms.open(len(rows))
        for batch in (*rows, rows[-1]):
            norms.before_backward()
            own_loss(weight, batch).backward()
            norms.after_backward(len(batch), 0.25, 1.0, last=batch is rows[-1])
        norms.end((), 14.0)
        assert norms.take() is None
        before = weight.grad
        kept = before.clone()
        norms.open(2)
        norms.before_backward()
        norms.close()
        assert weight.grad is before
        assert torch.equal(weight.grad, kept)

    @pytest.mark.parametrize("watched", [False, True])
    def test_that_cannot_be_taken_say_nothing_and_leave_gradients_alone(
        self, monkeypatch: pytest.MonkeyPatch, watched: bool
    ) -> None:
        """A failure at each of the norms of a window in turn, and where they are read."""
        weight, plain, rows = weight_of(watched=watched), weight_of(), batches(SIZES)
        for batch, factor in zip(rows, FACTORS, strict=True):
            (8.0 * factor * own_loss(plain, batch)).backward()
        norms = WindowNorms(ALONE)
        norms.follow([weight], afresh=False)
        told = []
        for failing in (1, 3, 5, "stack", None):
            calls = []

            def norm(*args: Any, failing: Any = failing, calls: list[int] = calls) -> Tensor:
                calls.append(1)
                if len(calls) == failing:
                    raise torch.OutOfMemoryError("not enough\nmemory")
                return squared_norm(*args)

            def stack(*args: Any) -> Any:
                raise RuntimeError("no stack")

            with monkeypatch.context() as patch:
                patch.setattr("lightning_surge.measure.norms.squared_norm", norm)
                window(norms, weight, rows, FACTORS)
                if failing == "stack":
                    patch.setattr(torch, "stack", stack)
                assert (norms.take() is None) == (failing is not None)
            told.append(norms.take_failure())
            assert torch.equal(weight.grad, plain.grad)
            weight.grad = None
        assert told == [*["OutOfMemoryError: not enough"] * 3, "RuntimeError: no stack", None]

    def test_go_on_where_their_state_was_taken(self) -> None:
        weight, rows = weight_of(), batches(SIZES)
        whole, first, second = (WindowNorms(ALONE) for _ in range(3))
        for norms, runs in ((whole, 2), (first, 1)):
            norms.follow([weight], afresh=False)
            for _ in range(runs):
                window(norms, weight, rows, FACTORS)
                weight.grad = None
        second.load_state_dict(first.state_dict())
        second.follow([weight], afresh=False)
        window(second, weight, rows, FACTORS)
        assert (second.windows, second.state_dict()) == (2, whole.state_dict())
        with pytest.raises(ValueError, match="Expected finite sums over windows"):
            second.load_state_dict({"sums": [math.nan] * 6, "windows": 1, "examples": 3.0})


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_processes_say_what_one_says_of_all_their_chunks(sharded: bool) -> None:
    """Two processes with two micro-batches each; sharded, each has a half of the gradients' coordinates.

    Before that, a window in which one of them cannot take a norm says nothing on both.
    """
    rows = batches(SIZES)

    def work(rank: int, count: int) -> Any:
        weight = weight_of()
        norms = WindowNorms(Ranks(count=count, rank=rank, sharded=sharded))
        norms.follow([weight], afresh=False)
        found = []
        for fails in (True, False):
            weight.grad = None
            norms.open(2)
            for index, batch in enumerate(rows[rank::2]):
                norms.before_backward()
                (0.5 * own_loss(weight, batch)).backward()
                if sharded or index == 1:  # what the strategy does
                    torch.distributed.all_reduce(weight.grad)
                    weight.grad /= count
                with pytest.MonkeyPatch.context() as patch:
                    if fails and rank and index:
                        patch.setattr("lightning_surge.measure.norms.squared_norm", None)
                    norms.after_backward(len(batch), 0.5, 1.0, last=index == 1)
            norms.end(norms._ranks.total(*norms.message()), 14.0)
            sums = norms.state_dict()["sums"]
            found.append(None if norms.take() is None else sums)
        return found

    (nothing, first), second = on_ranks(work, 2)
    assert second == [nothing, first]
    assert nothing is None
    weight = weight_of()
    if sharded:
        # A micro-batch of both is one chunk, here a plain mean over the processes.
        grads = [
            [torch.autograd.grad(own_loss(weight, b), weight)[0] for b in rows[k : k + 2]] for k in (0, 2)
        ]
        own = [float((0.25 * sum(pair)).square().sum()) for pair in grads]
        total = float((0.25 * sum(sum(pair) for pair in grads)).square().sum())
        wanted = NormSums.of_window(total, [Row(own[0], 4.0, 0.5), Row(own[1], 10.0, 0.5)])
    else:
        wanted = exact(weight, rows, [0.25] * 4)
    assert first == pytest.approx(numbers(wanted))
