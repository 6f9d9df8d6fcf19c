"""Names and values of what the callback logs, and TensorBoard's chart of them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lightning.pytorch.loggers import Logger
from torch.optim import Optimizer

from lightning_surge.estimates import EstimatedLaw
from lightning_surge.laws import Law, MeasuredLaw
from lightning_surge.noise import NoiseHistory
from lightning_surge.policy import Decision

__all__ = ["add_tensorboard_layout", "group_suffixes", "law_metrics", "lr_metrics"]

PREFIX = "surge/"


def group_suffixes(optimizer: Optimizer, suffix: str) -> list[str]:
    """What the keys of the learning rates of each parameter group end with.

    Args:
        optimizer: its groups.
        suffix: of the optimizer.

    Returns:
        The suffix, and behind it the group's name or number where there are several.
    """
    groups = optimizer.param_groups
    if len(groups) == 1:
        return [suffix]
    return [f"{suffix}/{group.get('name', index)}" for index, group in enumerate(groups)]


def lr_metrics(
    groups: Sequence[str],
    suffix: str = "",
    *,
    scheduled: Sequence[float],
    used: Sequence[float],
    decision: Decision,
) -> dict[str, float]:
    """The three learning rates of every group, and the factor between them.

    Args:
        groups: suffix of each group, as of `group_suffixes`.
        suffix: of the optimizer.
        scheduled: learning rates from the schedule.
        used: learning rates written.
        decision: of the policy.

    Returns:
        Log keys and values.
    """
    metrics = {}
    for group, lr_scheduled, lr_used in zip(groups, scheduled, used, strict=True):
        metrics[f"{PREFIX}lr_scheduled{group}"] = lr_scheduled
        metrics[f"{PREFIX}lr_predicted{group}"] = lr_scheduled * decision.predicted
        metrics[f"{PREFIX}lr_used{group}"] = lr_used
    metrics[f"{PREFIX}lr_scale{suffix}"] = decision.used
    metrics[f"{PREFIX}lr_scale_predicted{suffix}"] = decision.predicted
    if math.isfinite(decision.standard_error):
        metrics[f"{PREFIX}lr_scale_standard_error{suffix}"] = decision.standard_error
    return metrics


def law_metrics(
    history: NoiseHistory, law: EstimatedLaw | None, batch_size: float, deviation_l1: float = math.nan
) -> dict[str, float]:
    """What the measurements say, each with its standard error where it is finite.

    Args:
        history: the measurements.
        law: the law estimated from them.
        batch_size: examples per optimizer step, at which alignment and curvature are reported.
        deviation_l1: `sum_i sigma_i`, if known from elsewhere than the measurements.

    Returns:
        Log keys and values.
    """
    stats = history.stats()
    metrics = {
        f"{PREFIX}noise_scale": stats.noise_scale,
        f"{PREFIX}grad_sq": stats.grad_sq,
        f"{PREFIX}trace_cov": stats.trace_cov,
        f"{PREFIX}num_measurements": float(history.num_measurements),
    }
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
    if not math.isnan(law.edge_lr(batch_size)):
        quantities["edge_lr"] = lambda law: law.edge_lr(batch_size)
    for name, quantity in quantities.items():
        metrics[f"{PREFIX}{name}"] = quantity(law)
        error = law.standard_error(quantity)
        if math.isfinite(error):
            metrics[f"{PREFIX}{name}_standard_error"] = error
    if isinstance(law.law, MeasuredLaw):
        if math.isfinite(deviation_l1):
            # |sigma|_1^2 / |mu|_1^2; the alignment of an infinite batch is |mu|_1.
            metrics[f"{PREFIX}noise_scale_l1"] = (deviation_l1 / law.law.alignment_limit) ** 2
        error = law.standard_error(lambda law: law.alignment_scale)  # type: ignore[attr-defined]
        if math.isfinite(error):
            metrics[f"{PREFIX}noise_scale_standard_error"] = error
    return metrics


def add_tensorboard_layout(loggers: Iterable[Logger], groups: Mapping[str, Sequence[str]]) -> None:
    """Give TensorBoard a chart with the learning rates and one with batch size and peak, per optimizer.

    TensorBoard shows one layout per run, so all optimizers must be in it.

    Args:
        loggers: those whose experiment has no custom scalars are passed over.
        groups: suffixes of the parameter groups, by the suffix of the optimizer.
    """
    charts: dict[str, list[str | list[str]]] = {}
    for suffix, names in groups.items():
        for group in names:
            tags = rf"surge/lr_(scheduled|predicted|used){re.escape(group)}$"
            charts[f"learning rate{group}"] = ["Multiline", [tags]]
        tags = rf"surge/(batch_size|peak_batch_size|critical_batch_size){re.escape(suffix)}$"
        charts[f"batch size{suffix}"] = ["Multiline", [tags]]
    layout = {"surge": charts}
    for logger in loggers:
        # By what it can do, not by its class: several packages bring a TensorBoard writer. The type is asked,
        # because a dummy experiment answers to every name.
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(type(experiment), "add_custom_scalars"):
            experiment.add_custom_scalars(layout)
