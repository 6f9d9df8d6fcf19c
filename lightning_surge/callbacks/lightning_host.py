"""Lightning under its two names, `lightning.pytorch` and `pytorch_lightning`.

They are two copies of one code base, each with classes of its own, and whoever has `lightning` has both. A
Trainer of either takes callbacks and modules by their methods; where a class is asked for, this module knows
both. Only `pytorch_lightning`'s LightningCLI asks for a class of callbacks: import it before
`lightning_surge`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from importlib.metadata import version
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.overrides import is_overridden
from torch.optim import Optimizer

from lightning_surge.schedules.batch_sampler import ScheduledBatchSampler

log = logging.getLogger(__name__)

C = TypeVar("C")

if TYPE_CHECKING or "pytorch_lightning" not in sys.modules:
    Callback = pl.Callback
else:
    # LightningCLI accepts subclasses of its own package's Callback only. The other package is not imported
    # for that: it would take over the logger through which Lightning speaks.
    from pytorch_lightning import Callback as _OtherCallback

    class Callback(pl.Callback, _OtherCallback):
        """A callback to both packages."""


def warn(message: str, *, by: Callable[..., None] = rank_zero_warn) -> None:
    """Warn, on rank zero. Where warnings are errors (`python -W error`) log instead: training goes on."""
    try:
        by(message, stacklevel=5)
    except Warning:
        log.warning(message)


# Neither Lightning nor torch documents these; each has a test in tests/project/test_lightning_contract.py.
OF_LIGHTNING = (
    "_logger_connector.should_update_logs",
    "strategy.training_step",
    "fit_loop._combined_loader",
    "fit_loop._data_fetcher",
    "fit_loop.max_batches",
    "val_check_batch",
    "distributed_sampler_kwargs",
)
OF_TORCH = (
    "amp.GradScaler._found_inf_per_device",
    "amp.GradScaler._check_inf_per_device",
    "optim.Optimizer.register_step_pre_hook",
    "optim.Optimizer.register_step_post_hook",
    "utils._python_dispatch.TorchDispatchMode",
)


def check_versions(trainer: pl.Trainer, name: str) -> None:
    """Refuse a Lightning or torch that lacks an undocumented part which the callbacks touch."""
    for package, owner, paths in (("lightning", trainer, OF_LIGHTNING), ("torch", torch, OF_TORCH)):
        for path in paths:
            try:
                attrgetter(path)(owner)
            except AttributeError:
                raise MisconfigurationException(
                    f"{name} needs {path}, which {package} does not document, got {package} "
                    f"{version(package)} without it: install an older release of it, or a newer one of "
                    "lightning-surge."
                ) from None


def callbacks_of(trainer: pl.Trainer, kind: type[C]) -> list[C]:
    """The Trainer's callbacks of a class, in their order; `object` for all, of either package."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, kind)]


def is_accumulation_scheduler(callback: object) -> bool:
    """Whether a callback is Lightning's own `GradientAccumulationScheduler`, of either package."""
    return isinstance(callback, _classes("pytorch.callbacks", "GradientAccumulationScheduler"))


def is_sampler_wrapper(sampler: object) -> bool:
    """Whether Lightning has put a sampler between a rank and the user's, as either package does."""
    return isinstance(sampler, _classes("fabric.utilities.distributed", "DistributedSamplerWrapper"))


def overrides(pl_module: pl.LightningModule, name: str) -> bool:
    """Whether a module brings a method of its own in place of LightningModule's."""
    parents = _classes("pytorch", "LightningModule")
    return is_overridden(name, pl_module, next(kind for kind in parents if isinstance(pl_module, kind)))


def _classes(path: str, name: str) -> tuple[type[Any], ...]:
    """The class of that name in each package that has been imported: others have no objects."""
    part, _, rest = path.partition(".")
    packages = (f"lightning.{part}", {"pytorch": "pytorch_lightning", "fabric": "lightning_fabric"}[part])
    modules = (sys.modules.get(f"{package}.{rest}".rstrip(".")) for package in packages)
    return tuple(getattr(module, name) for module in modules if module is not None)


