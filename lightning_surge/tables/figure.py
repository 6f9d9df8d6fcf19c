"""Draw grids of runs with the laws fitted to them, as the paper's Figures 2 to 5 do.

matplotlib is imported when a figure is asked for, and used without pyplot: no window, no global state.

References:
    Li et al., arXiv:2405.14578, Figures 2-5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lightning_surge.checking.libraries import needed
from lightning_surge.tables.fit import GridFit
from lightning_surge.tables.law_fits import LAWS, FloatArray, Optima, fit_law

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Okabe and Ito's palette, which stays apart under the common forms of colour blindness.
BEST, SQRT, INK, FAILED = "#D55E00", "#555555", "#000000", "#d8d8d8"
RIVALS = (("#0072B2", (0, (5, 2))), ("#CC79A7", (0, (1, 1))), ("#009E73", (0, (4, 1.5, 1, 1.5))))
"""Colours and dashes of laws that are not told from the best one; further ones are not drawn."""
COLUMNS = 3
TICKS = 9  # labels that an axis has room for
WORST = 2.0  # colours end at so many doublings of the steps; at such a part of the losses' spread
QUANTILE = 0.6
NARROWEST = 0.35  # width of a lone column of cells, in log batch size
MARGIN = 1.3  # beyond the learning rates where there are no cells, as a factor


def draw_fits(fits: Sequence[GridFit], title: str = "") -> Figure:
    """One panel per fit; a figure for `figure.savefig`.

    Each cell of a grid is coloured by how much worse it ended than the best one at its batch size, so that
    the valley shows at every size; grey cells have a run that failed. Dots are the optima, with intervals;
    open ones took no part in the fits. A table of tuned learning rates has no cells to colour. The wide curve
    is the law that predicts best, the thin ones are not told from it, and sqrt scaling is always there to
    compare. A star marks the peak of the best law, with its interval, if it lies inside the grid.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
        ValueError: if there are no fits.
    """
    if not fits:
        raise ValueError("Expected at least one fit, got none: pass what fit_grid returned.")
    with needed("Drawing needs matplotlib", "'lightning-surge[plot]'"):
        from matplotlib.figure import Figure
    columns = min(COLUMNS, len(fits))
    rows = math.ceil(len(fits) / columns)
    figure = Figure(figsize=(6.2 * columns, 4.9 * rows + 0.7), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=11)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes in panels[len(fits) :]:
        axes.set_visible(False)
    entries: dict[str, Any] = {}
    for axes, fit in zip(panels, fits, strict=False):
        _draw_panel(axes, fit)
        handles, labels = axes.get_legend_handles_labels()
        entries = dict(zip(labels, handles, strict=True)) | entries
    across = min(len(entries), 2 * columns)
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=across, frameon=False)
    return figure


def _draw_panel(axes: Axes, fit: GridFit) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = np.array([valley.batch_size for valley in fit.valleys])
    lrs = np.unique(np.exp(np.concatenate([valley.log_lrs for valley in fit.valleys])))
    if any(valley.log_lrs.size > 1 for valley in fit.valleys):
        _draw_grid(axes, fit)
    else:
        axes.set_ylim(lrs[0] / MARGIN, lrs[-1] * MARGIN)
    bottom, top = axes.get_ylim()
    _draw_laws(axes, fit, np.geomspace(sizes[0], sizes[-1], 200))
    _draw_optima(axes, fit)
    left, right = np.exp(_borders(np.log(sizes))[[0, -1]])
    # A law may leave the grid by decades; the grid is what is to be seen.
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    axes.minorticks_off()
    ticks = _thinned(sizes, left, right)
    axes.set_xticks(ticks, [f"{size:,.10g}" for size in ticks])
    ticks = _thinned(np.array([float(f"{lr:.2g}") for lr in lrs]), bottom, top)
    axes.set_yticks(ticks, [f"{lr:g}" for lr in ticks])
    axes.set_xlabel("batch size B (examples)")
    axes.set_ylabel("learning rate (per step)")
    what = "final loss" if fit.measure == "loss" else "steps to the loss"
    what += "" if fit.target is None else f" {fit.target:.4g}"
    title = ", ".join([what, *(f"{column} {value}" for column, value in fit.group.items())])
    best = fit.winner
    if fit.best is not None and fit.tried(best.peak_batch_size.value):
        _draw_star(axes, best.peak_batch_size, best.peak_lr)
        title += f"\npeak of {best.name} at B = {float(f'{best.peak_batch_size.value:.3g}'):,g}"
    axes.set_title(title, fontsize=10.5)


def _thinned(values: FloatArray, low: float, high: float) -> list[float]:
    """As many of the values as there is room for, in the log."""
    kept: list[float] = []
    for value in np.unique(values).tolist():
        if not kept or math.log(value / kept[-1]) >= math.log(high / low) / TICKS:
            kept.append(value)
    return kept


def _draw_laws(axes: Axes, fit: GridFit, across: FloatArray) -> None:
    used = [valley.optimum for valley in fit.valleys if valley.optimum.found]
    optima = Optima(np.array([each.batch_size for each in used]), np.log([each.lr for each in used]))
    laws = {law.name: law.law for law in fit.laws}
    best = fit.winner.name
    curves: list[tuple[str, str, Any, float, str]] = [
        (name, *style, 1.8, "")
        for name, style in zip([n for n in fit.ties if n != "sqrt"], RIVALS, strict=False)
    ]
    curves += [("sqrt", SQRT, ":", 2.0, "")] if best != "sqrt" else []
    curves += [(best, BEST, "-", 4.0, " (predicts best)" if fit.best else "")]
    for name, colour, dashes, width, what in curves:
        law = laws[name] if name in laws else fit_law(name, optima).law  # type: ignore[union-attr]
        lrs = [law.lr(size) for size in across.tolist()]
        label = LAWS[name].label + what
        axes.plot(across, lrs, color=colour, linestyle=dashes, linewidth=width, label=label)


def _draw_grid(axes: Axes, fit: GridFit) -> None:
    """Cells by their excess over the best of their batch size."""
    import matplotlib

    sizes = _borders(np.log([valley.batch_size for valley in fit.valleys]))
    with np.errstate(invalid="ignore"):
        excess = [valley.means - valley.means.min() for valley in fit.valleys]
    finite = np.concatenate([each[np.isfinite(each)] for each in excess])
    spread = float(np.quantile(finite, QUANTILE)) or 1.0
    top = WORST * math.log(2) if fit.measure == "steps" else spread
    colours = matplotlib.colormaps["viridis_r"].with_extremes(bad=FAILED)
    borders = [_borders(valley.log_lrs) for valley in fit.valleys]
    image: Any = None
    for left, right, heights, cells in zip(sizes[:-1], sizes[1:], borders, excess, strict=True):
        cells = np.where(np.isfinite(cells), cells, np.nan)[:, None]
        image = axes.pcolormesh(
            np.exp([left, right]), np.exp(heights), cells, cmap=colours, vmin=0, vmax=top, alpha=0.85,
            rasterized=True,
        )  # fmt: skip
    axes.set_ylim(math.exp(min(each[0] for each in borders)), math.exp(max(each[-1] for each in borders)))
    bar = axes.figure.colorbar(image, ax=axes, extend="max")
    if fit.measure == "steps":
        bar.set_ticks([0, math.log(2), 2 * math.log(2)], labels=["1", "2", "4"])
        bar.set_label("steps / fewest at this B (grey: not reached)", fontsize=9)
    else:
        bar.set_label("distance from the best at this B (grey: failed)", fontsize=9)


def _draw_optima(axes: Axes, fit: GridFit) -> None:
    barred = any(math.isfinite(lr.low) and math.isfinite(lr.high) for lr in fit.lrs)
    tuned = all(valley.optimum.status == "tuned" for valley in fit.valleys)
    found = "tuned lr" if tuned else "best lr, 95 % interval" if barred else "best lr"
    for valley, lr in zip(fit.valleys, fit.lrs, strict=True):
        if not math.isnan(lr.value):
            inside = valley.optimum.found
            axes.errorbar(
                [valley.batch_size], [lr.value], yerr=_bars(lr.value, lr.low, lr.high), fmt="o", color=INK,
                markersize=6, capsize=3, markerfacecolor=INK if inside else "white", zorder=4,
                label=found if inside else "no optimum inside: not used",
            )  # fmt: skip


def _bars(value: float, low: float, high: float) -> list[list[float]] | None:
    """Lengths of an error bar to both sides; None without an interval that ends."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return None
    return [[max(value - low, 0.0)], [max(high - value, 0.0)]]


def _draw_star(axes: Axes, size: Any, lr: Any) -> None:
    low, high = axes.get_xlim()
    # An interval without an end goes on to the border.
    axes.errorbar(
        [size.value], [lr.value], xerr=_bars(size.value, max(size.low, low), min(size.high, high)),
        yerr=_bars(lr.value, lr.low, lr.high), fmt="*", color="white", ecolor="#8b0000", markersize=17,
        markeredgecolor="#8b0000", elinewidth=2, capsize=5, zorder=5, label="its peak, 95 % interval",
    )  # fmt: skip


def _borders(centres: npt.ArrayLike) -> FloatArray:
    """Half way between neighbours, and as far beyond the ends."""
    x = np.asarray(centres, dtype=np.float64)
    if x.size == 1:
        return np.array([x[0] - NARROWEST, x[0] + NARROWEST])
    middles = (x[1:] + x[:-1]) / 2
    return np.concatenate([[2 * x[0] - middles[0]], middles, [2 * x[-1] - middles[-1]]])
