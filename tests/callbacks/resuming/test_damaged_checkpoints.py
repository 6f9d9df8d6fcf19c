"""State that no run wrote: damaged, of another version, of other settings, or none at all."""

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_surge import BatchSizeScheduler, ExactResume, SurgeLRCallback, by_examples
from lightning_surge.callbacks.resuming.random_streams import to_portable
from lightning_surge.laws.base import SGDLaw
from lightning_surge.measure.replay import RandomState
from lightning_surge.policy.estimates import EstimatedLaw
from lightning_surge.schedules.sizes import LinearRamp
from tests.trainings import Regression, heard, make_trainer, probing, regression_data, sgd, trained

State = dict[str, Any]

BATCH, STEPS = 16, 14
SIZES = (1.0, 16.0, 300.0)


def net() -> Regression:
    return Regression(width=6)


def batches() -> DataLoader[Any]:
    return regression_data(BATCH * STEPS, BATCH)


OPTIONS: dict[str, State] = {
    "step": {"objective": "step"},
    "first size": {"objective": "alignment", "base_batch_size": None},
    "theorem3": {"law": "theorem3"},
    "sgd": {"objective": "alignment"},
}
every_kind = pytest.mark.parametrize("kind", OPTIONS)


class States(dict[str, State]):
    """The state of a short run with every objective that keeps something of its own."""

    def __repr__(self) -> str:
        return "whole"  # Hypothesis would print all of it


@pytest.fixture(scope="module")
def whole() -> States:
    states = States()
    for name, options in OPTIONS.items():
        callback = probing(**options)
        trained(Regression(sgd, width=6) if name == "sgd" else net(), batches(), callback)
        states[name] = callback.state_dict()
        assert callback.law is not None
    return states


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to everything in a nested state, containers too."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from leaves(item, (*path, index))


DELETED = object()
WRONG: list[Any] = [
    *(None, "text", "", [], {}, [1.0], {"a": 1}, True, False, 1 + 2j),
    *(math.nan, math.inf, -math.inf, -1.0, -1, 0, 0.5, 1, 1e300, 1.7e308, 5e-324, 10**400),
    *(torch.tensor([math.nan]), torch.zeros(0), torch.zeros(3, 2, dtype=torch.int64)),
]


