"""Processes that measure together: sums, meetings, failures, and whole measurements against one process."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_surge.measure.coordinates import CoordinateMeasurement
from lightning_surge.measure.distributed import RankError, Ranks
from lightning_surge.measure.measurement import LawMeasurement
from lightning_surge.measure.probing import Prober
from lightning_surge.measure.records import Measurement
from lightning_surge.measure.replay import Piece
from tests.processes import on_ranks

EXAMPLES, WIDTH = 32, 5


def ranks(rank: int, count: int) -> Ranks:
    return Ranks(count=count, rank=rank)


class TestTogether:
    def test_numbers(self) -> None:
        def work(rank: int, count: int) -> Any:
            group = ranks(rank, count)
            return group.total(float(rank), 1.0), group.least(float(rank), -1.0 * rank), group.first(rank + 7)

        assert on_ranks(work, 3) == [((3.0, 3.0), (0.0, -2.0), 7)] * 3

    def test_examples_of_one_replica_count_once(self) -> None:
        def work(rank: int, count: int) -> Any:
            return Ranks(count=count, rank=rank, replicas=2).examples(3.0, 8.0)

        assert on_ranks(work, 4) == [(6.0, 16.0)] * 4

    def test_gradients_are_summed_and_none_counts_as_zero(self) -> None:
        def work(rank: int, count: int) -> Any:
            weight = torch.zeros(3, requires_grad=True)
            rare = torch.zeros(2, 2, requires_grad=True)
            half = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
            weight.grad = torch.arange(3.0) + rank
            half.grad = torch.ones(2, dtype=torch.bfloat16)
            if rank == 1:
                rare.grad = torch.tensor([[0.0, 0.0], [5.0, 0.0]]).to_sparse()
            ranks(rank, count).sum_gradients([weight, rare, half])
            return [p.grad.tolist() for p in (weight, rare, half) if p.grad is not None]

        expected = [[1.0, 3.0, 5.0], [[0.0, 0.0], [5.0, 0.0]], [2.0, 2.0]]
        assert on_ranks(work, 2) == [expected, expected]

    def test_large_gradients_take_several_messages(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("lightning_surge.measure.distributed.MESSAGE_ELEMENTS", 4)

        def work(rank: int, count: int) -> Any:
            tensors = [torch.full((n,), float(rank + n)) for n in (1, 2, 3, 9, 1)]
            ranks(rank, count).sum(tensors)
            return [tensor.tolist() for tensor in tensors]

        expected = [[2.0 * n + 1.0] * n for n in (1, 2, 3, 9, 1)]
        assert on_ranks(work, 2) == [expected, expected]

    def test_a_failure_is_everybodys(self) -> None:
        def work(rank: int, count: int) -> str:
            group, weight = ranks(rank, count), torch.zeros(1, requires_grad=True)
            try:
                if rank == 1:
                    group.meet(failed=True)
                    return "failed"
                group.sum_gradients([weight])
            except RankError as error:
                assert weight.grad is None or float(weight.grad) == 0.0
                return str(error)
            return "went on"

        message = "Expected 3 processes to measure together, but 1 of them failed"
        assert on_ranks(work, 3) == [message, "failed", message]


def data() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(EXAMPLES, WIDTH, dtype=torch.float64, generator=generator)


def prober(weight: Tensor, group: Ranks) -> Prober:
    def compute_loss(batch: Tensor, batch_idx: int) -> Tensor:
        return torch.log1p((batch @ weight - 1.0).square()).mean()

    return Prober(
        [weight],
        compute_loss=compute_loss,
        backward=lambda loss: loss.backward(),  # type: ignore[no-untyped-call]
        batch_size_fn=len,
        split_batch=lambda batch, count: batch.chunk(count),
        ranks=group,
    )


def law_measurement(batch: Tensor, group: Ranks, law: str) -> tuple[Measurement, list[float]]:
    """What is measured from a batch, cut into slices, with the sizes of the chunks."""
    weight = torch.linspace(-0.5, 0.5, WIDTH, dtype=torch.float64).requires_grad_()
    probe = prober(weight, group)
    chunks = probe.chunks([Piece(batch, 0, float(len(batch)))], 4.0, fewest=8)
    options: dict[str, Any] = {"replay": probe.replay, "delta": 1e-3, "scales": [1.0], "ranks": group}
    if law != "measured":
        options |= {"sizes": (2.0, 4.0), "law": law, "seed": 1}
    kind = LawMeasurement if law == "measured" else CoordinateMeasurement
    measured = kind([weight], **options).run(chunks)
    assert weight.grad is None
    return measured, [chunk.size for chunk in chunks]


def interleaved(lengths: Sequence[int]) -> Tensor:
    """One batch whose k-th slice holds the k-th slices of every process's batch."""
    parts = [part.chunk(8) for part in data().split(list(lengths))]
    assert {len(part) for part in parts} == {8}
    return torch.cat([torch.cat(slices) for slices in zip(*parts, strict=True)])


def flat(value: Any) -> list[float]:
    if isinstance(value, tuple):
        return [number for part in value for number in flat(part)]
    return [] if value is None else [float(value)]


@pytest.mark.parametrize(
    ("law", "lengths"),
    [(law, [EXAMPLES // n] * n) for law in ("measured", "theorem2", "theorem3") for n in (2, 4)]
    + [("measured", [24, 8])],
)
def test_processes_measure_what_one_measures_on_all_examples(law: str, lengths: list[int]) -> None:
    """A process with a shorter batch counts by its examples."""

    def work(rank: int, count: int) -> Any:
        return law_measurement(data().split(lengths)[rank], ranks(rank, count), law)

    together = on_ranks(work, len(lengths))
    assert all(result == together[0] for result in together)
    measured, sizes = together[0]
    alone, sizes_alone = law_measurement(interleaved(lengths), Ranks(), law)
    assert sizes == sizes_alone == [4.0] * 8
    assert flat(measured) == pytest.approx(flat(alone), rel=1e-6, abs=1e-9, nan_ok=True)


def test_slices_are_as_many_as_the_shortest_batch_allows() -> None:
    lengths = [27, 5]

    def work(rank: int, count: int) -> Any:
        batch = data().split(lengths)[rank]
        weight = torch.zeros(WIDTH, dtype=torch.float64, requires_grad=True)
        chunks = prober(weight, ranks(rank, count)).chunks([Piece(batch, 0, float(len(batch)))], 4.0)
        return [len(chunk.pieces) for chunk in chunks], [chunk.size for chunk in chunks]

    (long, sizes), (short, same) = on_ranks(work, 2)
    assert sizes == same
    assert sum(sizes) == EXAMPLES
    assert len(long) == len(short) == 5
    assert short == [1] * 5


class TestSlices:
    @pytest.mark.parametrize("couples", [False, True])
    def test_agree_or_not_on_all_processes_alike(self, couples: bool) -> None:
        def work(rank: int, count: int) -> Any:
            batch = data().split(EXAMPLES // count)[rank]
            weight = torch.zeros(WIDTH, dtype=torch.float64, requires_grad=True)
            probe = prober(weight, ranks(rank, count))
            if couples and rank == 1:
                probe._compute_loss = lambda batch, _: (batch @ weight - 1.0).square().sum()
            return probe.slices_agree(Piece(batch, 0, float(len(batch))), 4)[0]

        assert on_ranks(work, 2) == [not couples] * 2
