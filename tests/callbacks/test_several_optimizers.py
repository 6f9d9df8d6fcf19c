"""Several optimizers and manual optimization: each has its own statistics, learning rate and budget."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, LambdaCallback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_surge import BatchSizeWarmup, SurgeLRCallback
from lightning_surge.callbacks.measuring.plan import Pace
from lightning_surge.callbacks.step_examples import MicroBatchTracker
from lightning_surge.checking.state import restore, save
from tests.trainings import (
    Sizes,
    Slope,
    assert_same,
    at_update,
    columns,
    flat,
    layouts_in,
    make_trainer,
    scaling,
    trained,
)

LATENT = 2


class Gan(pl.LightningModule):
    """The usual recipe: one network after the other on every batch, with noise drawn on the way."""

    def __init__(
        self, *, lrs: tuple[float, float] = (0.01, 0.02), toggled: bool = False, draws: bool = True
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.critic = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.1 * draws), nn.Linear(6, 1))
        self.generator = nn.Sequential(nn.Linear(LATENT, 6), nn.Tanh(), nn.Linear(6, 3))
        self.rates = lrs
        self.toggled, self.draws = toggled, draws
        self.used: list[list[float]] = [[], []]
        self.scheduled: list[list[float]] = [[], []]

    def fake(self, real: Tensor) -> Tensor:
        latent = torch.randn(len(real), LATENT) if self.draws else real[:, :LATENT]
        return self.generator(latent)

    def critic_loss(self, batch: Sequence[Tensor]) -> Tensor:
        (real,) = batch
        fake = self.fake(real).detach()
        softplus = nn.functional.softplus
        return softplus(-self.critic(real)).mean() + softplus(self.critic(fake)).mean()

    def generator_loss(self, batch: Sequence[Tensor]) -> Tensor:
        fake = self.fake(batch[0])
        return nn.functional.softplus(-self.critic(fake)).mean()

    def losses(self) -> list[Callable[[Any], Tensor]]:
        return [self.critic_loss, self.generator_loss]

    def turn(self, index: int, batch: Any) -> None:
        optimizer: Any = self.optimizers()[index]  # type: ignore[index]
        if self.toggled:
            self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        loss = self.losses()[index](batch)
        self.manual_backward(loss)
        optimizer.step()
        self.scheduled[index].append(optimizer.param_groups[0]["lr"])
        self.log(f"loss{index}", loss.detach())
        if self.toggled:
            self.untoggle_optimizer(optimizer)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.turn(0, batch)
        self.turn(1, batch)

    def configure_optimizers(self) -> Any:
        parts = (self.critic, self.generator)
        optimizers = [AdamW(part.parameters(), lr=lr) for part, lr in zip(parts, self.rates, strict=True)]
        for optimizer, used in zip(optimizers, self.used, strict=True):
            at_update(optimizer, lambda o, used=used: used.append(float(o.param_groups[0]["lr"])))
        return optimizers

    @property
    def weights(self) -> Tensor:
        return flat(self.parameters())


LOSSES = (Gan.critic_loss, Gan.generator_loss)


def pair(base: float = 8, law: Any = "measured", **options: Any) -> list[SurgeLRCallback]:
    return [SurgeLRCallback(base, law, optimizer=i, loss_fn=LOSSES[i], **options) for i in (0, 1)]


def rule(optimizer: int | None) -> SurgeLRCallback:
    return SurgeLRCallback(4, "sqrt", optimizer=optimizer)


def data(examples: int, batch_size: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    return DataLoader(TensorDataset(1.0 + torch.randn(examples, 3, generator=generator)), batch_size)


class TestGan:
    @pytest.mark.parametrize("toggled", [False, True])
    def test_dry_runs_are_bit_identical_to_none(self, toggled: bool) -> None:
        plain = trained(Gan(toggled=toggled), data(192, 16))
        callbacks = pair(4, dry_run=True, probe_every=1)
        watched = trained(Gan(toggled=toggled), data(192, 16), *callbacks)
        assert [callback.history.num_measurements for callback in callbacks] == [11, 11]
        assert torch.equal(watched.weights, plain.weights)
        assert watched.used == plain.used

    @pytest.mark.parametrize(("served", "first"), [((0, 1), [0.02, 0.02, 0.01]), ((1,), [0.01] * 3)])
    def test_every_step_of_those_served_gets_the_factor_of_its_own_decision(
        self, served: Sequence[int], first: list[float]
    ) -> None:
        module = trained(Gan(), data(20, 8), *(pair(4, "linear")[index] for index in served))
        assert module.used == [first, [0.04, 0.04, 0.02]]
        # And it is off again before anything else of the user's code runs.
        assert module.scheduled == [[0.01] * 3, [0.02] * 3]

    @pytest.mark.parametrize("still", [0, 1])
    def test_statistics_are_those_of_the_network_trained_alone(self, still: int) -> None:
        """With its opponent at rest a network of a GAN is trained as in automatic optimization."""
        moving = 1 - still

        class Alone(Gan):
            def __init__(self) -> None:
                super().__init__()
                self.automatic_optimization = True

            def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # type: ignore[override]
                if moving:
                    self.losses()[0](batch)  # the opponent's turn draws random numbers, too
                return self.losses()[moving](batch)

            def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
                if still:
                    self.losses()[still](batch)

            def configure_optimizers(self) -> Any:
                return super().configure_optimizers()[moving]

        options: dict[str, Any] = {"probe_every": 2, "probe_examples": 16}
        module, callbacks = Gan(lrs=(0.0, 0.02) if moving else (0.01, 0.0)), pair(**options)
        make_trainer(*callbacks).fit(module, data(256, 16))
        callback = callbacks[moving]
        reference = SurgeLRCallback(8, loss_fn=LOSSES[moving], **options)
        alone = trained(Alone(), data(256, 16), reference)
        assert reference.history.num_measurements >= 6
        assert callback.history.state_dict() == reference.history.state_dict()
        assert callback.decision == reference.decision
        assert module.used[moving] == alone.used[moving]
        assert torch.equal(module.weights, alone.weights)

    def test_the_opponents_parameters_and_gradients_are_untouched(self) -> None:
        """A careless loss_fn, whose gradient flows into the opponent: nothing of it is left."""

        def careless(module: Any, batch: Any) -> Tensor:
            fake = module.generator(torch.randn(len(batch[0]), LATENT))
            return nn.functional.softplus(module.critic(fake)).mean()

        plain = trained(Gan(), data(128, 16))
        callback = SurgeLRCallback(4, optimizer=0, loss_fn=careless, dry_run=True, probe_every=1)
        watched = trained(Gan(), data(128, 16), callback)
        assert callback.history.num_measurements == 7
        assert torch.equal(watched.weights, plain.weights)
        assert_same(*([parameter.grad for parameter in one.parameters()] for one in (watched, plain)))


class Turns(Gan):
    """Who takes a turn in which batch."""

    def __init__(self, turns: Callable[[int], Sequence[int]], **options: Any) -> None:
        super().__init__(**options)
        self.turns = turns

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for index in self.turns(batch_idx):
            self.turn(index, batch)


class Accumulating(Gan):
    """The critic steps after every second batch, the generator after every third."""

    def __init__(self, *, to_none: bool, zero_after: bool, toggled: bool) -> None:
        super().__init__()
        self.to_none, self.zero_after, self.toggled = to_none, zero_after, toggled

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        for index, every in ((0, 2), (1, 3)):
            optimizer = optimizers[index]
            if self.toggled:
                self.toggle_optimizer(optimizer)
            if not self.zero_after and batch_idx % every == 0:
                optimizer.zero_grad(set_to_none=self.to_none)
            # In two passes: the examples are the same.
            self.manual_backward(self.losses()[index](batch) / every)
            self.manual_backward(self.losses()[index](batch) / every)
            if (batch_idx + 1) % every == 0:
                optimizer.step()
                if self.zero_after:
                    optimizer.zero_grad(set_to_none=self.to_none)
            if self.toggled:
                self.untoggle_optimizer(optimizer)


def sizes_of(module: Gan, examples: int) -> list[list[float]]:
    """The batch size of every step of each, in batches of 8."""
    sizes = Sizes(pair(8, "sqrt"))
    trained(module, data(examples, 8), *sizes.callbacks, sizes)
    return sizes.sizes


class TestBatchSize:
    @pytest.mark.parametrize(
        ("turns", "expected", "toggled"),
        [
            (lambda i: (0, 1) if i % 3 == 2 else (0,), [[8, 8, 8, 8, 8, 4], [8, 4]], False),
            (lambda i: (i % 2,), [[8, 8, 8], [8, 8, 4]], True),
            (lambda i: (0, 0, 0, 1), [[8] * 15 + [4] * 3, [8] * 5 + [4]], True),
            (lambda i: (1, 0), [[8, 8, 8, 8, 8, 4], [8, 8, 8, 8, 8, 4]], False),
        ],
        ids=["more critic", "alternating", "several on one batch", "generator first"],
    )
    def test_is_that_of_the_batches_behind_the_step(
        self, turns: Any, expected: list[list[float]], toggled: bool
    ) -> None:
        assert sizes_of(Turns(turns, toggled=toggled), 44) == expected

    @pytest.mark.parametrize(
        ("to_none", "zero_after", "toggled"),
        [(True, False, False), (False, False, True), (True, True, True), (False, True, True)],
    )
    def test_accumulated_by_hand_is_the_sum(self, to_none: bool, zero_after: bool, toggled: bool) -> None:
        module = Accumulating(to_none=to_none, zero_after=zero_after, toggled=toggled)
        assert sizes_of(module, 44) == [[16, 16, 12], [24, 20]]

    def test_gradients_that_nobody_zeroes_count_with_what_they_hold(self) -> None:
        """Half of a window is thrown away: only the other half is behind the step."""

        class Forgetful(Gan):
            def training_step(self, batch: Any, batch_idx: int) -> None:
                critic: Any = self.optimizers()[0]  # type: ignore[index]
                if batch_idx == 1:
                    critic.zero_grad(set_to_none=False)
                self.manual_backward(self.critic_loss(batch))
                if batch_idx == 2:
                    critic.step()

        assert sizes_of(Forgetful(), 24) == [[16], []]

    def test_without_manual_backward_is_told_once_and_the_schedule_kept(self) -> None:
        class Plain(Gan):
            def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
                loss.backward()  # type: ignore[no-untyped-call]

        module = Plain()
        with pytest.warns(UserWarning, match="saw no manual_backward behind a step of AdamW") as told:
            make_trainer(pair(4, "linear")[0]).fit(module, data(24, 8))
        assert sum("saw no manual_backward" in str(warning.message) for warning in told) == 1
        assert module.used == [[0.01] * 3, [0.02] * 3]


class TestMicroBatchTracker:
    def test_see_what_each_pass_leaves(self) -> None:
        one, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
        optimizer = SGD([one, other], lr=0.1)
        tracker = MicroBatchTracker(optimizer)
        assert tracker.are_zeroed()
        (one * torch.tensor([1.0, 2.0])).sum().backward()
        assert tracker.have_come()
        assert not tracker.have_come()
        elsewhere = nn.Parameter(torch.ones(2))
        elsewhere.sum().backward()
        assert not tracker.have_come()
        one.sum().backward()  # accumulates in place
        assert tracker.have_come()
        optimizer.zero_grad(set_to_none=False)
        assert tracker.are_zeroed()
        assert not tracker.are_zeroed()  # seen before: a gradient of zero may be a gradient
        one.sum().backward()
        assert tracker.have_come()
        one.grad.mul_(0.5)  # type: ignore[union-attr]
        assert not tracker.are_zeroed()  # scaled, as by clipping
        optimizer.zero_grad()
        assert tracker.are_zeroed()
        optimizer.add_param_group({"params": [elsewhere]})
        assert not tracker.are_zeroed()


class Scheduled(Turns):
    """The user steps schedulers: in every batch, whether or not the optimizer has stepped in it."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.lr_schedulers()  # type: ignore[misc]
        second.step()
        super().training_step(batch, batch_idx)
        first.step()

    def configure_optimizers(self) -> Any:
        optimizers = super().configure_optimizers()
        return optimizers, [ExponentialLR(optimizer, 0.5) for optimizer in optimizers]


