"""`objective="edge"` in training: what it follows, what it costs, what it refuses."""

import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from lightning_surge import BatchSizeWarmup, SurgeLRCallback
from lightning_surge.laws.edge import EdgeLaw
from lightning_surge.laws.objectives import edge_ratio
from lightning_surge.measure.sharpness import FIRST_SECANTS, SECANTS
from lightning_surge.policy.estimates import EstimatedLaw
from tests.trainings import make_trainer


def adamw(module: nn.Module) -> Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=0.01, betas=(0.9, 0.99))


class Regression(pl.LightningModule):
    """Least squares with noise: its loss is a quadratic, the same at every point."""

    def __init__(self, make_optimizer: Callable[[nn.Module], Optimizer] = adamw, decay: float = 1.0) -> None:
        super().__init__()
        pl.seed_everything(0, verbose=False)
        self.linear = nn.Linear(8, 1, bias=False)
        self.make_optimizer = make_optimizer
        self.decay = decay
        self.calls = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.calls += 1
        x, y = batch
        return nn.functional.mse_loss(self.linear(x), y)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, self.decay)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def data(count: int, batch_size: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 8, generator=generator) * torch.linspace(0.3, 2.0, 8)
    y = x.sum(dim=1, keepdim=True) + 4.0 * torch.randn(count, 1, generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def surge(**options: Any) -> SurgeLRCallback:
    settings: dict[str, Any] = {"base_batch_size": 4, "probe_every": 2, "probe_examples": 64}
    return SurgeLRCallback(objective="edge", **(settings | options))


class Spy(Callback):
    """At every step the decision, the scheduled learning rate and the law."""

    def __init__(self, callback: SurgeLRCallback) -> None:
        self.callback = callback
        self.rows: list[tuple[Any, float, Any]] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any) -> None:
        self.lr = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.rows.append((self.callback.decision, self.lr, self.callback.law))


@pytest.mark.slow
class TestFollowing:
    def test_the_edge_is_that_of_the_loss_and_of_adams_averages(self) -> None:
        """`H = 2 E[x x']` is known; `P` is read off the optimizer."""
        module, callback = Regression(), surge(dry_run=True, half_life=20.0)
        trainer = make_trainer(callback, max_epochs=2)
        trainer.fit(module, data(4 * 300, 4))
        law = callback.law
        assert isinstance(law, EstimatedLaw)
        assert isinstance(law.law, EdgeLaw)
        hessian = 2.0 * torch.diag(torch.linspace(0.3, 2.0, 8) ** 2)
        (state,) = trainer.optimizers[0].state.values()
        # With noise this large the averages hardly move, and say the same at the end as on the way.
        v = state["exp_avg_sq"].flatten() / (1.0 - 0.99 ** float(state["step"]))
        for size in (4.0, 16.0):
            p = (v * 4.0 / size).sqrt()
            edge = 38.0 / float((hessian.diagonal() / p).max())
            error = law.standard_error(lambda law, size=size: law.edge_lr(size))
            assert abs(law.edge_lr(size) - edge) < 4 * error + 0.1 * edge
            assert error < 0.2 * edge

    def test_the_factor_follows_the_schedule_at_every_step(self) -> None:
        callback = surge(probe_every=40, max_drift_per_step=1e9)
        spy = Spy(callback)
        make_trainer(callback, spy).fit(Regression(decay=0.97), data(16 * 200, 16))
        known = [row for row in spy.rows if row[0].reason == "measured"]
        assert len(known) > 60
        for decision, lr, law in known:
            assert decision.predicted == pytest.approx(edge_ratio(law, 16.0, 4.0, lr), rel=1e-9)
        assert [lr for _, lr, _ in spy.rows] == pytest.approx([0.01 * 0.97**step for step in range(200)])
        assert len({decision.used for decision, _, _ in known}) == len(known)

    def test_before_an_edge_is_known_square_root_scaling_is_held(self) -> None:
        callback = surge(probe_every=5, max_drift_per_step=1e9)
        spy = Spy(callback)
        make_trainer(callback, spy).fit(Regression(), data(16 * 40, 16))
        reasons = [decision.reason for decision, _, _ in spy.rows]
        assert "held: the measurements do not determine an edge of stability" in reasons
        first = reasons.index("held: the measurements do not determine an edge of stability")
        assert all(decision.used == 2.0 for decision, _, _ in spy.rows[: first + 1])
        assert reasons[-1] in ("measured", "between sqrt and measured: standard error is large")

    def test_a_ramp_is_measured_at_the_size_in_force(self) -> None:
        callback = surge(probe_every=3)
        warmup = BatchSizeWarmup(4, 64, 60)
        make_trainer(warmup, callback, max_epochs=1).fit(Regression(), data(4000, 4))
        pairs = callback.history.stats().sharpness
        others = [pair.sizes[1] for pair in pairs]
        assert {pair.sizes[0] for pair in pairs} == {4.0}
        # Four times the base at first, where the two coincide.
        assert others[0] == 16.0 or others[0] == 8.0
        assert max(others) == 64.0
        assert callback.law is not None
        assert 0.0 < callback.law.edge_lr(64.0) < callback.law.edge_lr(4.0)

    def test_asking_at_another_learning_rate(self) -> None:
        callback = surge(max_drift_per_step=1e9)
        make_trainer(callback).fit(Regression(), data(16 * 60, 16))
        law = callback.law
        assert law is not None
        assert callback.lr_scale(16) == callback.lr_scale(16, lr=0.01)
        assert callback.lr_scale(16, lr=1e3) < callback.lr_scale(16, lr=0.0)
        assert callback.lr_scale(4, lr=0.5) == 1.0
        record = callback.law_history[-1]
        assert record.law.edge_lr(16.0) == law.edge_lr(16.0)

    def test_is_logged_with_its_standard_error(self) -> None:
        callback = surge()
        trainer = make_trainer(callback)
        trainer.fit(Regression(), data(16 * 60, 16))
        law = callback.law
        assert isinstance(law, EstimatedLaw)
        metrics = trainer.callback_metrics
        assert float(metrics["surge/edge_lr"]) == pytest.approx(law.edge_lr(16.0), rel=1e-5)
        error = law.standard_error(lambda law: law.edge_lr(16.0))
        assert float(metrics["surge/edge_lr_standard_error"]) == pytest.approx(error, rel=1e-5)


