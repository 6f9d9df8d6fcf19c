"""The callback on several processes: what one process measures on the same examples, and equal everywhere."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace as Run
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import ProcessRaisedException
from torch.optim import AdamW
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

from lightning_surge import BatchSizeScheduler, SurgeLRCallback, by_examples
from lightning_surge.callbacks.checks import check_processes
from lightning_surge.schedules.seesaw import Seesaw
from lightning_surge.schedules.sizes import GeometricRamp
from tests.processes import Reporting, environment, on_ranks
from tests.trainings import Regression, assert_same, every_step, regression_data, trained

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's threads do not survive a fork"),
]

GLOBAL, SLICES, STEPS = 16, 4, 6


class Portions:
    """Of each global batch, the part of one process; the whole, slice by slice, for a process alone."""

    def __init__(self, rank: int, parts: Sequence[int], size: int, slices: int) -> None:
        self.rank, self.parts, self.size, self.slices = rank, parts, size, slices

    def __len__(self) -> int:
        return self.size // sum(self.parts)

    def __iter__(self) -> Iterator[list[int]]:
        whole = sum(self.parts)
        for start in range(0, self.size, whole):
            begins = [start + sum(self.parts[:rank]) for rank in range(len(self.parts))]
            rows = [list(range(begin, begin + part)) for begin, part in zip(begins, self.parts, strict=True)]
            if self.rank >= 0:
                yield rows[self.rank]
            else:
                cut = [[part[i * len(part) // self.slices : (i + 1) * len(part) // self.slices]
                        for i in range(self.slices)] for part in rows]  # fmt: skip
                yield [row for slices in zip(*cut, strict=True) for part in slices for row in part]


class Net(Regression):
    def __init__(self, parts: Sequence[int] = (8, 8), *, alone: bool = False, shard: bool = False) -> None:
        super().__init__(
            lambda module: AdamW(module.net.parameters(), lr=0.01, betas=(0.9, 0.95)), features=6, width=9
        )
        self.unused = nn.Linear(2, 2)
        self.unused.requires_grad_(False)
        self.parts, self.alone, self.shard = parts, alone, shard

    def configure_model(self) -> None:
        if self.shard and not hasattr(self, "sharded"):
            self.sharded = True
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def train_dataloader(self) -> Any:
        data: Any = regression_data(GLOBAL * STEPS, GLOBAL, features=6).dataset
        rank = -1 if self.alone else self.trainer.global_rank
        return DataLoader(data, batch_sampler=Portions(rank, self.parts, len(data), SLICES))  # type: ignore[arg-type]


def report(trainer: pl.Trainer, module: Net) -> dict[str, Any]:
    callback = next((c for c in trainer.callbacks if isinstance(c, SurgeLRCallback)), None)  # type: ignore[attr-defined]
    weights = [p.full_tensor() if module.shard else p for p in module.net.parameters()]
    said: dict[str, Any] = {"lrs": module.lrs, "weights": [weight.detach().clone() for weight in weights]}
    if callback is not None:
        stats, law = callback.history.stats(), callback.law
        said |= {"measured": callback.history.num_measurements, "stats": repr(stats)}
        said |= {"numbers": [stats.grad_sq, stats.trace_cov], "budget": dict(vars(callback._measurer.budget))}
        if law is not None:
            said["numbers"] += [ask(b) for ask in (law.lr, law.alignment) for b in (4.0, 16.0, 64.0)]
    return said


def train(
    path: Path,
    *callbacks: pl.Callback,
    devices: int = 2,
    make: Callable[..., pl.LightningModule] = Net,
    strategy: Any = "ddp_fork",
    resume: Path | None = None,
    module: dict[str, Any] | None = None,
    **options: Any,
) -> list[Run]:
    path.mkdir(parents=True, exist_ok=True)
    options |= {"devices": devices, "strategy": strategy if devices > 1 else "auto"}
    net = make(**({"alone": devices == 1} | (module or {})))
    reporting = Reporting(path, report)
    trained(net, None, *callbacks, reporting, use_distributed_sampler=False, resume=resume, **options)
    # One of several processes that were started from outside leaves others at work.
    return [] if os.environ.get("LOCAL_RANK") else runs_in(path, devices)


def runs_in(path: Path, count: int) -> list[Run]:
    return [Run(**said) for said in Reporting(path, report).read(count)]


def surge(**options: Any) -> SurgeLRCallback:
    return SurgeLRCallback(8, **({"probe_every": 2, "custom_scalars": False} | options))


def assert_equal(left: Run, right: Run) -> None:
    assert_same([left.lrs, left.weights], [right.lrs, right.weights])


def assert_traceless(path: Path, run: Callable[..., list[Run]], *measuring: pl.Callback) -> None:
    """What `run` makes of a folder and callbacks is the same with those that measure, and without."""
    measured = run(path / "measured", *measuring)
    assert measured[0].measured > 0
    for with_callback, without in zip(measured, run(path / "plain"), strict=True):
        assert_equal(with_callback, without)


def assert_alike(left: Run, right: Run, **tolerance: float) -> None:
    """Up to the rounding of sums that are taken in another order."""
    tolerance = {"rel": 1e-3, "abs": 1e-9} | tolerance
    assert left.measured == right.measured > 0
    assert left.numbers == pytest.approx(right.numbers, **tolerance)
    assert left.lrs == pytest.approx(right.lrs, **tolerance)
    for a, b in zip(left.weights, right.weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def assert_as_one(several: list[Run], alone: list[Run]) -> None:
    """All processes are equal, and measured what one does on the same examples."""
    for other in several[1:]:
        assert_equal(several[0], other)
    assert_alike(several[0], alone[0])


PROBED: dict[str, Any] = {"law": "theorem2", "probe_examples": 32}


@pytest.mark.parametrize("law", ["theorem2", "theorem3"])
def test_two_processes_probe_what_one_does(tmp_path: Path, law: str) -> None:
    options = PROBED | {"law": law}
    two = train(tmp_path / "two", surge(**options))
    assert_as_one(two, train(tmp_path / "one", surge(**options), devices=1))
    assert two[0].stats == two[1].stats


class TestWindows:
    """Norms of every process's own gradients, which the reducer never shows."""

    @pytest.mark.parametrize(
        ("devices", "accumulation", "view"), [(2, 1, False), (2, 2, True), (4, 1, False)]
    )
    def test_say_what_as_many_micro_batches_of_one_process_say(
        self, tmp_path: Path, devices: int, accumulation: int, view: bool
    ) -> None:
        options: dict[str, Any] = {"max_epochs": 2, "accumulate_grad_batches": accumulation}
        strategy = DDPStrategy(start_method="fork", gradient_as_bucket_view=view)
        parts = {"parts": (4,) * devices}
        many = train(tmp_path / "many", surge(), devices=devices, strategy=strategy, module=parts, **options)
        options["accumulate_grad_batches"] = accumulation * devices
        assert_as_one(many, train(tmp_path / "one", surge(), devices=1, module={"parts": (4,)}, **options))
        assert many[0].budget["spent"] == 0.0


