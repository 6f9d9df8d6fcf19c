"""Makes a run that was killed go on as if it had not been.

Lightning restores weights, optimizers and its counters. What else the next step depends on is kept here: the
random streams of every rank, the generators of the loaders, and the place that the loaders had reached. Three
things that Lightning does on resuming are set right on the way; each has a test of its own:

* From a checkpoint saved after the last batch of an epoch, but before the epoch's end, it leaves out the next
  epoch; from one saved at an epoch's end it counts that epoch twice if ``max_steps`` is set.
* It takes up the states of loaders in mid-epoch only, all from rank zero, and before samplers know the epoch.
* A validation advances the random streams of training, but is not repeated on resuming.
"""

from __future__ import annotations

import hashlib
import inspect
import pickle
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities import rank_zero_warn
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)
from torch.utils.data.distributed import DistributedSampler

from lightning_surge.callbacks.hosts import is_sampler_wrapper
from lightning_surge.replay import RandomState

__all__ = [
    "Obstacle",
    "ResumableDataset",
    "Resumption",
    "random_states",
    "restore_random_states",
    "why_not_resumable",
]

STATE_VERSION = 1


def random_states() -> dict[str, Any]:
    """The global random streams of this process, in a form that every checkpoint can hold.

    Returns:
        Tensors, numbers and strings only: what ``torch.load(weights_only=True)`` reads.

    Example:
        >>> states = random_states()
        >>> before = torch.rand(3)
        >>> restore_random_states(states)
        >>> bool((before == torch.rand(3)).all())
        True
    """
    return _to_portable(RandomState.capture())


def restore_random_states(states: dict[str, Any]) -> None:
    """Set the global random streams of this process back.

    Args:
        states: what `random_states` returned, perhaps in another process. CUDA devices that this one does not
            have are left out.
    """
    _from_portable(states).restore()


def _to_portable(state: RandomState) -> dict[str, Any]:
    version, words, gauss = state.python
    states = {
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "torch": state.torch,
        "cuda": list(state.cuda),
    }
    if isinstance(state.numpy, tuple):  # else the user has replaced NumPy's global generator
        name, key, position, has_gauss, gauss = state.numpy
        words = torch.from_numpy(key.astype(np.int64))
        numpy = {"name": name, "words": words, "position": position, "has_gauss": has_gauss, "gauss": gauss}
        states["numpy"] = numpy
    return states


def _from_portable(states: dict[str, Any]) -> RandomState:
    python, numpy = states["python"], RandomState.capture().numpy
    if (saved := states.get("numpy")) is not None:
        words = saved["words"].numpy().astype(np.uint32)
        numpy = (saved["name"], words, saved["position"], saved["has_gauss"], saved["gauss"])
    return RandomState(
        (python["version"], tuple(python["words"].tolist()), python["gauss"]),
        numpy,
        states["torch"],
        states["cuda"][: torch.cuda.device_count()],
    )


class ResumableDataset(Dataset[Any]):
    """A map-style dataset whose workers go on with their random numbers when a run is resumed in mid-epoch.

    A worker process of a loader has random streams of its own, which nobody saves. torchdata's
    ``StatefulDataLoader`` keeps a state of the dataset of each worker, though: here, those streams. Needed
    only with ``num_workers > 0`` and a dataset that draws random numbers.

    Args:
        dataset: the one to wrap.

    Example:
        >>> dataset = ResumableDataset(["a", "b"])
        >>> len(dataset), dataset[1]
        (2, 'b')
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[index]

    def __getitems__(self, indices: list[Any]) -> list[Any]:
        """All examples of a batch, at once if the dataset can."""
        if callable(fetch := getattr(self.dataset, "__getitems__", None)):
            return list(fetch(indices))
        return [self.dataset[index] for index in indices]

    def state_dict(self) -> dict[str, Any]:
        """The streams of the worker that asks; nothing in the main process, where they are saved anyway."""
        return {} if get_worker_info() is None else random_states()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let this worker go on where the saved one was."""
        if state and get_worker_info() is not None:
            restore_random_states(state)


