"""Measurements in 16 and 64 bits, under a gradient scaler, and with clipped gradients, against 32 bits."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, TensorDataset

from lightning_surge import SurgeLRCallback
from lightning_surge.measure.records import Measurement
from tests.drawn import numbers
from tests.trainings import MakeOptimizer, Regression, make_trainer, probing, scaling, trained, with_lr

adamw = with_lr(AdamW, 0.01, weight_decay=0.0)
fused = with_lr(AdamW, 0.01, weight_decay=0.0, fused=True)
sgd = with_lr(SGD, 0.05)


class Net(Regression):
    """A network whose loss is infinite at some batches, and flat at the first `still` ones."""

    def __init__(
        self, make_optimizer: MakeOptimizer = adamw, overflows: tuple[int, ...] = (), still: int = 0
    ) -> None:
        super().__init__(make_optimizer, width=64, features=16)
        self.overflows, self.still = overflows, still

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.calls += 1
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x).float(), y.float())
        if batch_idx < self.still:
            return 0.0 * loss
        return loss * math.inf if batch_idx in self.overflows else loss


def data(batches: int, batch_size: int = 16) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batches * batch_size, 16, generator=generator)
    y = x[:, :4].sum(dim=1, keepdim=True) + torch.randn(len(x), 1, generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


class Measure:
    """Runs a training and returns its measurements, live from windows' norms or from probes."""

    def __init__(self, measurements: list[Measurement]) -> None:
        self.measurements = measurements

    def __call__(
        self, module: Net, *, live: bool, batches: int = 4, dry_run: bool = True, **options: Any
    ) -> list[list[float]]:
        self.measurements.clear()
        self.callback = probing(objective="alignment", dry_run=dry_run, log_peak=not live)
        loader = data(4 * batches, 4) if live else data(batches)
        options |= {"accumulate_grad_batches": 4 if live else 1}
        self.trainer = trained(module, loader, self.callback, **options).trainer
        return [numbers(measurement) for measurement in self.measurements]


@pytest.fixture
def measure(noted: Any) -> Measure:
    return Measure(noted(lambda measurement: measurement))


def scaled_or(precision: str) -> dict[str, Any]:
    return {"plugins": scaling()} if precision == "16-mixed" else {"precision": precision}


class TestAgainst32Bits:
    @pytest.mark.parametrize("live", [True, False])
    @pytest.mark.parametrize("make_optimizer", [with_lr(torch.optim.Adam, 0.1), with_lr(SGD, 0.1)])
    @pytest.mark.parametrize(
        # Of the norms, of the alignments, and of curvatures over about half of an optimal step.
        ("precision", "tolerances"),
        [
            ("64-true", (1e-5, 1e-5, 1e-3)),
            ("bf16-mixed", (0.01, 0.05, 0.08)),
            ("16-mixed", (0.002, 0.01, 0.02)),
        ],
    )
    def test_the_first_measurement_is_the_same(
        self, measure: Measure, precision: str, tolerances: Any, make_optimizer: MakeOptimizer, live: bool
    ) -> None:
        # The first step moves nothing, so that both are taken at the same point.
        still = 4 if live else 1
        reference = measure(Net(make_optimizer, still=still), live=live, batches=2)
        module = Net(make_optimizer, still=still)
        if precision == "64-true":
            module.double()
        got = measure(module, live=live, batches=2, **scaled_or(precision))
        assert len(got) == len(reference) == 1
        norms, alignments, curvatures = tolerances
        wanted = [norms] * 2 + ([] if live else [alignments] * 3 + [curvatures] * 2)
        for value, expected, tolerance in zip(got[0], reference[0], wanted, strict=True):
            assert value == pytest.approx(expected, rel=tolerance)

    @pytest.mark.slow
    @pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
    def test_short_secants_scatter_but_have_no_bias(self, measure: Measure, precision: str) -> None:
        """Over a twentieth of the optimal step, where rounding is a good part of what changes."""
        ratios = []
        for seed in range(12):
            values = []
            for options in ({}, scaled_or(precision)):
                module = Net(with_lr(torch.optim.Adam, 0.01), still=1)
                for parameter in module.parameters():
                    generator = torch.Generator().manual_seed(seed)
                    parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
                values.append(measure(module, live=False, batches=2, **options)[0][-2:])
            ratios.append(torch.tensor(values[1]) / torch.tensor(values[0]))
        ratio = torch.stack(ratios)
        error = ratio.std(dim=0) / len(ratios) ** 0.5
        assert ((ratio.mean(dim=0) - 1.0).abs() < 4.0 * error).all()
        assert (error < 0.06).all()


