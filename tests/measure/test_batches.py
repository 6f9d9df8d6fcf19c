"""Cutting batches of every common structure."""

from collections import OrderedDict, UserDict, defaultdict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_surge.measure.batches import BatchError, group_evenly, split_leading_dimension, tensors_in


class Pair(NamedTuple):
    image: Tensor
    label: Tensor


@dataclass
class Sample:
    tokens: Tensor
    split: str


@dataclass(frozen=True)
class Frozen:
    tokens: Tensor


X = torch.arange(12).reshape(6, 2)
Y = torch.arange(6)


class TestStructures:
    @given(length=st.integers(1, 40), data=st.data())
    def test_slices_partition_the_batch_in_order(self, length: int, data: st.DataObject) -> None:
        num_slices = data.draw(st.integers(1, length))
        slices = split_leading_dimension(torch.arange(length), num_slices)
        assert len(slices) == num_slices
        assert torch.equal(torch.cat(slices), torch.arange(length))
        sizes = [len(part) for part in slices]
        assert max(sizes) - min(sizes) <= 1

    @pytest.mark.parametrize(
        "batch",
        [
            *([X, Y], (X, Y), Pair(X, Y), Sample(X, "train"), Frozen(X)),
            *(kind({"x": X, "y": Y}) for kind in (dict, OrderedDict, UserDict)),
            defaultdict(list, x=X, y=Y),  # whose constructor takes something else
        ],
        ids=lambda batch: type(batch).__name__,
    )
    def test_containers_keep_their_type_and_their_fields(self, batch: Any) -> None:
        first, second = split_leading_dimension(batch, 2)
        assert type(first) is type(second) is type(batch)
        for part, rows in ((first, slice(3)), (second, slice(3, 6)), (batch, slice(6))):
            found = tensors_in(part)
            assert 1 <= len(found) <= 2
            assert all(map(torch.equal, found, (X[rows], Y[rows])))

    def test_nesting(self) -> None:
        batch = {"in": [X, (Y, {"mask": X > 3})], "target": Pair(X, Y)}
        second = split_leading_dimension(batch, 3)[1]
        assert torch.equal(second["in"][1][1]["mask"], (X > 3)[2:4])
        assert torch.equal(second["target"].label, Y[2:4])

    def test_arrays_and_lists_of_examples_are_data(self) -> None:
        names = ["a", "b", "c", "d", "e", "f"]
        first, second = split_leading_dimension((np.arange(6), names, Y), 2)
        assert first[0].tolist() == [0, 1, 2]
        assert second[1] == ["d", "e", "f"]

    def test_everything_else_is_shared(self) -> None:
        marker = object()
        batch = (X, "name", 3, None, torch.tensor(2.0), np.array(5), marker, {"temperature": 0.5})
        for part in split_leading_dimension(batch, 3):
            assert len(part[0]) == 2
            assert part[1:4] == ("name", 3, None)
            assert part[4] is batch[4]
            assert part[5] is batch[5]
            assert part[6] is marker
            assert part[7] == {"temperature": 0.5}


class TestErrors:
    @pytest.mark.parametrize("batch", [3, "text", None, (torch.tensor(1.0),), object()])
    def test_nothing_to_slice(self, batch: Any) -> None:
        with pytest.raises(BatchError, match=r"batch with tensors to slice.*pass split_batch="):
            split_leading_dimension(batch, 2)

    def test_lengths_that_disagree(self) -> None:
        with pytest.raises(BatchError, match=r"lengths \[4, 6\]: pass split_batch="):
            split_leading_dimension((X, Y[:4]), 2)

    @pytest.mark.parametrize("num_slices", [0, -1, 7])
    def test_more_slices_than_examples(self, num_slices: int) -> None:
        with pytest.raises(BatchError, match=f"num_slices={num_slices}, 6 examples: use larger batches"):
            split_leading_dimension(X, num_slices)


class TestGrouping:
    @pytest.mark.parametrize("num_groups", [0, -1, 4, 10**18])
    def test_groups_that_would_be_empty(self, num_groups: int) -> None:
        with pytest.raises(
            ValueError, match=f"Expected 1 <= num_groups <= 3 items, got num_groups={num_groups}: "
        ):
            group_evenly([1, 2, 3], num_groups)