class Obstacle(NamedTuple):
    """Why a run cannot be resumed exactly.

    Attributes:
        text: the rule, what was found, and the remedy.
        certain: whether it cannot; else it depends on what this package cannot see.
    """

    text: str
    certain: bool


def why_not_resumable(loader: Any, *, mid_epoch: bool = True) -> Obstacle | None:
    """What keeps a training loader from going on exactly where it was.

    Args:
        loader: one loader, as the Trainer uses it.
        mid_epoch: whether the run is to be resumed within an epoch, or at the end of one.

    Returns:
        None if it will give the batches that were left, in their order.

    Example:
        >>> why_not_resumable(DataLoader(range(4))).certain
        True
        >>> why_not_resumable(DataLoader(range(4)), mid_epoch=False) is None
        True
    """
    if mid_epoch and not _is_stateful(loader):
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
    if loader.num_workers and not (_is_stateful(loader) and _is_stateful(loader.dataset)):
        workers = f"{loader.num_workers} persistent workers" if loader.persistent_workers else "workers"
        if mid_epoch or loader.persistent_workers:
            return Obstacle(
                "Expected the dataset to save the random states of workers, got "
                f"{type(loader.dataset).__name__} in {workers}, whose random numbers begin anew on resuming. "
                "If it draws any, wrap it in ResumableDataset and load it with StatefulDataLoader, or use "
                "num_workers=0.",
                certain=False,
            )
    return None


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
        if not _counts_only(loader.batch_sampler) and _saves_iteration(loader.batch_sampler):
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
    return _is_stateful(iterable) or not inspect.isgeneratorfunction(
        getattr(type(iterable), "__iter__", None)
    )


def _counts_only(batches: Any) -> bool:
    """Whether a batch sampler is torch's or torchdata's, which know how many indices were used, not which."""
    return type(batches).__module__ in ("torch.utils.data.sampler", "torchdata.stateful_dataloader.sampler")


def _is_stateful(thing: Any) -> bool:
    return callable(getattr(thing, "state_dict", None)) and callable(getattr(thing, "load_state_dict", None))


