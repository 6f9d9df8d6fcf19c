"""Names and values of what the callback logs, and TensorBoard's charts of them; see docs/logged-values.md."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.fabric.utilities import rank_zero_info
from torch.optim import Optimizer

from lightning_surge.callbacks.checks import served_optimizer, trained_optimizers
from lightning_surge.laws.base import Law
from lightning_surge.policy.estimates import EstimatedLaw
from lightning_surge.policy.history import NoiseHistory
from lightning_surge.policy.policy import Decision

PREFIX = "surge/"
# The tag of TensorBoard's layouts with the bytes behind it, among which ours has this pattern.
LAYOUT = rb"custom_scalars__config__[\s\S]{0,512}"
OWN_LAYOUT = f"{PREFIX}lr_(scheduled|predicted|used)".encode()


def _group_suffixes(optimizer: Optimizer, suffix: str) -> list[str]:
    """The endings of the learning-rate keys of each parameter group."""
    groups = optimizer.param_groups
    if len(groups) == 1:
        return [suffix]
    return [f"{suffix}/{group.get('name', index)}" for index, group in enumerate(groups)]


def with_error(name: str, value: float, error: float) -> dict[str, float]:
    """A number to log, and its standard error where that is finite."""
    known = {f"{PREFIX}{name}_standard_error": error} if math.isfinite(error) else {}
    return {f"{PREFIX}{name}": value} | known


def law_metrics(history: NoiseHistory, law: EstimatedLaw | None, batch_size: float) -> dict[str, float]:
    """What the measurements say, each with its standard error where it is finite.

    An infinite noise scale, and whatever is 0 or infinite in a law at the edge of what can be fitted, was not
    measured, and is left out, and so is what depends on curvature in a law from norms alone. An infinite peak
    of another law is an answer: it never falls.
    """
    stats = history.stats()
    metrics = {
        f"{PREFIX}grad_sq": stats.grad_sq,
        f"{PREFIX}trace_cov": stats.trace_cov,
        f"{PREFIX}num_measurements": float(history.num_measurements),
    }
    if math.isfinite(stats.noise_scale):
        error = history.standard_error(lambda stats: stats.noise_scale)
        metrics |= with_error("noise_scale", stats.noise_scale, error)
    if law is None:
        return metrics
    quantities: dict[str, Callable[[Law], float]] = {
        "peak_batch_size": lambda law: law.peak.batch_size,
        "peak_lr": lambda law: law.peak.lr,
        "critical_batch_size": lambda law: law.critical_batch_size,
        "alignment": lambda law: law.alignment(batch_size),
        "curvature": lambda law: law.alignment(batch_size) / law.lr(batch_size),
        "lr_optimal": lambda law: law.lr(batch_size),
    }
    if not stats.knows_curvature:
        quantities = {"critical_batch_size": quantities["critical_batch_size"]}
    for name, quantity in quantities.items():
        value = quantity(law)
        if not law.at_edge or 0.0 < value < math.inf:
            metrics |= with_error(name, value, law.standard_error(quantity))
    # By their names a reader of the logs knows which law it is, and makes it again.
    numbers: dict[str, float | None] = asdict(law.law)  # type: ignore[call-overload]
    metrics |= {f"{PREFIX}law/{name}": value for name, value in numbers.items() if value is not None}
    metrics[f"{PREFIX}law/smallest_measured"], metrics[f"{PREFIX}law/largest_measured"] = law.reach
    return metrics


def tensorboard_layout(groups: Mapping[str, Sequence[str]]) -> dict[str, dict[str, list[Any]]]:
    """The scalars of each TensorBoard chart, one unit to a chart, as `add_custom_scalars` takes them.

    Args:
        groups: suffixes of the parameter groups, by the suffix of the optimizer; both empty if there is one.
    """
    charts = {
        f"learning rates{group}": [rf"{PREFIX}lr_(scheduled|predicted|used){re.escape(group)}$"]
        for names in groups.values()
        for group in names
    }
    others = {
        "batch size against peak": "batch_size|peak_batch_size|critical_batch_size",
        "noise": "noise_scale",
        "overhead": "overhead|overhead_time",
    }
    for title, names in others.items():
        for suffix in groups:
            charts[f"{title}{suffix}"] = [rf"{PREFIX}({names}){re.escape(suffix)}$"]
    return {"surge": {title: ["Multiline", patterns] for title, patterns in charts.items()}}


def _layouts_in(experiment: Any) -> bytes:
    """The records of an experiment's files that hold a layout; a resumed run has older files."""
    directory = getattr(experiment, "log_dir", None)
    if not directory or not hasattr(type(experiment), "flush"):
        return b""
    experiment.flush()
    found = b""
    try:
        for path in Path(directory).glob("*tfevents*"):
            # Searched as bytes, since this comes before every training and the files may be long.
            found += b"".join(re.findall(LAYOUT, path.read_bytes()))
    except (OSError, TypeError):
        return b""
    return found


