"""Pictures of the fidelity study, as small PNGs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.fidelity.analysis import Record, Row, groups, pick, quantile
from benchmarks.fidelity.free import DECAYS
from benchmarks.fidelity.held import LAWS, one_step_rows
from benchmarks.fidelity.ladder import LONGEST, best_ratios
from benchmarks.fidelity.one_step import SIZES

__all__ = ["draw"]

Records = Mapping[str, Sequence[Record]]
BLACK, GREY, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = (
    "#000000", "#8c8c8c", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
LAW_COLOURS = dict(zip(LAWS, (VERMILION, ORANGE, BLACK, BLUE, GREEN), strict=True))
PHASE_COLOURS = {"early": ORANGE, "late": BLUE, "cooled": GREEN}


def draw(records: Records, directory: Path) -> None:
    """Draw what there are records for."""
    if records["one_step"]:
        draw_one_step(records).savefig(directory / "one_step.png", metadata={"Software": None})
    longer = pick(best_ratios(records["ladder"]), beta_2=0.95, examples=(DECAYS[1], LONGEST))
    if longer:
        draw_best_ratio(longer).savefig(directory / "best_ratio.png", metadata={"Software": None})


def draw_one_step(records: Records) -> Figure:
    """Predicted over true lr by batch size: medians, with the 10th and 90th percentile."""
    rows = [row for row in one_step_rows(records["one_step"]) if row["lr"] is not None]
    panels = groups(rows, "workload")
    figure = Figure(figsize=(3.4 * len(panels), 3.5), dpi=90, layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)
    for axes, ((name,), found) in zip(grid.flat, panels.items(), strict=True):
        axes.axhline(1.0, color=GREY, linewidth=0.8)
        for index, law in enumerate(LAWS):
            drawn = [row for row in pick(found, law=law) if math.isfinite(row["lr"])]
            by_size = {size: [r["lr"] for r in pick(drawn, batch_size=size)] for size in SIZES}
            by_size = {size: errors for size, errors in by_size.items() if errors}
            # Next to one another, so that the bars of one batch size can be told apart.
            x = np.array(list(by_size)) * 2.0 ** (0.24 * (index - 2))
            low, middle, high = (
                np.array([2 ** quantile(errors, share) for errors in by_size.values()])
                for share in (0.1, 0.5, 0.9)
            )
            bars, style = (middle - low, high - middle), {"capsize": 2, "markersize": 4, "linewidth": 1.2}
            axes.errorbar(x, middle, bars, fmt="o-", color=LAW_COLOURS[law], label=law, **style)
        points = len(groups(found, "beta_2", "phase", "seed"))
        axes.set_title(f"{name}, {points} point{'s' if points > 1 else ''}", fontsize=10)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xscale("log", base=2)
        axes.set_xticks(SIZES, [str(size) for size in SIZES], fontsize=8)
        axes.minorticks_off()
        axes.set_xlabel("batch size B (examples)")
    grid[0, 0].set_ylabel("predicted / true best lr of one step\nmedian, 10th to 90th percentile", fontsize=9)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    columns = min(int(figure.get_figwidth() / 1.7), len(labels))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    return figure


def draw_best_ratio(rows: Sequence[Row]) -> Figure:
    """The best ratio approached by growth of the batch, a panel for each decay and workload."""
    panels = groups(rows, "examples", "workload")
    panels = {key: found for key, found in sorted(panels.items()) if len(groups(found, "growth")) > 1}
    growths = sorted({row["growth"] for row in rows})
    figure = Figure(figsize=(9.6, 3.0 * math.ceil(len(panels) / 3) + 0.4), dpi=90, layout="constrained")
    grid = figure.subplots(math.ceil(len(panels) / 3), 3, squeeze=False, sharey=True)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, ((examples, workload), found) in zip(grid.flat, panels.items(), strict=False):
        axes.plot(growths, np.sqrt(growths), "--", color=GREY, label="sqrt scaling")
        for index, (phase, colour) in enumerate(PHASE_COLOURS.items()):
            for row in (here := pick(found, phase=phase)):
                # Next to one another, so that the ranges of one growth can be told apart.
                x, inside = row["growth"] * 2.0 ** (0.16 * (index - 1)), "white" if row["open"] else colour
                axes.vlines(x, min(row["of_seeds"]), max(row["of_seeds"]), color=colour, linewidth=1.2)
                axes.plot(x, row["best"], "o", color=colour, markerfacecolor=inside, markersize=5)
            x = np.array([row["growth"] for row in here]) * 2.0 ** (0.16 * (index - 1))
            axes.plot(x, [row["best"] for row in here], color=colour, linewidth=1.2, label=phase)
        axes.set_title(f"{workload}, decay over {examples:,} examples", fontsize=9)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(growths, [str(growth) for growth in growths])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("batch size after / before the change", fontsize=9)
    for axes in grid[:, 0]:
        axes.set_ylabel("best ratio of learning rates\n(approached at 5 % a step)", fontsize=9)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    handles.append(Line2D([], [], color=BLACK, marker="o", markerfacecolor="white", linestyle="none"))
    labels.append("at least so much: the ladder, or the time to rise, ends")
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return figure
