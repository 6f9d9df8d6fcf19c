"""A training with a ramp that is killed and resumed is the training that was not, bit for bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_surge import BatchSizeScheduler, ExactResume, SurgeLRCallback, by_examples
from lightning_surge.callbacks.resuming.random_streams import ResumableDataset, to_portable
from lightning_surge.measure.replay import RandomState
from lightning_surge.schedules.seesaw import Seesaw
from lightning_surge.schedules.sizes import (
    BatchSizeRule,
    ConstantSize,
    GeometricRamp,
    LinearRamp,
    Milestones,
    Progress,
    Schedule,
)
from tests.trainings import (
    Noisy,
    ValidatedReading,
    assert_same,
    every_step,
    heard,
    make_trainer,
    sampled,
    saved_steps,
    trained,
    with_lr,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The last 3 checkpoints each came while batches were being pooled"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used"),
]

EXAMPLES, EPOCHS = 44, 3


def cosine(optimizer: Optimizer) -> LRScheduler:
    return by_examples(CosineAnnealingLR(optimizer, T_max=EPOCHS * EXAMPLES // 2), examples_per_step=2)


class Net(ValidatedReading):
    """With a cosine that counts examples; notes what is asked for at each step."""

    def __init__(self, loader: Callable[[], Any], make_schedule: Any = cosine) -> None:
        super().__init__(loader, with_lr(AdamW, 0.01, betas=(0.9, 0.95)), make_schedule)
        self.requests: list[tuple[int, int]] = []

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, BatchSizeScheduler):
                self.requests.append((self.trainer.global_step, callback.requested_batch_size))


def accumulated(workers: int = 0) -> StatefulDataLoader:
    data: Any = ResumableDataset(Noisy(EXAMPLES)) if workers else Noisy(EXAMPLES)
    return StatefulDataLoader(data, batch_size=2, shuffle=True, num_workers=workers)


def flexible(workers: int = 0) -> DataLoader[Any]:
    return sampled(accumulated(workers).dataset, 5, kind=StatefulDataLoader, num_workers=workers)


RAMPS: dict[str, BatchSizeRule] = {
    "doublings": GeometricRamp(2, 16, duration=1.5 * EXAMPLES, unit="examples"),
    "any size": LinearRamp(2, 16, duration=1.5 * EXAMPLES, unit="examples"),
    "decay": Seesaw(start=2, maximum=16),
}


def run(
    loader: Any, rule: BatchSizeRule, *callbacks: pl.Callback, resume: Path | None = None, **options: Any
) -> Net:
    """Train, on other random streams if resumed."""
    model = Net(loader)
    pl.seed_everything(1 if resume is None else 77, verbose=False)
    ours = BatchSizeScheduler(rule), *callbacks
    return trained(model, None, *ours, resume=resume, max_epochs=EPOCHS, **options)


def exact(path: Path) -> list[pl.Callback]:
    """Measure often enough to be under way at any checkpoint, and save after every optimizer step."""
    surge = SurgeLRCallback(base_batch_size=2, probe_every=4, split_batch=None, custom_scalars=False)
    return [surge, ExactResume(), every_step(path)]


def weights(file: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(file, weights_only=True)["state_dict"]
    return found


def assert_resumed(folder: Path, which: slice, *arguments: Any, **options: Any) -> Net:
    """A run that, resumed from some of its steps, has the steps and weights of the whole one."""
    whole, saved = run(*arguments, *exact(folder / "whole"), **options), saved_steps(folder / "whole")
    assert len(saved) > 9
    for place, checkpoint in list(enumerate(saved))[which]:
        path = folder / f"from {checkpoint.stem}"
        run(*arguments, *exact(path), resume=checkpoint, **options)
        again = saved_steps(path)
        # One of an epoch's last step may be saved a second time, when the epoch is ended.
        later = [file.name for file in again if file.name != checkpoint.name]
        assert later == [file.name for file in saved[place + 1 :]]
        assert_same(weights(again[-1]), weights(saved[-1]))
    return whole


@pytest.mark.parametrize(
    ("loader", "rule", "workers", "every"),
    [
        (accumulated, "doublings", 0, 2),
        (flexible, "any size", 0, 2),
        (accumulated, "decay", 0, 11),
        (accumulated, "doublings", 2, 9),
        (flexible, "any size", 2, 9),
        (flexible, "decay", 2, 9),
    ],
)
def test_resumed_from_any_step_it_takes_the_same_batches_to_the_same_weights(
    tmp_path: Path, loader: Callable[[int], Any], rule: str, workers: int, every: int
) -> None:
    whole = assert_resumed(tmp_path, slice(0, -1, every), lambda: loader(workers), RAMPS[rule])
    assert {index for *_, [indices] in whole.taken for index in indices} == set(range(EXAMPLES))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's threads do not survive a fork")
@pytest.mark.parametrize("loader", [accumulated, flexible])
def test_two_processes(tmp_path: Path, loader: Callable[[], Any]) -> None:
    ramp = LinearRamp(4, 16, duration=1.5 * EXAMPLES, unit="examples")
    two = {"strategy": "ddp_fork", "devices": 2}
    # Else both would draw the same random numbers, and one could take the other's.
    apart = LambdaCallback(
        on_train_start=lambda trainer, _: (
            trainer.global_step or pl.seed_everything(trainer.global_rank, verbose=False)
        )
    )
    assert_resumed(tmp_path, slice(2, -2, 5), loader, ramp, apart, **two)


def plain() -> Any:
    return DataLoader(Noisy(EXAMPLES), batch_size=2, shuffle=True)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize(
    ("loader", "rule"),
    [
        (accumulated, Milestones({0: 2, 8: 4, 16: 8, 20: 2})),
        (plain, Milestones({0: 2, 40: 4, 80: 8, 100: 2}, unit="examples")),
        (flexible, Milestones({0: 2, 8: 5, 16: 9, 20: 2})),
    ],
)
def test_the_schedule_goes_on_without_exact_resuming(
    tmp_path: Path, loader: Callable[[], Any], rule: Schedule
) -> None:
    """Lightning may repeat or leave out examples, even an epoch; sizes follow the clock all the same."""
    run(loader, rule, every_step(tmp_path))
    for checkpoint in saved_steps(tmp_path)[::5]:
        state = torch.load(checkpoint, weights_only=True)["callbacks"]["BatchSizeScheduler"]
        assert state.keys() == {"version", "accumulation", "examples", "epoch_begin"}
        requests = run(loader, rule, resume=checkpoint).requests
        done, sizes = int(state["examples"]), dict(requests)
        if rule.unit == "steps":
            assert [sizes[step] for step in sizes] == [rule(Progress(step)) for step in sizes]
        else:
            assert requests[0][1] == rule(Progress(0, done))


@pytest.mark.filterwarnings("ignore:Expected a training loader with state_dict")
@pytest.mark.parametrize("others", [[], [ExactResume()]])
def test_only_exact_resuming_touches_random_streams(tmp_path: Path, others: list[pl.Callback]) -> None:
    seen: list[list[Any]] = []

    def note(*args: Any) -> None:
        now = to_portable(RandomState.capture())
        seen[-1].append(
            [part.tolist() for part in (now["python"]["words"], now["numpy"]["words"], now["torch"])]
        )

    for mine in ([], [BatchSizeScheduler(ConstantSize(2)), *others]):
        pl.seed_everything(1, verbose=False)
        seen.append([])
        # Right after validations and checkpoints.
        look, saving = LambdaCallback(on_train_batch_start=note), every_step(tmp_path / str(len(seen)))
        make_trainer(*mine, look, saving, max_epochs=2, val_check_interval=7).fit(Net(plain, None))
    assert (seen[0] == seen[1]) == (not others)


@pytest.mark.parametrize("beside", [True, False])
def test_a_checkpoint_that_holds_them_under_the_batch_size(tmp_path: Path, beside: bool) -> None:
    """As `BatchSizeScheduler` saved them before `ExactResume` was there."""
    whole = run(flexible, RAMPS["any size"], ExactResume(), every_step(tmp_path))
    saved = saved_steps(tmp_path)
    content = torch.load(saved[7], weights_only=True)
    former = content["callbacks"]
    former["BatchSizeScheduler"] |= {"version": 1, "resumption": former.pop("ExactResume")}
    torch.save(content, tmp_path / "former.ckpt")
    save = every_step(tmp_path / "again")
    with heard() as said:
        callbacks = [ExactResume()] if beside else []
        again = run(flexible, RAMPS["any size"], *callbacks, save, resume=tmp_path / "former.ckpt")
    assert again.requests == whole.requests[8:]
    last = (weights(saved_steps(folder)[-1])["net.0.weight"] for folder in (tmp_path, tmp_path / "again"))
    assert torch.equal(*last) == beside
    asked = [text.startswith("Expected ExactResume beside BatchSizeScheduler for a") for text in said]
    assert sum(asked) == (not beside)
