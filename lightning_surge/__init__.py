"""Measures gradient noise while a model trains and sets the learning rate that fits the batch size."""

from importlib.metadata import version

from lightning_surge.callbacks import BatchSizeScheduler, BatchSizeWarmup, SurgeLRCallback
from lightning_surge.clocks import by_examples
from lightning_surge.follow_peak import FollowPeak
from lightning_surge.sampling import ScheduledBatchSampler

__all__ = [
    "BatchSizeScheduler",
    "BatchSizeWarmup",
    "FollowPeak",
    "ScheduledBatchSampler",
    "SurgeLRCallback",
    "by_examples",
]
__version__ = version("lightning-surge")
