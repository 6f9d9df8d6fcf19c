"""Logs of a run: reading them, charts of them, and advice on how to go on."""

from lightning_surge.runs.advice import Advice, Caveat, Interval, Option, RunState, advise, run_state
from lightning_surge.runs.log_files import read_run
from lightning_surge.runs.plots import plot_run
from lightning_surge.runs.report import describe, document
from lightning_surge.runs.run_log import RunLog, RunLogError, Series

__all__ = [
    "Advice", "Caveat", "Interval", "Option", "RunLog", "RunLogError", "RunState", "Series", "advise",
    "describe", "document", "plot_run", "read_run", "run_state",
]  # fmt: skip
