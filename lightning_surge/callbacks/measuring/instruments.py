"""Which parameters a measurement displaces, how far, and with which instrument it looks at the change."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from lightning_surge.callbacks.settings import SurgeSettings
from lightning_surge.measure.coordinates import CoordinateMeasurement
from lightning_surge.measure.curvature import probe_distance
from lightning_surge.measure.direction import Direction
from lightning_surge.measure.distributed import ALONE
from lightning_surge.measure.measurement import LawMeasurement, NormMeasurement
from lightning_surge.measure.probing import Prober
from lightning_surge.measure.records import Measurement
from lightning_surge.measure.replay import Chunk
from lightning_surge.optimizers.families import lr_scales, parameter_scales
from lightning_surge.optimizers.lr_writer import learning_rates

# Where the schedule's learning rate is (nearly) zero, curvature is measured over this share of its largest.
SMALLEST_DELTA = 0.03
# The curvature wanted is that over the optimal step. Until it is known, this share of the learning rate.
FIRST_DELTA = 0.125


class Instruments:
    """Makes the measurements of what an optimizer moves, as far as it moves it.

    Attributes:
        optimal_lr: distance that the curvature is wanted over, as far as it is known.
        parameters: those that the optimizer moves.
        largest_lr: largest scheduled learning rate so far, the scale of the schedule.
        parameters_changed: since somebody last set this to False, as where a callback unfreezes some.
    """

    # Of the run in hand; absent between runs.
    _optimizer: Optimizer
    _direction: Direction
    _prober: Prober

    def __init__(self, settings: SurgeSettings) -> None:
        self._settings = settings
        self.optimal_lr: float | None = None
        self._ranks = ALONE
        self.largest_lr = 0.0
        self.end()

    def begin(self, optimizer: Optimizer, direction: Direction, prober: Prober) -> None:
        """Take hold of a run that starts."""
        self._optimizer, self._direction, self._prober = optimizer, direction, prober
        self._ranks = prober.ranks

    def end(self) -> None:
        """Let go of the run."""
        for name in ("_optimizer", "_direction", "_prober"):
            vars(self).pop(name, None)
        self.parameters: list[Tensor] = []
        self.parameters_changed = False
        self._scales: list[float] = []

    def refresh(self) -> None:
        """Read the parameter groups afresh: fine-tuning callbacks unfreeze and add."""
        lrs = learning_rates(self._optimizer)
        self.largest_lr = max(self.largest_lr, *lrs)
        groups = zip(self._optimizer.param_groups, lr_scales(lrs), strict=True)
        rows = [
            (p, scale * distance)
            for group, scale in groups
            for p, distance in zip(group["params"], parameter_scales(self._optimizer, group), strict=True)
            if p.requires_grad
        ]
        before, self.parameters = self.parameters, [parameter for parameter, _ in rows]
        if before and list(map(id, before)) != list(map(id, self.parameters)):
            self.parameters_changed = True
        self._scales = [scale for _, scale in rows]

    def _delta(self) -> float:
        """Distance of the secants: the optimal step as far as it is known, within the schedule's scale."""
        lr = max(*learning_rates(self._optimizer), SMALLEST_DELTA * self.largest_lr)
        wanted = FIRST_DELTA * lr if self.optimal_lr is None else self.optimal_lr
        return probe_distance(self.parameters, min(max(wanted, SMALLEST_DELTA * lr), lr))

    # ------------------------------------------------------------------ instruments

    def norms(self) -> NormMeasurement:
        """For the noise alone."""
        return NormMeasurement(self.parameters, self._prober.replay, self._ranks)

    def law(self) -> LawMeasurement:
        """For the measured law."""
        return LawMeasurement(
            self.parameters,
            replay=self._prober.replay,
            # The direction itself may carry the loss scale, as the gradient does.
            delta=self._delta() / self._prober.loss_scale**self._direction.loss_power,
            scales=self._scales,
            direction=self._direction,
            ranks=self._ranks,
        )

    def coordinates(self, chunks: Sequence[Chunk], base: float, seed: int) -> CoordinateMeasurement:
        """For the theorems."""
        return CoordinateMeasurement(
            self.parameters,
            replay=self._prober.replay,
            delta=self._delta(),
            scales=self._scales,
            sizes=CoordinateMeasurement.sizes_for(chunks, base),
            law=self._settings.law,
            seed=seed,
            ranks=self._ranks,
        )

    def unscaled(self, measurement: Measurement) -> Measurement:
        """What a measurement says of the loss itself, without the factor that it was taken with."""
        return measurement.unscaled(self._prober.loss_scale, direction=self._direction)
