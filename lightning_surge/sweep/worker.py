"""The process of one cell: the user's training, with a callback that takes down the loss.

python -m lightning_surge.sweep.worker ORDER
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from dataclasses import replace
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_surge.sweep.cells import Cell, Outcome, SweepError, SweepSettings
from lightning_surge.sweep.config import cell_arguments, cell_cli, files_digest
from lightning_surge.sweep.recorder import CellEnd, LossRecorder
from lightning_surge.sweep.study import SweepStudy, patiently

__all__ = ["run_cell"]


def run_cell(settings: SweepSettings, cell: Cell) -> Outcome:
    """Train a cell in this process: what it said, or a SweepError if no cell of the sweep can run."""
    if files_digest(settings.configs) != settings.files_digest:
        raise SweepError(
            f"Expected {', '.join(settings.configs)} as it was when the sweep began, got an edited "
            "file: put it back, or start a sweep with another --output."
        )
    recorder = LossRecorder(settings, cell)
    try:
        cli = cell_cli(settings, cell_arguments(settings, cell), recorder)
        trained = dict(cli.trainer.callback_metrics)
        if not recorder.trains and recorder.validated_at != recorder.steps and cli.trainer.enable_validation:
            cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
        outcome = Outcome("finished", recorder.final_loss(trained | cli.trainer.callback_metrics))
    except CellEnd as end:
        outcome = end.outcome
    except (MisconfigurationException, SweepError) as error:
        raise SweepError(str(error)) from error
    except (Exception, SystemExit) as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning exits after one
            raise KeyboardInterrupt from error
        traceback.print_exc()
        memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "t allocate memory" in str(error)
        first = (str(error) or "no message").splitlines()[0]
        outcome = Outcome("out_of_memory" if memory else "failed", message=f"{type(error).__name__}: {first}")
    return replace(outcome, steps=recorder.steps, examples=recorder.examples, reached=recorder.reached())


def _end_with_the_sweep() -> None:
    """Wait for the end of standard input, which the sweep holds open while it lives."""
    sys.stdin.buffer.read()
    if hasattr(os, "killpg") and os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def main(order: dict[str, Any]) -> None:
    """Run the cell of a trial and tell the study."""
    threading.Thread(target=_end_with_the_sweep, daemon=True).start()
    outcome, refusal = None, ""
    try:
        outcome = run_cell(SweepSettings.from_json(order["settings"]), Cell(*order["cell"]))
    except SweepError as error:
        refusal = str(error)
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        study = patiently(lambda: SweepStudy(order["where"], order["name"]))
        patiently(lambda: study.tell(order["trial"], outcome, refusal))
    sys.stdout.flush()
    sys.stderr.flush()
    # Not the ordinary way: threads and handlers of the user's libraries may keep a process for ever.
    os._exit(0)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
