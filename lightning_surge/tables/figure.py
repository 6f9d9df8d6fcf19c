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

from lightning_surge.tables.fit import FittedLaw, GridFit
from lightning_surge.tables.law_fits import LAWS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_fits"]

FloatArray = npt.NDArray[np.float64]

# Okabe and Ito's palette, which stays apart under the common forms of colour blindness.
STYLES: dict[str, tuple[str, Any, float]] = {
    "measured": ("#D55E00", "-", 4.0),
    "adam": ("#0072B2", (0, (5, 2)), 2.0),
    "sgd": ("#CC79A7", (0, (1, 1)), 2.5),
    "sgd_sqrt": ("#009E73", (0, (4, 1.5, 1, 1.5)), 2.0),
}
"""Colour, dashes and width of the curves that are drawn, the wide ones below."""
INK, FAILED = "#000000", "#d8d8d8"
COLUMNS = 3
WORST = 2.0
"""Colours end at so many doublings of the steps; at such a part of the losses' spread."""
QUANTILE = 0.6
NARROWEST = 0.35
"""Width of a lone column of cells, in log batch size."""
MARGIN = 1.3
"""Beyond the learning rates where there are no cells, as a factor."""


def draw_fits(fits: Sequence[GridFit]) -> Figure:
    """One panel per fit.

    Each cell of a grid is coloured by how much worse it ended than the best one at its batch size, so that
    the valley shows at every size; grey cells have a run that failed. Dots are the optima, with intervals;
    open ones lie at an edge of the grid and took no part in the fits. A table of tuned learning rates has no
    cells to colour. The curves are the measured-law form,
    Adam's and the two of SGD. A star marks the peak, with its interval, of the law that predicts best among
    those with a peak inside the grid.

    Args:
        fits: what `fit_grid` returned.

    Returns:
        A figure for `figure.savefig`.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
        ValueError: without fits.
    """
    if not fits:
        raise ValueError("Expected at least one fit, got none: pass what fit_grid returned.")
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Drawing needs matplotlib: pip install 'lightning-surge[plot]'.") from error
    columns = min(COLUMNS, len(fits))
    rows = math.ceil(len(fits) / columns)
    figure = Figure(figsize=(6.2 * columns, 4.9 * rows + 0.5), dpi=110, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes in panels[len(fits) :]:
        axes.set_visible(False)
    entries: dict[str, Any] = {}
    for axes, fit in zip(panels, fits, strict=False):
        _draw_panel(axes, fit)
        handles, labels = axes.get_legend_handles_labels()
        entries = dict(zip(labels, handles, strict=True)) | entries
    across = min(len(entries), 3 if len(fits) == 1 else 7)
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=across, frameon=False)
    return figure


def _draw_panel(axes: Axes, fit: GridFit) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    if any(valley.log_lrs.size > 1 for valley in fit.valleys):
        _draw_grid(axes, fit)
    else:
        lrs = [valley.optimum.lr for valley in fit.valleys if valley.optimum.found]
        axes.set_ylim(min(lrs) / MARGIN, max(lrs) * MARGIN)
        axes.set_yticks(sorted({*lrs}), [f"{lr:g}" for lr in sorted({*lrs})])
    bottom, top = axes.get_ylim()
    sizes = np.array([valley.batch_size for valley in fit.valleys])
    across = np.geomspace(sizes[0], sizes[-1], 200)
    fitted = {law.name: law for law in fit.laws}
    for name, (colour, dashes, width) in STYLES.items():
        if name in fitted:
            curve = [fitted[name].law.lr(size) for size in across.tolist()]
            label = LAWS[name].label
            axes.plot(across, curve, color=colour, linestyle=dashes, linewidth=width, label=label)
    _draw_optima(axes, fit)
    left, right = _borders(np.log(sizes))[[0, -1]]
    axes.set_xlim(math.exp(left), math.exp(right))
    # A law may leave the grid by decades; the grid is what is to be seen.
    axes.set_ylim(bottom, top)
    axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("batch size B (examples)")
    axes.set_ylabel("learning rate (per step)")
    what = "final loss" if fit.measure == "loss" else "steps to the loss"
    title = what + ("" if fit.target is None else f" {fit.target:.4g}")
    peaked = _peaked(fit)
    if peaked is not None:
        _draw_peak(axes, peaked)
        title += f"\npeak at B = {peaked.peak_batch_size.value:.3g} ({peaked.name}"
        title += ")" if peaked.name == fit.best or fit.best is None else f"; best law: {fit.best})"
    axes.set_title(title, fontsize=10.5)


