"""What the figure shows is what was fitted."""

import itertools
import sys
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgba

from lightning_surge.laws.theorems import Theorem3Law
from lightning_surge.tables.figure import FAILED, draw_fits
from lightning_surge.tables.fit import GridFit, fit_grid
from lightning_surge.tables.law_fits import LAWS
from lightning_surge.tables.read import RunTable

LAW = Theorem3Law(peak_lr=0.01, noise_scale=64.0)
SIZES = (4.0, 16.0, 64.0, 256.0, 1024.0)


def fitted(*, steps: bool = True, seeds: int = 2, bootstrap: int = 20) -> GridFit:
    """An edge at the largest batch size, a failed run at the largest learning rate of the smallest."""
    rows = []
    for size in SIZES:
        for step in range(-2, 3):
            for seed in range(seeds):
                best = LAW.lr(size)
                worse = 0.1 * (step + 0.25) ** 2 + 0.005 * seed * (-1) ** step
                value = 1000 * (1 + 64 / size) * np.exp(worse) if steps else 2 + worse
                failed = size == 4 and step == 2
                if not (size == 1024 and step > 0):
                    rows.append((size, best * 2 ** (step + 0.25), np.inf if failed else value, seed))
    size, lr, outcome, seed = np.array(rows).T
    table = RunTable("steps" if steps else "loss", size, lr, outcome, seed.astype(np.int64))
    return fit_grid(table, laws=["measured", "adam", "sgd", "sgd_sqrt", "constant"], bootstrap=bootstrap)


@pytest.fixture(scope="module")
def fit() -> GridFit:
    return fitted()


def panel(fit: GridFit) -> Any:
    return draw_fits([fit]).axes[0]


def test_the_curves_are_the_best_law_its_rivals_and_sqrt(fit: GridFit) -> None:
    lines = {str(line.get_label()): line for line in panel(fit).get_lines()}
    laws = {law.name: law.law for law in fit.laws}
    assert fit.best == "adam"
    wanted = {LAWS[name].label: laws[name] for name in fit.ties} | {
        "Adam, Eq. 23 (predicts best)": laws["adam"]
    }
    for label, law in wanted.items():
        sizes, lrs = lines[label].get_data()
        np.testing.assert_allclose(lrs, [law.lr(size) for size in sizes.tolist()])
        assert (sizes[0], sizes[-1]) == pytest.approx((4, 1024))
    widths = {label: line.get_linewidth() for label, line in lines.items() if not label.startswith("_")}
    assert max(widths, key=lambda label: widths[label]) == "Adam, Eq. 23 (predicts best)"
    # Not among the laws that were fitted.
    sizes, lrs = lines["sqrt scaling"].get_data()
    np.testing.assert_allclose(np.diff(np.log(lrs)) / np.diff(np.log(sizes)), 0.5)
    drawn = {LAWS[name].label for name in LAWS} & lines.keys()
    assert drawn == {*(LAWS[name].label for name in fit.ties[:3]), "sqrt scaling"}


@pytest.mark.parametrize("count", [3, 20])
def test_labels_have_room(count: int) -> None:
    sizes = np.repeat(np.geomspace(8, 16_000, count).round(), 9)
    lrs = LAW.peak.lr * np.tile(2.0 ** np.arange(-4, 5), count)
    table = RunTable("loss", sizes, lrs, np.log(lrs / [LAW.lr(size) for size in sizes.tolist()]) ** 2)
    figure = draw_fits([fit_grid(table, laws=["adam", "sqrt"], bootstrap=0)], "runs.csv: 180 runs")
    figure.canvas.draw()
    assert figure.get_suptitle() == "runs.csv: 180 runs"
    for axis, fewest in ((figure.axes[0].xaxis, min(count, 5)), (figure.axes[0].yaxis, 4)):
        boxes = [label.get_window_extent() for label in axis.get_ticklabels() if label.get_text()]
        assert len(boxes) >= fewest
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert "16,000" in [label.get_text() for label in figure.axes[0].get_xticklabels()] or count == 20
    (legend,) = figure.legends
    assert figure.bbox.contains(*legend.get_window_extent().min)
    assert figure.bbox.contains(*legend.get_window_extent().max)


