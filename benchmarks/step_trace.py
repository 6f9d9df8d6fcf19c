"""How much of the package one optimizer step enters: `python -m benchmarks.step_trace [--list]`.

Counts the Python functions of the package that are entered from the start of a batch to its end, in a small
AdamW training that logs every step: an ordinary step, one beside a batch-size scheduler, one with a probe.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

import lightning_surge
from benchmarks.trainer import quiet_trainer
from lightning_surge import BatchSizeScheduler, SurgeLRCallback
from lightning_surge.schedules import ConstantSize

PACKAGE = str(Path(lightning_surge.__file__).parent)
STEP = 40
Entered = Counter[tuple[str, str]]


class Traced(pl.LightningModule):
    """A linear model whose 40th step is watched, from the callbacks' first hook to their last."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 1)

    def training_step(self, batch: tuple[torch.Tensor, ...], batch_idx: int) -> torch.Tensor:
        """Mean squared error."""
        return (self.layer(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Watch(pl.Callback):
    """Counts functions entered during one step."""

    def __init__(self, entered: Entered, step: Callable[[], bool]) -> None:
        self.entered = entered
        self.step = step

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Watch Lightning's own loop, which calls every hook of a batch."""
        loop: Any = trainer.fit_loop.epoch_loop
        advance = loop.advance

        def watched(*args: Any, **kwargs: Any) -> Any:
            if not self.step():
                return advance(*args, **kwargs)
            sys.setprofile(self.note)
            try:
                return advance(*args, **kwargs)
            finally:
                sys.setprofile(None)

        loop.advance = watched

    def note(self, frame: FrameType, event: str, arg: object) -> None:
        """Count a function of the package."""
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE):
            self.entered[code.co_filename.removeprefix(PACKAGE + "/"), code.co_qualname] += 1


def trace(*callbacks: pl.Callback, **options: Any) -> Entered:
    """How often each function was entered in one step beside these callbacks, by file and name."""
    entered: Entered = Counter()
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(
        torch.randn(16 * 60, 8, generator=generator), torch.randn(16 * 60, 1, generator=generator)
    )
    module = Traced()
    watch = Watch(entered, lambda: trainer.global_step == STEP)
    surge = SurgeLRCallback(base_batch_size=8, **options)
    trainer = quiet_trainer([*callbacks, surge, watch], max_epochs=1, log_every_n_steps=1)
    trainer.fit(module, DataLoader(data, batch_size=16))
    return entered


def main() -> None:
    """Print calls and files of each kind of step."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="the functions too, most entered first")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    rows = {
        "ordinary": trace(),
        "with BatchSizeScheduler": trace(BatchSizeScheduler(ConstantSize(16))),
        "with a probe": trace(probe_every=1),
    }
    for name, entered in rows.items():
        print(f"{name}: {sum(entered.values())} calls in {len({file for file, _ in entered})} files")
        if arguments.list:
            for (file, function), count in sorted(entered.items(), key=lambda row: -row[1]):
                print(f"  {count:4} {file}: {function}")


if __name__ == "__main__":
    main()
