"""Figures of the paper's procedure, like its Figures 2 and 3."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.fidelity.procedure import BATCH_SIZES, TARGETS
from benchmarks.fidelity.procedure_optima import (
    Case,
    Optimum,
    Records,
    best_over_following,
    cases,
    line_of,
    log_steps,
    shape,
)
from benchmarks.fidelity.procedure_tables import plus_minus
from benchmarks.fidelity.workloads import BASE_BATCH_SIZE

__all__ = ["figures"]

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#bbbbbb"
SIZE_COLORS = dict(zip(BATCH_SIZES, ("#000000", "#e69f00", "#56b4e9", "#009e73", "#cc79a7"), strict=True))


def figures(records: Records, directory: Path) -> list[Path]:
    """Draw `procedure_{grid,tradeoff,following}.png`, by workload, betas and target."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    everything = cases(records)
    for name, painter in (("grid", draw_grid), ("tradeoff", draw_tradeoff), ("following", draw_following)):
        shown = [case for case in everything if (case.following if name == "following" else case.optima)]
        rows = list(dict.fromkeys((case.workload, case.betas) for case in shown))
        if not rows:
            continue
        figure = Figure(figsize=(11.0, 2.9 * len(rows) + 0.4), dpi=90, layout="constrained")
        panels = figure.subplots(len(rows), len(TARGETS), squeeze=False)
        for axes in panels.flat:
            axes.set_visible(False)
        for case in shown:
            axes = panels[rows.index((case.workload, case.betas)), case.target]
            axes.set_visible(True)
            axes.set_title(case.title, fontsize=10)
            painter(axes, case)
        drawn = [axes.get_legend_handles_labels() for axes in panels.flat]
        unique = {label: handle for found in drawn for handle, label in zip(*found, strict=True)}
        figure.legend(unique.values(), unique, loc="outside lower center", ncols=len(unique), frameon=False)
        paths.append(directory / f"procedure_{name}.png")
        figure.savefig(paths[-1])
    return paths


def batch_size_axis(axes: Any) -> None:
    """Logarithmic, with the batch sizes tried."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(BATCH_SIZES, [str(size) for size in BATCH_SIZES])
    axes.set_xlabel("batch size B (examples)")
    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter("")
    axes.set_ylabel("learning rate (per step)")


def draw_grid(axes: Any, case: Case) -> None:
    """Steps to the target by batch size and learning rate, as a multiple of the fewest at that size."""
    lrs = np.array(case.grid[0]["lrs"])
    excess = np.full((len(lrs), len(BATCH_SIZES)), np.nan)
    for record in case.grid:
        steps = log_steps(record, case.target).mean(0)
        if np.isfinite(steps).any():
            steps = np.where(np.isfinite(steps), steps - steps.min(), np.nan)
            excess[:, BATCH_SIZES.index(record["batch_size"])] = np.exp(steps)
    edges = [
        np.exp(np.append(x - (d := (x[1] - x[0]) / 2), x[-1] + d)) for x in (np.log(BATCH_SIZES), np.log(lrs))
    ]
    axes.set_facecolor(GREY)  # not reached
    image = axes.pcolormesh(*edges, np.log2(excess), cmap="viridis_r", vmin=0, vmax=2, rasterized=True)
    bar = axes.figure.colorbar(image, ax=axes, ticks=[0, 1, 2], extend="max")
    bar.ax.set_yticklabels(["1", "2", "4"])
    bar.set_label("steps / fewest at this B\n(grey: loss not reached)", fontsize=8)
    batch_size_axis(axes)
    draw_optima(axes, case.optima, "black")


def draw_optima(axes: Any, optima: Sequence[Optimum], color: str) -> None:
    """Best learning rates with standard errors, and their peak as a star if there is one."""
    sizes, lrs = [each.batch_size for each in optima], np.array([each.lr for each in optima])
    errors = np.array([each.error for each in optima])
    bars = [lrs * (1 - np.exp(-errors)), lrs * (np.exp(errors) - 1)]
    axes.errorbar(sizes, lrs, yerr=bars, color=color, marker="o", markersize=4, capsize=3, label="best lr")
    peak = shape(optima).peak if len(optima) > 2 else math.inf
    if 0 < peak < math.inf:
        axes.plot(peak, lrs.max(), "*", color=ORANGE, markersize=13, label="its peak")


def draw_tradeoff(axes: Any, case: Case) -> None:
    """1/S against 1/E with the line of Eq. 22."""
    steps = {each.batch_size: math.exp(np.mean(each.values)) for each in case.optima}
    x = np.array([1 / (size * count) for size, count in steps.items()])
    y = np.array([1 / count for count in steps.values()])
    for size, across, up in zip(steps, x, y, strict=True):
        axes.plot(1e3 * across, up, "o", color=SIZE_COLORS[size], markersize=7, label=f"B = {size}")
    found = line_of(case.optima)
    if math.isnan(found["noise_scale"][0]):
        axes.set_title(f"{case.title}\nno falling line", fontsize=9)
    else:
        axes.set_title(f"{case.title}\nB_noise = {plus_minus(found['noise_scale'])} examples", fontsize=9)
        ends = np.array([0.0, 1.05 / found["min_examples"][0]])
        line = 1 / found["min_steps"][0] - found["noise_scale"][0] * ends
        axes.plot(1e3 * ends, line, color=GREY, zorder=0, label="Eq. 22")
    axes.set_xlim(0, 1.1e3 * x.max())
    axes.set_ylim(0, 1.1 * y.max())
    axes.set_xlabel("1/E (per 1,000 examples)")
    axes.set_ylabel("1/S (per step)")


def draw_following(axes: Any, case: Case) -> None:
    """Best learning rate of the steps that follow, and the callback's curve."""
    assert case.following is not None
    optima, said = best_over_following(case.following), case.following["callback"]
    draw_optima(axes, optima, BLUE)
    if said:
        sizes = [int(size) for size in said["lrs"]]
        lrs = np.array([lr for lr, _ in said["lrs"].values()])
        base = sizes.index(BASE_BATCH_SIZE)
        axes.plot(sizes, lrs, ":", color=ORANGE, label="callback, one step")
        axes.plot(
            sizes,
            lrs / lrs[base] * optima[base].lr,
            color=ORANGE,
            label=f"the same, equal at B = {sizes[base]}",
        )
        peak = said["peak_batch_size"][0]
        if peak is not None and BATCH_SIZES[0] < peak < BATCH_SIZES[-1]:
            axes.axvline(peak, color=ORANGE, linewidth=0.8, linestyle="--", label="callback's peak")
    batch_size_axis(axes)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.9 * 10 ** math.floor(math.log10(high))), high)  # a power of ten in sight