def _draw_grid(axes: Axes, fit: GridFit) -> None:
    """Cells by their excess over the best of their batch size."""
    import matplotlib

    sizes = _borders(np.log([valley.batch_size for valley in fit.valleys]))
    excess = [valley.means - valley.means.min() for valley in fit.valleys if np.isfinite(valley.means).any()]
    everything = np.concatenate(excess) if excess else np.zeros(1)
    finite = everything[np.isfinite(everything)]
    spread = float(np.quantile(finite, QUANTILE)) or 1.0
    top = WORST * math.log(2) if fit.measure == "steps" else spread
    colours = matplotlib.colormaps["viridis_r"].with_extremes(bad=FAILED)
    image: Any = None
    lows, highs = [], []
    for valley, left, right in zip(fit.valleys, sizes[:-1], sizes[1:], strict=True):
        borders = _borders(valley.log_lrs)
        lows.append(borders[0])
        highs.append(borders[-1])
        cells = np.full(valley.means.shape, np.nan)
        known = np.isfinite(valley.means)
        if known.any():
            cells[known] = valley.means[known] - valley.means[known].min()
        image = axes.pcolormesh(
            np.exp([left, right]), np.exp(borders), cells[:, None], cmap=colours, vmin=0, vmax=top,
            alpha=0.85, rasterized=True,
        )  # fmt: skip
    axes.set_ylim(math.exp(min(lows)), math.exp(max(highs)))
    bar = axes.figure.colorbar(image, ax=axes, extend="max")
    if fit.measure == "steps":
        bar.set_ticks([0, math.log(2), 2 * math.log(2)], labels=["1", "2", "4"])
        bar.set_label("steps / fewest at this B (grey: not reached)", fontsize=9)
    else:
        bar.set_label("loss above the lowest at this B (grey: failed)", fontsize=9)


def _draw_optima(axes: Axes, fit: GridFit) -> None:
    barred = any(math.isfinite(lr.low) and math.isfinite(lr.high) for lr in fit.lrs)
    found = "best lr, 95 % interval" if barred else "best lr"
    if all(valley.optimum.status == "tuned" for valley in fit.valleys):
        found = "tuned lr"
    used = [valley.optimum.found for valley in fit.valleys]
    for valley, lr, inside in zip(fit.valleys, fit.lrs, used, strict=True):
        if math.isnan(lr.value):
            continue
        bars = None
        if math.isfinite(lr.low) and math.isfinite(lr.high):
            bars = [[max(lr.value - lr.low, 0.0)], [max(lr.high - lr.value, 0.0)]]
        axes.errorbar(
            [valley.batch_size], [lr.value], yerr=bars, fmt="o", color=INK, markersize=7, capsize=4,
            markerfacecolor=INK if inside else "white", zorder=4,
            label=found if inside else "at an edge: not used",
        )  # fmt: skip


def _peaked(fit: GridFit) -> FittedLaw | None:
    """The law whose peak is marked."""
    first, last = fit.valleys[0].batch_size, fit.valleys[-1].batch_size
    return next((law for law in fit.laws if first <= law.peak_batch_size.value <= last), None)


def _draw_peak(axes: Axes, law: FittedLaw) -> None:
    size, lr = law.peak_batch_size, law.peak_lr
    low, high = axes.get_xlim()
    # An interval without an end goes on to the border.
    ends = [max(size.low, low), min(size.high, high)] if not math.isnan(size.low) else [size.value] * 2
    heights = [lr.low, lr.high] if math.isfinite(lr.low) and math.isfinite(lr.high) else [lr.value] * 2
    axes.errorbar(
        [size.value], [lr.value],
        xerr=[[max(size.value - ends[0], 0.0)], [max(ends[1] - size.value, 0.0)]],
        yerr=[[max(lr.value - heights[0], 0.0)], [max(heights[1] - lr.value, 0.0)]],
        fmt="*", color="white", ecolor="#8b0000", markersize=17, markeredgecolor="#8b0000", elinewidth=2,
        capsize=5, zorder=5, label="peak, 95 % interval",
    )  # fmt: skip


def _borders(centres: npt.ArrayLike) -> FloatArray:
    """Half way between neighbours, and as far beyond the ends."""
    x = np.asarray(centres, dtype=np.float64)
    if x.size == 1:
        return np.array([x[0] - NARROWEST, x[0] + NARROWEST])
    middles = (x[1:] + x[:-1]) / 2
    return np.concatenate([[2 * x[0] - middles[0]], middles, [2 * x[-1] - middles[-1]]])
