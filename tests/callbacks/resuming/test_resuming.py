"""A run that was killed and resumed takes the same batches to the same weights as one that was not.

The exact comparisons also test what `ExactResume` relies on in Lightning and torchdata: the layout of
the loops' states in a checkpoint, `fit_loop._resuming_from_checkpoint`, `fit_loop._data_fetcher` and its
iterator, the samplers that Lightning makes, and `_num_yielded` and `_finished` of torchdata's iterators.
"""

import os
import random
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from lightning.pytorch.callbacks import Checkpoint, LambdaCallback, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerStatus
from torch import Tensor
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
)
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from lightning_surge.callbacks.resuming.exact_resume import ExactResume
from lightning_surge.callbacks.resuming.loaders import Obstacle, why_not_resumable
from lightning_surge.callbacks.resuming.random_streams import ResumableDataset, from_portable, to_portable
from lightning_surge.measure.replay import RandomState
from tests.processes import Reporting
from tests.trainings import (
    Noisy,
    Reading,
    ValidatedReading,
    every_step,
    flat,
    heard,
    make_trainer,
    sampled,
    trained,
    with_lr,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used"),
]

no_fork = pytest.mark.skipif(
    torch.cuda.is_available(), reason="autograd's threads for a GPU do not survive a fork"
)

EXAMPLES, BATCH = 12, 4
TWO_EPOCHS: dict[str, Any] = {"max_epochs": 2, "num_sanity_val_steps": 0}

MakeLoader = Callable[[], Any]


class Counting(IterableDataset[Any]):
    """Counts its passes, and reads on from its state, which it takes up at the first example."""

    def __init__(self) -> None:
        self.position = self.start = self.passes = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += self.start == 0
        self.position, self.start = self.start, 0
        while self.position < EXAMPLES:
            self.position += 1
            example = torch.full((3,), self.position / EXAMPLES) + 0.1 * torch.randn(3)
            yield 100 * self.passes + self.position, example
        self.position = 0  # torchdata begins the next epoch from the state that a finished one leaves

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "passes": self.passes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start, self.passes = state["position"], state["passes"]


class CountingWithLength(Counting):
    def __len__(self) -> int:
        return EXAMPLES


OPTIMIZATION = with_lr(SGD, 0.02, momentum=0.9), lambda optimizer: StepLR(optimizer, 1, 0.7), "epoch"


