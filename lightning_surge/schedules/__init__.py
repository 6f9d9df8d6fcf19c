"""Batch sizes over a run: schedules, the windows of micro-batches they lead to, a sampler, and clocks."""

from typing import Never

from lightning_surge.schedules.batch_sampler import ScheduledBatchSampler
from lightning_surge.schedules.by_examples import by_examples
from lightning_surge.schedules.seesaw import Seesaw
from lightning_surge.schedules.sizes import (
    ConstantSize,
    CosineRamp,
    GeometricRamp,
    LinearRamp,
    Milestones,
    Phase,
    Phases,
    Progress,
    Schedule,
)
from lightning_surge.schedules.windows import (
    AccumulatedSchedule,
    SampledSchedule,
    Window,
    plan_windows,
    total_examples,
    total_steps,
)

__all__ = [
    "AccumulatedSchedule", "ConstantSize", "CosineRamp", "GeometricRamp", "LinearRamp",
    "Milestones", "Phase", "Phases", "Progress", "SampledSchedule", "Schedule", "ScheduledBatchSampler",
    "Seesaw", "Window", "by_examples", "plan_windows", "total_examples", "total_steps",
]  # fmt: skip


def __getattr__(name: str) -> Never:
    """Say what to use in place of a name that is retired."""
    if name == "FollowPeak":
        # Not an AttributeError, in whose place `from lightning_surge import` says nothing of a remedy.
        raise ImportError(
            "FollowPeak is retired: use a ramp, as schedules.GeometricRamp, or schedules.Seesaw."
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
