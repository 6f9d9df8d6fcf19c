"""What the trainings of tests share."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint


def make_trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
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