class SaveEverywhere(Checkpoint):
    """Saves between any two optimizer steps, after validations, and at the end of epochs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saved: list[tuple[Path, int]] = []
        self.steps = 0

    def _save(self, trainer: pl.Trainer, *args: Any) -> None:
        path = self.folder / f"{len(self.saved):02d} after step {trainer.global_step}.ckpt"
        trainer.save_checkpoint(path)
        self.saved.append((path, len(trainer.lightning_module.taken)))  # type: ignore[arg-type]

    on_validation_end = on_train_epoch_end = _save

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step > self.steps:
            self.steps = trainer.global_step
            self._save(trainer)


class Ran(NamedTuple):
    taken: list[Any]
    weights: Tensor

    def after(self, batches: int) -> "Ran":
        return Ran(self.taken[batches:], self.weights)

    def same_as(self, other: "Ran") -> bool:
        return self.taken == other.taken and torch.equal(self.weights, other.weights)


def run(
    net: type[Reading], loader: MakeLoader, *callbacks: pl.Callback, resume: Any = None, **options: Any
) -> Ran:
    model = net(loader, *OPTIMIZATION)
    # A script is started anew in another state than the one in which it was killed.
    pl.seed_everything(1 if resume is None else 2, verbose=False)
    trained(model, None, *callbacks, resume=resume, **(TWO_EPOCHS | options))
    return Ran(model.taken, flat(model.parameters()))


def shuffled(**options: Any) -> StatefulDataLoader[Any]:
    return StatefulDataLoader(Noisy(EXAMPLES), **({"batch_size": BATCH, "shuffle": True} | options))


def plain(**options: Any) -> DataLoader[Any]:
    return DataLoader(Noisy(EXAMPLES), batch_size=BATCH, **options)


def drawing(sampler: Any) -> StatefulDataLoader[Any]:
    return shuffled(sampler=sampler, shuffle=None)


def batching(sampler: Any) -> StatefulDataLoader[Any]:
    return shuffled(batch_sampler=BatchSampler(sampler, BATCH, False), batch_size=1, shuffle=False)


def flexible(largest: int) -> DataLoader[Any]:
    return sampled(Noisy(EXAMPLES), largest, kind=StatefulDataLoader)


def counting() -> StatefulDataLoader[Any]:
    return StatefulDataLoader(Counting(), batch_size=BATCH)


def assert_exact(net: Any, loader: MakeLoader, folder: Path, every: int = 1, **options: Any) -> None:
    """Resume from every checkpoint of a run and compare what follows."""
    save = SaveEverywhere(folder)
    whole = run(net, loader, ExactResume(), save, **options)
    assert len(whole.taken) >= 4
    for path, taken in save.saved[::every]:
        resumed = run(net, loader, ExactResume(), resume=path, **options)
        assert resumed.same_as(whole.after(taken)), path.name


class TestStreams:
    def test_any_checkpoint_can_hold_them(self, tmp_path: Path) -> None:
        random.gauss(0, 1), np.random.normal()  # a half-used pair  # noqa: NPY002
        torch.save(to_portable(RandomState.capture()), tmp_path / "states")
        states = torch.load(tmp_path / "states", weights_only=True)
        first = random.gauss(0, 1), np.random.normal(), torch.rand(2).tolist()  # noqa: NPY002
        from_portable(states).restore()
        assert first == (random.gauss(0, 1), np.random.normal(), torch.rand(2).tolist())  # noqa: NPY002

    def test_of_devices_that_are_not_here(self) -> None:
        devices = {"cuda": [torch.zeros(16, dtype=torch.uint8)] * 99}
        from_portable(to_portable(RandomState.capture()) | devices).restore()

    def test_without_numpys_own_generator(self) -> None:
        states = to_portable(RandomState.capture())
        del states["numpy"]
        before = np.random.get_state()  # noqa: NPY002
        from_portable(states).restore()
        assert before[2] == np.random.get_state()[2]  # noqa: NPY002


@pytest.mark.slow
class TestOneProcess:
    @pytest.mark.parametrize(
        ("net", "options"),
        [
            (Reading, {}),
            (Reading, {"accumulate_grad_batches": 2}),
            (Reading, {"max_steps": 6, "max_epochs": -1}),
            (Reading, {"limit_train_batches": 2}),
            (ValidatedReading, {}),
            (ValidatedReading, {"max_steps": 6, "max_epochs": -1}),
            (ValidatedReading, {"val_check_interval": 1}),
            (ValidatedReading, {"val_check_interval": 2, "max_steps": 6, "max_epochs": -1}),
        ],
    )
    def test_from_every_checkpoint(self, net: type[Reading], options: dict[str, Any], tmp_path: Path) -> None:
        assert_exact(net, shuffled, tmp_path, **options)

    @pytest.mark.parametrize(
        "loader",
        [
            lambda: shuffled(shuffle=False),
            lambda: shuffled(generator=torch.Generator().manual_seed(5)),
            lambda: batching(SequentialSampler(Noisy(EXAMPLES))),
            lambda: StatefulDataLoader(CountingWithLength(), batch_size=BATCH),
            lambda: {"long": shuffled(), "short": StatefulDataLoader(Noisy(8), batch_size=4, shuffle=True)},
        ],
        ids=["in order", "generator", "batch sampler", "iterable", "two loaders"],
    )
    def test_with_every_loader(self, loader: MakeLoader, tmp_path: Path) -> None:
        assert_exact(Reading, loader, tmp_path)

    @pytest.mark.parametrize("epochs", [1, 2])
    @pytest.mark.parametrize("by_steps", [False, True])
    def test_a_run_that_goes_on_after_its_end(self, epochs: int, by_steps: bool, tmp_path: Path) -> None:
        def until(epochs: int) -> dict[str, Any]:
            return {"max_steps": 3 * epochs, "max_epochs": -1} if by_steps else {"max_epochs": epochs}

        model, path = Reading(shuffled, *OPTIMIZATION), tmp_path / "end.ckpt"
        pl.seed_everything(1, verbose=False)
        trained(model, None, ExactResume(), **until(epochs)).trainer.save_checkpoint(path)
        resumed = run(Reading, shuffled, ExactResume(), resume=path, **until(3))
        assert resumed.same_as(run(Reading, shuffled, ExactResume(), **until(3)).after(3 * epochs))

    def test_a_plain_loader_at_the_end_of_epochs(self, tmp_path: Path) -> None:
        for options in ({}, {"max_steps": 6, "max_epochs": -1}):
            fit = partial(run, ValidatedReading, lambda: plain(shuffle=True), **options)
            save = SaveEverywhere(tmp_path)
            with pytest.warns(UserWarning, match="Expected a training loader with state_dict"):
                whole = fit(ExactResume(), save)
            # After the last batch, the validation, and the epoch.
            for path, taken in save.saved[2:5]:
                assert fit(ExactResume(), resume=path).same_as(whole.after(taken)), path.name

    def test_a_loader_without_a_length_at_the_end_of_epochs(self, tmp_path: Path) -> None:
        save = SaveEverywhere(tmp_path)
        with pytest.warns(UserWarning, match="Expected a training loader with a length"):
            whole = run(Reading, counting, ExactResume(), save)
        for path, taken in save.saved[2:4]:  # after the last batch, after the epoch
            assert run(Reading, counting, ExactResume(), resume=path).same_as(whole.after(taken)), path.name

    def test_a_checkpoint_of_a_run_without_it(self, tmp_path: Path) -> None:
        save, fit = SaveEverywhere(tmp_path), partial(run, Reading, lambda: shuffled(shuffle=False))
        whole = fit(save)
        for path, taken in save.saved:
            assert fit(ExactResume(), resume=path).taken == whole.taken[taken:], path.name

    def test_a_checkpoint_in_the_midst_of_validation(self, tmp_path: Path) -> None:
        def save(trainer: pl.Trainer, *args: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt", weights_only=False)

        fit = partial(run, ValidatedReading, shuffled, val_check_interval=2)
        whole = fit(LambdaCallback(on_validation_epoch_end=save), ExactResume())
        assert fit(ExactResume(), resume=tmp_path / "2.ckpt").same_as(whole.after(2))

    def test_a_validation_of_its_own_leaves_streams_alone(self) -> None:
        owned, other = make_trainer(ExactResume()), make_trainer()
        model = ValidatedReading(shuffled, *OPTIMIZATION)
        owned.fit(model)
        after = []
        for trainer in (owned, other):
            torch.manual_seed(3)
            trainer.validate(model, verbose=False)
            after.append(torch.get_rng_state())
        assert torch.equal(*after)


@pytest.mark.slow
class TestWorkers:
    @pytest.mark.parametrize(
        ("net", "kept", "options"),
        [
            (ValidatedReading, {}, {"val_check_interval": 2}),
            (Reading, {"persistent_workers": True, "snapshot_every_n_steps": 2}, {}),
        ],
    )
    def test_augmentation_in_workers(
        self, tmp_path: Path, net: type[Reading], kept: dict[str, Any], options: dict[str, Any]
    ) -> None:
        def loader() -> StatefulDataLoader[Any]:
            dataset = ResumableDataset(Noisy(EXAMPLES))
            return StatefulDataLoader(dataset, BATCH, shuffle=True, num_workers=2, **kept)

        assert_exact(net, loader, tmp_path, every=3, **options)

    def test_without_the_wrapper_only_the_order_is_kept(self, tmp_path: Path) -> None:
        save, fit = SaveEverywhere(tmp_path), partial(run, Reading, lambda: shuffled(num_workers=2))
        whole = fit(ExactResume(), save)
        with pytest.warns(UserWarning, match="Noisy in workers, whose random numbers begin anew"):
            resumed = fit(ExactResume(), resume=save.saved[0][0])
        assert resumed.taken == whole.taken[1:]
        assert not resumed.same_as(whole.after(1))

    def test_the_wrapper_has_no_state_in_the_main_process(self) -> None:
        dataset = ResumableDataset(Noisy(EXAMPLES))
        assert dataset.state_dict() == {}
        before = torch.get_rng_state()
        dataset.load_state_dict(to_portable(RandomState.capture()) | {"torch": torch.zeros_like(before)})
        assert torch.equal(before, torch.get_rng_state())


class SeededApart(pl.Callback):
    """Gives every rank streams of its own, and kills all of them."""

    def __init__(self, kill_at: int = -1) -> None:
        self.kill_at = kill_at

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == 0:
            pl.seed_everything(100 + trainer.global_rank, verbose=False)

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.kill_at:
            os._exit(9)


def sharded() -> StatefulDataLoader[Any]:
    sampler = StatefulDistributedSampler(Noisy(EXAMPLES), 2, torch.distributed.get_rank())
    return shuffled(sampler=sampler, shuffle=None, batch_size=2)


@pytest.mark.slow
@no_fork
class TestTwoProcesses:
    @staticmethod
    def fit(
        folder: Path, net: type[Reading], loader: MakeLoader, *callbacks: pl.Callback, **options: Any
    ) -> list[Ran]:
        def look(trainer: pl.Trainer, model: Any) -> dict[str, Any]:
            return {"taken": model.taken, "weights": flat(model.parameters())}

        reporting = Reporting(folder, look)
        run(net, loader, ExactResume(), *callbacks, reporting, strategy="ddp_fork", devices=2, **options)
        return [Ran(**said) for said in reporting.read()]

    @pytest.mark.parametrize(
        ("loader", "options"),
        [
            (lambda: shuffled(batch_size=2), {"max_steps": 6, "max_epochs": -1}),
            (lambda: shuffled(batch_size=2, shuffle=False), {}),
            (sharded, {}),
            (lambda: flexible(2), {"use_distributed_sampler": False, "max_epochs": 1}),
        ],
        ids=["shuffled", "distributed sampler", "stateful distributed sampler", "each its own"],
    )
    def test_killed(self, loader: MakeLoader, options: dict[str, Any], tmp_path: Path) -> None:
        fit = partial(self.fit, tmp_path, ValidatedReading, loader, **options)
        # The last is killed, which leaves what it had saved.
        whole = fit(SeededApart())
        with pytest.raises(mp.ProcessExitedException):
            fit(SeededApart(kill_at=5), every_step(tmp_path / "saved"))
        for step in (2, 3, 5):  # in mid-epoch, after an epoch, in mid-epoch of another
            resumed = fit(SeededApart(), resume=tmp_path / "saved" / f"step={step}.ckpt")
            for rank in range(2):
                assert resumed[rank].same_as(whole[rank].after(step)), (rank, step)

    def test_augmentation_in_workers_differs(self, tmp_path: Path) -> None:
        """Lightning alone would give rank one the random states of rank zero's workers."""

        def loader() -> StatefulDataLoader[Any]:
            dataset = ResumableDataset(Noisy(EXAMPLES))
            return StatefulDataLoader(dataset, batch_size=2, shuffle=True, num_workers=1)

        fit = partial(self.fit, tmp_path, Reading, loader, max_epochs=1)
        whole = fit(SeededApart(), every_step(tmp_path / "saved"))
        resumed = fit(SeededApart(), resume=tmp_path / "saved" / "step=1.ckpt")
        assert all(resumed[rank].same_as(whole[rank].after(1)) for rank in range(2))


