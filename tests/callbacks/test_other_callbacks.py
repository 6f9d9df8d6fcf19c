"""Lightning's own callbacks and tuners beside ours, in both orders.

Two exact references. A rule that doubles every learning rate must train as twice the learning rate does
alone, whatever another callback does with it; and a dry run that measures must leave no trace in anything.
"""

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, Callback, LearningRateFinder, ModelCheckpoint
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_surge import BatchSizeScheduler, SurgeLRCallback
from lightning_surge.schedules.sizes import ConstantSize
from tests.trainings import at_update, make_trainer, probing

Arrange = Callable[[Callback, Callback], list[Callback]]

pytestmark = [
    # Said by one of Lightning's callbacks of another, whether or not ours are there.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*was called without a model"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
]

LR = 0.03125
ORDERS: dict[str, Arrange] = {
    "ours first": lambda ours, other: [ours, other],
    "ours last": lambda ours, other: [other, ours],
}
every_order = pytest.mark.parametrize("arrange", ORDERS.values(), ids=list(ORDERS))


class Net(pl.LightningModule):
    """A network of two parts with batch statistics, a schedule, and a note of the learning rates used."""

    def __init__(
        self, lr: float = LR, *, batch_size: int = 8, norm: bool = True, scheduled: bool = True
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5) if norm else nn.Tanh())
        self.head = nn.Linear(5, 1)
        self.lr, self.batch_size, self.scheduled = lr, batch_size, scheduled
        self.used: list[list[float]] = []

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.head(torch.tanh(self.backbone(x))), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, on_epoch=True)
        return loss

    def train_dataloader(self) -> DataLoader[Any]:
        return data(self.batch_size)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def val_dataloader(self) -> DataLoader[Any]:
        return data(16)

    def configure_optimizers(self) -> Any:
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = AdamW(parameters, lr=self.lr)
        at_update(optimizer, self.note)
        if not self.scheduled:
            return optimizer
        # Recursive: whatever stays in the learning rate compounds.
        return [optimizer], [ExponentialLR(optimizer, 0.5)]

    def note(self, optimizer: Optimizer) -> None:
        # StochasticWeightAveraging steps once more, without gradients, after its pass for batch statistics.
        if any(parameter.grad is not None for parameter in self.parameters()):
            self.used.append([float(group["lr"]) for group in optimizer.param_groups])

    @property
    def weights(self) -> Tensor:
        return torch.cat([value.detach().double().reshape(-1) for value in self.state_dict().values()])


def data(batch_size: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(48, 3, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True).sin()), batch_size)


class Case(NamedTuple):
    """Another callback, by the learning rate that it may have a share in, and what shows what it did."""

    make: Callable[[float, Path], Callback]
    seen: Callable[[Any, pl.Trainer], Any] = lambda callback, trainer: None
    options: dict[str, Any] = {}  # noqa: RUF012
    norm: bool = True


class PerStep(pl.callbacks.EMAWeightAveraging):
    """Notes the average at every validation, for which the weights are swapped."""

    def __init__(self) -> None:
        super().__init__(decay=0.75)
        self.validated: list[float] = []

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.validated.append(float(pl_module.weights.sum()))
        super().on_validation_epoch_end(trainer, pl_module)


def checkpoints(callback: ModelCheckpoint, trainer: pl.Trainer) -> Any:
    """Of every file: the step, the scheduled learning rate relative to the module's, and the weights."""
    rows = []
    for path in sorted(Path(str(callback.dirpath)).glob("*.ckpt")):
        saved = torch.load(path, weights_only=False)
        (optimizer,) = saved["optimizer_states"]
        lr = optimizer["param_groups"][0]["lr"] / trainer.lightning_module.lr  # type: ignore[union-attr, operator]
        weights = torch.cat([value.double().reshape(-1) for value in saved["state_dict"].values()])
        rows.append((path.name, saved["global_step"], lr, weights.tolist()))
    assert len(rows) > 1
    return rows