class TestCost:
    def test_from_accumulation(self) -> None:
        callback = surge(probe_every=1)
        make_trainer(callback, accumulate_grad_batches=4).fit(Regression(), data(16 * 12, 4))
        # Four windows fill a pool of 64. Adam's averages have told mean and variance apart for one of two.
        assert callback.history.num_measurements == 2
        assert len(callback.history.stats().sharpness) == 1
        secants = 2 * 2 + SECANTS + FIRST_SECANTS
        charged = 1.25 * (2 * 64 + 32 * secants)
        assert callback.overhead == pytest.approx(charged / (16 * 12))

    @pytest.mark.parametrize("accumulation", [1, 4])
    def test_the_budget_is_kept(self, accumulation: int) -> None:
        callback = surge(probe_every=None, probe_examples=None, max_overhead=0.2)
        trainer = make_trainer(callback, accumulate_grad_batches=accumulation)
        trainer.fit(Regression(), data(16 * 300 * accumulation, 16))
        assert len(callback.history.stats().sharpness) >= 3
        assert callback.overhead < 0.22

    def test_other_objectives_keep_no_vector(self) -> None:
        callback = SurgeLRCallback(4, objective="alignment", probe_every=1, probe_examples=16)
        make_trainer(callback).fit(Regression(), data(16 * 12, 16))
        assert callback.state_dict()["measurer"]["sharpness"] == {"vector": []}


class TestDefault:
    """Progress, which no setting of the run changes, but for steps along the gradient."""

    @pytest.mark.parametrize("clip", [None, 1.0])
    @pytest.mark.parametrize("base", [4, None])
    def test_is_progress(self, base: int | None, clip: float | None) -> None:
        callback = SurgeLRCallback(base, probe_every=2, probe_examples=16)
        make_trainer(callback, gradient_clip_val=clip).fit(Regression(), data(16 * 30, 16))
        assert callback.settings.objective == "progress"
        assert isinstance(callback.law, EstimatedLaw)
        assert math.isnan(callback.law.edge_lr(16.0))  # nobody looked for it

    def test_is_alignment_along_the_gradient(self) -> None:
        callback = SurgeLRCallback(4, probe_every=2, probe_examples=16)
        assert callback.settings.objective == "progress"
        make_trainer(callback).fit(Regression(with_options(torch.optim.SGD)), data(16 * 30, 16))
        assert callback.settings.objective == "alignment"
        assert callback.decision is not None
        assert callback.law is not None
        assert callback.decision.predicted == pytest.approx(callback.law.lr(16.0) / callback.law.lr(4.0))
        # The next training may be of another kind.
        make_trainer(callback).fit(Regression(), data(16 * 4, 16))
        assert callback.settings.objective == "progress"

    def test_what_was_asked_for_is_followed_along_the_gradient_too(self) -> None:
        callback = SurgeLRCallback(4, objective="progress", probe_every=2, probe_examples=16)
        make_trainer(callback).fit(Regression(with_options(torch.optim.SGD)), data(16 * 30, 16))
        assert callback.settings.objective == "progress"
        assert callback.decision is not None
        assert callback.decision.predicted == pytest.approx(4.0)