class BatchNormNet(Net):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.net = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Linear(9, 1))


class EverySecond(Net):
    """A layer that only every second step uses."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.net.append(nn.Linear(1, 1))

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return (self.net[: 4 - batch_idx % 2](x) - y).square().mean()


UNUSED, VIEWS = {"find_unused_parameters": True}, {"gradient_as_bucket_view": True}


@pytest.mark.filterwarnings("ignore:The mean gradient of a batch's slices is not")
@pytest.mark.parametrize(
    ("make", "strategy", "accumulation", "objective"),
    [
        (Net, {}, 1, "step"),
        (Net, UNUSED, 2, "step"),
        (Net, VIEWS, 1, "step"),
        (Net, VIEWS, 2, "step"),
        (Net, {}, 4, "progress"),
        (Net, UNUSED, 4, "progress"),
        (BatchNormNet, {}, 1, "step"),  # whose batches are left whole
        (EverySecond, UNUSED, 1, "step"),
        (EverySecond, UNUSED, 2, "step"),
    ],
)
def test_a_dry_run_leaves_no_trace(
    tmp_path: Path, make: Any, strategy: dict[str, bool], accumulation: int, objective: Any
) -> None:
    def run(path: Path, *callbacks: pl.Callback) -> list[Run]:
        ddp = DDPStrategy(start_method="fork", **strategy)
        options = {"max_epochs": 2, "accumulate_grad_batches": accumulation}
        return train(path, *callbacks, make=make, strategy=ddp, **options)

    assert_traceless(tmp_path, run, surge(dry_run=True, probe_every=1, objective=objective))


def test_a_process_with_shorter_batches_counts_by_its_examples(tmp_path: Path) -> None:
    parts = {"parts": (12, 4)}
    scheduler = BatchSizeScheduler(GeometricRamp(16, 16, 1), micro_batch_size=8)
    two = train(tmp_path / "two", scheduler, surge(**PROBED), module=parts)
    assert_as_one(two, train(tmp_path / "one", surge(**PROBED), devices=1, module=parts))


class Messages(pl.Callback):
    """Counts the collectives of each optimizer step."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.counts, self.monkeypatch = path, Counter[int](), monkeypatch

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name in ("all_reduce", "broadcast", "all_gather", "barrier", "broadcast_object_list"):
            self._count(trainer, name, getattr(torch.distributed, name))

    def _count(self, trainer: pl.Trainer, name: str, collective: Any) -> None:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.counts[trainer.global_step] += 1
            return collective(*args, **kwargs)

        self.monkeypatch.setattr(torch.distributed, name, counted)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        torch.save(dict(self.counts), self.path / f"messages {trainer.global_rank}.pt")