AVERAGING = partial(pl.callbacks.StochasticWeightAveraging, swa_epoch_start=1, annealing_epochs=1)
CASES = {
    "EMAWeightAveraging": Case(lambda lr, path: PerStep(), lambda callback, _: callback.validated),
    "StochasticWeightAveraging": Case(lambda lr, path: AVERAGING(lr / 4)),
    "StochasticWeightAveraging without BatchNorm": Case(lambda lr, path: AVERAGING(lr / 4), norm=False),
    "EarlyStopping": Case(
        lambda lr, path: pl.callbacks.EarlyStopping("val_loss", min_delta=0.02, patience=1),
        lambda callback, trainer: (callback.stopped_epoch, float(callback.best_score), trainer.current_epoch),
        {"max_epochs": 6},
    ),
    "ModelCheckpoint at epoch ends": Case(
        lambda lr, path: ModelCheckpoint(path, save_top_k=-1, save_on_train_epoch_end=True), checkpoints
    ),
    "ModelCheckpoint after validation": Case(
        lambda lr, path: ModelCheckpoint(path, save_top_k=-1, monitor="val_loss"), checkpoints
    ),
    "ModelCheckpoint at steps": Case(
        lambda lr, path: ModelCheckpoint(path, save_top_k=-1, every_n_train_steps=4), checkpoints
    ),
    "BackboneFinetuning": Case(
        lambda lr, path: BackboneFinetuning(1, lambda epoch: 1.5, backbone_initial_ratio_lr=0.25),
        lambda callback, trainer: len(trainer.optimizers[0].param_groups),
        norm=False,  # batch norms are not frozen
    ),
    # None of these is asked for a learning rate: all at once.
    "Timer and what shows the run": Case(
        lambda lr, path: pl.callbacks.Timer(timedelta(hours=1)),
        options={"enable_model_summary": True, "enable_progress_bar": True},
    ),
}


def fit(folder: Path, case: Case, lr: float, ours: Callback | None, arrange: Arrange | None = None) -> Any:
    """Train with another callback, alone or beside ours; what it led to."""
    path = Path(mkdtemp(dir=folder))
    other = case.make(lr, path)
    callbacks = [other] if ours is None or arrange is None else arrange(ours, other)
    # What BackboneFinetuning freezes at first has no place in the optimizer yet.
    module = Net(lr, norm=case.norm, scheduled=not isinstance(other, BackboneFinetuning))
    trainer = make_trainer(*callbacks, **({"max_epochs": 3, "default_root_dir": path} | case.options))
    trainer.fit(module)
    return module.used, module.weights.tolist(), case.seen(other, trainer)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
class TestBeside:
    def test_twice_the_learning_rate_is_twice_the_learning_rate(self, tmp_path: Path, name: str) -> None:
        case = CASES[name]
        twice = fit(tmp_path, case, 2.0 * LR, None)
        for arrange in ORDERS.values():
            assert fit(tmp_path, case, LR, SurgeLRCallback(4, "linear"), arrange) == twice

    @pytest.mark.filterwarnings("ignore:The mean gradient of a batch's slices is not")
    def test_a_dry_run_leaves_no_trace(self, tmp_path: Path, name: str) -> None:
        case = CASES[name]
        alone = fit(tmp_path, case, LR, None)
        for arrange in ORDERS.values():
            ours = probing(dry_run=True)
            assert fit(tmp_path, case, LR, ours, arrange) == alone
            assert ours.history.num_measurements >= 2


@every_order
def test_a_run_saved_at_its_exception_goes_on(tmp_path: Path, arrange: Arrange) -> None:
    class Crash(Net):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            # Before a window begins: one that is cut in two has lost its gradients, or batches being pooled.
            if self.trainer.global_step == 6 and self.trainer.training:
                raise RuntimeError("crash")
            return batch

    def ours() -> SurgeLRCallback:
        return SurgeLRCallback(2, probe_every=2)

    whole, measured = Net(norm=False), ours()
    make_trainer(measured, max_epochs=3).fit(whole)
    broken = arrange(ours(), pl.callbacks.OnExceptionCheckpoint(tmp_path))
    with pytest.raises(RuntimeError, match="crash"):
        make_trainer(*broken, max_epochs=3, enable_checkpointing=True).fit(Crash(norm=False))
    (path,) = tmp_path.glob("*.ckpt")
    assert torch.load(path, weights_only=False)["optimizer_states"][0]["param_groups"][0]["lr"] == LR / 2
    again, resumed = ours(), Net(norm=False)
    make_trainer(again, max_epochs=3).fit(resumed, ckpt_path=path)
    assert resumed.used == whole.used[6:]
    assert torch.equal(resumed.weights, whole.weights)
    assert again.history.state_dict() == measured.history.state_dict()


@every_order
def test_lightnings_accumulation_schedule_is_followed(arrange: Arrange) -> None:
    module = Net(scheduled=False)
    other = pl.callbacks.GradientAccumulationScheduler({0: 1, 1: 2})
    make_trainer(*arrange(SurgeLRCallback(8, "linear"), other), max_epochs=2).fit(module)
    assert module.used == [[LR]] * 6 + [[2 * LR]] * 3