class Test16BitParameters:
    @pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
    def test_are_refused_with_every_remedy(self, precision: Any) -> None:
        module = Net(sgd)
        message = (
            r"Expected float32 parameters, got dtype torch.b?float16, .*precision='bf16-mixed' or '16-mixed' "
            r".*law='sqrt', law='linear' or law='constant'"
        )
        with pytest.raises(MisconfigurationException, match=message):
            make_trainer(SurgeLRCallback(4, log_peak=True), precision=precision).fit(module, data(2))
        assert module.calls == 0

    @pytest.mark.parametrize(("precision", "accumulation"), [("bf16-true", 1), ("16-true", 4)])
    def test_are_measured_for_the_default(self, precision: Any, accumulation: int) -> None:
        found = []
        for kind in (precision, "32-true"):
            callback = SurgeLRCallback(4, probe_every=1, dry_run=True)
            options = {"precision": kind, "accumulate_grad_batches": accumulation}
            trained(Net(with_lr(SGD, 1e-3)), data(4 * accumulation + 1), callback, **options)
            first = callback.history._records[0].statistics
            found.append((first.batch_size, first.grad_sq, first.trace_cov))
            assert callback.history.num_measurements >= 4
        assert found[0] == pytest.approx(found[1], rel=0.05)


@pytest.mark.parametrize(
    ("make_optimizer", "precision", "overflows"),
    [
        (partial(with_lr, SGD), "bf16-true", ()),
        (partial(with_lr, SGD), "16-true", ()),
        (partial(with_lr, AdamW, weight_decay=0.0, fused=False), "16-mixed", (1, 3)),
        (partial(with_lr, AdamW, weight_decay=0.0, fused=True), "16-mixed", (1, 3)),
    ],
)
def test_a_rule_doubles_the_learning_rate(make_optimizer: Any, precision: str, overflows: Any) -> None:
    def run(lr: float, *callbacks: Callback) -> Tensor:
        module = Net(make_optimizer(lr=lr), overflows)
        trained(module, data(6), *callbacks, **scaled_or(precision))
        assert module.weights.element_size() == (4 if overflows else 2)
        return module.weights

    # 16 examples at a base of 4: the square root of four.
    assert torch.equal(run(0.01, SurgeLRCallback(4, "sqrt")), run(0.02))


