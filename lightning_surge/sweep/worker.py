"""What runs inside the process of a cell: the user's training, with a callback that takes down the loss.

python -m lightning_surge.sweep.worker SPECIFICATION ANSWER
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_surge.sweep.cells import CellSpec, Outcome, SweepError
from lightning_surge.sweep.config import (
    LEFT_OUT,
    cell_arguments,
    cli_class,
    cli_options,
    cli_warnings,
    files_digest,
    require_jsonargparse,
)
from lightning_surge.sweep.recorder import DivergedError, LossRecorder, TargetsReachedError

__all__ = ["run_cell"]


def run_cell(spec: CellSpec) -> Outcome:
    """Train a cell in this process.

    Args:
        spec: of the cell.

    Returns:
        What it said, whatever went wrong with its training.

    Raises:
        SweepError: if no cell of the sweep can run.
    """
    require_jsonargparse()
    if files_digest(spec.settings.configs) != spec.settings.files_digest:
        raise SweepError(
            f"Expected {', '.join(spec.settings.configs)} as it was when the sweep began, got an edited "
            "file: put it back, or start a sweep with another --output."
        )
    recorder = LossRecorder(spec)
    begin = time.monotonic()
    outcome = Outcome("failed")
    try:
        loss = _train(spec, recorder)
        outcome = Outcome("finished", loss)
    except TargetsReachedError:
        outcome = Outcome("finished", recorder.loss)
    except DivergedError as error:
        outcome = Outcome("diverged", message=str(error))
    except (MisconfigurationException, SweepError) as error:
        raise SweepError(str(error)) from error
    except (Exception, SystemExit) as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning exits after one
            raise KeyboardInterrupt from error
        traceback.print_exc()
        memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "t allocate memory" in str(error)
        first = (str(error) or "no message").splitlines()[0]
        outcome = Outcome("out_of_memory" if memory else "failed", message=f"{type(error).__name__}: {first}")
    return replace(
        outcome,
        steps=recorder.steps,
        examples=recorder.examples,
        seconds=time.monotonic() - begin,
        reached=recorder.crossings.reached,
    )


def _train(spec: CellSpec, recorder: LossRecorder) -> float:
    class CellCLI(cli_class(spec.settings)):  # type: ignore[misc]
        def instantiate_trainer(self, **options: Any) -> pl.Trainer:
            # A logger that writes nothing, since callbacks may ask for one.
            trainer: pl.Trainer = super().instantiate_trainer(**options, logger=DummyLogger())
            kept = [callback for callback in trainer.callbacks if not isinstance(callback, LEFT_OUT)]  # type: ignore[attr-defined]
            trainer.callbacks = [*kept, recorder]  # type: ignore[attr-defined]
            return trainer

    with cli_warnings():
        cli = CellCLI(args=cell_arguments(spec.settings, spec.cell), **cli_options(spec.settings))
    trained = dict(cli.trainer.callback_metrics)
    if not recorder.trains and recorder.validated_at != recorder.steps and cli.trainer.enable_validation:
        cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
    return recorder.final_loss(trained | cli.trainer.callback_metrics)


def _end_with_the_sweep() -> None:
    """Wait for the end of standard input, which the sweep holds open while it lives."""
    sys.stdin.buffer.read()
    if hasattr(os, "killpg") and os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def main(arguments: list[str]) -> None:
    """Run the cell of a file and leave its answer in another."""
    specification, answer = map(Path, arguments)
    threading.Thread(target=_end_with_the_sweep, daemon=True).start()
    try:
        values: dict[str, Any] = asdict(run_cell(CellSpec.from_json(specification.read_text())))
    except SweepError as error:
        values = {"unusable": str(error)}
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        draft = answer.with_suffix(".draft")
        draft.write_text(json.dumps(values))
        os.replace(draft, answer)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not the ordinary way: threads and handlers of the user's libraries may keep a process for ever.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
