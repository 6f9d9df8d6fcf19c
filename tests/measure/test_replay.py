"""A step replayed inside `no_trace` leaves nothing behind."""

import copy
import itertools
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics import CatMetric, MeanMetric, Metric, MetricCollection, SumMetric

from lightning_surge.measure import replay
from lightning_surge.measure.replay import RandomState, TraceError, no_trace


def traceless(module: nn.Module) -> Any:
    return no_trace(module.modules(), dict(module.named_parameters()))


class Step(nn.Module):
    """A module whose step touches everything a training step usually does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
        self.mean_loss = MeanMetric()
        self.all_losses = CatMetric()
        self.collection = MetricCollection({"a": SumMetric(), "b": MeanMetric()})
        self.loose: list[Metric] = [SumMetric()]
        self.history: list[float] = []
        self.counts: Counter[str] = Counter()
        self.steps = 0
        self.window: deque[float] = deque([1.0, 2.0], maxlen=2)

    def forward(self, x: Tensor) -> Tensor:
        loss = self.layer(x).square().mean()
        for metric in (self.mean_loss, self.all_losses, self.collection, *self.loose):
            metric.update(loss.detach())
        self.mean_loss.compute()
        self.history.append(loss.item())
        self.window.append(loss.item())
        self.counts["steps"] += 1
        self.steps += 1
        self.last_loss = loss.detach()
        return loss


def metric_states(metric: Metric) -> dict[str, Any]:
    names = (*metric._defaults, "_update_count", "_computed", "_cache")
    return copy.deepcopy({name: getattr(metric, name) for name in names})


class TestWholeStep:
    @pytest.mark.parametrize("fails", [False, True])
    def test_nothing_remains(self, fails: bool) -> None:
        torch.manual_seed(0)
        module, x = Step(), torch.randn(5, 3)
        module(x).backward()
        gradients = [p.grad for p in module.parameters()]
        values = [g.clone() for g in gradients]
        state = copy.deepcopy(module.state_dict())
        metrics = [m for m in module.modules() if isinstance(m, Metric)] + module.loose
        assert len(metrics) == 5
        states = [metric_states(metric) for metric in metrics]
        plain = copy.deepcopy((module.history, module.counts, module.steps, module.window))
        last_loss, random_state = module.last_loss, torch.get_rng_state()

        def replayed() -> None:
            with traceless(module):
                assert all(p.grad is None for p in module.parameters())
                for _ in range(3):
                    module(x).backward()
                assert module.steps == plain[2] + 3
                assert not torch.equal(module.layer[1].running_mean, state["layer.1.running_mean"])
                if fails:
                    raise RuntimeError("out of memory")

        if fails:
            with pytest.raises(RuntimeError, match="out of memory"):
                replayed()
        else:
            replayed()
        for p, gradient, value in zip(module.parameters(), gradients, values, strict=True):
            assert p.grad is gradient
            assert torch.equal(gradient, value)
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, state[name]), name
        for metric, wanted in zip(metrics, states, strict=True):
            now = metric_states(metric)
            assert now.keys() == wanted.keys()
            for name, value in wanted.items():
                # Not torch.equal: lists of tensors and None occur.
                assert repr(now[name]) == repr(value), name
        assert (module.history, module.counts, module.steps, module.window) == plain
        assert module.window.maxlen == 2
        assert module.last_loss is last_loss
        assert torch.equal(torch.get_rng_state(), random_state)


class TestRandomStreams:
    DRAWS: tuple[Callable[[], float], ...] = (
        random.random,
        lambda: float(np.random.random()),  # noqa: NPY002
        lambda: float(torch.rand(())),
    )

    @pytest.mark.parametrize("draw", DRAWS, ids=["python", "numpy", "torch"])
    def test_global_streams(self, draw: Callable[[], float]) -> None:
        module = nn.Dropout()
        state = RandomState.capture()
        wanted = draw()
        state.restore()
        with traceless(module):
            assert draw() == wanted
            draw()
        assert draw() == wanted

    @pytest.mark.parametrize(
        ("generator", "draw"),
        [
            (torch.Generator().manual_seed(1), lambda g: float(torch.rand((), generator=g))),
            (np.random.default_rng(1), lambda g: float(g.random())),
            (np.random.RandomState(1), lambda g: float(g.random_sample())),
            (random.Random(1), lambda g: g.random()),
        ],
        ids=["torch", "numpy", "numpy legacy", "python"],
    )
    @pytest.mark.parametrize("place", [lambda g: g, lambda g: {"a": [(g,)]}], ids=["attribute", "nested"])
    def test_generators_of_the_module(
        self, generator: Any, draw: Callable[[Any], float], place: Callable[[Any], Any]
    ) -> None:
        module = nn.Module()
        module.source = place(generator)
        with traceless(module):
            first = draw(generator)
        assert draw(generator) == first


class TestAttributes:
    @pytest.mark.parametrize(
        ("value", "change"),
        [
            ([1, 2], lambda v: v.append(3)),
            ([1, 2], list.clear),
            ([3, 1], list.sort),
            ({"a": 1}, lambda v: v.update(a=2, b=3)),
            ({"a": 1, "b": 2}, lambda v: v.pop("a")),
            (OrderedDict(a=1, b=2), lambda v: v.move_to_end("a")),
            ({1, 2}, lambda v: v.add(3)),
            ({1, 2}, set.clear),
            (Counter("aab"), lambda v: v.update("abc")),
            (defaultdict(int, a=1), lambda v: v["b"]),
            (deque([1, 2, 3], maxlen=3), lambda v: v.append(4)),
            (bytearray(b"ab"), lambda v: v.extend(b"c")),
            (np.arange(3.0), lambda v: v.fill(7.0)),
            (torch.arange(3.0), lambda v: v.fill_(7.0)),
            (torch.arange(3.0, requires_grad=True), lambda v: v.data.fill_(7.0)),
            ([[1], {"a": [2]}], lambda v: (v[0].append(2), v[1]["a"].append(3))),
            (([1], torch.zeros(2)), lambda v: (v[0].append(2), v[1].add_(1.0))),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_mutable_values_are_put_back_in_place(self, value: Any, change: Callable[[Any], Any]) -> None:
        module = nn.Module()
        module.value = value
        wanted = copy.deepcopy(value)
        with traceless(module):
            change(value)
            assert repr(value) != repr(wanted)
        assert module.value is value
        assert repr(value) == repr(wanted)
        assert type(value) is type(wanted)

    def test_assigned_added_and_deleted_attributes(self) -> None:
        module = nn.Module()
        module.kept, module.dropped, module.counter, module.items = "as it was", [1], 1, [object()]
        dropped, (item,) = module.dropped, module.items
        with traceless(module):
            module.kept = "changed"
            module.counter += 1
            module.added = 5
            module.items[0] = object()
            del module.dropped
        assert (module.kept, module.counter) == ("as it was", 1)
        assert module.dropped is dropped
        assert module.items[0] is item
        assert not hasattr(module, "added")

    def test_slots_of_the_module_and_of_what_it_holds(self) -> None:
        class Base:
            __slots__ = ("inherited", "numbers", "unset")

        class Held(Base):
            __slots__ = ("__private", "own")

            def step(self) -> int:
                self.__private = 1 + getattr(self, "_Held__private", 0)
                return self.__private

        class Slotted(nn.Module):
            __slots__ = ("held", "steps")

        module, held = Slotted(), Held()
        held.inherited, held.own, held.numbers = itertools.count(), 1, [1]
        module.held, module.steps = [held], 0
        assert held.step() == 1
        with traceless(module):
            assert (next(held.inherited), held.step()) == (0, 2)
            held.unset, held.numbers = held.numbers, [*held.numbers, 2]
            del held.own
            module.steps += 1
        assert module.held == [held]
        assert (module.steps, held.own, held.numbers, next(held.inherited), held.step()) == (0, 1, [1], 0, 2)
        assert not hasattr(held, "unset")

    def test_an_iterator_in_a_slot_that_cannot_be_copied_may_not_be_drawn_from(self) -> None:
        class Held:
            __slots__ = ("ticks",)

        module = nn.Module()
        module.held = Held()
        module.held.ticks = (tick for tick in range(3))
        with pytest.raises(TraceError, match=r"uses Held\.ticks"), traceless(module):
            next(module.held.ticks)
        assert next(module.held.ticks) == 0

    def test_cycles_end(self) -> None:
        module = nn.Module()
        module.loop = [1]
        module.loop.append(module.loop)
        module.me = [module]
        with traceless(module):
            module.loop.append(2)
        assert len(module.loop) == 2

    def test_training_flag(self) -> None:
        module = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2).eval())
        with traceless(module):
            module.eval()
            module[1].train()
        assert [m.training for m in module.modules()] == [True, True, False]

    def test_modules_in_plain_containers(self) -> None:
        module = nn.Module()
        module.teachers = {"first": [nn.BatchNorm1d(2)]}
        norm = module.teachers["first"][0]
        with traceless(module):
            norm(torch.randn(4, 2))
            norm.extra = 1
        assert torch.equal(norm.running_mean, torch.zeros(2))
        assert norm.num_batches_tracked == 0
        assert not hasattr(norm, "extra")

    def test_what_cannot_be_written_does_not_stop_the_rest(self) -> None:
        module = nn.Module()
        module.table = np.arange(3.0)
        module.table.setflags(write=False)
        module.register_buffer("ones", torch.ones(1).expand(4))
        state = torch.get_rng_state()
        with traceless(module):
            torch.rand(2)
            module.step = 1
        assert torch.equal(module.ones, torch.ones(4))
        assert torch.equal(torch.get_rng_state(), state)
        assert not hasattr(module, "step")


class TestBuffers:
    def test_values_identity_additions_and_removals(self) -> None:
        module = nn.Module()
        module.register_buffer("total", torch.arange(3.0))
        module.register_buffer("absent", None)
        module.register_buffer("gone", torch.ones(1))
        module.register_buffer("queue", torch.arange(3.0))
        total = module.total
        with traceless(module):
            module.queue.data = torch.zeros(5)
            module.total.add_(1.0)
            module.total = module.total * 2
            module.absent = torch.ones(2)
            module.register_buffer("new", torch.ones(1))
            del module.gone
        assert module.total is total
        assert torch.equal(total, torch.arange(3.0))
        assert torch.equal(module.queue, torch.arange(3.0))
        assert module.absent is None
        assert list(module._buffers) == ["total", "absent", "gone", "queue"]

    def test_sizes_do_not_matter_for_buffers_and_metric_states(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(replay, "COPIED_ELEMENTS", 2)
        module = nn.Module()
        module.register_buffer("total", torch.zeros(4))
        module.metric = CatMetric()
        module.metric.update(torch.arange(4.0))
        with traceless(module):
            module.total.add_(1.0)
            module.metric.value[0].add_(1.0)
        assert torch.equal(module.total, torch.zeros(4))
        assert torch.equal(module.metric.value[0], torch.arange(4.0))


class TestLargeAttributes:
    def test_an_in_place_change_is_reported_and_the_rest_restored(self) -> None:
        module = nn.Module()
        module.largest, module.cache = (torch.zeros(replay.COPIED_ELEMENTS + more) for more in (0, 1))
        module.steps = 0
        state = torch.get_rng_state()

        def change() -> None:
            with traceless(module):
                torch.rand(1)
                module.steps += 1
                module.largest[0] = module.cache[0] = 1.0

        with pytest.raises(
            TraceError, match=r"shape \(1048577,\) in place: register it as a buffer, or pass loss_fn="
        ):
            change()
        assert (module.steps, module.largest[0]) == (0, 0.0)
        assert torch.equal(torch.get_rng_state(), state)

    def test_reading_or_replacing_a_large_one_is_fine(self) -> None:
        module = nn.Module()
        cache = module.cache = torch.zeros(replay.COPIED_ELEMENTS + 1)
        with traceless(module):
            module.cache = module.cache + 1.0
        assert module.cache is cache


class TestParameters:
    @pytest.mark.parametrize("size", [replay.COPIED_ELEMENTS + 7, 5, 0])
    @pytest.mark.parametrize(
        "change", [lambda p: p[-1:].add_(1.0), lambda p: p.copy_(p.flip(0)), lambda p: p.neg_()]
    )
    def test_that_a_step_changes_are_named(self, size: int, change: Callable[[Tensor], object]) -> None:
        module = nn.Module()
        module.register_parameter("weight", nn.Parameter(torch.linspace(-1.0, 1.0, size)))

        def step() -> None:
            with traceless(module), torch.no_grad():
                change(module.weight)

        if size == 0:
            step()
        else:
            with pytest.raises(TraceError, match="changes weight: pass loss_fn="):
                step()


class TestGradients:
    def test_parameters_outside_the_module_and_without_gradients(self) -> None:
        inside, outside = nn.Linear(1, 1), nn.Parameter(torch.ones(2))
        outside.grad = kept = torch.ones(2)
        with no_trace(inside.modules(), {**dict(inside.named_parameters()), "outside": outside}):
            assert outside.grad is None
            (inside(torch.ones(1)).sum() * outside.sum()).backward()
        assert outside.grad is kept
        assert torch.equal(kept, torch.ones(2))
        assert all(p.grad is None for p in inside.parameters())