class TestSchedules:
    def test_an_optimizer_that_reads_its_learning_rate_early(self) -> None:
        class Early(Slope):
            automatic_optimization = False

            def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
                optimizer: Any = self.optimizers()

                def closure() -> Tensor:
                    optimizer.zero_grad()
                    loss = self.weight.sum()
                    self.manual_backward(loss)
                    return loss

                optimizer.step(closure=closure)

            def configure_optimizers(self) -> Optimizer:
                return LBFGS(self.parameters(), lr=0.25, max_iter=1)

        module = trained(Early(), data(8, 8), SurgeLRCallback(4, "linear"))
        assert module.weight.item() == -0.5


class TestScaler:
    @pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
    def test_steps_that_it_skips_are_skipped_for_their_optimizer_only(self) -> None:
        class Overflowing(Scheduled):
            def critic_loss(self, batch: Any) -> Tensor:
                self.seen += 1
                return super().critic_loss(batch) * (torch.inf if self.seen == 2 else 1.0)

        def run(*callbacks: Callback) -> Overflowing:
            module = Overflowing(lambda i: (0, 1))
            module.seen = 0  # type: ignore[assignment]
            make_trainer(*callbacks, plugins=scaling(16.0)).fit(module, data(40, 8))
            return module

        plain, scaled = run(), run(*pair(4, "linear"))
        assert [len(lrs) for lrs in plain.used] == [4, 5]
        assert scaled.used == [[2.0 * lr for lr in lrs] for lrs in plain.used]
        assert scaled.scheduled == plain.scheduled


