"""Examples are counted where that is certain, and asked for where it is not."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_surge import SurgeLRCallback
from lightning_surge.callbacks.batch_counter import BatchCounter
from tests.trainings import Regression, make_trainer

Fields = namedtuple("Fields", ["x", "y"])


@dataclass
class Record:
    x: Tensor
    y: Tensor


class Encoding(dict[str, Any]):
    """As of a tokenizer: a mapping that is no plain dict."""


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(range(100))


def loader(size: int | None, examples: int = 100, **options: Any) -> DataLoader[Any]:
    return DataLoader(range(examples), size, **options)  # type: ignore[arg-type]


def rows(*leading: int) -> tuple[Tensor, ...]:
    return tuple(torch.zeros(length, 3) for length in leading)


CERTAIN: dict[str, tuple[Any, Any, float]] = {
    "tensor": (torch.zeros(8, 3), loader(8), 8.0),
    "tuple": (rows(8, 8), loader(8), 8.0),
    "dict": ({"x": torch.zeros(8, 3), "y": torch.zeros(8)}, loader(8), 8.0),
    "mapping": (Encoding(x=torch.zeros(8, 3)), loader(8), 8.0),
    "named tuple": (Fields(*rows(8, 8)), loader(8), 8.0),
    "dataclass": (Record(*rows(8, 8)), loader(8), 8.0),
    "nested": ({"x": [torch.zeros(8, 3), {"z": torch.zeros(8)}], "n": 3}, loader(8), 8.0),
    "strings": ({"text": ["a", "b"], "y": torch.zeros(2)}, loader(2), 2.0),
    "scalars beside": ((torch.tensor(0.5), torch.zeros(8, 3)), loader(8), 8.0),
    "graphs": (SimpleNamespace(x=torch.zeros(37, 3), num_graphs=8), loader(8), 8.0),
    "pairs": ([(torch.zeros(3, 32, 32), torch.tensor(1)) for _ in range(16)], loader(16), 16.0),
    "class weights behind": ((torch.zeros(16, 3), torch.zeros(10)), loader(16), 16.0),
    "no loader": (rows(8, 8), None, 8.0),
    "two loaders": ({"a": torch.zeros(4, 3), "b": torch.zeros(4, 3)}, {"a": loader(4), "b": loader(4)}, 4.0),
    "batches of a sampler": (rows(5, 5), loader(1, batch_sampler=[[0, 1, 2, 3, 4]]), 5.0),
    "a data set shorter than the batch": (rows(5, 5), loader(8, 5), 5.0),
    "a stream that ends": (rows(5, 5), DataLoader(Stream(), 8), 5.0),
}
UNCERTAIN: dict[str, tuple[Any, Any, str]] = {
    "time first": (torch.zeros(128, 8, 3), loader(8), r"got 128 .*\(128, 8, 3\)\. .* says batch_size=8"),
    "nodes": ((torch.zeros(37, 3), torch.zeros(2, 90)), loader(8), "got 37 .* and 2 in others"),
    "images of a detection batch": (
        ((torch.zeros(3, 32, 32),) * 16, ({"boxes": torch.zeros(2, 4)},) * 16),
        loader(16),
        "got 3 in the first tensor",
    ),
    "pairs from nowhere": ([(torch.zeros(3, 32), torch.zeros(2))] * 16, None, "got 3 .* and 2 in others"),
    "views of a contrastive loss": (torch.zeros(16, 3), loader(8), "got 16 .*says batch_size=8"),
    "fewer than the loader's": (torch.zeros(4, 3), loader(8), "got 4 .*says batch_size=8"),
    "more than a stream's": (torch.zeros(16, 3), DataLoader(Stream(), 8), "got 16"),
    "loaders of two sizes": ({"a": torch.zeros(4, 3), "b": torch.zeros(8, 3)}, {}, "got 4 .* and 8"),
    "nothing": (object(), loader(8), "got no tensor"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CERTAIN)
def test_what_is_certain_is_counted(kind: str) -> None:
    batch, source, examples = CERTAIN[kind]
    assert BatchCounter(None, "Owner").first(batch, source) == examples


@pytest.mark.parametrize("kind", UNCERTAIN)
def test_what_is_not_is_refused(kind: str) -> None:
    batch, source, found = UNCERTAIN[kind]
    message = f"Owner cannot tell how many .*{found}.*batch_size_fn="
    with pytest.raises(MisconfigurationException, match=message):
        BatchCounter(None, "Owner").first(batch, source)


def test_the_first_batch_of_a_loader_decides_for_the_rest() -> None:
    count, first = BatchCounter(None, "Owner"), loader(8)
    assert count.first(rows(8), first) == 8.0
    assert count.first(rows(3), first) == 3.0  # the last one of an epoch
    with pytest.raises(MisconfigurationException, match="got 3"):
        count.first(rows(3), loader(8))


@pytest.mark.parametrize("value", [0, 0.0, 7, torch.tensor(7), 2.5])
def test_a_function_may_count_anything_from_zero(value: Any) -> None:
    assert BatchCounter(lambda batch: value, "Owner").first(rows(8), loader(16)) == float(value)


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "many", None, torch.zeros(2)])
def test_a_function_counts_numbers(value: Any) -> None:
    with pytest.raises(ValueError, match="Expected batch_size_fn to return 0 <= examples < inf, got"):
        BatchCounter(lambda batch: value, "Owner").first(rows(8), loader(16))


# ---------------------------------------------------------------------- in a training


@dataclass
class Late:
    x: Tensor
    scale: InitVar[float] = 1.0
    cached: Tensor | None = field(init=False, default=None)

    def __post_init__(self, scale: float) -> None:
        self.x = self.x * scale


@dataclass
class Strict:
    x: Tensor

    def __post_init__(self) -> None:
        if len(self.x) != 8:
            raise TypeError("eight rows")


class Rows(Regression):
    def __init__(self, empty: int | None = None) -> None:
        super().__init__(features=3)
        self.empty = empty

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.net(batch.x if hasattr(batch, "x") else batch).square().mean()
        return loss * 0.0 if batch_idx == self.empty else loss


def stacked(make: Callable[[Tensor], Any]) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    data = list(torch.randn(80, 3, generator=generator))
    return DataLoader(data, 8, collate_fn=lambda examples: make(torch.stack(examples)))  # type: ignore[arg-type]


@pytest.mark.parametrize("law", ["measured", "sqrt"])
@pytest.mark.parametrize("make", [Late, Strict, Record], ids=lambda kind: kind.__name__)
def test_dataclasses_are_visited_and_not_made_anew(make: Any, law: Any) -> None:
    kind = make if make is not Record else (lambda x: Record(x, x[:, 0]))
    callback = SurgeLRCallback(2, law, **({"probe_every": 1} if law == "measured" else {}))
    make_trainer(callback).fit(Rows(), stacked(kind))
    assert callback.history.num_measurements == (9 if law == "measured" else 0)
    assert callback.decision is not None
    assert callback.decision.used > 1.0


def test_a_batch_of_nothing_weighs_nothing() -> None:
    sizes = iter([8, 0, 8, 8, 0, 0, 8, 8, 8, 8])
    callback = SurgeLRCallback(8, "sqrt", batch_size_fn=lambda batch: next(sizes))
    module = Rows(empty=1)
    trainer = make_trainer(callback)
    trainer.fit(module, stacked(lambda x: x))
    assert trainer.global_step == 10
    assert callback._measurer.budget.trained == 56.0
