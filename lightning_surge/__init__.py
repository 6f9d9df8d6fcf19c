"""Measures gradient noise while a model trains and sets the learning rate that fits the batch size."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_surge.callbacks import BatchSizeScheduler, BatchSizeWarmup, ExactResume, SurgeLRCallback
    from lightning_surge.schedules import ScheduledBatchSampler, by_examples

__all__ = [
    "BatchSizeScheduler",
    "BatchSizeWarmup",
    "ExactResume",
    "ScheduledBatchSampler",
    "SurgeLRCallback",
    "by_examples",
]
__version__ = version("lightning-surge")

# torch and lightning take seconds to import, and the command line and the packages of floats need neither: a
# name is imported when it is first asked for.
_PACKAGES = {
    "BatchSizeScheduler": "callbacks",
    "BatchSizeWarmup": "callbacks",
    "ExactResume": "callbacks",
    "ScheduledBatchSampler": "schedules",
    "SurgeLRCallback": "callbacks",
    "by_examples": "schedules",
}
# Whose packages say what to use instead.
_RETIRED = {"FollowPeak": "schedules"}


def __getattr__(name: str) -> Any:
    """Import a public name."""
    package = {**_PACKAGES, **_RETIRED}.get(name)
    if package is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{package}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Every name, imported yet or not."""
    return sorted({*globals(), *__all__})