def test_optima_with_intervals_and_the_one_at_the_edge_open(fit: GridFit) -> None:
    axes = panel(fit)
    bars = [bar for bar in axes.containers if not bar.get_label().startswith("its peak")]
    assert [bar.get_label() for bar in bars] == ["best lr, 95 % interval"] * 4 + [
        "no optimum inside: not used"
    ]
    for bar, lr, size in zip(bars, fit.lrs, SIZES, strict=True):
        assert bar.lines[0].get_xdata().tolist() == [size]
        assert bar.lines[0].get_ydata().tolist() == [lr.value]
        if lr is not fit.lrs[-1]:
            (segment,) = bar.lines[2][0].get_segments()
            assert segment[:, 1].tolist() == pytest.approx([lr.low, lr.high])
    assert to_rgba(bars[-1].lines[0].get_markerfacecolor()) == to_rgba("white")
    assert bars[-1].lines[2] == ()


def test_the_peak_with_its_interval(fit: GridFit) -> None:
    axes = panel(fit)
    law = next(law for law in fit.laws if law.name == fit.best)
    (peak,) = [bar for bar in axes.containers if bar.get_label() == "its peak, 95 % interval"]
    assert peak.lines[0].get_xdata().tolist() == [law.peak_batch_size.value]
    across, up = (each.get_segments()[0] for each in peak.lines[2])
    assert across[:, 0].tolist() == pytest.approx([law.peak_batch_size.low, law.peak_batch_size.high])
    assert up[:, 1].tolist() == pytest.approx([law.peak_lr.low, law.peak_lr.high])
    assert f"peak of adam at B = {law.peak_batch_size.value:.3g}" in axes.get_title()
    # No peak is marked of a law that lost.
    title = panel(fit._replace(best="constant")).get_title()
    assert "peak" not in title


def test_the_grid_is_coloured_by_the_excess_and_failed_cells_are_grey(fit: GridFit) -> None:
    axes = panel(fit)
    meshes = [mesh for mesh in axes.collections if hasattr(mesh, "get_coordinates")]
    assert len(meshes) == len(SIZES)
    for mesh, valley in zip(meshes, fit.valleys, strict=True):
        cells = mesh.get_array().ravel()
        finite = np.isfinite(valley.means)
        np.testing.assert_allclose(cells[finite], valley.means[finite] - valley.means[finite].min())
        borders = mesh.get_coordinates()[:, 0, 1]
        assert (borders[:-1] < np.exp(valley.log_lrs)).all()
        assert (np.exp(valley.log_lrs) < borders[1:]).all()
        assert bool(np.ma.getmaskarray(cells).any()) == (valley.batch_size == 4)
        assert mesh.cmap.get_bad().tolist() == pytest.approx(to_rgba(FAILED))


def test_every_axis_names_its_unit(fit: GridFit) -> None:
    grid, colours = draw_fits([fit]).axes
    assert grid.get_xlabel() == "batch size B (examples)"
    assert grid.get_ylabel() == "learning rate (per step)"
    assert colours.get_ylabel() == "steps / fewest at this B (grey: not reached)"
    assert [label.get_text() for label in colours.get_yticklabels()] == ["1", "2", "4"]
    losses = draw_fits([fitted(steps=False, bootstrap=0)]).axes[1]
    assert losses.get_ylabel() == "distance from the best at this B (grey: failed)"


def test_one_panel_per_target(fit: GridFit) -> None:
    targets = (2.5, 2.0, 1.5, 1.0)
    figure = draw_fits([fit._replace(target=target, group={"width": "64"}) for target in targets])
    titles = [axes.get_title().split("\n")[0] for axes in figure.axes if axes.get_title()]
    assert titles == [f"steps to the loss {target:g}, width 64" for target in targets]
    # Three to a row; what is left of the second is empty.
    assert [axes.get_visible() for axes in figure.axes[:6]] == [True] * 4 + [False] * 2


def test_nothing_to_draw_and_nothing_to_draw_with(fit: GridFit, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="Expected at least one fit, got none"):
        draw_fits([])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-surge\[plot\]'"):
        draw_fits([fit])


def test_tuned_learning_rates_have_no_cells() -> None:
    sizes = np.array(SIZES)
    lrs = np.array([LAW.lr(size) for size in SIZES])
    table = RunTable("steps", sizes, lrs, 1000 * (1 + 64 / sizes))
    axes = panel(fit_grid(table, laws=["adam"], tuned=True, bootstrap=0))
    assert not axes.collections or all("QuadMesh" not in type(each).__name__ for each in axes.collections)
    low, high = axes.get_ylim()
    assert low < lrs.min() < lrs.max() < high
    assert "tuned lr" in axes.get_legend_handles_labels()[1]
