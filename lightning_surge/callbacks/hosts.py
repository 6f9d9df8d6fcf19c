"""Lightning under its two names, `lightning.pytorch` and `pytorch_lightning`.

They are two copies of one code base, each with classes of its own, and whoever has `lightning` has both. A
Trainer of either takes callbacks and modules by their methods; where a class is asked for, this module knows
both. Only `pytorch_lightning`'s LightningCLI asks for a class of callbacks: import it before
`lightning_surge`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning_utilities.core.overrides import is_overridden

__all__ = ["Callback", "is_accumulation_scheduler", "is_sampler_wrapper", "overrides"]

if TYPE_CHECKING or "pytorch_lightning" not in sys.modules:
    Callback = pl.Callback
else:
    # LightningCLI accepts subclasses of its own package's Callback only. The other package is not imported
    # for that: it would take over the logger through which Lightning speaks.
    from pytorch_lightning import Callback as _OtherCallback

    class Callback(pl.Callback, _OtherCallback):
        """A callback to both packages."""


def is_accumulation_scheduler(callback: object) -> bool:
    """Whether a callback is Lightning's own `GradientAccumulationScheduler`, of either package."""
    return isinstance(callback, _classes("pytorch.callbacks", "GradientAccumulationScheduler"))


def is_sampler_wrapper(sampler: object) -> bool:
    """Whether Lightning has put a sampler between a rank and the user's, as either package does."""
    return isinstance(sampler, _classes("fabric.utilities.distributed", "DistributedSamplerWrapper"))


def overrides(pl_module: pl.LightningModule, name: str) -> bool:
    """Whether a module brings a method of its own in place of LightningModule's.

    Args:
        pl_module: of either package.
        name: of the method.
    """
    parents = _classes("pytorch", "LightningModule")
    return is_overridden(name, pl_module, next(kind for kind in parents if isinstance(pl_module, kind)))


def _classes(path: str, name: str) -> tuple[type[Any], ...]:
    """The class of that name in each package that has been imported: others have no objects."""
    part, _, rest = path.partition(".")
    packages = (f"lightning.{part}", {"pytorch": "pytorch_lightning", "fabric": "lightning_fabric"}[part])
    modules = (sys.modules.get(f"{package}.{rest}".rstrip(".")) for package in packages)
    return tuple(getattr(module, name) for module in modules if module is not None)
