"""Makes a run that was killed go on as if it had not been.

Three things that Lightning does on resuming are set right on the way:

* From a checkpoint saved after the last batch of an epoch, but before the epoch's end, it leaves out the next
  epoch; from one saved at an epoch's end it counts that epoch twice if ``max_steps`` is set.
* It takes up the states of loaders in mid-epoch only, all from rank zero, and before samplers know the epoch.
* A validation advances the random streams of training, but is not repeated on resuming.
"""

from __future__ import annotations

import hashlib
import pickle
import random
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_surge.callbacks.lightning_host import Callback, check_versions, warn
from lightning_surge.callbacks.resuming.loaders import (
    epoch_samplers,
    generators_of,
    in_order,
    is_stateful,
    leave_epoch,
    load_loaders,
    share_samplers,
    why_not_resumable,
)
from lightning_surge.callbacks.resuming.random_streams import from_portable, to_portable
from lightning_surge.checking.state import restore, save
from lightning_surge.measure.replay import RandomState

STATE_VERSION = 1


@dataclass(frozen=True)
class RankState:
    """What one rank saved.

    Attributes:
        streams: the global random streams, as of `to_portable`.
        generators: states of the generators that loaders draw their order from.
        seeds: of the samplers that are told the epoch; None where they have none.
    """

    streams: dict[str, Any]
    generators: list[Tensor]
    seeds: list[int | None]


