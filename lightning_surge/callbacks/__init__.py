"""Lightning callbacks: the learning rate that fits the batch size, and schedules of the batch size."""

from lightning_surge.callbacks.batch_size_scheduler import BatchSizeScheduler, BatchSizeWarmup
from lightning_surge.callbacks.surge_lr import SurgeLRCallback

__all__ = ["BatchSizeScheduler", "BatchSizeWarmup", "SurgeLRCallback"]