class TestFailures:
    def test_averages_that_stop_telling_are_held_with_a_reason(self) -> None:
        class Clip(Callback):
            def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
                trainer.gradient_clip_val = 1.0 if trainer.global_step >= 30 else None

        callback = surge(probe_every=4)
        spy = Spy(callback)
        make_trainer(callback, spy, Clip()).fit(Regression(), data(16 * 60, 16))
        assert spy.rows[29][0].reason == "measured"
        assert spy.rows[-1][0].reason == "held: Adam's averages do not tell the gradient from its noise now"
        assert math.isfinite(spy.rows[-1][0].used)


def with_options(kind: type[Optimizer], **options: Any) -> Callable[[nn.Module], Optimizer]:
    return lambda module: kind(module.parameters(), lr=0.01, **options)


def two_groups(first: tuple[float, float], second: tuple[float, float]) -> Callable[[nn.Module], Optimizer]:
    def make(module: nn.Module) -> Optimizer:
        extra = nn.Parameter(torch.zeros(1))
        groups = [{"params": list(module.parameters()), "betas": first}, {"params": [extra], "betas": second}]
        return torch.optim.AdamW(groups, lr=0.01)

    return make


class TestRefusals:
    @pytest.mark.parametrize(
        ("make_optimizer", "message"),
        [
            (with_options(torch.optim.SGD), "one of Adam, AdamW, RAdam, NAdam .* got SGD: .*'progress'"),
            (with_options(torch.optim.RMSprop), "got RMSprop"),
            (with_options(torch.optim.Adagrad), "got Adagrad"),
            (with_options(torch.optim.Adamax), "got Adamax"),
            (with_options(torch.optim.Adafactor), "got Adafactor"),
            (with_options(torch.optim.AdamW, amsgrad=True), "without amsgrad .* got AdamW"),
            (
                with_options(torch.optim.Adam, weight_decay=0.1),
                "decoupled weight decay .* got Adam, .* AdamW",
            ),
            (with_options(torch.optim.AdamW, betas=(0.3, 0.99)), "beta_1 > 1/3 .* AdamW with beta_1=0.3"),
            (two_groups((0.9, 0.99), (0.8, 0.99)), r"one beta_1 .* got \[0.8, 0.9\]"),
            (two_groups((0.9, 0.99), (0.9, 0.9)), "same betas in all parameter groups"),
        ],
    )
    def test_of_optimizers(self, make_optimizer: Callable[[nn.Module], Optimizer], message: str) -> None:
        module = Regression(make_optimizer)
        with pytest.raises(MisconfigurationException, match=message):
            make_trainer(surge()).fit(module, data(32, 8))
        assert module.calls == 0

    @pytest.mark.parametrize(
        "make_optimizer",
        [
            with_options(torch.optim.Adam),
            with_options(torch.optim.AdamW, weight_decay=0.1),
            with_options(torch.optim.NAdam, weight_decay=0.1, decoupled_weight_decay=True),
            with_options(torch.optim.RAdam),
        ],
    )
    def test_what_is_not_refused_finds_an_edge(
        self, make_optimizer: Callable[[nn.Module], Optimizer]
    ) -> None:
        callback = surge()
        make_trainer(callback).fit(Regression(make_optimizer), data(16 * 20, 16))
        assert callback.law is not None
        assert 0.0 < callback.law.edge_lr(16.0) < math.inf

    def test_of_16_bit_weights(self) -> None:
        module = Regression()
        with pytest.raises(MisconfigurationException, match=r"32-true' or higher .* got 'bf16-mixed'"):
            make_trainer(surge(), precision="bf16-mixed").fit(module, data(32, 8))
        assert module.calls == 0

    def test_of_a_schedule_that_moves_beta_1(self) -> None:
        class Cycled(Regression):
            def configure_optimizers(self) -> Any:
                optimizer = super().configure_optimizers()["optimizer"]
                schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=100)
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

        module = Cycled()
        with pytest.raises(MisconfigurationException, match="cycle_momentum=False"):
            make_trainer(surge()).fit(module, data(32, 8))
        assert module.calls == 0

    def test_of_clipping(self) -> None:
        module = Regression()
        with pytest.raises(MisconfigurationException, match=r"no gradient clipping .* gradient_clip_val=0.5"):
            make_trainer(surge(), gradient_clip_val=0.5).fit(module, data(32, 8))
        assert module.calls == 0

    def test_of_clipping_in_the_module(self) -> None:
        class Clipping(Regression):
            def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
                pass

        with pytest.raises(MisconfigurationException, match="own configure_gradient_clipping"):
            make_trainer(surge()).fit(Clipping(), data(32, 8))