class TestScaler:
    @pytest.mark.parametrize("live", [True, False])
    @pytest.mark.parametrize("make_optimizer", [adamw, sgd, fused])
    def test_measurements_do_not_depend_on_the_scale(
        self, measure: Measure, make_optimizer: MakeOptimizer, live: bool
    ) -> None:
        low, high = (
            measure(Net(make_optimizer), live=live, plugins=scaling(scale)) for scale in (256.0, 4096.0)
        )
        grown = measure(Net(make_optimizer), live=live, plugins=scaling(256.0, growth_interval=1))
        assert self._scale(measure) == 256.0 * 2**4
        assert len(low) == len(high) == len(grown) == (4 if live else 3)
        for others in (high, grown):
            for row, other in zip(low, others, strict=True):
                assert other == pytest.approx(row, rel=1e-3)

    @staticmethod
    def _scale(measure: Measure) -> float:
        return float(measure.trainer.precision_plugin.scaler.get_scale())  # type: ignore[union-attr]

    @pytest.mark.parametrize("live", [True, False])
    @pytest.mark.parametrize("make_optimizer", [adamw, fused])
    def test_skipped_steps_count_for_nothing(
        self, measure: Measure, make_optimizer: MakeOptimizer, live: bool
    ) -> None:
        # Live, the third micro-batch of the third window of four.
        module = Net(make_optimizer, overflows=(10,) if live else (2,))
        measure(module, live=live, batches=6, dry_run=False, plugins=scaling())
        callback = measure.callback
        assert callback._measurer.budget.trained == 5 * 16
        # Nothing is left of the skipped window in the next one, and its learning rate is restored.
        assert callback.decision is not None
        assert measure.trainer.optimizers[0].param_groups[0]["lr"] == 0.01
        (step,) = {float(state["step"]) for state in measure.trainer.optimizers[0].state.values()}
        assert step == 5.0
        assert all(math.isfinite(value) for m in measure.measurements for value in numbers(m))
        # The probe that met the overflowing batch was not taken either.
        assert callback.history.num_measurements <= 5
        assert not live or len(measure.measurements) == 5

    @pytest.mark.parametrize("law", ["theorem2", "theorem3"])
    def test_theorems_do_not_depend_on_the_scale(self, measure: Measure, law: Any) -> None:
        def measured(**options: Any) -> list[float]:
            measure.measurements.clear()
            callback = SurgeLRCallback(2, law, probe_every=8, probe_examples=32, dry_run=True)
            make_trainer(callback, **options).fit(Net(with_lr(torch.optim.Adam, 1e-4)), data(12))
            (measurement,) = measure.measurements
            norms, sums = measurement.statistics, measurement.coordinate_sums
            assert sums is not None
            first = [norms.grad_sq, norms.trace_cov, sums.alignment_slope]
            curvatures = [value for _, value in measurement.curvatures]
            return [*first, *(value for _, value in norms.alignments), *curvatures, *sums[:2]]

        reference, low, high = measured(), measured(plugins=scaling(256.0)), measured(plugins=scaling(4096.0))
        assert high == pytest.approx(low, rel=0.01)
        # Secants of this learning rate are too short for the curvatures in 16 bits.
        assert low[:5] == pytest.approx(reference[:5], rel=0.02)

    def test_slices_do_not_overflow_where_the_batch_does_not(self, measure: Measure) -> None:
        """Scalers settle at the edge of overflow, and a slice's gradients are means over fewer examples."""
        largest = 0.0
        for power in range(8, 24):
            measure(Net(still=1), live=False, batches=2, plugins=scaling(2.0**power))
            if self._scale(measure) < 2.0**power:
                break  # which the scaler has backed off from
            largest = 2.0**power
        assert largest >= 2.0**10
        assert power < 23
        taken = measure(Net(still=1), live=False, batches=2, plugins=scaling(largest))
        assert len(taken) == 1
        assert taken[0] == pytest.approx(measure(Net(still=1), live=False, batches=2)[0], rel=0.03)


class TestClipping:
    @pytest.mark.parametrize("live", [True, False])
    @pytest.mark.parametrize(
        ("algorithm", "precision"), [("norm", "32-true"), ("norm", "16-mixed"), ("value", "32-true")]
    )
    def test_that_bites_leaves_measurements_those_of_the_unclipped_gradient(
        self, measure: Measure, algorithm: str, precision: str, live: bool
    ) -> None:
        still = 4 if live else 1
        expected = measure(Net(still=still), live=live, batches=2, **scaled_or(precision))
        assert len(expected) == 1
        clipping = {"gradient_clip_val": 1e-4, "gradient_clip_algorithm": algorithm}
        plain, clipped = Net(still=still), Net(still=still)
        assert measure(clipped, live=live, batches=2, **clipping, **scaled_or(precision)) == expected
        # In a dry run, clipping bites as it would without the callback.
        loader, accumulation = (data(8, 4), 4) if live else (data(2), 1)
        trained(plain, loader, accumulate_grad_batches=accumulation, **clipping, **scaled_or(precision))
        assert torch.equal(plain.weights, clipped.weights)

    @pytest.mark.parametrize(
        "make", [Net, type("Clips", (Net,), {"configure_gradient_clipping": lambda *_, **__: None})]
    )
    def test_of_plain_gradients_is_warned_of(self, make: type[Net]) -> None:
        clip = 1.0 if make is Net else None
        with pytest.warns(UserWarning, match="steps of SGD to be the gradient's, got clipping.*law='sqrt'"):
            make_trainer(probing(), gradient_clip_val=clip).fit(make(sgd), data(2))
