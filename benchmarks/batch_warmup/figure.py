"""Final loss against optimizer steps, as a small PNG."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from benchmarks.batch_warmup.analysis import Tuned, lines
from benchmarks.batch_warmup.rules import (
    BASE_BATCH_SIZE,
    BUDGETS,
    DEFAULT,
    DEFAULT_OVERHEAD,
    FIXED_RULES,
    LARGE_BATCH_SIZE,
    LARGE_OVERHEAD,
    RAMPS,
    RULES,
    SEESAW,
    Rule,
    growth,
)
from benchmarks.batch_warmup.targets import LOSS_BOUND
from benchmarks.batch_warmup.workloads import WORKLOADS
from benchmarks.fidelity.analysis import Record
from benchmarks.fidelity.figures import BLACK, BLUE, GREEN, GREY, PURPLE, SKY, VERMILION
from lightning_surge.laws.objectives import OBJECTIVES

__all__ = ["draw"]

COLOURS = dict(
    zip(
        (*FIXED_RULES, *OBJECTIVES),
        (GREY, PURPLE, GREEN, "#b07aa1", "#76b7a2", VERMILION, SKY, BLUE),
        strict=True,
    )
)
MARKERS = {"slow": "o", "fast": "s", SEESAW: "^"}
CONSTANTS = {BASE_BATCH_SIZE: "*", LARGE_BATCH_SIZE: "P"}
LINEAR_BELOW = 0.02  # nats


def draw(constants: Sequence[Record], ramps: Sequence[Record], path: Path) -> None:
    """Loss minus that of the tuned constant small batch, by steps: a panel per workload and budget."""
    panels = list(itertools.product(WORKLOADS, BUDGETS))
    found = [lines(constants, ramps, *panel) for panel in panels]
    if not any(found):
        return
    figure = Figure(figsize=(4.6 * len(BUDGETS), 3.4 * len(WORKLOADS) + 0.9), dpi=90, layout="constrained")
    grid = figure.subplots(len(WORKLOADS), len(BUDGETS), squeeze=False, sharey="row")
    for axes, (workload, budget), here in zip(grid.flat, panels, found, strict=True):
        axes.axhspan(-LOSS_BOUND, LOSS_BOUND, color=GREY, alpha=0.2, linewidth=0)
        axes.axhline(0.0, color=BLACK, linewidth=0.8)
        for line in here:
            if math.isfinite(line.loss):
                spread = line.spread if math.isfinite(line.spread) else 0.0
                x = line.steps * 2.0 ** _offset(line.rule)
                axes.errorbar(x, line.difference.value, spread, capsize=2, elinewidth=1, **_style(line.rule))
        lost = sum(not math.isfinite(line.loss) for line in here)
        title = f"{workload}, {WORKLOADS[workload].examples[budget]:,} examples"
        axes.set_title(title + (f" ({lost} diverged, not shown)" if lost else ""), fontsize=10)
        axes.set_xscale("log", base=2)
        axes.set_yscale("symlog", linthresh=LINEAR_BELOW)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.grid(axis="y", color=GREY, alpha=0.3, linewidth=0.6)
        axes.set_axisbelow(True)
    for axes in grid[-1]:
        axes.set_xlabel("optimizer steps")
    for axes in grid[:, 0]:
        label = f"final loss minus constant small batch\n(nats, linear below {LINEAR_BELOW:g}; sd of seeds)"
        axes.set_ylabel(label, fontsize=9)
    figure.legend(handles=_legend(), loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Software": None})


def _style(rule: Rule | Tuned) -> dict[str, Any]:
    if isinstance(rule, Tuned):
        return _marks(BLACK, CONSTANTS[rule.batch_size], size=9)
    style = _marks(COLOURS[rule.rule], MARKERS[rule.ramp])
    return style | ({"markerfacecolor": "none"} if rule.max_overhead == DEFAULT_OVERHEAD else {})


def _marks(colour: str, marker: str, size: float = 5.5) -> dict[str, Any]:
    return {"color": colour, "marker": marker, "markersize": size, "linestyle": "none"}


def _offset(rule: Rule | Tuned) -> float:
    # Rules on the same ramp take equally many steps; next to one another they can be told apart.
    if isinstance(rule, Tuned) or rule.ramp not in RAMPS:
        return 0.0
    return 0.06 * (list(COLOURS).index(rule.rule) - (len(COLOURS) - 1) / 2)


def _legend() -> list[Artist]:
    shown = {f"constant B = {size}, tuned lr": _marks(BLACK, CONSTANTS[size], 9) for size in CONSTANTS}
    shown |= {growth(ramp): _marks(BLACK, marker) for ramp, marker in MARKERS.items()}
    for rule in RULES:
        if rule.ramp == "slow" and rule.max_overhead != DEFAULT_OVERHEAD:
            shown[rule.label.partition(", overhead")[0]] = _marks(COLOURS[rule.rule], "o")
    hollow = _style(Rule("slow", DEFAULT, DEFAULT_OVERHEAD)) | {"color": BLACK}
    shown[f"overhead {100 * DEFAULT_OVERHEAD:g} %, not {100 * LARGE_OVERHEAD:g} %"] = hollow
    band = Patch(color=GREY, alpha=0.2, linewidth=0, label=f"within {LOSS_BOUND:g} nats")
    return [*(Line2D([], [], label=label, **style) for label, style in shown.items()), band]
