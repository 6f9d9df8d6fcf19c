"""Checkpointed, compiled, tied, frozen, unfrozen, sparse, idle parameters: measured as a reference is."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adafactor, Adam, AdamW, Optimizer, SparseAdam
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_surge import SurgeLRCallback
from tests.drawn import numbers
from tests.trainings import assert_same, make_trainer, probing

# So short that secants tell the curvature at the point itself, in float64.
LR = 1e-6


class Net(pl.LightningModule):
    """Two layers in float64; `loss` may compute them in any way, `reference` computes them plainly."""

    kind: type[Optimizer] = Adam

    def __init__(self) -> None:
        super().__init__()
        pl.seed_everything(0, verbose=False)
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 4)
        self.window: list[Tensor] = []
        self.build()
        self.double()

    def build(self) -> None:
        """Add what a case needs."""

    def reference(self, x: Tensor) -> Tensor:
        return (self.second(torch.tanh(self.first(x))) - x.sum(dim=1, keepdim=True)).square().mean()

    def loss(self, x: Tensor) -> Tensor:
        return self.reference(x)

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.window = []
        self.window.append(batch)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Optimizer:
        return self.kind(self.trained(), lr=LR)

    def trained(self) -> list[nn.Parameter]:
        return list(self.parameters())


class Reentrant(Net):
    use_reentrant = True

    def loss(self, x: Tensor) -> Tensor:
        block: Callable[[Tensor], Tensor] = lambda x: torch.tanh(self.first(x))  # noqa: E731
        hidden = checkpoint(block, x.clone().requires_grad_(), use_reentrant=self.use_reentrant)
        return (self.second(hidden) - x.sum(dim=1, keepdim=True)).square().mean()


class NonReentrant(Reentrant):
    use_reentrant = False


class PartCompiled(Net):
    def build(self) -> None:
        self.fast = torch.compile(nn.Sequential(self.first, nn.Tanh(), self.second), backend="aot_eager")

    def loss(self, x: Tensor) -> Tensor:
        return (self.fast(x) - x.sum(dim=1, keepdim=True)).square().mean()

    def trained(self) -> list[nn.Parameter]:
        return [*self.first.parameters(), *self.second.parameters()]


class Compiled(Net):
    """Compiled as a whole before training."""


class Tied(Net):
    def build(self) -> None:
        self.second = nn.Linear(6, 4)
        self.second.weight = nn.Parameter(torch.randn(6, 6))
        self.first = nn.Linear(6, 6)
        self.first.weight = self.second.weight

    def reference(self, x: Tensor) -> Tensor:
        x = torch.cat([x, x[:, :2]], dim=1)
        bias = torch.cat([self.second.bias, self.second.bias[:2]])
        hidden = torch.tanh(self.first(x))
        return (
            (functional.linear(hidden, self.second.weight, bias) - x.sum(dim=1, keepdim=True)).square().mean()
        )


class Frozen(Net):
    """In the optimizer, but without a gradient."""

    def build(self) -> None:
        self.first.requires_grad_(False)


class Sparse(Net):
    """A table of which a batch touches some rows."""

    kind = SGD

    def build(self) -> None:
        self.table = nn.Embedding(40, 4, sparse=True)

    def reference(self, x: Tensor, *, sparse: bool = False) -> Tensor:
        rows = (x[:, :2].abs() * 10).long().clamp(max=39)
        vectors = functional.embedding(rows, self.table.weight, sparse=sparse)
        return (vectors.tanh().sum(dim=1) - x).square().mean()

    def loss(self, x: Tensor) -> Tensor:
        return self.reference(x, sparse=True)

    def trained(self) -> list[nn.Parameter]:
        return [self.table.weight]


class SparseSigns(Sparse):
    kind = SparseAdam


class Experts(Net):
    """Each of two layers sees the examples of one sign, and has no gradient where there are none."""

    def build(self) -> None:
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def reference(self, x: Tensor) -> Tensor:
        total = torch.zeros((), dtype=x.dtype)
        for expert, chosen in ((self.first, x[:, 0] > 1.0), (self.second, x[:, 0] <= 1.0)):
            if chosen.any():
                total = total + (torch.tanh(expert(x[chosen])) - 1.0).square().sum()
        return total / len(x)


class Relative(Net):
    """Steps are relative to the root mean square of each parameter."""

    kind = Adafactor


CASES = [
    Relative,
    Net,
    Reentrant,
    NonReentrant,
    PartCompiled,
    Compiled,
    Tied,
    Frozen,
    Sparse,
    SparseSigns,
    Experts,
]


def expected(module: Net) -> list[float]:
    """Norms, alignments and curvatures from four chunks, with exact products of the Hessian."""
    parameters = [p for p in module.trained() if p.requires_grad]
    chunks = torch.cat(module.window).chunk(4)

    def flat(tensors: Any) -> Tensor:
        pairs = zip(tensors, parameters, strict=True)
        return torch.cat([(torch.zeros_like(p) if t is None else t).reshape(-1) for t, p in pairs])

    def gradient(x: Tensor, *, graph: bool = False) -> Tensor:
        loss = module.reference(x)
        return flat(torch.autograd.grad(loss, parameters, create_graph=graph, allow_unused=True))

    def curvature(v: Tensor, *xs: Tensor) -> float:
        total = 0.0
        for x in xs:
            with torch.enable_grad():
                slope = gradient(x, graph=True) @ v
                product = flat(torch.autograd.grad(slope, parameters, allow_unused=True))
            total += float(product @ v) / len(xs)
        return total

    with torch.enable_grad():
        g = torch.stack([gradient(x) for x in chunks])
    size = len(chunks[0])
    mean = g.mean(dim=0)
    trace_cov = size * float((g - mean).square().sum()) / 3
    relative = issubclass(module.kind, Adafactor)
    sizes = [p.detach().square().mean().sqrt() if relative else torch.ones(()) for p in parameters]
    scale = flat([size.to(p.dtype).expand_as(p) for size, p in zip(sizes, parameters, strict=True)])

    def way(v: Tensor) -> Tensor:
        return v if issubclass(module.kind, SGD) else scale * v.sign()

    prefix, other = (g[0] + g[2]) / 2, (g[1] + g[3]) / 2
    return [
        float(mean.square().sum()) - trace_cov / (4 * size),
        trace_cov,
        float(way(g[0]) @ g[1] + way(g[2]) @ g[3]) / 2,
        float(way(prefix) @ other),
        float(way(other) @ prefix),
        (curvature(way(g[0]), chunks[1]) + curvature(way(g[2]), chunks[3])) / 2,
        curvature(way(prefix), chunks[1], chunks[3]),
    ]


def data(batches: int, batch_size: int) -> DataLoader[Any]:
    x = torch.randn(batches * batch_size, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return DataLoader(x, batch_size=batch_size)  # type: ignore[arg-type]


@pytest.fixture
def compare(noted: Any) -> Callable[[Net], list[tuple[list[float], list[float]]]]:
    """What is measured from now on, beside the reference at the same point."""
    return lambda module: noted(lambda measurement: (numbers(measurement), expected(module)))


def surge(**options: Any) -> SurgeLRCallback:
    return probing(objective="alignment", **options)


def train(module: Net, *callbacks: pl.Callback, live: bool) -> Net:
    target = torch.compile(module, backend="eager") if isinstance(module, Compiled) else module
    trainer = make_trainer(*callbacks, accumulate_grad_batches=4 if live else 1)
    trainer.fit(target, data(12, 4) if live else data(3, 16))
    torch._dynamo.reset()
    return module


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_what_is_measured_is_what_a_plain_reference_says(compare: Any, case: type[Net], live: bool) -> None:
    module = case()
    rows = compare(module)
    train(module, surge(log_peak=not live), live=live)
    # Norms alone from windows, and in the second probe.
    assert [len(got) for got, _ in rows] == ([2, 2, 2] if live else [7, 2])
    for got, wanted in rows:
        assert got == pytest.approx(wanted[: len(got)], rel=2e-3)


@pytest.mark.parametrize(
    ("case", "live"),
    [(Reentrant, True), (Reentrant, False), (NonReentrant, False), (PartCompiled, False), (Compiled, True)],
)
def test_a_dry_run_is_bit_identical_to_no_callback(case: type[Net], live: bool) -> None:
    plain, measured = train(case(), live=live), train(case(), surge(dry_run=True), live=live)
    assert_same(plain.trained(), measured.trained())


class Later(BaseFinetuning):
    """Unfreezes the first layer in the second epoch, as a group of its own."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.first)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.first, optimizer, lr=LR)


