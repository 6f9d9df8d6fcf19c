"""Pictures of the fidelity study, as small PNGs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.fidelity.analysis import CHANGE, Record, Row, groups, mean, pick, quantile
from benchmarks.fidelity.best_ratio import best_ratios
from benchmarks.fidelity.free import DECAYS
from benchmarks.fidelity.held import LAWS, one_step_rows
from benchmarks.fidelity.one_step import SIZES
from benchmarks.fidelity.rules import at_default, of_unit

__all__ = ["draw"]

Records = Mapping[str, Sequence[Record]]
BLACK, GREY, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = (
    "#000000", "#8c8c8c", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
LAW_COLOURS = dict(zip(LAWS, (VERMILION, ORANGE, BLACK, BLUE, GREEN), strict=True))
RULE_COLOURS = {"alignment": SKY, "step": VERMILION, "progress": BLUE}
PHASE_COLOURS = {"early": ORANGE, "late": BLUE, "cooled": GREEN}
REGRETS = {"tuned": "at the best base lr", "regret": "as run"}


def draw(records: Records, directory: Path) -> None:
    """Draw what there are records for."""
    if records["one_step"]:
        draw_one_step(records).savefig(directory / "one_step.png", metadata={"Software": None})
    if records["rules"]:
        draw_regret(records).savefig(directory / "regret.png", metadata={"Software": None})
    longer = [row for row in best_ratios(records["ladder"]) if row["examples"] != DECAYS[0]]
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
    """The best ratio approached by growth of the batch: a row for each decay, a panel for each workload."""
    rows = pick(rows, beta_2=0.95)
    decays = sorted({row["examples"] for row in rows})
    workloads = list(groups(rows, "workload"))
    growths = sorted({row["growth"] for row in rows})
    figure = Figure(figsize=(2.9 * len(workloads), 2.9 * len(decays) + 0.4), dpi=90, layout="constrained")
    grid = figure.subplots(len(decays), len(workloads), squeeze=False, sharex=True, sharey=True)
    for line, examples in zip(grid, decays, strict=True):
        for axes, (workload,) in zip(line, workloads, strict=True):
            axes.plot(growths, np.sqrt(growths), "--", color=GREY, label="sqrt scaling")
            for index, (phase, colour) in enumerate(PHASE_COLOURS.items()):
                found = pick(rows, workload=workload, examples=examples, phase=phase)
                # Next to one another, so that the ranges of one growth can be told apart.
                x = np.array([row["growth"] * 2.0 ** (0.16 * (index - 1)) for row in found])
                best = np.array([row["best"] for row in found])
                ends = (
                    np.array([(min(row["of_seeds"]), max(row["of_seeds"])) for row in found]).reshape(-1, 2).T
                )
                bars = np.maximum([best - ends[0], ends[1] - best], 0.0)
                axes.errorbar(x, best, bars, color=colour, capsize=2, linewidth=1.2, label=phase)
                for point, row in zip(x, found, strict=True):
                    inside = "white" if row["open"] else colour
                    axes.plot(point, row["best"], "o", color=colour, markerfacecolor=inside, markersize=5)
            axes.set_title(f"{workload}, {examples:,} examples", fontsize=9)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.set_xticks(growths, [str(growth) for growth in growths])
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        line[0].set_ylabel("best ratio of learning rates\n(approached at 5 % a step)", fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel("batch size after / before the change", fontsize=9)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    hollow = Line2D([], [], color=BLACK, marker="o", markerfacecolor="white", linestyle="none")
    figure.legend(
        [*handles, hollow],
        [*labels, "at least so much: the ladder, or the time to rise, ends"],
        loc="outside lower center",
        ncols=len(labels) + 1,
        frameon=False,
        fontsize=9,
    )
    return figure


def draw_regret(records: Records) -> Figure:
    """Mean regret by rule with 95 % half-widths, at the best base lr and as run."""
    every = at_default(records["rules"])
    units = {"nats": of_unit(every, nats=True), "%": of_unit(every, nats=False)}
    shown = {unit: found for unit, found in units.items() if found}
    # A rule that has not been run at a base lr has no bar there, and no line.
    rules = {field: [rule for (rule,) in groups(_known(every, field), "rule")] for field in REGRETS}
    heights = [0.26 * max(len(names), 1) + 1.0 for names in rules.values()]
    figure = Figure(figsize=(4.6 * len(shown), sum(heights)), dpi=90, layout="constrained")
    grid = figure.subplots(len(rules), len(shown), squeeze=False, sharey="row", height_ratios=heights)
    for line, (field, base) in zip(grid, REGRETS.items(), strict=True):
        for axes, (unit, found) in zip(line, shown.items(), strict=True):
            known = _known(found, field)
            _regret_bars(axes, known, field, rules[field], unit)
            name = "cross-entropy" if unit == "nats" else "autoencoder"
            axes.set_title(f"{name}, {base}, {len(groups(known, *CHANGE))} changes of B", fontsize=10)
        line[0].invert_yaxis()
    return figure


def _known(rows: Sequence[Row], field: str) -> list[Row]:
    return [row for row in rows if row[field] is not None]


def _regret_bars(axes: Axes, rows: Sequence[Row], field: str, rules: Sequence[str], unit: str) -> None:
    means = np.array([mean(row[field] for row in pick(rows, rule=rule))[:2] for rule in rules])
    values, widths = np.where(np.isfinite(means), means, 0.0).reshape(-1, 2).T
    colours = [RULE_COLOURS.get(rule.partition(",")[0], GREY) for rule in rules]
    linear = 0.01 if unit == "nats" else 1.0
    # A mean that one ruinous change makes says nothing on the other side of zero.
    below = np.where(values > linear, np.minimum(widths, values + linear), widths)
    axes.barh(rules, values, xerr=(below, widths), color=colours, error_kw={"capsize": 2, "linewidth": 1})
    axes.set_xscale("symlog", linthresh=linear)
    highest = math.log10(max(values.max(initial=0.0), linear) / linear)
    decades = [linear * 10.0**power for power in range(0, math.ceil(highest) + 1, 1 + round(highest / 4))]
    axes.set_xticks([-linear, 0.0, *decades])
    axes.set_xlim(left=-2 * linear, right=decades[-1] * 3)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.axvline(0.0, color=BLACK, linewidth=0.8)
    axes.grid(axis="x", color=GREY, alpha=0.3, linewidth=0.6)
    axes.set_axisbelow(True)
    name = "nats" if unit == "nats" else "% of the best loss"
    axes.set_xlabel(f"mean regret ({name}, linear below {linear:g})")
