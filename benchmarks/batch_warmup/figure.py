"""Final loss against optimizer steps, as a small PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.batch_warmup.analysis import Line, Record, Tuned, lines
from benchmarks.batch_warmup.rules import (
    BASE_BATCH_SIZE,
    BUDGETS,
    DEFAULT_OVERHEAD,
    FOLLOW,
    LARGE_BATCH_SIZE,
)
from benchmarks.batch_warmup.targets import LOSS_BOUND
from benchmarks.batch_warmup.workloads import WORKLOADS

__all__ = ["draw"]

BLACK, GREY, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = (
    "#000000", "#8c8c8c", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
COLOURS = {
    "constant": GREY,
    "sqrt": PURPLE,
    "linear": GREEN,
    "step": VERMILION,
    "alignment": SKY,
    "progress": BLUE,
    "edge": ORANGE,
}
MARKERS = {"slow": "o", "fast": "s", FOLLOW: "D"}
CONSTANTS = {BASE_BATCH_SIZE: "*", LARGE_BATCH_SIZE: "P"}
LINEAR_BELOW = 0.02  # nats


def draw(constants: Sequence[Record], ramps: Sequence[Record], path: Path) -> None:
    """Loss minus that of the tuned constant small batch, by optimizer steps: a panel per workload and budget.

    Args:
        constants: `runs` of the kind `"constant"`.
        ramps: `runs` of the kind `"ramp"`.
        path: to write to; left alone where there is nothing to show.
    """
    panels = {
        (workload, budget): lines(constants, ramps, workload, budget)
        for workload in WORKLOADS
        for budget in BUDGETS
    }
    if not any(panels.values()):
        return
    figure = Figure(figsize=(4.6 * len(BUDGETS), 3.4 * len(WORKLOADS) + 0.9), dpi=90, layout="constrained")
    grid = figure.subplots(len(WORKLOADS), len(BUDGETS), squeeze=False, sharey="row")
    for axes, ((workload, budget), found) in zip(grid.flat, panels.items(), strict=True):
        axes.axhspan(-LOSS_BOUND, LOSS_BOUND, color=GREY, alpha=0.2, linewidth=0)
        axes.axhline(0.0, color=BLACK, linewidth=0.8)
        for line in found:
            if math.isfinite(line.loss):
                spread = line.spread if math.isfinite(line.spread) else 0.0
                axes.errorbar(line.steps, line.difference.value, spread, capsize=2, **_style(line))
        lost = sum(not math.isfinite(line.loss) for line in found)
        title = f"{workload}, {WORKLOADS[workload].examples[budget]:,} examples"
        axes.set_title(title + (f" ({lost} diverged, not shown)" if lost else ""), fontsize=10)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_yscale("symlog", linthresh=LINEAR_BELOW)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.grid(axis="y", color=GREY, alpha=0.3, linewidth=0.6)
        axes.set_axisbelow(True)
    for axes in grid[-1]:
        axes.set_xlabel("optimizer steps")
    for axes in grid[:, 0]:
        label = f"final loss minus constant small batch\n(nats, linear below {LINEAR_BELOW:g}; sd of seeds)"
        axes.set_ylabel(label, fontsize=9)
    every = [line for found in panels.values() for line in found]
    figure.legend(handles=_legend(every), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Software": None})


def _style(line: Line) -> dict[str, Any]:
    if isinstance(line.rule, Tuned):
        marker = CONSTANTS[line.rule.batch_size]
        return {"color": BLACK, "marker": marker, "markersize": 9, "linestyle": "none"}
    style = {"color": COLOURS[line.rule.rule], "marker": MARKERS[line.rule.ramp], "markersize": 5.5}
    # Hollow: at the default cost of measuring.
    hollow = {"markerfacecolor": "none"} if line.rule.max_overhead == DEFAULT_OVERHEAD else {}
    return style | hollow | {"linestyle": "none"}


def _legend(found: Sequence[Line]) -> list[Line2D]:
    handles: dict[str, Line2D] = {}
    for line in found:
        if isinstance(line.rule, Tuned):
            name = f"constant B = {line.rule.batch_size}, tuned lr"
        else:
            name = f"{line.rule.growth}, {line.rule.label}"
        handles.setdefault(name, Line2D([], [], label=name, **_style(line)))
    return list(handles.values())
