"""A Trainer that only trains: no logger, no files, no bars."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl

__all__ = ["quiet_trainer"]


def quiet_trainer(callbacks: Sequence[pl.Callback], **options: Any) -> pl.Trainer:
    """On one CPU, unless options of the Trainer say something else."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "callbacks": list(callbacks),
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
    }
    return pl.Trainer(**quiet | options)