def damaged(state: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy with one entry replaced, or deleted; lists lose everything behind it too."""
    state = copy.deepcopy(state)
    parent = state
    for key in path[:-1]:
        parent = parent[key]
    if value is not DELETED:
        parent[path[-1]] = value
    elif isinstance(parent, dict):
        del parent[path[-1]]
    else:
        del parent[path[-1] :]
    return state


def loaded(callback: SurgeLRCallback, state: Any) -> list[str]:
    """Load, and say what was warned of."""
    with heard() as said:
        callback.load_state_dict(state)
    # torch has its own to say of tensors where they do not belong.
    return [text for text in said if "SurgeLRCallback" in text]


def assert_sane(callback: SurgeLRCallback) -> None:
    base = callback.base_batch_size
    for size in SIZES:
        scale = callback.lr_scale(size)
        reach = 1.0 if base is None else max(size / base, base / size)
        # On its way up from a smaller batch it may be below the bounds that go by the size.
        assert 1e-9 < scale <= reach, (size, scale)


def is_fresh(callback: SurgeLRCallback) -> bool:
    """Whether nothing of a run is left but the base batch size."""
    state, fresh = callback.state_dict(), probing().state_dict()
    parts = ("history", "law_metrics")
    policy = state["policy"]
    return (
        all(state[part] == fresh[part] for part in parts)
        and state["measurer"]["budget"] == fresh["measurer"]["budget"]
        and (policy is None or (policy["law"] is None and policy["at"] is None))
        and math.isnan(state["scheduled_lr"])
        and callback.law is None
    )


class TestAnyDamage:
    @every_kind
    @settings(max_examples=90, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(chosen=st.data())
    def test_of_one_entry_is_left_out_as_a_whole_or_does_no_harm(
        self, whole: States, kind: str, chosen: st.DataObject
    ) -> None:
        state = whole[kind]
        # Any kind of entry as often as another, though there are far more numbers in records.
        room = chosen.draw(st.sampled_from(sorted(state)))
        paths = [path for path in leaves(state) if path[0] == room]
        path = chosen.draw(st.sampled_from(paths))
        value = chosen.draw(st.sampled_from([DELETED, *WRONG]))
        callback = probing(**OPTIONS[kind])
        told = loaded(callback, damaged(state, path, value))
        assert_sane(callback)
        if told:
            (message,) = told
            assert "starts measuring afresh, and base_batch_size is" in message
            assert is_fresh(callback)
        callback.state_dict()

    @every_kind
    def test_nothing_is_wrong_with_a_whole_one(self, whole: States, kind: str) -> None:
        callback = probing(**OPTIONS[kind])
        assert loaded(callback, whole[kind]) == []
        assert callback.law is not None
        assert repr(callback.state_dict()) == repr(whole[kind])
        json.dumps(whole[kind])  # so that no release of torch refuses to load it


class TestDamage:
    """Of each kind, by example."""

    CASES: tuple[tuple[tuple[Any, ...], Any, str], ...] = (
        (("history", "records"), DELETED, "KeyError: 'records'"),
        (("history", "records", 0, "norms", 1), math.nan, "statistics.grad_sq < inf, got .*=nan"),
        (("history", "records", 0, "norms"), [1.0, 2.0], "Measurement.statistics.trace_cov"),
        (("history", "records", 0, "norms", 0), -4.0, "statistics and sizes above 0, .*batch_size=-4.0"),
        (("history", "records", 0, "passes"), -1.0, "statistics and sizes above 0, .*passes=-1.0"),
        (("history", "num_measurements"), 1, "num_measurements >= 13, got num_measurements=1"),
        (("policy", "law", "kind"), "GoodLaw", "KeyError"),
        (("policy", "law", "law", "kind"), "GoodLaw", "KeyError: 'GoodLaw'"),
        (("policy", "law", "law", "kind"), "EdgeLaw", "'edge' is retired: use objective='progress'"),
        (("policy", "law", "law", "alignment_scale"), math.nan, "Expected 0 <= alignment_scale < inf, got"),
        (("policy", "law", "law", "alignment_scale"), "48", "got alignment_scale='48'"),
        (("policy", "law", "replicates", 0, 1), 1.5, "Expected shares between 0 and 1"),
        (("policy", "law", "reach"), [8.0, 4.0], "a reach from low to high, got .*(8.0, 4.0)"),
        (("policy", "used_to"), 1e300, "in reach of 4, and a reason or None, got used_to=1e.300"),
        (("policy", "used_to"), math.nan, "PolicyState.used_to < inf, got PolicyState.used_to=nan"),
        (("policy", "at"), 5e-324, "in reach of 4"),
        (("policy", "held"), 3, "PolicyState.held to be of type str, got 3"),
        (("measurer", "budget", "_spacing"), 0.5, "Expected 1 <= spacing < inf, got spacing=0.5"),
        (("measurer", "budget", "trained"), math.inf, "Expected .*budget.trained < inf, got .*trained=inf"),
        (("measurer", "seen"), [3, 0.0], "got 3 batches of 0 examples"),
        (("measurer", "seen"), [3, 16.0], "hold the 224 trained on, got 3 batches of 16 examples"),
        (("measurer", "seen"), [3, 1e9], "got 3 batches of 1e.09 examples"),
        (("measurer", "largest_lr"), math.nan, "got .*measurer.largest_lr=nan"),
        (("scheduled_lr",), -0.1, "Expected 0 <= scheduled_lr < inf, got scheduled_lr=-0.1"),
        (("law_metrics",), {"surge/a": None}, "law_metrics.*got .*None"),
        (("version",), 0, "state of version 2 in the checkpoint, got 0: "),
        (("version",), DELETED, "state of version 2 in the checkpoint, got None: "),
    )

    @pytest.mark.parametrize(("path", "value", "message"), CASES)
    def test_is_named_and_the_run_begins_afresh(
        self, whole: States, path: tuple[Any, ...], value: Any, message: str
    ) -> None:
        # A callback that has seen another run forgets that one too.
        callback = probing(objective="step")
        callback.load_state_dict(whole["step"])
        state = whole["step"]
        if path == ("policy", "law", "kind"):
            path, value = ("policy", "law", "law"), {"kind": "GoodLaw"}
        with pytest.warns(UserWarning, match=f"{message}.*starts measuring afresh"):
            callback.load_state_dict(damaged(state, path, value))
        assert is_fresh(callback)
        assert callback.base_batch_size == 4
        assert callback.lr_scale(64) == 1.05

    @pytest.mark.parametrize("state", [[1, 2], "state", 7])
    def test_of_all_of_it(self, state: Any) -> None:
        callback = SurgeLRCallback()
        with pytest.warns(UserWarning, match="of version 2 .* got None: .* first step: pass base"):
            callback.load_state_dict(state)
        assert is_fresh(callback)
        assert callback.lr_scale(64) == 1.0

    @pytest.mark.parametrize(
        ("base", "kept"), [(16.0, 16.0), (math.nan, None), ("16", None), (5e-324, None), (1e300, None)]
    )
    def test_leaves_the_base_batch_size_if_that_is_whole(
        self, whole: States, base: Any, kept: float | None
    ) -> None:
        state = damaged(damaged(whole["step"], ("policy",), DELETED), ("base_batch_size",), base)
        for configured in (None, 8.0):
            callback = SurgeLRCallback(configured)
            with pytest.warns(
                UserWarning, match=r"base_batch_size is (16\.|8\.|that of the first step: pass)"
            ):
                callback.load_state_dict(state)
            assert callback.base_batch_size == (configured or kept)
            assert callback.lr_scale(64) == (1.0 if configured is kept is None else 1.05)

    def test_numbers_that_no_square_can_hold_are_no_standard_error(self) -> None:
        # A share this small makes a pseudo-value beyond every number.
        laws = [SGDLaw(max_lr=1.0, noise_scale=scale) for scale in (1.0, 2.0)]
        law = EstimatedLaw(laws[0], ((laws[1], 5e-324), (laws[0], 0.5)), num_measurements=2)
        assert law.standard_error(lambda law: law.lr(1.0)) == math.inf


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("going on") / "whole.ckpt"
    trained(net(), batches(), probing(objective="step")).trainer.save_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def without_state(checkpoint: Path) -> Path:
    content = torch.load(checkpoint, weights_only=True)
    content["callbacks"].clear()
    torch.save(content, checkpoint.with_name("without.ckpt"))
    return checkpoint.with_name("without.ckpt")


class TestGoingOn:
    """With a Trainer, from a checkpoint on disk."""

    def _resumed(self, path: Path, callback: SurgeLRCallback) -> Regression:
        module = trained(net(), batches(), callback, resume=path, max_epochs=2)
        assert len(module.lrs) == STEPS
        assert all(0.01 / 4 <= lr <= 0.04 for lr in module.lrs)
        return module

    def test_from_one_that_knows_nothing_of_the_callback(self, without_state: Path) -> None:
        callback = probing(base_batch_size=None)
        with pytest.warns(UserWarning, match="law='measured' in the checkpoint, got none: .*of the first"):
            module = self._resumed(without_state, callback)
        assert callback.base_batch_size == BATCH
        assert module.lrs[0] == 0.01
        assert callback.history.num_measurements > 4

    # Lightning says, too, that a callback of the checkpoint is missing.
    @pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")
    def test_with_another_law(self, checkpoint: Path) -> None:
        callback = probing(base_batch_size=None, law="theorem3")
        message = "law='theorem3' .* got that of .*'measured'.* base_batch_size is 4"
        with pytest.warns(UserWarning, match=message):
            module = self._resumed(checkpoint, callback)
        assert callback.base_batch_size == 4
        assert module.lrs[0] == 0.0105  # on the way to sqrt(16 / 4) until something is measured
        assert callback.history.num_measurements > 4

    @pytest.mark.parametrize("objective", ["alignment", "progress"])
    def test_with_another_objective_goes_on_with_the_measurements(
        self, checkpoint: Path, objective: str
    ) -> None:
        callback = probing(objective=objective)
        self._resumed(checkpoint, callback)
        assert callback.history.num_measurements > STEPS

    @pytest.mark.parametrize("whole_state", [True, False])
    def test_in_the_middle_of_a_run(self, whole_state: bool) -> None:
        # As a learning-rate finder does that is asked within training.
        def restore(trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == 7:
                state = copy.deepcopy(callback.state_dict())
                callback.load_state_dict(state if whole_state else {"version": 2})

        callback, again = probing(objective="step"), net()
        trainer = make_trainer(callback, LambdaCallback(on_train_batch_end=restore))
        if whole_state:
            trainer.fit(again, batches())
            without = probing(objective="step")
            assert again.lrs == trained(net(), batches(), without).lrs
            assert repr(callback.state_dict()) == repr(without.state_dict())
        else:
            with pytest.warns(UserWarning, match="Expected SurgeState with 'base_batch_size'.*afresh"):
                trainer.fit(again, batches())
            assert callback.history.num_measurements == STEPS - 7 - 1

    @pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
    def test_a_validation_of_a_checkpoint_without_state_keeps_what_was_measured(
        self, without_state: Path
    ) -> None:
        class Validated(Regression):
            def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
                self.net(batch[0])

        callback = probing()
        trainer = make_trainer(callback)
        module = Validated(width=6)
        trainer.fit(module, batches())
        count = callback.history.num_measurements
        trainer.validate(module, batches(), ckpt_path=without_state, verbose=False)
        assert callback.history.num_measurements == count > 4


class TestBatchSizeScheduler:
    RAMP: ClassVar[Any] = LinearRamp(4, 64, duration=1000, unit="examples")

    def _state(self) -> State:
        state = BatchSizeScheduler(self.RAMP).state_dict()
        state |= {"accumulation": 4, "examples": 400.0, "epoch_begin": [3, 320.0, 1.0]}
        return copy.deepcopy(state)

    @settings(max_examples=100, deadline=None)
    @given(chosen=st.data())
    def test_any_damage_of_one_entry_is_left_out_as_a_whole(self, chosen: st.DataObject) -> None:
        state = self._state()
        path = chosen.draw(st.sampled_from(list(leaves(state))))
        value = chosen.draw(st.sampled_from([DELETED, *WRONG]))
        scheduler = BatchSizeScheduler(self.RAMP)
        with heard() as said:
            scheduler.load_state_dict(damaged(state, path, value))
        now = scheduler.state_dict()
        begin = now["epoch_begin"]
        assert type(now["accumulation"]) is int
        assert now["accumulation"] >= 1
        assert all(0.0 <= number < math.inf for number in (now["examples"], *begin))
        if said:
            assert "counts examples from 0" in said[0]
            assert (now["accumulation"], now["examples"], begin) == (1, 0.0, [0, 0.0, 0.0])

    @pytest.mark.parametrize(
        ("path", "value", "message"),
        [
            (("accumulation",), 0, "whole number accumulation >= 1, got accumulation=0"),
            (("examples",), math.nan, "SchedulerState.examples < inf, got SchedulerState.examples=nan"),
            (("epoch_begin",), [1, 2.0, -3.0], "0 <= examples and epoch_begin < inf, got .*=-3.0"),
            (("version",), 0, "version 2 in the checkpoint, got 0"),
        ],
    )
    def test_the_damage_is_named(self, path: tuple[Any, ...], value: Any, message: str) -> None:
        scheduler = BatchSizeScheduler(self.RAMP)
        with pytest.warns(UserWarning, match=f"{message}.*counts examples from 0"):
            scheduler.load_state_dict(damaged(self._state(), path, value))

    @pytest.mark.filterwarnings("ignore:Expected a training loader with state_dict and load_state_dict")
    @pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")
    @pytest.mark.parametrize(
        ("path", "value"),
        [
            (("ranks",), DELETED),
            (("ranks", 0, "streams"), DELETED),
            (("ranks", 0, "streams", "torch"), torch.zeros(3, dtype=torch.uint8)),
            (("ranks", 0, "streams", "python", "words"), torch.zeros(7, dtype=torch.int64)),
            (("ranks", 0, "streams", "numpy", "words"), torch.zeros(7, dtype=torch.int64)),
            (("ranks", 0, "streams", "numpy", "name"), "MT1"),
            (("ranks", 0, "seeds"), None),
        ],
    )
    def test_damaged_random_states_are_left_alone_altogether(
        self, tmp_path: Path, path: tuple[Any, ...], value: Any
    ) -> None:
        saving = ModelCheckpoint(tmp_path, filename="whole", every_n_train_steps=STEPS)
        make_trainer(ExactResume(), saving).fit(net(), batches())
        content = torch.load(tmp_path / "whole.ckpt", weights_only=True)
        content["callbacks"]["ExactResume"] = damaged(content["callbacks"]["ExactResume"], path, value)
        torch.save(content, tmp_path / "changed.ckpt")

        streams: list[Any] = []
        look = LambdaCallback(
            on_train_epoch_start=lambda *_: streams.append(to_portable(RandomState.capture()))
        )
        module = net()
        trainer = make_trainer(ExactResume(), look, max_epochs=2)
        pl.seed_everything(5, verbose=False)
        expected = to_portable(RandomState.capture())
        with pytest.warns(UserWarning, match="Expected whole random states in the checkpoint, got "):
            trainer.fit(module, batches(), ckpt_path=tmp_path / "changed.ckpt", weights_only=True)
        assert len(module.lrs) == STEPS
        for kind in ("python", "numpy"):
            assert torch.equal(streams[0][kind]["words"], expected[kind]["words"])


class TestClock:
    @pytest.mark.parametrize(
        ("name", "value"), [("examples", math.nan), ("examples", -1.0), ("rounding", "0"), ("ticks", 1.5)]
    )
    def test_damage_is_refused_before_the_scheduler_is_touched(self, name: str, value: Any) -> None:
        def clock() -> Any:
            optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
            return by_examples(torch.optim.lr_scheduler.StepLR(optimizer, 1), examples_per_step=4)

        saved = clock()
        saved.advance(8.0)
        saved.optimizer.step()
        saved.step()
        fresh = clock()
        before = fresh.state_dict()
        with pytest.raises(ValueError, match=f"{name}.*{value!r}: "):
            fresh.load_state_dict(saved.state_dict() | {name: value})
        assert fresh.state_dict() == before