class Resumption:
    """What a callback keeps in its state, and does in its hooks, so that a run can be resumed exactly.

    The callback calls each method from its own hook of the same name. Resumed from a checkpoint that was
    saved between two optimizer steps, in ``on_train_batch_end`` or later, the run then takes the remaining
    batches to the same weights, bit for bit, on as many processes as before. Where the loader cannot do that,
    a warning says so, once per run.

    Random numbers that a validation draws do not reach training any more, with or without a resume.

    Limits: random numbers that ``LightningModule.on_train_batch_end`` draws come after the checkpoint and are
    lost. ``ReduceLROnPlateau`` does not see the metrics of an epoch that was over, but not yet ended. A
    ``CombinedLoader`` of mode ``max_size`` begins anew with loaders that were used up.
    """

    def __init__(self) -> None:
        self.setup()

    def setup(self) -> None:
        """Forget any run before."""
        self._training_streams: RandomState | None = None  # while a validation may draw from them
        self._resumes = False
        self._loaded: dict[str, Any] = {}
        self._loader_states: list[Any] = []
        self._warned = False

    # ------------------------------------------------------------------ before the run is killed

    def on_train_batch_end(self, trainer: pl.Trainer) -> None:
        """Remember the streams, in case a validation follows.

        Args:
            trainer: the one that trains.
        """
        # Here, since a validation draws from them before any hook of it runs.
        self._training_streams = RandomState.capture() if trainer.enable_validation else None

    def on_validation_end(self, trainer: pl.Trainer) -> None:
        """Set the streams back to what they were before the validation.

        Args:
            trainer: any, after training batches or alone.
        """
        if self._training_streams is not None and _validates_while_training(trainer):
            self._training_streams.restore()

    def state_dict(self, trainer: pl.Trainer) -> dict[str, Any]:
        """Random streams, generators and, where they differ, loaders of every rank.

        Every rank has to ask for it, as Lightning does in ``trainer.save_checkpoint`` and `ModelCheckpoint`.

        Args:
            trainer: the one that saves.
        """
        if self._training_streams is None or not _validates_while_training(trainer):
            self._training_streams = RandomState.capture()
        loaders = _training_loaders(trainer)
        own = {
            "streams": _to_portable(self._training_streams),
            "generators": [generator.get_state() for generator in _generators(loaders)],
            "seeds": [getattr(sampler, "seed", None) for sampler in _epoch_samplers(loaders)],
        }
        state = {"version": STATE_VERSION, "ranks": _gather(trainer, own)}
        if trainer.world_size > 1:
            # Lightning keeps the states of rank zero's loaders only; as a rule all ranks have the same.
            states = [loader.state_dict() for loader in loaders if _is_stateful(loader)]
            if _differs(trainer, states):
                state["loaders"] = _gather(trainer, states)
        if samplers := _share_samplers(loaders):
            orders = [_order(sampler) for sampler in samplers]
            state["orders"] = _gather(trainer, orders) if _differs(trainer, orders) else [orders]
        in_fit = trainer.state.fn == TrainerFn.FITTING
        if in_fit and trainer.fit_loop.batch_idx >= 0 and not trainer.is_last_batch:
            self._warn_about(trainer, mid_epoch=True, certain=True)
        return state

    def _warn_about(self, trainer: pl.Trainer, *, mid_epoch: bool, certain: bool = False) -> None:
        for loader in _training_loaders(trainer):
            obstacle = why_not_resumable(loader, mid_epoch=mid_epoch)
            if obstacle is not None and (obstacle.certain or not certain):
                self._warn(obstacle.text)
        if mid_epoch and trainer.num_training_batches == float("inf"):
            self._warn(
                "Expected a training loader with a length, got one without: Lightning fetches one batch "
                "ahead, which is lost on resuming in mid-epoch. Give the dataset a __len__, or "
                "Trainer(limit_train_batches=) a whole number, or save at an epoch's end."
            )

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            rank_zero_warn(text)

    # ------------------------------------------------------------------ when it is resumed

    def on_load_checkpoint(self, trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
        """Correct what Lightning noted about an epoch whose batches had all been taken.

        Args:
            trainer: the one that resumes.
            checkpoint: the whole of it, of which Lightning restores its loops later.
        """
        if trainer.state.fn != TrainerFn.FITTING:
            return
        loops = checkpoint["loops"]["fit_loop"]
        self._resumes = True
        self._loader_states = loops["state_dict"].get("combined_loader", [])
        batches, epochs = loops["epoch_loop.batch_progress"], loops["epoch_progress"]
        if not batches["is_last_batch"]:
            return
        for count in ("total", "current"):
            # Saved in on_train_batch_end. Lightning would take the epoch for ended, without its hooks, and
            # ask the loader, which has reached its end, for the batches of the next.
            batches[count]["completed"] = batches[count]["processed"]
        if trainer.max_steps != -1 and epochs["current"]["processed"] == epochs["current"]["started"]:
            for count in ("total", "current"):
                # Saved in on_train_epoch_end. With max_steps Lightning ends the epoch again, and would count
                # it twice: a DistributedSampler would leave out the order of one epoch.
                epochs[count]["processed"] -= 1
                epochs[count]["completed"] = min(epochs[count]["completed"], epochs[count]["processed"])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep what `state_dict` returned until training starts.

        Args:
            state: from the checkpoint.
        """
        self._loaded = state

    def on_train_start(self, trainer: pl.Trainer) -> None:
        """Set loaders, generators and streams to where they were.

        Args:
            trainer: with its loaders and counters restored.
        """
        resumes, state, loader_states = self._resumes, self._loaded, self._loader_states
        self._resumes, self._loaded, self._loader_states = False, {}, []
        if not resumes or trainer.global_step == 0:  # the latter after a learning-rate finder
            return
        own = self._own(trainer, state)
        if own is None:
            state = {}
        if "loaders" in state:
            loader_states = state["loaders"][trainer.global_rank]
        loop, loaders = trainer.fit_loop, _training_loaders(trainer)
        fetcher = loop._data_fetcher
        assert fetcher is not None
        samplers = _epoch_samplers(loaders)
        for sampler, seed in zip(samplers, own["seeds"] if own else [], strict=False):
            if seed is not None:  # Lightning's are from seed_everything, which another script may have called
                sampler.seed = seed
        within_epoch = loop.restarting and not trainer.is_last_batch
        if within_epoch:
            if samplers or "loaders" in state:
                # Lightning made the iterators with the states of rank zero, and for the first epoch.
                for sampler in samplers:
                    sampler.set_epoch(loop.epoch_progress.current.processed)  # type: ignore[attr-defined]
                _load(loaders, loader_states)
                orders = state.get("orders", [[]])
                with _in_order(_share_samplers(loaders), orders[trainer.global_rank % len(orders)]):
                    iter(fetcher)
        else:
            _load(loaders, loader_states)
            for loader in loaders:
                _leave_epoch(loader)
            if loop.restarting:
                # The epoch has only to be ended, but Lightning asks for a batch where no validation is due.
                fetcher.reset()
                fetcher.iterator = iter(())
            else:
                # Lightning would take the iterator that it made before it knew the epoch.
                loop._resuming_from_checkpoint = False
        if own is not None:
            for generator, saved in zip(_generators(loaders), own["generators"], strict=False):
                generator.set_state(saved)
            streams = self._training_streams = _from_portable(own["streams"])
            streams.restore()
            if within_epoch:
                # Lightning may yet prepare a validation that it then skips, which draws random numbers.
                fetcher.iterator = _RestoringFirst(fetcher, streams)
        self._warn_about(trainer, mid_epoch=within_epoch)

    def _own(self, trainer: pl.Trainer, state: dict[str, Any]) -> dict[str, Any] | None:
        """What this rank saved."""
        if not state:  # the checkpoint is of a run without this
            return None
        if state.get("version") != STATE_VERSION:
            self._warn(
                f"Expected random states of version {STATE_VERSION} in the checkpoint, got "
                f"{state.get('version')!r}: training goes on with other random numbers. Resume with the "
                "release that saved it for the same ones."
            )
            return None
        try:
            return self._own_of(trainer, state)
        except Exception as error:
            self._warn(
                f"Expected whole random states in the checkpoint, got {type(error).__name__}: {error}: "
                "training goes on with other random numbers, and the loaders as Lightning set them."
            )
            return None

    def _own_of(self, trainer: pl.Trainer, state: dict[str, Any]) -> dict[str, Any] | None:
        ranks: list[Any] = state["ranks"]
        if len(ranks) != trainer.world_size:
            self._warn(
                f"Expected to resume on {len(ranks)} processes, as the checkpoint was saved, got "
                f"{trainer.world_size}: training goes on with other random numbers, and other examples on "
                "each. Use as many for the same ones."
            )
            return None
        if None in ranks:
            self._warn(
                f"Expected the random states of {len(ranks)} processes in the checkpoint, got those of one: "
                "it was saved after an exception. Resume from one saved in training for the same numbers."
            )
        own: dict[str, Any] | None = ranks[trainer.global_rank]
        if own is not None:
            _check_states(own, _generators(_training_loaders(trainer)))
        if len(state.get("loaders", ranks)) != len(ranks):
            raise ValueError(f"Expected the loaders' states of {len(ranks)} ranks, got {state['loaders']}.")
        return own


class _RestoringFirst:
    """An iterator of a fetcher that sets the random streams before the first batch, and then steps aside."""

    def __init__(self, fetcher: Any, streams: RandomState) -> None:
        self._fetcher = fetcher
        self._iterator = fetcher.iterator
        self._streams = streams

    def __iter__(self) -> _RestoringFirst:
        return self

    def __next__(self) -> Any:
        self._streams.restore()
        self._fetcher.iterator = self._iterator
        return next(self._iterator)


def _validates_while_training(trainer: pl.Trainer) -> bool:
    return trainer.state.fn == TrainerFn.FITTING and trainer.validating


def _training_loaders(trainer: pl.Trainer) -> list[Any]:
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else list(combined.flattened)


def _epoch_samplers(loaders: list[Any]) -> list[Any]:
    """Samplers that have to be told the epoch, as Lightning tells them."""
    found = {}
    for loader in loaders:
        batches = getattr(loader, "batch_sampler", None)
        for sampler in (getattr(loader, "sampler", None), getattr(batches, "sampler", None)):
            if callable(getattr(sampler, "set_epoch", None)):
                found[id(sampler)] = sampler
    return list(found.values())


def _generators(loaders: list[Any]) -> list[torch.Generator]:
    """Generators that the loaders draw their order from, each once."""
    found: dict[int, torch.Generator] = {}
    for loader in loaders:
        batches = getattr(loader, "batch_sampler", None)
        owners = [loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)]
        owners += [sampler.dataset._sampler for sampler in _share_samplers([loader])]
        for owner in owners:
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator):
                found[id(generator)] = generator
    return list(found.values())


def _share_samplers(loaders: list[Any]) -> list[Any]:
    """Samplers that Lightning made, to give each rank its share of what another sampler draws.

    They know how many indices were used, but draw others when they are asked again.
    """
    samplers = _epoch_samplers(loaders)
    return [sampler for sampler in samplers if is_sampler_wrapper(sampler)]


def _order(sampler: Any) -> Tensor:
    """The indices of the present epoch, of all ranks."""
    return torch.tensor(sampler.dataset._sampler_list or [])


@contextmanager
def _in_order(samplers: list[Any], orders: list[Tensor]) -> Iterator[None]:
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


def _check_states(own: dict[str, Any], generators: list[torch.Generator]) -> None:
    """Try what one rank saved on streams of no consequence, so that none is set to half of it."""
    streams = _from_portable(own["streams"])
    random.Random().setstate(streams.python)
    np.random.RandomState().set_state(streams.numpy)
    torch.Generator().set_state(streams.torch)
    for generator, saved in zip(generators, own["generators"], strict=False):
        generator.clone_state().set_state(saved)
    if not all(isinstance(state, Tensor) and state.dtype == torch.uint8 for state in streams.cuda):
        raise ValueError("Expected bytes as the states of CUDA devices.")
    if not all(seed is None or isinstance(seed, int) for seed in own["seeds"]):
        raise ValueError(f"Expected whole numbers as seeds, got {own['seeds']}.")


def _load(loaders: list[Any], states: list[Any]) -> None:
    """Give those loaders that have a state theirs."""
    stateful = [loader for loader in loaders if _is_stateful(loader)]
    for loader, state in zip(stateful, states, strict=False):
        loader.load_state_dict(state)


def _leave_epoch(loader: Any) -> None:
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


def _gather(trainer: pl.Trainer, own: Any) -> list[Any]:
    """What every rank has, in the order of ranks."""
    everyones = [None] * trainer.world_size
    # After an exception the other ranks may be anywhere, but not here.
    if trainer.world_size == 1 or trainer.interrupted or not torch.distributed.is_initialized():
        everyones[trainer.global_rank] = own
    else:
        torch.distributed.all_gather_object(everyones, own)
    return everyones


def _differs(trainer: pl.Trainer, own: Any) -> bool:
    """Whether ranks have different ones."""
    return len(set(_gather(trainer, hashlib.sha256(pickle.dumps(own)).digest()))) > 1