@pytest.mark.slow
class TestLearningRateFinder:
    OPTIONS: dict[str, Any] = {  # noqa: RUF012
        "min_lr": 1e-4,
        "max_lr": 0.5,
        "num_training_steps": 20,
        "early_stop_threshold": None,
    }

    @staticmethod
    def net() -> Net:
        """An epoch of 24 steps, which ends no sooner than the finder."""
        return Net(batch_size=2, norm=False, scheduled=False)

    def suggested(self, path: Path, *callbacks: Callback) -> tuple[Net, Any]:
        module = self.net()
        trainer = make_trainer(*callbacks, default_root_dir=path)
        trainer.fit(module)
        (finder,) = (c for c in callbacks if isinstance(c, LearningRateFinder))
        return module, finder.optimal_lr

    def test_finds_the_same_and_its_learning_rate_is_the_base(self, tmp_path: Path) -> None:
        alone, reference = self.suggested(tmp_path, LearningRateFinder(**self.OPTIONS))
        lr = reference.suggestion()
        assert alone.used[20:] == [[lr]] * 24
        for arrange in ORDERS.values():
            rule = SurgeLRCallback(1, "linear")
            measuring = SurgeLRCallback(1, dry_run=True, probe_every=1, probe_examples=8)
            for ours, factor in ((rule, 2.0), (measuring, 1.0)):
                callbacks = arrange(ours, LearningRateFinder(**self.OPTIONS))
                module, found = self.suggested(tmp_path, *callbacks)
                assert found.results == reference.results
                assert module.used[:20] == alone.used[:20]
                assert module.used[20:] == [[factor * lr]] * 24
                assert ours._measurer.budget.trained == 48
            assert measuring.history.num_measurements >= 2
            assert all(record.step < 24 for record in measuring.law_history)

    @every_order
    def test_in_the_midst_of_training(self, tmp_path: Path, arrange: Arrange) -> None:
        """At the start of an epoch, as Lightning's documentation shows it: our hook is installed by then."""

        class AtEpochs(LearningRateFinder):
            def on_fit_start(self, *args: Any, **kwargs: Any) -> None:
                return

            def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
                if trainer.current_epoch == 1:
                    self.lr_find(trainer, pl_module)

        def run(*ours: Callback) -> tuple[Net, AtEpochs]:
            module, finder = self.net(), AtEpochs(**self.OPTIONS)
            callbacks = arrange(ours[0], finder) if ours else [finder]
            make_trainer(*callbacks, max_epochs=2, default_root_dir=tmp_path).fit(module)
            return module, finder

        alone, reference = run()
        ours = SurgeLRCallback(1, dry_run=True, probe_every=1, probe_examples=8)
        watched, finder = run(ours)
        assert finder.optimal_lr.results == reference.optimal_lr.results  # type: ignore[union-attr]
        assert watched.used == alone.used
        assert torch.equal(watched.weights, alone.weights)
        # 48 examples in each of two epochs: the finder's steps are not counted, its restart is survived.
        assert ours._measurer.budget.trained == 96
        assert ours.history.num_measurements >= 2


@pytest.mark.slow
class TestBatchSizeFinder:
    FINDER = partial(pl.callbacks.BatchSizeFinder, steps_per_trial=2, init_val=2, max_trials=2)

    @every_order
    def test_its_size_is_the_base_and_its_trials_are_not_measured(
        self, tmp_path: Path, arrange: Arrange
    ) -> None:
        alone, beside = (Net(norm=False, scheduled=False) for _ in range(2))
        make_trainer(self.FINDER(), default_root_dir=tmp_path).fit(alone)
        finder, ours = self.FINDER(), SurgeLRCallback(probe_every=1, probe_examples=16)
        make_trainer(*arrange(ours, finder), default_root_dir=tmp_path).fit(beside)
        assert finder.optimal_batch_size == beside.batch_size == ours.base_batch_size == 4
        # At the base the factor is 1.
        assert beside.used == alone.used
        assert torch.equal(beside.weights, alone.weights)
        assert ours.history.num_measurements >= 2
        assert ours._measurer.budget.trained == 48


class TestBatchSizeScheduler:
    """Ours for the batch size, beside those that look at the weights or at the steps."""

    @pytest.mark.filterwarnings("ignore:Expected a training loader with state_dict")
    @pytest.mark.parametrize(
        "name", ["EMAWeightAveraging", "EarlyStopping", "ModelCheckpoint at steps", "BackboneFinetuning"]
    )
    def test_is_the_accumulation_it_sets(self, tmp_path: Path, name: str) -> None:
        case = CASES[name]
        reference = case._replace(options={**case.options, "accumulate_grad_batches": 2})
        accumulated = fit(tmp_path, reference, LR, None)
        for arrange in ORDERS.values():
            assert fit(tmp_path, case, LR, BatchSizeScheduler(ConstantSize(16)), arrange) == accumulated
