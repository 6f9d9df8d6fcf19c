"""Where training loaders stand: the samplers and generators in them, and the states that they take back."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_surge.callbacks.hosts import is_sampler_wrapper

__all__ = [
    "epoch_samplers",
    "generators_of",
    "in_order",
    "is_stateful",
    "leave_epoch",
    "load_loaders",
    "order_of",
    "share_samplers",
]


def is_stateful(thing: Any) -> bool:
    """Whether something says where it stands, and can be put there."""
    return callable(getattr(thing, "state_dict", None)) and callable(getattr(thing, "load_state_dict", None))


def epoch_samplers(loaders: list[Any]) -> list[Any]:
    """Samplers that have to be told the epoch, as Lightning tells them."""
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
    """Samplers that Lightning made, to give each rank its share of what another sampler draws.

    They know how many indices were used, but draw others when they are asked again.
    """
    samplers = epoch_samplers(loaders)
    return [sampler for sampler in samplers if is_sampler_wrapper(sampler)]


def order_of(sampler: Any) -> Tensor:
    """The indices of the present epoch, of all ranks."""
    return torch.tensor(sampler.dataset._sampler_list or [])


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
    """Give those loaders that have a state theirs."""
    stateful = [loader for loader in loaders if is_stateful(loader)]
    for loader, state in zip(stateful, states, strict=False):
        loader.load_state_dict(state)


def leave_epoch(loader: Any) -> None:
    """Let the next `iter` of a loader that was given its state begin the next epoch."""
    if not _is_torchdata(loader) or loader._iterator is not None:
        return
    loader.state_dict()  # makes the iterator that was saved, which the next iter() would return
    iterator: Any = loader._iterator
    if iterator._num_yielded and not iterator._finished:
        # Some samplers and datasets go to their place at the first example, and else would in the next epoch.
        next(iter(loader), None)


def _is_torchdata(loader: Any) -> bool:
    module = sys.modules.get("torchdata.stateful_dataloader")  # imported, if one of its loaders is here
    return module is not None and isinstance(loader, module.StatefulDataLoader)