class StepRecord(NamedTuple):
    """What is logged of one optimizer step; learning rates of each group are floats or tensors."""

    decision: Decision
    batch_size: float
    scheduled: Sequence[Any]
    used: Sequence[Any]


class StepLog:
    """Keeps the latest step until it can be logged, and is `unlogged` no more."""

    def __init__(self, optimizer: Optimizer, suffix: str, *, prog_bar: bool) -> None:
        self.optimizer = optimizer
        self.suffix = suffix
        self._prog_bar = prog_bar
        self.unlogged: StepRecord | None = None

    def write(self, pl_module: pl.LightningModule, metrics: dict[str, float]) -> None:
        """Log the step that was kept."""
        record, self.unlogged = self.unlogged, None
        assert record is not None
        decision = record.decision
        metrics |= {
            f"{PREFIX}lr_scale": decision.used,
            f"{PREFIX}lr_scale_predicted": decision.predicted,
            f"{PREFIX}held_because": float(decision.because),
        }
        if math.isfinite(decision.standard_error):
            metrics[f"{PREFIX}lr_scale_standard_error"] = decision.standard_error
        logged = {name + self.suffix: value for name, value in metrics.items()}
        scheduled, used = ([float(lr) for lr in lrs] for lrs in (record.scheduled, record.used))
        groups = _group_suffixes(self.optimizer, self.suffix)  # one may have been added since
        for group, before, lr in zip(groups, scheduled, used, strict=False):
            logged[f"{PREFIX}lr_scheduled{group}"] = before
            logged[f"{PREFIX}lr_predicted{group}"] = before * decision.predicted
            logged[f"{PREFIX}lr_used{group}"] = lr
        pl_module.log_dict(logged, on_step=True, on_epoch=False, batch_size=1)
        if self._prog_bar:
            name = f"lr_used{self.suffix}"
            pl_module.log(name, used[0], prog_bar=True, logger=False, batch_size=1)


def logs_now(trainer: pl.Trainer) -> bool:
    """Whether Lightning keeps what is logged in this batch."""
    return bool(trainer._logger_connector.should_update_logs or trainer.fast_dev_run)  # type: ignore[attr-defined]


def optimizer_suffix(trainer: pl.Trainer, index: int | None) -> str:
    """The ending of an optimizer's keys; empty where there is only one."""
    return f"/opt{index}" if len(trained_optimizers(trainer.optimizers)) > 1 else ""


def add_layout(
    trainer: pl.Trainer, pl_module: pl.LightningModule, name: str, indices: Sequence[int | None]
) -> None:
    """Give TensorBoard its charts of every optimizer that is served, once per run.

    It shows the last layout of a run only, so a run that has one keeps it, and a message says so.
    """
    groups = {}
    for index in indices:
        suffix = optimizer_suffix(trainer, index)
        groups[suffix] = _group_suffixes(served_optimizer(trainer, pl_module, name, index), suffix)
    for logger in trainer.loggers:
        # By what it can do, not by its class: several packages bring a TensorBoard writer. The type is asked,
        # because a dummy experiment answers to every name.
        experiment: Any = getattr(logger, "experiment", None)
        if not hasattr(type(experiment), "add_custom_scalars"):
            continue
        written = _layouts_in(experiment)
        if not written:
            experiment.add_custom_scalars(tensorboard_layout(groups))
        elif OWN_LAYOUT not in written:
            rank_zero_info(
                "TensorBoard shows one layout per run, and this run has one already: the charts of surge/ "
                "were not added. Pass custom_scalars=False, or add callbacks.logging.tensorboard_layout."
            )