class Generated(RandomSampler):
    """Another kind of it."""


class OwnSampler:
    def __iter__(self) -> Iterator[int]:
        yield from range(EXAMPLES)

    def __len__(self) -> int:
        return EXAMPLES


class Generating(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        yield 1


class TestWhyNotResumable:
    @pytest.mark.parametrize(
        ("loader", "text", "certain"),
        [
            (plain, "state_dict and load_state_dict, got DataLoader: .* anew", True),
            (lambda: [1, 2], "state_dict and load_state_dict, got list", True),
            (lambda: drawing(RandomSampler(Noisy(12))), "torch's RandomSampler", True),
            (lambda: drawing(Generated(Noisy(12))), "torch's Generated", True),
            (lambda: drawing(WeightedRandomSampler([1.0], 1)), "torch's Weighted.*shuffle=True", True),
            (lambda: batching(RandomSampler(Noisy(12))), "torch's RandomSampler", True),
            (lambda: drawing(OwnSampler()), "got OwnSampler: .* asked again", False),
            (lambda: StatefulDataLoader(Generating()), "an IterableDataset .* got Generating", False),
            (lambda: shuffled(num_workers=1), "got Noisy in workers, .* ResumableDataset", False),
            (lambda: shuffled(num_workers=1, in_order=False), "got in_order=False", True),
        ],
    )
    def test_in_mid_epoch(self, loader: MakeLoader, text: str, certain: bool) -> None:
        obstacle = why_not_resumable(loader())
        assert obstacle is not None
        assert obstacle.certain == certain
        assert re.search(text, obstacle.text)

    @pytest.mark.parametrize(
        "loader",
        [
            shuffled,
            lambda: shuffled(shuffle=False),
            lambda: drawing(range(3)),
            lambda: flexible(4),
            lambda: StatefulDataLoader(Counting()),
            lambda: StatefulDataLoader(ResumableDataset(Noisy(EXAMPLES)), num_workers=1),
        ],
    )
    def test_nothing_in_mid_epoch(self, loader: MakeLoader) -> None:
        assert why_not_resumable(loader()) is None
        assert why_not_resumable(loader(), mid_epoch=False) is None

    def test_at_the_end_of_an_epoch(self) -> None:
        def why(**options: Any) -> Obstacle | None:
            return why_not_resumable(DataLoader(Noisy(EXAMPLES), shuffle=True, **options), mid_epoch=False)

        assert why() is None
        assert why(num_workers=1) is None
        obstacle = why(num_workers=1, persistent_workers=True)
        assert obstacle is not None
        assert "Noisy in 1 persistent workers" in obstacle.text
        assert not obstacle.certain


def warnings_of(loader: MakeLoader, *callbacks: pl.Callback, **options: Any) -> list[str]:
    with heard() as said:
        run(Reading, loader, *callbacks, **options)
    return [text for text in said if text.startswith("Expected")]


class TestWarnings:
    @pytest.mark.parametrize(
        ("loader", "text"),
        [
            (plain, "got DataLoader"),
            (counting, "a length, got one without: Lightning fetches one batch ahead"),
        ],
    )
    def test_once_when_saving_in_mid_epoch(self, tmp_path: Path, loader: Any, text: str) -> None:
        (warning,) = warnings_of(loader, ExactResume(), SaveEverywhere(tmp_path))
        assert text in warning

    def test_none_where_the_length_of_the_epoch_is_said(self, tmp_path: Path) -> None:
        assert warnings_of(counting, ExactResume(), SaveEverywhere(tmp_path), limit_train_batches=3) == []

    def test_once_when_resuming_in_mid_epoch(self, tmp_path: Path) -> None:
        save = SaveEverywhere(tmp_path)
        warnings_of(plain, save)
        (tmp_path / "again").mkdir()
        again = SaveEverywhere(tmp_path / "again")
        (warning,) = warnings_of(plain, ExactResume(), again, resume=save.saved[0][0])
        assert "got DataLoader" in warning

    def test_none_at_the_end_of_an_epoch(self, tmp_path: Path) -> None:
        save = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
        assert warnings_of(plain, ExactResume(), save) == []
        assert warnings_of(plain, ExactResume(), resume=tmp_path / "epoch=0.ckpt") == []
        # Of all batches of a loader without a length, which the Trainer limits.
        limited = ExactResume(), SaveEverywhere(tmp_path)
        assert warnings_of(counting, *limited, limit_train_batches=3) == []

    def test_a_doubt_only_when_resuming(self, tmp_path: Path) -> None:
        save, loader = SaveEverywhere(tmp_path), lambda: drawing(OwnSampler())
        assert warnings_of(loader, ExactResume(), save) == []
        assert len(warnings_of(loader, ExactResume(), resume=save.saved[0][0])) == 1

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            # Of two processes, whose loaders are not to be taken from either.
            (lambda now: {"ranks": 2 * now["ranks"], "loaders": []}, "on 2 processes, as .* saved, got 1"),
            (
                lambda now: {"version": 99},
                "whole random states .* got ValueError: Expected version 1, got 99.",
            ),
        ],
    )
    def test_what_cannot_be_taken_up(self, tmp_path: Path, change: Any, text: str) -> None:
        save = SaveEverywhere(tmp_path)
        run(Reading, shuffled, ExactResume(), save)
        checkpoint = torch.load(save.saved[0][0], weights_only=True)
        state = checkpoint["callbacks"]["ExactResume"]
        state |= change(state)
        torch.save(checkpoint, tmp_path / "other.ckpt")
        (warning,) = warnings_of(shuffled, ExactResume(), resume=tmp_path / "other.ckpt")
        assert re.search(text, warning)

    def test_after_an_exception_no_rank_waits_for_others(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        trainer = make_trainer()
        monkeypatch.setattr(type(trainer), "world_size", 2)
        trainer.state.status = TrainerStatus.INTERRUPTED
        resume = ExactResume()
        resume.setup(trainer, Reading(shuffled, *OPTIMIZATION), "fit")
        state = resume.state_dict()
        assert [rank is None for rank in state["ranks"]] == [False, True]
        with pytest.warns(UserWarning, match="random states of 2 processes in the checkpoint, got those of"):
            assert resume._own(trainer, state) is not None


def test_states_that_no_run_resumes_from_are_forgotten() -> None:
    """A learning-rate finder, say, loads the checkpoint that it saved before the first step."""
    resume = ExactResume()
    trained(Reading(shuffled, *OPTIMIZATION), None, resume, **TWO_EPOCHS)
    state = resume.state_dict()

    def load(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        progress = {"epoch_progress": {}, "epoch_loop.batch_progress": {"is_last_batch": False}}
        loops = {"fit_loop": {"state_dict": {}} | progress}
        resume.on_load_checkpoint(trainer, pl_module, {"loops": loops})
        resume.load_state_dict(state)

    found = run(Reading, shuffled, resume, LambdaCallback(on_fit_start=load))
    assert found.same_as(run(Reading, shuffled))
