"""What `make field` says of a library: tried on trainings of which it is known."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.field.__main__ import Row, examine, kind_of, page
from benchmarks.field.libraries import EXAMPLES, Library
from benchmarks.trainer import quiet_trainer

Step = Callable[[BoringModel, Any], Tensor]


def mean(model: BoringModel, batch: Any) -> Tensor:
    return model(batch["x"]).square().mean()


def library(make_step: Callable[[], Step] = lambda: mean, *, nodes: bool = False) -> Library:
    """Forty-eight rows of noise, in batches that can hold something longer in front of them."""

    def collate(rows: list[Tensor]) -> dict[str, Any]:
        x = torch.stack(rows)
        return {"nodes": torch.zeros(2 * len(x), 3), "x": x} if nodes else {"x": x}

    def fit(callbacks: list[Any]) -> None:
        step = make_step()

        class Module(BoringModel):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                return step(self, batch)

        data: Any = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
        loader = DataLoader(data, EXAMPLES, collate_fn=collate)
        quiet_trainer(callbacks, max_steps=6).fit(Module(), loader)

    return Library("torch", "a layer", fit, lambda batch: len(batch["x"]))


def growing(passes: Iterator[int]) -> Step:
    """A loss that grows with every pass."""
    return lambda model, batch: mean(model, batch) * next(passes)


def test_a_training_that_is_left_alone() -> None:
    row = examine(library())
    assert (row.dry_run_equal, row.factor_right, row.asked, row.updates) == (True, True, [], 6)
    assert (row.optimizer, row.batch, row.pieces, row.measurements) == ("torch SGD", "dict", "slices", 2)


def test_what_is_refused_is_passed_as_the_message_asks() -> None:
    row = examine(library(nodes=True))
    assert row.asked == ["batch_size_fn", "split_batch"]
    assert (row.dry_run_equal, row.factor_right) == (True, True)


def test_a_wrong_count_is_a_wrong_factor() -> None:
    row = examine(library(nodes=True)._replace(count=lambda batch: 2 * len(batch["x"])))
    assert (row.dry_run_equal, row.factor_right) == (True, False)
    assert "**no**" in page([row])


def test_a_trace_that_nobody_can_see_is_an_unequal_dry_run() -> None:
    row = examine(library(lambda: growing(itertools.count(1))))
    assert (row.dry_run_equal, row.factor_right) == (False, True)


def test_a_training_that_cannot_be_repeated_is_no_reference() -> None:
    step = growing(itertools.count(1))
    with pytest.raises(RuntimeError, match="repeats itself"):
        examine(library(lambda: step))


@pytest.mark.parametrize(
    ("batch", "kind"),
    [
        (torch.zeros(2), "Tensor"),
        ({"x": 1}, "dict"),
        ([(torch.zeros(2), None), torch.zeros(2)], "list[tuple[Tensor, None], Tensor]"),
        (tuple("many"), "tuple"),
        (Row, "type"),
    ],
)
def test_kinds_of_batches(batch: Any, kind: str) -> None:
    assert kind_of(batch) == kind
