"""A line for every epoch: what the small examples print while they train."""

from __future__ import annotations

import logging
import math
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.rank_zero import rank_zero_only

__all__ = ["EpochTable", "quiet_trainer"]

# Heading, logged value, format.
COLUMNS = (
    ("batch size", "surge/batch_size", "{:.0f}"),
    ("R", "surge/lr_scale", "{:.2f}"),
    ("noise scale", "surge/noise_scale", "{:.0f}"),
    ("critical batch", "surge/critical_batch_size", "{:.0f}"),
    ("val. loss", "val_loss", "{:.4f}"),
)
HEADINGS = ("epoch", "steps", *(heading for heading, _, _ in COLUMNS))


class EpochTable(pl.Callback):
    """Prints how the last step of an epoch was: batch size, factor on the learning rate, measured noise."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The heading."""
        self._print(HEADINGS)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """One line; `-` for what is not known yet."""
        metrics = trainer.callback_metrics
        cells = [f"{trainer.current_epoch + 1}", f"{trainer.global_step}"]
        for _, name, form in COLUMNS:
            value = float(metrics[name]) if name in metrics else math.nan
            cells.append("-" if math.isnan(value) else form.format(value))
        self._print(cells)

    @rank_zero_only
    def _print(self, cells: Any) -> None:
        print("  ".join(cell.rjust(len(heading)) for cell, heading in zip(cells, HEADINGS, strict=True)))


def quiet_trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """A Trainer on the CPU that writes no files and prints nothing but what the callbacks do."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "log_every_n_steps": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(callbacks=list(callbacks), **(defaults | options))
