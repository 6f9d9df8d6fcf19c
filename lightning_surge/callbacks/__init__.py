"""Lightning callbacks: the learning rate that fits the batch size, schedules of the batch size, resuming."""

from lightning_surge.callbacks.batch_size_scheduler import BatchSizeScheduler, BatchSizeWarmup
from lightning_surge.callbacks.resuming.exact_resume import ExactResume
from lightning_surge.callbacks.surge_lr import SurgeLRCallback

__all__ = ["BatchSizeScheduler", "BatchSizeWarmup", "ExactResume", "SurgeLRCallback"]