def test_an_ordinary_step_sends_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {}
    for name, callbacks in {"with": [surge(probe_every=4, probe_examples=16)], "without": []}.items():
        train(tmp_path / name, *callbacks, Messages(tmp_path / name, monkeypatch))
        counts[name] = torch.load(tmp_path / name / "messages 0.pt")
        assert counts[name] == torch.load(tmp_path / name / "messages 1.pt")
        monkeypatch.undo()
    more = [counts["with"].get(step, 0) - counts["without"].get(step, 0) for step in range(STEPS)]
    # The very first window asks how large batches are. Every one is measured, which sends nothing more.
    assert more == [2, 1, 1, 1, 1, 1]


class Fails(SurgeLRCallback):
    """Runs out of memory on one process, at one of the passes of its first measurement."""

    def __init__(self, rank: int, at: int, **options: Any) -> None:
        super().__init__(8, objective="step", probe_every=1, dry_run=True, custom_scalars=False, **options)
        self.rank, self.at, self.passes = rank, at, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        replay = self._measurer._prober._compute_loss

        def compute_loss(batch: Any, batch_idx: int) -> Tensor:
            self.passes += 1
            if trainer.global_rank == self.rank and self.passes == self.at:
                raise torch.OutOfMemoryError("no memory for this")
            return replay(batch, batch_idx)

        self._measurer._prober._compute_loss = compute_loss


@pytest.mark.parametrize(("rank", "accumulation"), [(0, 1), (1, 1), (1, 4)])
@pytest.mark.filterwarnings("ignore:Measuring failed")
def test_one_process_runs_out_of_memory(tmp_path: Path, rank: int, accumulation: int) -> None:
    options: dict[str, Any] = {"max_epochs": 2 * accumulation, "accumulate_grad_batches": accumulation}
    plain = train(tmp_path / "plain", **options)
    for at in (1, 2, 5):
        runs = train(tmp_path / f"fails {at}", Fails(rank, at), **options)
        for run, expected in zip(runs, plain, strict=True):
            assert_equal(run, expected)
        assert runs[0].budget == runs[1].budget
        assert runs[0].measured == runs[1].measured > 0


class Dies(Net):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.trainer.global_rank == 1 and self.trainer.global_step == 3:
            raise RuntimeError("this process is done for")


def test_a_process_that_dies_ends_the_training_of_all(tmp_path: Path) -> None:
    """As without the callback: nobody waits for ever for the one that is gone."""
    with pytest.raises(ProcessRaisedException, match="this process is done for"):
        train(tmp_path, surge(), make=Dies)


