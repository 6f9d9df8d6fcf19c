"""Theorems 2 and 3 of Li et al. 2024 from the moments of one example's gradient, which no training knows."""

import math
from typing import NamedTuple

import numpy as np
from scipy.special import erf

from lightning_surge.laws.theorems import Theorem3Law


class Theorem2(NamedTuple):
    """Eq. 9 and 10: sign steps under Gaussian noise that is independent across coordinates."""

    mean: np.ndarray
    deviation: np.ndarray
    hessian: np.ndarray

    def alignment(self, batch_size: float) -> float:
        return float(self._signs(batch_size) @ self.mean)

    def curvature(self, batch_size: float) -> float:
        signs = self._signs(batch_size)
        return float((1 - signs * signs) @ np.diag(self.hessian) + signs @ self.hessian @ signs)

    def lr(self, batch_size: float) -> float:
        return self.alignment(batch_size) / self.curvature(batch_size)

    def gain(self, batch_size: float) -> float:
        return 0.5 * self.alignment(batch_size) * self.lr(batch_size)

    def _signs(self, batch_size: float) -> np.ndarray:
        signs: np.ndarray = erf(math.sqrt(batch_size / 2) * self.mean / self.deviation)
        return signs


def theorem3(mean: np.ndarray, deviation: np.ndarray, hessian: np.ndarray) -> Theorem3Law:
    """Eq. 13 to 16: its limit for batches far below where any coordinate's sign settles."""
    ratio, trace = mean / deviation, float(np.trace(hessian))
    coherent = float(ratio @ hessian @ ratio - ratio**2 @ np.diag(hessian))
    slope = math.sqrt(2 / math.pi) * float(mean @ ratio) / trace
    if coherent <= 0:
        return Theorem3Law(noise_scale=math.inf, peak_lr=math.inf, sqrt_coefficient=slope)
    noise_scale = math.pi * trace / (2 * coherent)
    weight = float(mean @ ratio)
    return Theorem3Law(
        noise_scale=noise_scale, peak_lr=math.sqrt(noise_scale / (2 * math.pi)) * weight / trace
    )