class TestObjective:
    def test_each_follows_the_default_of_its_optimizer(self) -> None:
        class Mixed(Gan):
            def configure_optimizers(self) -> Any:
                along = SGD(self.critic.parameters(), lr=0.01)
                return [along, Adam(self.generator.parameters(), lr=0.01)]

        callbacks = pair()
        trained(Mixed(), data(32, 16), *callbacks)
        assert [callback.settings.objective for callback in callbacks] == ["alignment", "progress"]


class TestBudget:
    @pytest.mark.slow
    @pytest.mark.parametrize("limit", [{"max_epochs": 1}, {"max_steps": 72, "max_epochs": -1}])
    def test_is_kept_of_the_examples_of_each(self, limit: dict[str, int]) -> None:
        """Five steps of the critic to one of the generator, and the Trainer counts all six."""
        callbacks = pair(max_overhead=2.0, probe_examples=32, objective="alignment")
        trained(Turns(lambda i: (0, 1) if i % 5 == 4 else (0,)), data(480, 8), *callbacks, **limit)
        for callback in callbacks:
            assert callback.history.num_measurements >= 2
            assert 1.0 < callback.overhead <= 2.0
        assert [callback._measurer.budget.trained for callback in callbacks] == [480, 96]
        assert [callback._behind_step.pace.steps for callback in callbacks] == [60, 12]
        assert callbacks[1].law_history[-1].step < 12

    def test_a_batch_is_pooled_once(self) -> None:
        """Copies of an example would be taken for examples that agree."""
        callback = SurgeLRCallback(8, optimizer=0, loss_fn=LOSSES[0], probe_every=1, probe_examples=32)
        seen: list[list[float]] = []

        def note(*args: Any) -> None:
            seen.append([float(piece.batch[0].sum()) for piece in callback._measurer._pool.pieces])

        pools = LambdaCallback(on_train_batch_end=note)
        make_trainer(callback, pools).fit(Turns(lambda i: (0, 0, 1)), data(96, 8))
        assert callback.history.num_measurements >= 2
        assert any(len(sums) > 1 for sums in seen)
        assert all(len(set(sums)) == len(sums) for sums in seen)


