"""What the figure shows is what was fitted."""

from __future__ import annotations

import builtins
import sys
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgba

from lightning_surge.laws.theorems import Theorem3Law
from lightning_surge.tables.figure import FAILED, draw_fits
from lightning_surge.tables.fit import GridFit, fit_grid
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


def test_the_curves_are_the_laws(fit: GridFit) -> None:
    lines = {line.get_label(): line for line in panel(fit).get_lines()}
    labels = {"adam": "Adam, Eq. 23", "sgd": "SGD, exponent 1", "sgd_sqrt": "SGD, exponent 1/2"}
    laws = {law.name: law.law for law in fit.laws}
    for name, label in {**labels, "measured": "measured-law form"}.items():
        sizes, lrs = lines[label].get_data()
        np.testing.assert_allclose(lrs, [laws[name].lr(size) for size in sizes.tolist()])
        assert (sizes[0], sizes[-1]) == pytest.approx((4, 1024))
    assert not any("constant" in str(label) for label in lines)


def test_optima_with_intervals_and_the_one_at_the_edge_open(fit: GridFit) -> None:
    axes = panel(fit)
    bars = [bar for bar in axes.containers if not bar.get_label().startswith("peak")]
    assert [bar.get_label() for bar in bars] == ["best lr, 95 % interval"] * 4 + ["at an edge: not used"]
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
    assert law.name == "adam" or "adam" in fit.ties
    (peak,) = [bar for bar in axes.containers if bar.get_label() == "peak, 95 % interval"]
    assert peak.lines[0].get_xdata().tolist() == [law.peak_batch_size.value]
    across, up = (each.get_segments()[0] for each in peak.lines[2])
    assert across[:, 0].tolist() == pytest.approx([law.peak_batch_size.low, law.peak_batch_size.high])
    assert up[:, 1].tolist() == pytest.approx([law.peak_lr.low, law.peak_lr.high])
    assert f"peak at B = {law.peak_batch_size.value:.3g} ({law.name})" in axes.get_title()


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
    assert losses.get_ylabel() == "loss above the lowest at this B (grey: failed)"


def test_one_panel_per_target(fit: GridFit) -> None:
    targets = (2.5, 2.0, 1.5, 1.0)
    figure = draw_fits([fit._replace(target=target) for target in targets])
    titles = [axes.get_title().split("\n")[0] for axes in figure.axes if axes.get_title()]
    assert titles == [f"steps to the loss {target:g}" for target in targets]
    # Three to a row; what is left of the second is empty.
    assert [axes.get_visible() for axes in figure.axes[:6]] == [True] * 4 + [False] * 2


def test_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match="Expected at least one fit, got none"):
        draw_fits([])


def test_without_matplotlib_the_extra_is_named(fit: GridFit, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)
    real = builtins.__import__

    def refusing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refusing)
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
