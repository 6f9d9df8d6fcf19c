from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_surge.callbacks.lightning_host import BatchCounter


@pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size` from an ambiguous collection")
@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(6, 2),
        [torch.zeros(6), torch.zeros(6, 3)],
        (torch.zeros(6), "a name"),
        {"name": "a batch", "inputs": {"ids": torch.zeros(6, 4)}},
    ],
)
def test_the_leading_dimension_counts(batch: Any) -> None:
    size = BatchCounter(None, "Callback")(batch)
    assert size == 6.0
    assert isinstance(size, float)


@pytest.mark.parametrize(
    "function", [torch.numel, lambda batch: np.int64(12), lambda batch: torch.tensor(12)]
)
def test_or_what_a_function_says(function: Callable[[Any], Any]) -> None:
    size = BatchCounter(function, "Callback")(torch.zeros(6, 2))
    assert size == 12.0
    assert type(size) is float


@pytest.mark.parametrize("batch", [3, object(), None, {}])
def test_a_batch_without_tensors(batch: Any) -> None:
    with pytest.raises(
        MisconfigurationException,
        match=rf"^Callback cannot .* examples a {type(batch).__name__} holds: pass bat",
    ):
        BatchCounter(None, "Callback")(batch)


@pytest.mark.parametrize("count", [0, -1, float("nan"), float("inf")])
def test_counts_that_cannot_be(count: float) -> None:
    with pytest.raises(ValueError, match=rf"positive, finite number of examples, got {count}: it must count"):
        BatchCounter(lambda batch: count, "Callback")(torch.zeros(6))


def test_what_goes_wrong_in_the_function_is_told_as_it_is() -> None:
    with pytest.raises(KeyError, match="tokens"):
        BatchCounter(lambda batch: batch["tokens"], "Callback")({})


def test_no_function() -> None:
    with pytest.raises(ValueError, match="to be a function or None, got batch_size_fn=3"):
        BatchCounter(3, "Callback")  # type: ignore[arg-type]