class TestResume:
    @pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
    @pytest.mark.filterwarnings("ignore:The dirpath has changed")
    def test_gives_the_same_learning_rates_and_weights(self, tmp_path: Path) -> None:
        def run(resume: Path | None = None) -> tuple[Turns, list[SurgeLRCallback]]:
            module = Turns(lambda i: (0, 1) if i % 3 == 2 else (0,), draws=False)
            callbacks = pair(4, probe_every=2)
            folder = tmp_path / ("again" if resume else "whole")
            checkpoint = ModelCheckpoint(folder, "{epoch}", every_n_epochs=1, save_top_k=-1)
            return trained(
                module, data(64, 8), *callbacks, checkpoint, resume=resume, max_epochs=4
            ), callbacks

        whole, measured = run()
        resumed, again = run(tmp_path / "whole" / "epoch=2.ckpt")
        assert [len(lrs) for lrs in resumed.used] == [8, 2]
        assert resumed.used == [whole.used[0][-8:], whole.used[1][-2:]]
        assert torch.equal(resumed.weights, whole.weights)
        for one, other in zip(again, measured, strict=True):
            assert one.history.state_dict() == other.history.state_dict()


class TestLogging:
    def test_names_the_optimizer(self, tmp_path: Path) -> None:
        class Groups(Gan):
            def configure_optimizers(self) -> Any:
                critic, _ = super().configure_optimizers()
                first, *rest = self.generator.parameters()
                return critic, AdamW([{"params": [first], "name": "in"}, {"params": rest}], lr=0.02)

        callbacks = pair(4, probe_every=1)
        logger = CSVLogger(tmp_path)
        make_trainer(*callbacks, logger=logger).fit(Groups(), data(64, 16))
        logged = columns(logger)
        keys = [key for key in logged if key.startswith("surge/")]
        assert all({"opt0", "opt1"} & set(key.split("/")[2:]) for key in keys)
        assert {key for key in keys if "lr_used" in key} == {
            "surge/lr_used/opt0",
            "surge/lr_used/opt1/in",
            "surge/lr_used/opt1/1",
        }
        for name in ("batch_size", "noise_scale", "overhead", "lr_scale"):
            assert {f"surge/{name}/opt0", f"surge/{name}/opt1"} <= set(keys)
        assert logged["surge/batch_size/opt1"] == [16.0] * 4

    def test_of_an_optimizer_that_rests_where_lightning_logs(self, tmp_path: Path) -> None:
        """The critic steps in even batches, and Lightning logs in odd ones."""
        logger = CSVLogger(tmp_path)
        trainer = make_trainer(*pair(4, "linear", prog_bar=True), logger=logger, log_every_n_steps=2)
        trainer.fit(Turns(lambda i: (i % 2,)), data(32, 8))
        for index, lr in ((0, 0.02), (1, 0.04)):
            assert columns(logger)[f"surge/lr_used/opt{index}"] == pytest.approx([lr] * 2)
            assert trainer.progress_bar_metrics[f"lr_used/opt{index}"] == pytest.approx(lr)

    def test_to_tensorboard_is_one_layout_with_all_optimizers(self, tmp_path: Path) -> None:
        logger = TensorBoardLogger(tmp_path)
        make_trainer(*pair(4, probe_every=1), logger=logger).fit(Gan(), data(64, 16))
        (layout,) = layouts_in(logger)
        charts = {
            "learning rates": ("lr_scheduled", "lr_predicted", "lr_used"),
            "batch size against peak": ("batch_size", "critical_batch_size"),
            "noise": ("noise_scale",),
            "overhead": ("overhead", "overhead_time"),
        }
        assert layout == {
            "surge": {
                f"{chart}/opt{i}": {f"surge/{name}/opt{i}" for name in names}
                for i in (0, 1)
                for chart, names in charts.items()
            }
        }


