"""The picture of an example's run: how the batch size and the learning rate went, and what the factor was."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_surge.runs.plots import BLACK, BLUE, ORANGE, number
from lightning_surge.runs.run_log import RunLog, wanted_factor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY = "#767676"
LIMITS = {"sqrt scaling": (0.5, "dotted"), "linear scaling": (1.0, "dashdot")}


def draw_story(run: RunLog, title: str) -> Figure:
    """Draw the batch size and the learning rate over the run, and the factor over the batch size.

    Args:
        run: what a ramp has logged, with a base batch size.
        title: a line above the figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.4), dpi=150, layout="constrained")
    panels: dict[str, Axes] = figure.subplot_mosaic(
        [["size", "factor"], ["lr", "factor"]], height_ratios=[1.0, 2.0], width_ratios=[1.25, 1.0]
    )
    draw_over_time(panels["size"], panels["lr"], run)
    draw_factor(panels["factor"], run)
    for axes in panels.values():
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color="#e6e6e6", linewidth=0.6)
        axes.set_axisbelow(True)
    figure.suptitle(title, fontsize=11, fontweight="bold")
    return figure


def draw_over_time(sizes: Axes, rates: Axes, run: RunLog) -> None:
    """The batch size in force above, the learning rate from the schedule and as used below."""
    batch = run.require("batch_size")
    sizes.step(batch.steps, batch.values, where="post", color=BLACK, linewidth=1.5)
    sizes.set_yscale("log", base=2)
    sizes.set_yticks(*_doublings(batch.values.min(), batch.values.max(), 4.0))
    sizes.set_title("batch size, examples per step", loc="left", fontsize=9)
    sizes.tick_params(labelbottom=False)
    sizes.sharex(rates)
    used, scheduled = run.require("lr_used"), run.require("lr_scheduled")
    rates.plot(used.steps, used.values * 1e3, color=BLUE, linewidth=2.0, label="used")
    dashed: dict[str, Any] = {"color": BLACK, "linewidth": 1.3, "linestyle": (0, (4, 2))}
    rates.plot(scheduled.steps, scheduled.values * 1e3, label="from the schedule", **dashed)
    rates.set_ylim(bottom=0.0)
    rates.set_title("learning rate, thousandths", loc="left", fontsize=9)
    rates.set_xlabel("optimizer step")
    rates.xaxis.set_major_formatter(lambda value, _: number(value))
    rates.legend(fontsize=9, framealpha=1.0, edgecolor="none")


def draw_factor(axes: Axes, run: RunLog) -> None:
    """What the objective asks for at every batch size, early and late, what was used, and two rules."""
    base, batch = run.base_batch_size, run.require("batch_size")
    grid = base * 2.0 ** np.linspace(-0.5, np.log2(2.0 * batch.values.max() / base), 121)
    for name, (exponent, style) in LIMITS.items():
        axes.plot(grid, (grid / base) ** exponent, color=GREY, linewidth=1.2, linestyle=style, label=name)
    moments = run.law_steps
    if len(moments):
        # The first law that rests on a few measurements, and the last one.
        early = moments[min(len(moments) - 1, len(moments) // 5)]
        for step, colour in dict(zip((int(early), int(moments[-1])), (ORANGE, BLUE), strict=True)).items():
            law, objective = run.law_at(step), run.objective_at(step)
            if law is not None and objective is not None:
                wanted = [wanted_factor(objective, law, float(size), base) for size in grid]
                axes.plot(grid, wanted, color=colour, linewidth=2.0, label=f"measured at step {step:,}")
    ends = [
        *(int(left) for left, right in pairwise(batch.steps) if _changes(run, left, right)),
        run.last_step,
    ]
    points = [(run.at("batch_size", step), run.at("lr_scale", step)) for step in ends]
    axes.plot(
        *zip(*points, strict=True), "o", color=BLACK, markersize=5, label="used, at the end of each size"
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_ylim(0.6, 1.2 * (2.0 * batch.values.max() / base))
    axes.set_xticks(*_doublings(base, grid[-1], 2.0))
    axes.set_yticks(*_doublings(1.0, 2.0 * batch.values.max() / base, 2.0))
    axes.set_title(f"factor on the learning rate (1 at {number(base)} examples)", loc="left", fontsize=9)
    axes.set_xlabel("batch size, examples per step")
    axes.legend(fontsize=9, loc="upper left", framealpha=1.0, edgecolor="none")


def _changes(run: RunLog, left: int, right: int) -> bool:
    return run.at("batch_size", int(left)) != run.at("batch_size", int(right))


def _doublings(low: float, high: float, ratio: float) -> tuple[list[float], list[str]]:
    """Ticks from `low` in equal ratios, and their words."""
    count = int(np.log(high / low) / np.log(ratio) + 1e-9) + 1
    ticks = [low * ratio**index for index in range(count)]
    return ticks, [number(tick) for tick in ticks]