def replicas_of(trainer: pl.Trainer) -> int:
    """Number of data-parallel replicas, which all see different examples."""
    # Not world_size: under tensor parallelism several ranks share one replica's examples.
    kwargs = trainer.distributed_sampler_kwargs
    return 1 if kwargs is None else int(kwargs["num_replicas"])


def loader_batch_size(loader: Any, owner: str) -> int:
    """Examples per micro-batch that a loader was made with."""
    # A DataLoader with a batch sampler has batch_size=None; any other has one made for it, whose size may be
    # written while training.
    size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    if size is None:
        size = getattr(loader, "batch_size", None)
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise MisconfigurationException(
            f"Expected a training DataLoader with a batch_size, got batch_size={size!r} from"
            f" {type(loader).__name__}: pass micro_batch_size= to {owner}."
        )
    return size


def scheduled_sampler(loader: Any, owner: str) -> ScheduledBatchSampler | None:
    """The batch sampler of a loader, if it is one that follows schedules."""
    if isinstance(loader, (list, tuple, dict)):
        if _has_scheduled_sampler(loader):
            raise MisconfigurationException(
                f"Expected one training DataLoader with a ScheduledBatchSampler, got {len(loader)} loaders:"
                " Lightning puts their batches together. Use DataLoader(batch_size=...) in each, and pass"
                f" micro_batch_size= to {owner}, which then accumulates."
            )
        return None
    sampler = getattr(loader, "batch_sampler", None)
    return sampler if isinstance(sampler, ScheduledBatchSampler) else None


def _has_scheduled_sampler(loaders: Any) -> bool:
    if isinstance(loaders, (list, tuple, dict)):
        parts = loaders.values() if isinstance(loaders, dict) else loaders
        return any(_has_scheduled_sampler(part) for part in parts)
    return isinstance(getattr(loaders, "batch_sampler", None), ScheduledBatchSampler)


def refuse_scheduled_validation(trainer: pl.Trainer) -> None:
    """Refuse a sampler that would cut validation into the micro-batches of training."""
    if _has_scheduled_sampler(trainer.val_dataloaders):
        raise MisconfigurationException(
            "Expected a ScheduledBatchSampler in the training DataLoader only, got one for validation, whose"
            " batches would follow the sizes of training: use DataLoader(batch_size=...) there."
        )


def refresh_epoch_length(trainer: pl.Trainer) -> None:
    """Let Lightning read the length of the training loader again, as if the epoch were the first.

    It reads it once per `fit`. With a stale one it would skip validation and the last step of an epoch that
    got shorter, and leave out examples of one that got longer.
    """
    length, limit = len(trainer.train_dataloader), trainer.limit_train_batches  # type: ignore[arg-type]
    # At least one, where the first epoch had one: without a batch Lightning ends the training.
    batches = min(length, limit) if isinstance(limit, int) else max(1, int(length * limit))
    combined = trainer.fit_loop._combined_loader
    assert combined is not None
    combined.limits = [batches]
    trainer.fit_loop.max_batches = batches
    interval = trainer.val_check_interval
    if isinstance(interval, int):
        # Lightning refuses an interval longer than the epoch, and would here never validate again.
        if trainer.check_val_every_n_epoch is not None:
            trainer.val_check_batch = min(interval, batches)
    elif isinstance(interval, float) and trainer.val_check_batch is not None:
        trainer.val_check_batch = max(1, int(batches * interval))


def skips_step(trainer: pl.Trainer, optimizer: Optimizer, *, has_loss: bool) -> bool:
    """Ask the scaler of `precision="16-mixed"` in `on_before_optimizer_step`.

    Lightning has unscaled the gradients by then and looked for infinities, except those of a fused optimizer
    (`_step_supports_amp_scaling`), which does both within its step. For that one the scaler is made to look
    now: one more pass over the gradients, which waits for the device.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not scaler.is_enabled():
        return False
    if not has_loss:
        return True
    found = scaler._found_inf_per_device(optimizer) or scaler._check_inf_per_device(optimizer)
    return any(bool(value) for value in found.values())