class TestErrors:
    @pytest.mark.parametrize(
        ("callbacks", "message"),
        [
            (
                [SurgeLRCallback(4, loss_fn=LOSSES[0])],
                r"which optimizer it serves, got 2 from configure_optimizers of Gan: pass one "
                r"SurgeLRCallback\(optimizer=i, loss_fn=...\) for each",
            ),
            ([rule(2)], "Expected 0 <= optimizer < 2 of one with parameters, got optimizer=2"),
            ([rule(1), *pair(4)], r"a different optimizer= each, got 3 with optimizer=\[1, 0, 1\]"),
            ([rule(None), rule(1)], r"a different optimizer= each, got 2 with optimizer=\[None, 1\]"),
            ([SurgeLRCallback(4, optimizer=0)], "pass loss_fn=.*mean loss which the optimizer"),
            (
                [*pair(4), BatchSizeWarmup(8, 16, 2)],
                "BatchSizeWarmup needs automatic optimization, got automatic_optimization=False in Gan",
            ),
        ],
    )
    def test_before_the_first_step(self, callbacks: list[Callback], message: str) -> None:
        module = Gan()
        before = module.weights.clone()
        with pytest.raises(MisconfigurationException, match=message):
            make_trainer(*callbacks).fit(module, data(16, 8))
        assert torch.equal(module.weights, before)


@pytest.mark.filterwarnings("ignore:.*starts measuring afresh")
@pytest.mark.parametrize(("saved", "base"), [(0, None), (1, 64.0)])
def test_the_base_is_not_taken_from_another_optimizers_state(saved: int, base: float | None) -> None:
    other = SurgeLRCallback(64, "sqrt", optimizer=saved)
    callback = SurgeLRCallback(optimizer=1)
    trainer: Any = SimpleNamespace(state=SimpleNamespace(fn=TrainerFn.FITTING))
    checkpoint = {"callbacks": {other.state_key: other.state_dict()}}
    callback.on_load_checkpoint(trainer, Gan(), checkpoint)
    assert callback.base_batch_size == base


@pytest.mark.parametrize(("name", "value"), [("steps", -1), ("batches_per_step", "2"), ("_batches", 1.5)])
def test_a_damaged_pace_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name.lstrip('_')}.*, got .*{name}={value}|of type int, got"):
        restore(Pace, {**save(Pace()), name: value})
