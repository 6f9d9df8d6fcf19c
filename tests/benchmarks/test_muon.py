"""Muon's direction, and the law that is fitted to what two batch sizes gain along it."""

from typing import Any

import pytest
import torch

from benchmarks.fidelity.muon import MUON_SIZES, fitted_scale, judged, muon_table, noise_scale, orthogonal
from lightning_surge.laws.base import MeasuredLaw

LAW = MeasuredLaw(alignment_limit=2.0, alignment_scale=48.0, noise_curvature=1.0, signal_curvature=0.0)


def steps(**beyond: float) -> dict[str, Any]:
    """A point at which the law holds, apart from learning rates that are so many times as large."""
    return {
        str(size): {"lr": LAW.lr(size) * beyond.get(f"at_{size}", 1.0)}
        | {"alignment": LAW.alignment(size), "share": 0.5}
        for size in MUON_SIZES
    }


def record(**beyond: float) -> dict[str, Any]:
    return {"orthogonal": steps(**beyond), "noise_scale": 48.0}


def test_the_scale_of_a_law_is_found_from_two_sizes() -> None:
    assert fitted_scale(steps()) == pytest.approx(48.0)
    flat = {size: step | {"alignment": 1.0} for size, step in steps().items()}
    assert fitted_scale(flat) == 0.0


def test_errors_are_in_octaves_over_the_base() -> None:
    rows = {row["batch_size"]: row for row in judged(record(at_1024=0.5))}
    assert rows[64]["lr"] == pytest.approx(0.0, abs=1e-9)
    assert rows[256]["by norms"] == pytest.approx(0.0, abs=1e-9)
    assert (rows[1024]["lr"], rows[1024]["alignment"]) == pytest.approx((1.0, 0.0), abs=1e-9)
    page = muon_table({"muon": [record(at_1024=0.5)]})
    assert "the noise scale of the matrices, 48 examples" in page
    assert "| 1024 | 0.50 | 0.00 | 0.00 |" in page


def test_singular_values_are_evened_out() -> None:
    matrix = torch.diag(torch.tensor([1.0, 0.5, 0.2]))
    values = torch.linalg.svdvals(orthogonal(torch.cat([matrix, torch.zeros(1, 3)]))) / 4**0.5
    assert (values - 1.0).abs().max() < 0.35


def test_the_noise_scale_of_gradients_is_found() -> None:
    """|G|^2 = 25, and noise of trace 200 for an example."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.tensor([3.0, 4.0])

    def gradient(size: int) -> list[torch.Tensor]:
        return [mean + 10.0 * torch.randn(2, generator=generator) / size**0.5]

    found = [noise_scale([gradient(16) for _ in range(24)], gradient(512), 16, 512) for _ in range(200)]
    assert sum(found) / len(found) == pytest.approx(8.0, rel=0.1)