class Head(Net):
    kind = AdamW

    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]


class TestUnfrozenLater:
    @pytest.mark.parametrize("live", [True, False])
    def test_is_measured_from_then_on(self, compare: Any, live: bool) -> None:
        module, callback = Head(), surge()
        rows = compare(module)
        counts: list[int] = []
        module.on_train_epoch_end = lambda: counts.append(callback.history.num_measurements)  # type: ignore[method-assign]
        trainer = make_trainer(callback, Later(), accumulate_grad_batches=4 if live else 1, max_epochs=2)
        trainer.fit(module, data(24, 4) if live else data(6, 16))
        assert len(trainer.optimizers[0].param_groups) == 2
        for got, wanted in rows:
            assert got == pytest.approx(wanted[: len(got)], rel=2e-3)
        # What was measured of the head alone is no part of the law of the whole.
        assert counts == [6 if live else 5, 6]

    def test_holds_the_last_law_meanwhile(self) -> None:
        module, callback = Head(), surge(probe_every=3)
        seen: list[tuple[int, str, float]] = []

        def note() -> None:
            assert callback.decision is not None
            seen.append((module.trainer.current_epoch, callback.decision.reason, callback.decision.used))

        module.on_train_batch_end = lambda *args: note()  # type: ignore[method-assign]
        make_trainer(callback, Later(), max_epochs=2).fit(module, data(20, 16))
        first = next(i for i, (epoch, *_) in enumerate(seen) if epoch == 1)
        assert seen[first][1] == "held: the trained parameters have changed"
        assert seen[first][2] == seen[first - 1][2]
        assert seen[-1][1] != seen[first][1]

    def test_in_mid_epoch_is_noticed_where_a_probe_reads_them(self) -> None:
        module, callback = Head(), surge(probe_every=3)
        module.first.requires_grad_(False)
        counts: list[int] = []

        def note(batch: Any, batch_idx: int) -> None:
            counts.append(callback.history.num_measurements)
            if batch_idx == 10:
                module.first.requires_grad_(True)
                module.trainer.optimizers[0].add_param_group({"params": [*module.first.parameters()]})

        module.on_train_batch_start = note  # type: ignore[method-assign]
        make_trainer(callback, max_epochs=1).fit(module, data(20, 16))
        assert max(counts[:11]) >= 3
        assert min(counts[11:]) == 1