class ExactResume(Callback):
    """Makes a run that was killed and resumed take the same batches to the same weights, bit for bit.

    Lightning restores weights, optimizers and its own counters, and every callback its own state. This one
    keeps what else the next step depends on: the random streams of every rank, the generators of the loaders
    and the places that the loaders had reached. A run resumed from a checkpoint saved between two optimizer
    steps, on as many processes as before, is the run that was not killed. Where a loader cannot go on in
    mid-epoch, a warning says so, once per run.

    No other callback of this package touches random streams. Those that a validation draws from are set back
    after it, with or without a resume, since a resumed run does not repeat that validation.

    Caveats:
        * Random numbers that ``LightningModule.on_train_batch_end`` draws come after the checkpoint and are
          lost.
        * ``ReduceLROnPlateau`` does not see the metrics of an epoch that was over but not yet ended.
        * A ``CombinedLoader`` of mode ``max_size`` begins anew with loaders that were used up.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.callbacks import ModelCheckpoint
        >>> save = ModelCheckpoint("checkpoints", every_n_train_steps=1000)
        >>> trainer = Trainer(callbacks=[ExactResume(), save], accelerator="cpu", logger=False)
    """

    def __init__(self) -> None:
        self._trainer: pl.Trainer | None = None
        self._reset()

    def _reset(self) -> None:
        self._training_streams: RandomState | None = None  # while a validation may draw from them
        self._resumes = False
        self._loaded: dict[str, Any] = {}
        self._loader_states: list[Any] = []
        self._warned = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget any run before."""
        if stage == "fit":
            check_versions(trainer, type(self).__name__)
            # Kept after the run: a checkpoint may be saved when it is over, to go on from.
            self._trainer = trainer
            self._reset()

    # ------------------------------------------------------------------ saving

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Remember the streams, in case a validation follows."""
        # Here, since a validation draws from them before any hook of it runs.
        self._training_streams = RandomState.capture() if trainer.enable_validation else None

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the streams back to what they were before the validation."""
        if self._training_streams is not None and _validates_while_training(trainer):
            self._training_streams.restore()

    def state_dict(self) -> dict[str, Any]:
        """Random streams, generators and, where they differ, loaders of every rank.

        Every rank has to ask for it, as Lightning does in ``trainer.save_checkpoint`` and `ModelCheckpoint`.
        """
        trainer = self._trainer
        if trainer is None:
            return {}
        if self._training_streams is None or not _validates_while_training(trainer):
            self._training_streams = RandomState.capture()
        loaders = _training_loaders(trainer)
        own = RankState(
            streams=to_portable(self._training_streams),
            generators=[generator.get_state() for generator in generators_of(loaders)],
            seeds=[getattr(sampler, "seed", None) for sampler in epoch_samplers(loaders)],
        )
        state = {"version": STATE_VERSION, "ranks": _gather(trainer, save(own))}
        if trainer.world_size > 1:
            # Lightning keeps the states of rank zero's loaders only; as a rule all ranks have the same.
            states = [loader.state_dict() for loader in loaders if is_stateful(loader)]
            if _differs(trainer, states):
                state["loaders"] = _gather(trainer, states)
        if samplers := share_samplers(loaders):
            # The indices of the present epoch, of all ranks.
            orders = [torch.tensor(sampler.dataset._sampler_list or []) for sampler in samplers]
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
            warn(text)

    # ------------------------------------------------------------------ resuming

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Correct what Lightning noted about an epoch whose batches had all been taken."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        # Where it was kept before this callback existed; `load_state_dict` comes later and knows better.
        former = checkpoint.get("callbacks", {}).get("BatchSizeScheduler", {})
        self._loaded = former.get("resumption") or {}
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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what `state_dict` returned until training starts."""
        self._loaded = state_dict

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set loaders, generators and streams to where they were."""
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
        samplers = epoch_samplers(loaders)
        for sampler, seed in zip(samplers, own.seeds if own else [], strict=False):
            if seed is not None:  # Lightning's are from seed_everything, which another script may have called
                sampler.seed = seed
        within_epoch = loop.restarting and not trainer.is_last_batch
        if within_epoch:
            if samplers or "loaders" in state:
                # Lightning made the iterators with the states of rank zero, and for the first epoch.
                for sampler in samplers:
                    sampler.set_epoch(loop.epoch_progress.current.processed)  # type: ignore[attr-defined]
                load_loaders(loaders, loader_states)
                orders = state.get("orders", [[]])
                with in_order(share_samplers(loaders), orders[trainer.global_rank % len(orders)]):
                    iter(fetcher)
        else:
            load_loaders(loaders, loader_states)
            for loader in loaders:
                leave_epoch(loader)
            if loop.restarting:
                # The epoch has only to be ended, but Lightning asks for a batch where no validation is due.
                fetcher.reset()
                fetcher.iterator = iter(())
            else:
                # Lightning would take the iterator that it made before it knew the epoch.
                loop._resuming_from_checkpoint = False
        if own is not None:
            for generator, saved in zip(generators_of(loaders), own.generators, strict=False):
                generator.set_state(saved)
            streams = self._training_streams = from_portable(own.streams)
            streams.restore()
            if within_epoch:
                # Lightning may yet prepare a validation that it then skips, which draws random numbers.
                fetcher.iterator = _RestoringFirst(fetcher, streams)
        self._warn_about(trainer, mid_epoch=within_epoch)

    def _own(self, trainer: pl.Trainer, state: dict[str, Any]) -> RankState | None:
        """What this rank saved; None for a run without this callback, and where it cannot be used."""
        try:
            return self._own_of(trainer, state) if state else None
        except Exception as error:
            self._warn(
                f"Expected whole random states in the checkpoint, got {type(error).__name__}: {error}: "
                "training goes on with other random numbers, and the loaders as Lightning set them."
            )
            return None

    def _own_of(self, trainer: pl.Trainer, state: dict[str, Any]) -> RankState | None:
        if state["version"] != STATE_VERSION:
            raise ValueError(f"Expected version {STATE_VERSION}, got {state['version']!r}.")
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
        saved = ranks[trainer.global_rank]
        own = None if saved is None else restore(RankState, saved)
        if own is not None:
            # Tried on streams nobody uses, so that none is set to half of it.
            streams = from_portable(own.streams)
            random.Random().setstate(streams.python)
            np.random.RandomState().set_state(streams.numpy)
            torch.Generator().set_state(streams.torch)
            generators = generators_of(_training_loaders(trainer))
            for generator, state_of_it in zip(generators, own.generators, strict=False):
                generator.clone_state().set_state(state_of_it)
            if not all(isinstance(one, Tensor) and one.dtype == torch.uint8 for one in streams.cuda):
                raise ValueError("Expected bytes as the states of CUDA devices.")
        if len(state.get("loaders", ranks)) != len(ranks):
            raise ValueError(f"Expected the loaders' states of {len(ranks)} ranks, got {state['loaders']}.")
        return own


class _RestoringFirst:
    """A fetcher's iterator that sets the random streams before the first batch and then steps aside."""

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


def _gather(trainer: pl.Trainer, own: Any) -> list[Any]:
    """The values of all ranks, in order."""
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