class Halved(Net):
    """Its learning rate halves every 64 examples, whoever counts them."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        clock = by_examples(StepLR(optimizer, step_size=4, gamma=0.5), examples_per_step=16)
        return [optimizer], [{"scheduler": clock, "interval": "step"}]


def test_seesaw_grows_alike_on_all_processes(tmp_path: Path) -> None:
    scheduler = BatchSizeScheduler(Seesaw(16, 64), micro_batch_size=8)
    options: dict[str, Any] = {"make": Halved, "max_epochs": 3}
    first, second = train(tmp_path / "two", scheduler, SurgeLRCallback(16, law="sqrt"), **options)
    assert_equal(first, second)
    # Six micro-batches an epoch, in windows of powers of two: sizes, and halvings of the schedule.
    sizes, halvings = [16] * 4 + [32] * 4 + [64, 32], [0] * 4 + [1, 1, 2, 2, 3, 4]
    expected = [0.01 * 0.5**n * (size / 16) ** 0.5 for size, n in zip(sizes, halvings, strict=True)]
    assert first.lrs == pytest.approx(expected, rel=1e-12)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_resumed_on_two_processes(tmp_path: Path) -> None:
    def run(name: str, resume: Path | None = None) -> list[Run]:
        callbacks = [surge(probe_examples=GLOBAL), every_step(tmp_path / name)]
        return train(tmp_path / f"{name} said", *callbacks, max_epochs=3, resume=resume)

    whole = run("whole")
    again = run("again", tmp_path / "whole" / f"step={STEPS}.ckpt")
    for left, right in zip(whole, again, strict=True):
        left.lrs = left.lrs[STEPS:]
        assert left.numbers == right.numbers
        assert_equal(left, right)


class TwoPlayers(Net):
    """Two optimizers that the user steps, each with a loss of its own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False
        self.other = nn.Linear(6, 1)

    def losses(self, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        x, y = batch
        return (self.net(x) - y).square().mean(), (self.other(x) - self.net(x).detach()).square().mean()

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Any:
        for index, optimizer in enumerate(self.optimizers()):
            optimizer.zero_grad()
            self.manual_backward(self.losses(batch)[index])
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [super().configure_optimizers(), torch.optim.Adam(self.other.parameters(), lr=0.01)]


def test_two_optimizers_on_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    def players(**options: Any) -> list[pl.Callback]:
        return [
            surge(optimizer=i, loss_fn=lambda module, batch, i=i: module.losses(batch)[i], **options)
            for i in (0, 1)
        ]

    def two(path: Path, *callbacks: pl.Callback) -> list[Run]:
        ddp = DDPStrategy(start_method="fork", find_unused_parameters=True)
        return train(path, *callbacks, make=TwoPlayers, strategy=ddp)

    alone = train(tmp_path / "one", *players(), make=TwoPlayers, devices=1)
    assert_as_one(two(tmp_path / "two", *players()), alone)
    assert_traceless(tmp_path, two, *players(dry_run=True))


REFUSED: dict[str, tuple[Any, str]] = {
    "sharded as one": (FSDPStrategy(), "got FSDPStrategy with 2 processes: use one of them"),
    "drifting": (DDPStrategy(model_averaging_period=2), "got DDPStrategy with model_averaging_period=2"),
    "counting passes": (DDPStrategy(static_graph=True), r"got DDPStrategy\(static_graph=True\)"),
    "one replica": (ModelParallelStrategy(1, 2), "2 processes for 1 replicas of the data: use"),
    "pieces": (ModelParallelStrategy(2, 1), "sharded parameters from the norms of accumulation windows"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_strategies_are_refused_before_training(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy, message = REFUSED[case]
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    monkeypatch.setattr(pl.Trainer, "strategy", property(lambda self: strategy))
    monkeypatch.setattr(pl.Trainer, "world_size", property(lambda self: 2))
    replicas = {"num_replicas": 1 if case == "one replica" else 2, "rank": 0}
    monkeypatch.setattr(pl.Trainer, "distributed_sampler_kwargs", property(lambda self: replicas))
    with pytest.raises(MisconfigurationException, match=message):
        check_processes(trainer, "SurgeLRCallback", measures=True, probes=True)
    check_processes(trainer, "SurgeLRCallback", measures=False, probes=False)
    if case in ("counting passes", "pieces"):
        check_processes(trainer, "SurgeLRCallback", measures=True, probes=False)


class TestSharded:
    """FSDP2: every process holds a piece of the parameters, and gradients arrive summed."""

    @staticmethod
    def runs(path: Path, *callbacks: pl.Callback, count: int = 2, **options: Any) -> list[Run]:
        """As `train`, in processes that were started from outside, as this strategy wants them."""

        def work(rank: int, count: int) -> None:
            os.environ["LOCAL_RANK"] = os.environ["RANK"] = str(rank)
            strategy = ModelParallelStrategy(data_parallel_size=count, tensor_parallel_size=1)
            train(path, *callbacks, devices=count, strategy=strategy, module={"shard": True}, **options)

        with environment(count):
            on_ranks(work, count, talk=False)
        return runs_in(path, count)

    def test_accumulation(self, tmp_path: Path) -> None:
        options: dict[str, Any] = {"accumulate_grad_batches": 4, "max_epochs": 4}
        two = self.runs(tmp_path / "two", surge(), **options)
        assert_as_one(two, train(tmp_path / "one", surge(), devices=1, **options))

    @pytest.mark.parametrize("accumulation", [1, 4])
    def test_a_dry_run_leaves_no_trace(self, tmp_path: Path, accumulation: int) -> None:
        run = partial(self.runs, accumulate_grad_batches=accumulation, max_epochs=2)
        if accumulation > 1:
            assert_traceless(tmp_path, run, surge(dry_run=True, probe_every=1))
            return
        # A step with one micro-batch has no second chunk that a sharded strategy would show.
        assert run(tmp_path, surge(dry_run=True, probe_every=1))[0].measured == 0
