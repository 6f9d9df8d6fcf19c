"""`lr * weight_decay` of every step: scaled with the factor, as torch does, kept, or kept per example."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LambdaCallback
from torch import nn
from torch.optim import SGD, Adafactor, Adam, AdamW, Muon, NAdam, Optimizer, RMSprop
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader

from lightning_surge import BatchSizeScheduler, SurgeLRCallback
from lightning_surge.optimizers.lr_writer import FactorInUpdate
from lightning_surge.schedules import Milestones
from tests.trainings import (
    MakeOptimizer,
    Regression,
    at_update,
    entries,
    every_step,
    make_trainer,
    regression_data,
    saved_steps,
    trained,
    with_lr,
)

adamw = with_lr(AdamW, 0.01, weight_decay=0.1)


class Decayed(Regression):
    """One matrix, whose learning rate falls at every step."""

    def __init__(self, make_optimizer: MakeOptimizer = adamw, gamma: float = 0.8) -> None:
        super().__init__(make_optimizer, lambda optimizer: ExponentialLR(optimizer, gamma))
        self.net = nn.Linear(4, 1, bias=False)  # type: ignore[assignment]


def data(count: int = 22, batch_size: int = 4) -> DataLoader[Any]:
    return regression_data(count, batch_size)


def per_example(law: Any = "sqrt") -> SurgeLRCallback:
    return SurgeLRCallback(4, law, scale_weight_decay="per_example")


def keeping(**options: Any) -> SurgeLRCallback:
    return SurgeLRCallback(3, "linear", scale_weight_decay=False, **options)


class TestProducts:
    @pytest.mark.parametrize(
        "make_optimizer",
        [
            adamw,
            *(with_lr(kind, 0.01, weight_decay=0.1, decoupled_weight_decay=True) for kind in (Adam, NAdam)),
            *(with_lr(kind, 0.01, weight_decay=0.1) for kind in (Adafactor, Muon, SGD)),
            # The learning rate is rounded to float32 when it is written; the decay makes up for that.
            lambda m: AdamW(m.parameters(), lr=torch.tensor(0.01), weight_decay=0.1, foreach=False),
        ],
    )
    @pytest.mark.parametrize("accumulation", [1, 2])
    def test_are_kept_step_by_step(self, make_optimizer: MakeOptimizer, accumulation: int) -> None:
        plain, kept = Decayed(make_optimizer), Decayed(make_optimizer)
        make_trainer(accumulate_grad_batches=accumulation).fit(plain, data())
        trainer = make_trainer(keeping(), accumulate_grad_batches=accumulation)
        trainer.fit(kept, data())
        # 22 examples: five batches of 4 and one of 2.
        sizes = [4, 4, 4, 4, 4, 2] if accumulation == 1 else [8, 8, 6]
        for size, [(lr, decay)], [(used, written)] in zip(sizes, plain.read, kept.read, strict=True):
            assert decay is not None
            assert written is not None
            assert used == pytest.approx(lr * size / 3, rel=1e-7)
            assert used * written == pytest.approx(lr * decay, rel=1e-15)
            assert written != decay
        assert entries(trainer.optimizers[0])[0][1] == 0.1

    def test_of_groups_are_kept_apart(self) -> None:
        def make(module: Any) -> Optimizer:
            second = {"params": [nn.Parameter(torch.ones(2))], "lr": 0.05, "weight_decay": 0}
            return AdamW([{"params": module.parameters(), "weight_decay": 0.4}, second], lr=0.01)

        module = Decayed(make, gamma=1.0)
        trainer = make_trainer(keeping())
        trainer.fit(module, data(12))
        assert module.read[0] == [(0.01 * (4 / 3), pytest.approx(0.3)), (0.05 * (4 / 3), 0.0)]
        groups = trainer.optimizers[0].param_groups
        assert [group["weight_decay"] for group in groups] == [0.4, 0]
        assert type(groups[1]["weight_decay"]) is int

    def test_of_optimizers_without_decay_are_no_obstacle(self) -> None:
        module = Decayed(with_lr(torch.optim.LBFGS, 0.01), gamma=1.0)
        trainer = make_trainer(keeping())
        trainer.fit(module, data(12))
        assert trainer.callback_metrics["surge/lr_used"] == pytest.approx(0.01 * (4 / 3))


class TestDecayPerExample:
    @pytest.mark.parametrize("tensor", [False, True])
    @pytest.mark.parametrize("form", [{}, {"fused": True}, {"foreach": False}], ids=["", "fused", "single"])
    def test_is_adamw_with_those_values_written_by_hand(
        self, form: dict[str, Any], tensor: bool, unraised: list[str]
    ) -> None:
        """Along a ramp of accumulated batches, whose last window is shorter."""

        def make(module: Any) -> Optimizer:
            lr: Any = torch.tensor(0.01, dtype=torch.float64) if tensor else 0.01
            return AdamW(module.parameters(), lr=lr, weight_decay=0.5, **form)

        trained, by_hand = Decayed(make), Decayed(make)
        ramp = BatchSizeScheduler(Milestones({0: 4, 2: 8, 3: 16}))
        trainer = make_trainer(ramp, per_example())
        trainer.fit(trained, data(44))
        assert "a learning-rate schedule that reaches its end" in unraised.pop()

        optimizer, micro = make(by_hand), list(data(44))
        for step, parts in enumerate([1, 1, 2, 4, 3]):
            for batch in [micro.pop(0) for _ in range(parts)]:
                (by_hand.training_step(batch, 0) / parts).backward()
            (group,) = optimizer.param_groups
            group["lr"], group["weight_decay"] = 0.01 * 0.8**step * parts**0.5, 0.5 * parts / parts**0.5
            optimizer.step()
            optimizer.zero_grad()
        assert micro == []
        assert torch.allclose(trained.weights, by_hand.weights, rtol=2e-6, atol=0.0)
        assert entries(trainer.optimizers[0]) == [(pytest.approx(0.01 * 0.8**5), 0.5)]

    def test_grows_where_the_learning_rate_does_not(self) -> None:
        module = trained(Decayed(gamma=1.0), data(), per_example("constant"), accumulate_grad_batches=2)
        assert module.read == [[(0.01, pytest.approx(0.1 * size / 4))] for size in (8, 8, 6)]

    def test_is_left_alone_by_a_dry_run(self) -> None:
        callback = SurgeLRCallback(2, "sqrt", dry_run=True, scale_weight_decay="per_example")
        module = trained(Decayed(gamma=1.0), data(), callback)
        assert module.read == [[(0.01, 0.1)]] * 6


class TestWriter:
    @given(
        factor=st.floats(1e-6, 1e6) | st.just(1.0),
        share=st.floats(1e-3, 1e3),
        lr=st.floats(1e-8, 10),
        decay=st.just(0.0) | st.floats(1e-9, 10),
        tensor=st.booleans(),
    )
    def test_restores_exactly(
        self, factor: float, share: float, lr: float, decay: float, tensor: bool
    ) -> None:
        optimizer = AdamW([nn.Parameter(torch.ones(1))], lr=lr, weight_decay=decay)
        if tensor:
            optimizer.param_groups[0]["weight_decay"] = torch.tensor(decay)
        before, read = entries(optimizer), []
        at_update(optimizer, lambda o: read.extend(entries(o)))
        writer = FactorInUpdate(optimizer, lambda early: factor, decay_factor=lambda group: share)
        optimizer.step()
        [(used, written)], [(_, old)] = read, before
        assert written is not None
        assert old is not None
        assert used * written == pytest.approx(share * lr * old, rel=1e-6 if tensor else 1e-15)
        assert entries(optimizer) == before
        writer.remove()

    def test_at_a_learning_rate_of_zero_leaves_the_decay(self) -> None:
        optimizer = AdamW([nn.Parameter(torch.ones(1))], lr=0.0, weight_decay=0.1)
        read: list[Any] = []
        at_update(optimizer, lambda o: read.extend(entries(o)))
        FactorInUpdate(optimizer, lambda early: 4.0, decay_factor=lambda group: 1.0)
        optimizer.step()
        assert read == entries(optimizer) == [(0.0, 0.1)]


class TestRestoring:
    def test_schedules_of_the_decay_are_followed(self) -> None:
        def grow(trainer: pl.Trainer, *args: Any) -> None:
            trainer.optimizers[0].param_groups[0]["weight_decay"] *= 2.0

        module = Decayed(gamma=1.0)
        trainer = make_trainer(LambdaCallback(on_before_optimizer_step=grow), keeping())
        trainer.fit(module, data(12))
        products = [lr * (decay or 0.0) for [(lr, decay)] in module.read]
        assert products == pytest.approx([0.002, 0.004, 0.008], rel=1e-15)
        assert entries(trainer.optimizers[0])[0] == (0.01, 0.8)

    @pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
    @pytest.mark.parametrize("accumulation", [1, 2])
    def test_in_checkpoints_and_in_the_run_that_goes_on_from_them(
        self, tmp_path: Path, accumulation: int
    ) -> None:
        options: dict[str, Any] = {"accumulate_grad_batches": accumulation, "max_epochs": 2}
        module = trained(Decayed(), data(24), keeping(), every_step(tmp_path), **options)
        paths = saved_steps(tmp_path)
        assert len(paths) == 12 // accumulation
        for step, path in enumerate(paths, start=1):
            (group,) = torch.load(path, weights_only=True)["optimizer_states"][0]["param_groups"]
            assert (group["lr"], group["weight_decay"]) == (pytest.approx(0.01 * 0.8**step), 0.1)
        half = len(paths) // 2
        resumed = trained(Decayed(), data(24), keeping(), resume=paths[half - 1], **options)
        assert resumed.read == module.read[half:]
        assert torch.equal(resumed.weights, module.weights)


class TestRefusals:
    @pytest.mark.parametrize(
        ("kind", "options", "law", "setting"),
        [
            (Adam, {}, "measured", False),
            (NAdam, {}, "sqrt", False),
            (RMSprop, {}, "sqrt", "per_example"),
            (SGD, {"momentum": 0.9}, "measured", "per_example"),
        ],
    )
    def test_of_coupled_decay(self, kind: Any, options: dict[str, float], law: Any, setting: Any) -> None:
        module = Decayed(with_lr(kind, 0.1, weight_decay=0.1, **options))
        callback = SurgeLRCallback(3, law, scale_weight_decay=setting)
        message = f"{setting!r} .* got parameter group 0 of {kind.__name__} with weight_decay=0.1"
        with pytest.raises(MisconfigurationException, match=message):
            make_trainer(callback).fit(module, data())
        assert module.calls == 0

    def test_not_of_a_decay_of_zero(self) -> None:
        module = trained(Decayed(with_lr(Adam, 0.01), gamma=1.0), data(8), keeping())
        assert module.read == [[(0.01 * (4 / 3), 0.0)]] * 2
