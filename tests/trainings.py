"""What tests train: a Trainer that writes nothing, and a look at what an optimizer's update reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch.optim import Optimizer

__all__ = ["MakeTrainer", "at_update", "make_quiet_trainer"]

MakeTrainer = Callable[..., pl.Trainer]


def make_quiet_trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """A Trainer on one CPU thread that writes nothing unless asked to."""
    torch.set_num_threads(1)
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "log_every_n_steps": 1,
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
    }
    return pl.Trainer(callbacks=list(callbacks), **(defaults | options))


def at_update(optimizer: Optimizer, look: Callable[[Optimizer], object]) -> None:
    """Look at an optimizer of torch's in the middle of each step, where the update reads its groups.

    Hooks see the schedule's values before and after: the factor is there for the update alone.
    """
    ask: Any = getattr(optimizer, "_init_group", None)
    if ask is None:  # LBFGS, which has one group and keeps no state by parameter
        return

    def asked(group: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if group is optimizer.param_groups[0]:
            look(optimizer)
        return ask(group, *args, **kwargs)

    optimizer._init_group = asked  # type: ignore[attr-defined]
