"""Where training loaders stand: the samplers and generators in them, and the states that they take back."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from lightning_surge.callbacks.lightning_host import is_sampler_wrapper


def is_stateful(thing: Any) -> bool:
    """Whether something says where it stands, and can be put there."""
    return callable(getattr(thing, "state_dict", None)) and callable(getattr(thing, "load_state_dict", None))


def epoch_samplers(loaders: list[Any]) -> list[Any]:
    """Samplers that Lightning tells the epoch."""
    found = {}
    for loader in loaders:
        batches = getattr(loader, "batch_sampler", None)
        for sampler in (getattr(loader, "sampler", None), getattr(batches, "sampler", None)):
            if callable(getattr(sampler, "set_epoch", None)):
                found[id(sampler)] = sampler
    return list(found.values())


def generators_of(loaders: list[Any]) -> list[torch.Generator]:
    """Generators that the loaders draw their order from, each once."""
    found: dict[int, torch.Generator] = {}
    for loader in loaders:
        batches = getattr(loader, "batch_sampler", None)
        owners = [loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)]
        owners += [sampler.dataset._sampler for sampler in share_samplers([loader])]
        for owner in owners:
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator):
                found[id(generator)] = generator
    return list(found.values())


def share_samplers(loaders: list[Any]) -> list[Any]:
    """Lightning's samplers that share out what another one draws, which would draw others if asked again."""
    return [sampler for sampler in epoch_samplers(loaders) if is_sampler_wrapper(sampler)]


@contextmanager
def in_order(samplers: list[Any], orders: list[Tensor]) -> Iterator[None]:
    """Let samplers begin an epoch with the indices that were saved."""
    drawn_from = [sampler.dataset._sampler for sampler in samplers]
    for sampler, order in zip(samplers, orders, strict=False):
        if len(order):
            sampler.dataset._sampler = order.tolist()
    try:
        yield
    finally:
        for sampler, source in zip(samplers, drawn_from, strict=True):
            sampler.dataset._sampler = source


def load_loaders(loaders: list[Any], states: list[Any]) -> None:
    """Load the states of the loaders that have one."""
    stateful = [loader for loader in loaders if is_stateful(loader)]
    for loader, state in zip(stateful, states, strict=False):
        loader.load_state_dict(state)


def leave_epoch(loader: Any) -> None:
    """Let the next `iter` of a loader that was given its state begin the next epoch."""
    torchdata = sys.modules.get("torchdata.stateful_dataloader")  # imported, if one of its loaders is here
    if torchdata is None or not isinstance(loader, torchdata.StatefulDataLoader) or loader._iterator:
        return
    loader.state_dict()  # makes the iterator that was saved, which the next iter() would return
    iterator: Any = loader._iterator
    if iterator._num_yielded and not iterator._finished:
        # Some samplers and datasets go to their place at the first example, and else would in the next epoch.
        next(iter(loader), None)


class Obstacle(NamedTuple):
    """Why a run cannot be resumed exactly, for certain or depending on what this package cannot see."""

    text: str
    certain: bool


def why_not_resumable(loader: Any, *, mid_epoch: bool = True) -> Obstacle | None:
    """What keeps a training loader from going on exactly where it was, in mid-epoch or at an epoch's end.

    Example:
        >>> why_not_resumable(DataLoader(range(4))).certain
        True
    """
    if mid_epoch and not is_stateful(loader):
        return Obstacle(
            "Expected a training loader with state_dict and load_state_dict, got "
            f"{type(loader).__name__}: resumed in mid-epoch, it begins the epoch anew, with examples already "
            "seen. Use torchdata.stateful_dataloader.StatefulDataLoader, or save at an epoch's end.",
            certain=True,
        )
    if not isinstance(loader, DataLoader):
        return None
    if mid_epoch and (obstacle := _order_obstacle(loader)) is not None:
        return obstacle
    if not loader.num_workers or (is_stateful(loader) and is_stateful(loader.dataset)):
        return None
    workers = f"{loader.num_workers} persistent workers" if loader.persistent_workers else "workers"
    if not mid_epoch and not loader.persistent_workers:
        return None
    return Obstacle(
        f"Expected the dataset to save the random states of workers, got {type(loader.dataset).__name__} in "
        f"{workers}, whose random numbers begin anew on resuming. If it draws any, wrap it in "
        "ResumableDataset and load it with StatefulDataLoader, or use num_workers=0.",
        certain=False,
    )


def _order_obstacle(loader: DataLoader[Any]) -> Obstacle | None:
    """What keeps a loader that has a state from giving the batches that were left, in their order."""
    dataset: Any = loader.dataset
    if isinstance(dataset, IterableDataset):
        if _saves_iteration(dataset):
            return None
        return Obstacle(
            f"Expected an IterableDataset with state_dict and load_state_dict, got {type(dataset).__name__}: "
            "resumed in mid-epoch, it is read again up to its place, which is right only if it gives the "
            "same examples again. Give it the two methods.",
            certain=False,
        )
    if loader.num_workers and not getattr(loader, "in_order", True):
        return Obstacle(
            "Expected in_order=True, got in_order=False: batches of several workers come in another order "
            "after resuming in mid-epoch. Leave in_order as it is.",
            certain=True,
        )
    sampler: Any = loader.sampler
    if loader.batch_sampler is not None:
        # torch's and torchdata's know how many indices were used, and not which.
        home = type(loader.batch_sampler).__module__
        counts_only = home in ("torch.utils.data.sampler", "torchdata.stateful_dataloader.sampler")
        if not counts_only and _saves_iteration(loader.batch_sampler):
            return None
        sampler = getattr(loader.batch_sampler, "sampler", loader.batch_sampler)
    if isinstance(sampler, (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)):
        return Obstacle(
            f"Expected a sampler with a state, got torch's {type(sampler).__name__}: resumed in mid-epoch, "
            "it draws another order. Use StatefulDataLoader(shuffle=True), or save at an epoch's end.",
            certain=True,
        )
    if isinstance(sampler, (SequentialSampler, DistributedSampler, Sequence)) or _saves_iteration(sampler):
        return None
    return Obstacle(
        f"Expected a sampler with state_dict and load_state_dict, got {type(sampler).__name__}: resumed in "
        "mid-epoch, it is asked again for the indices already used, which is right only if it draws no "
        "random numbers. Give it the two methods.",
        certain=False,
    )


def _saves_iteration(iterable: Any) -> bool:
    """Whether an iterable, or (for all that can be told) its iterator, has a state."""
    return is_stateful(iterable) or not inspect.isgeneratorfunction(getattr(type(iterable), "__iter__", None))
