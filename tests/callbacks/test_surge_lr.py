import itertools
import math
import random
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, LambdaCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader, default_collate
from torchmetrics import MeanSquaredError

from lightning_surge import BatchSizeScheduler, BatchSizeWarmup, SurgeLRCallback
from lightning_surge.callbacks.logging import law_metrics
from lightning_surge.laws.base import LinearLaw
from lightning_surge.measure.budget import ARITHMETIC
from lightning_surge.measure.records import ChunkStatistics, Measurement, SizedValue
from lightning_surge.policy.estimates import EstimatedLaw
from lightning_surge.policy.policy import Decision
from lightning_surge.schedules import Milestones
from tests.drawn import halves, history_of, measured_law
from tests.trainings import (
    MakeOptimizer,
    Memory,
    Outside,
    Regression,
    Slope,
    adamw,
    assert_same,
    columns,
    layouts_in,
    make_trainer,
    ones,
    probing,
    regression_data,
    sampled,
    sgd,
    trained,
    two_groups,
)

SUFFIXED = ["lr_scheduled", "lr_predicted", "lr_used"]


class Noting(Regression):
    """Notes the size of every batch that passes, in training and in probes."""

    def __init__(self) -> None:
        super().__init__()
        self.outside = Outside()

    def loss(self, batch: Any) -> Tensor:
        self.outside.notes.append(len(batch[0]))
        return super().loss(batch)


class Everything(Regression):
    """Whatever a probe could leave a trace in: dropout, statistics, logs, metrics, lists, counters."""

    def __init__(self, make_optimizer: MakeOptimizer, *, batch_norm: bool) -> None:
        super().__init__(make_optimizer)
        norm = nn.BatchNorm1d(8) if batch_norm else nn.Identity()
        self.net = nn.Sequential(nn.Linear(4, 8), norm, nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))
        self.metric = MeanSquaredError()
        self.register_buffer("average", torch.zeros(()))
        self.losses: list[float] = []
        self.seen = {"batches": [0]}
        self.outside = Outside()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.outside.notes.append(batch_idx)
        self.calls += 1
        self.seen["batches"].append(batch_idx)
        noise = random.random() + np.random.rand()  # noqa: NPY002
        prediction = self.net(x + 0.01 * noise)
        self.average.mul_(0.9).add_(prediction.detach().mean())
        loss = nn.functional.mse_loss(prediction, y)
        self.metric(prediction, y)
        self.losses.append(loss.item())
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"metric": self.metric}, on_step=True, on_epoch=True)
        return {"loss": loss}


class TestDryRun:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("source", "batch_size", "accumulation", "law", "batch_norm", "make_optimizer"),
        [
            ("pooled", 2, 1, "measured", True, sgd),
            ("pooled", 2, 1, "theorem2", True, adamw),
            ("falls back", 16, 1, "measured", True, adamw),
            ("sliced", 16, 1, "measured", False, sgd),
            ("sliced", 16, 1, "theorem3", False, adamw),
            ("micro-batches", 4, 4, "measured", True, sgd),
            ("micro-batches", 2, 8, "measured", True, adamw),
            ("sliced micro-batches", 4, 2, "measured", False, adamw),
            ("pooled micro-batches", 4, 4, "theorem3", True, adamw),
        ],
    )
    def test_is_bit_identical_to_no_callback(
        self, source: str, batch_size: int, accumulation: int, law: str, batch_norm: bool, make_optimizer: Any
    ) -> None:
        def run(*callbacks: Callback) -> tuple[Everything, Any, Memory]:
            memory = Memory()
            options = {"logger": memory, "accumulate_grad_batches": accumulation, "max_epochs": 2}
            # 22 is no multiple of 4 or 8: the last window is partial.
            data = regression_data(22 * batch_size, batch_size)
            module = trained(Everything(make_optimizer, batch_norm=batch_norm), data, *callbacks, **options)
            after = {
                "module": module.state_dict(),
                "optimizer": module.trainer.optimizers[0].state_dict(),
                "random": [torch.get_rng_state(), np.random.get_state(), random.getstate()],  # noqa: NPY002
                "metric": [module.metric.metric_state, module.metric._update_count],
                "python": [module.calls, module.losses, module.seen, module.group_lrs],
                "gradients": [parameter.grad for parameter in module.parameters()],
                "logged": [
                    {key: value for key, value in row.items() if "surge/" not in key}
                    for row in [module.trainer.callback_metrics, *memory.rows]
                ],
            }
            return module, after, memory

        _, expected, _ = run()
        base = {"sliced": 4, "falls back": 4}.get(source)
        examples = max(16, 4 * batch_size if batch_norm else 4)
        callback = SurgeLRCallback(base, law, "step", dry_run=True, probe_every=1, probe_examples=examples)
        couples = source in ("falls back", "pooled micro-batches")
        with pytest.warns(UserWarning, match="couples examples") if couples else nullcontext():
            module, after, memory = run(callback)
        assert callback.history.num_measurements >= 4
        assert len(module.outside.notes) > 44  # so something has been replayed
        assert memory.of("surge/noise_scale")
        assert memory.of("surge/lr_used") == memory.of("surge/lr_scheduled")
        assert_same(after, expected)

    def test_logs_what_it_would_do(self) -> None:
        memory = Memory()
        callback = SurgeLRCallback(4, "linear", dry_run=True)
        make_trainer(callback, logger=memory).fit(Slope(0.5), ones(32, 8))
        assert memory.of("surge/lr_predicted") == [1.0] * 4


class TestLearningRate:
    @pytest.mark.parametrize(
        ("batch_size", "accumulation", "make_optimizer", "law", "objective"),
        [
            (16, 1, adamw, "measured", "step"),
            (16, 1, sgd, "measured", "step"),
            (16, 1, two_groups, "measured", "progress"),
            (4, 4, two_groups, "measured", "step"),
            (16, 1, adamw, "theorem2", "step"),
            (16, 1, adamw, "theorem3", "step"),
        ],
    )
    def test_is_scheduled_times_the_decision_for_the_examples_behind_the_step(
        self,
        decisions: list[tuple[float, Decision]],
        batch_size: int,
        accumulation: int,
        make_optimizer: MakeOptimizer,
        law: str,
        objective: str,
    ) -> None:
        module = Regression(make_optimizer, lambda optimizer: ExponentialLR(optimizer, 0.5))
        callback = SurgeLRCallback(2, law, objective, probe_every=1, probe_examples=16)
        trainer = make_trainer(callback, accumulate_grad_batches=accumulation, max_epochs=2)
        trainer.fit(module, regression_data(16 * 12 + 4 + 1, batch_size))
        sizes = [size for size, _ in decisions]
        # Two micro-batches of four are divided as if they were four.
        assert sizes == 2 * [*[16.0] * 12, 10.0 if accumulation == 4 else 5.0]
        base = [0.04, 0.01] if make_optimizer is two_groups else [0.05 if make_optimizer is sgd else 0.01]
        # Halved at every step, which is exact.
        assert module.group_lrs == [
            [lr * 0.5**step * decision.used for lr in base] for step, (_, decision) in enumerate(decisions)
        ]
        # A measurement has moved it away from where it began.
        assert decisions[0][1].used == 1.05
        assert decisions[-2][1].used != decisions[0][1].used
        last = 0.5 ** len(decisions)
        assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [lr * last for lr in base]

    def test_of_a_rule_is_one_for_the_base_batch_size_taken_from_the_first_step(self) -> None:
        module = Slope()
        callback = SurgeLRCallback(law="linear")
        assert callback.base_batch_size is None
        assert callback.lr_scale(64) == 1.0
        make_trainer(callback, accumulate_grad_batches=2).fit(module, ones(14, 4))
        assert callback.base_batch_size == 8
        # The last window has 6 examples.
        assert module.weight.item() == -1.0 - 0.75
        assert isinstance(callback.law, LinearLaw)
        assert callback.lr_scale(20) == 2.5
        # Four passes of training: nothing is measured.
        assert (len(module.steps), callback.overhead) == (4, 0.0)

    def test_of_a_group_without_parameters_is_no_obstacle(self) -> None:
        module = Regression(lambda m: SGD([{"params": []}, {"params": list(m.parameters())}], lr=0.5))
        make_trainer(SurgeLRCallback(4, "linear")).fit(module, regression_data(16, 8))
        assert module.group_lrs == [[1.0, 1.0]] * 2


class TestBatchSize:
    def test_is_what_batch_size_fn_counts(self, decisions: list[tuple[float, Decision]]) -> None:
        # Tokens: every example of the batch is four of them.
        callback = SurgeLRCallback(
            32, "linear", batch_size_fn=lambda batch: batch[0].numel(), lr_scale_bounds=(1e-3, 1e3)
        )
        module = trained(Regression(sgd), regression_data(35, 8), callback, accumulate_grad_batches=2)
        # The last window, of 12 tokens, is one batch that Lightning divides by two.
        assert [size for size, _ in decisions] == [64.0, 64.0, 24.0]
        assert module.group_lrs == [[0.05 * 2.0], [0.05 * 2.0], [0.05 * 0.75]]

    def test_of_a_short_last_batch_is_measured_like_any_other(self) -> None:
        # Batches are pooled and cut, and every seventh holds a single example.
        callback = SurgeLRCallback(1, probe_every=1, probe_examples=9)
        make_trainer(callback, max_epochs=4).fit(Regression(), regression_data(25, 4))
        assert callback.history.num_measurements >= 5
        sizes = {record["norms"][0] for record in callback.history.state_dict()["records"]}
        assert 9.0 in sizes  # the short batch of one between two of four


class TestMeasuring:
    # Dropout of 0.8 would hide what BatchNorm does.
    @pytest.mark.parametrize("coupling", [0.0, 0.8, "sum"])
    def test_of_coupled_losses_falls_back_to_whole_batches(self, coupling: Any) -> None:
        class Coupled(Noting):
            def __init__(self) -> None:
                super().__init__()
                if coupling != "sum":
                    layers = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(coupling), nn.Linear(8, 1)
                    self.net = nn.Sequential(*layers)

            def loss(self, batch: Any) -> Tensor:
                return super().loss(batch) * (len(batch[0]) if coupling == "sum" else 1)

        callback, module = SurgeLRCallback(4, probe_every=1), Coupled()
        message = "couples examples .* sum .* Whole batches are pooled"
        with pytest.warns(UserWarning, match=message) as told:
            make_trainer(callback, max_epochs=3).fit(module, regression_data(256, 16))
        assert sum("couples" in str(warning.message) for warning in told) == 1
        assert min(module.outside.notes[:40]) < 16
        assert set(module.outside.notes[-40:]) == {16}
        assert callback.history.num_measurements >= 5
        assert isinstance(callback.law, EstimatedLaw)

    def test_uses_loss_fn_instead_of_training_step(self) -> None:
        outside = Outside()
        replayed: list[int] = []

        class Counting(Regression):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                outside.notes.append(batch_idx)
                return self.loss(batch)

        def loss_fn(module: Any, batch: Any) -> Tensor:
            replayed.append(len(batch[0]))
            return module.loss(batch)  # type: ignore[no-any-return]

        callback = probing(objective="alignment", loss_fn=loss_fn)
        make_trainer(callback).fit(Counting(), regression_data(80, 16))
        assert outside.notes == [0, 1, 2, 3, 4]
        # Once 1 + 4 passes to compare; then 4 slices in each of 4 probes.
        assert replayed == [16, *[4] * 4, *[4] * 4 * 4]
        assert callback.history.num_measurements == 4

    def test_uses_split_batch(self) -> None:
        class Keyed(Regression):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                sizes.append(len(batch["x"]))
                assert batch["id"] == "one for all"
                return self.loss((batch["x"], batch["y"]))

        def collate(rows: list[Any]) -> dict[str, Any]:
            x, y = default_collate(rows)
            # The third is of another length, so that no default could cut it.
            return {"x": x, "y": y, "extra": torch.zeros(3), "id": "one for all"}

        def split(batch: Any, num_slices: int) -> list[Any]:
            asked.append(num_slices)
            # The last one is the longest, on purpose.
            parts = [batch[key].tensor_split(list(range(1, num_slices))) for key in ("x", "y")]
            return [batch | {"x": x, "y": y} for x, y in zip(*parts, strict=True)]

        sizes: list[int] = []
        asked: list[int] = []
        callback = probing(split_batch=split, batch_size_fn=lambda batch: len(batch["x"]))
        loader = DataLoader(regression_data(80, 16).dataset, batch_size=16, collate_fn=collate)
        make_trainer(callback).fit(Keyed(), loader)
        assert 4 in asked
        assert {1, 13, 16} == set(sizes)
        assert callback.history.num_measurements == 4
        latest = callback.history.latest
        assert latest is not None
        assert latest.pairs == 16**2 - (1 + 1 + 1 + 13**2)

    def test_without_cutting_pools_whole_batches(self) -> None:
        callback = SurgeLRCallback(4, probe_every=1, split_batch=False)
        module = trained(Noting(), regression_data(256, 16), callback)
        assert set(module.outside.notes) == {16}
        assert callback.history.num_measurements >= 2

    @pytest.mark.parametrize("clip", [None, 1e-3])
    def test_from_accumulation_costs_no_pass(
        self, decisions: list[tuple[float, Decision]], clip: float | None
    ) -> None:
        module = Everything(adamw, batch_norm=True)
        callback = SurgeLRCallback(4, probe_every=1, dry_run=True)
        options = {"accumulate_grad_batches": 4, "gradient_clip_val": clip}
        make_trainer(callback, **options).fit(module, regression_data(96 + 6, 4))
        # 26 batches are 7 windows, of which the last one has 2, the second of 2 examples.
        assert callback.history.num_measurements == 7
        assert not any(decision.reason.startswith("held") for _, decision in decisions)
        assert len(module.outside.notes) == 26
        assert callback.overhead == pytest.approx(ARITHMETIC)
        latest = callback.history.latest
        assert latest is not None
        assert latest.statistics.batch_size == 6.0
        assert latest.num_chunks == 2
        assert latest.statistics.trace_cov > 0.0

    @pytest.mark.parametrize(
        ("options", "every"), [({}, 8), ({"log_peak": True}, 4), ({"objective": "step"}, 1)]
    )
    def test_curvature_where_it_is_asked_for(self, options: dict[str, Any], every: int) -> None:
        callback = probing(**options)
        make_trainer(callback).fit(Regression(), regression_data(128, 16))
        curved = [bool(record.curvatures) for record in callback.history._records]
        assert curved == [every < 8 and index % every == 0 for index in range(7)]
        assert math.isinf(callback.law.peak.batch_size) or every < 8  # type: ignore[union-attr]

    def test_of_a_slice_against_the_rest_of_a_large_batch(self) -> None:
        callback, module = SurgeLRCallback(16, max_overhead=0.2), Noting()
        make_trainer(callback).fit(module, regression_data(32 * 512, 512))
        latest = callback.history.latest
        assert latest is not None
        assert latest.statistics.batch_size == 512.0
        assert latest.num_chunks == 9  # eight slices of 32, and the rest
        assert latest.passes == 256.0
        assert latest.pairs == 512**2 - 8 * 32**2 - 256**2
        # A part of the first one is compared with its slices, once.
        assert sorted(set(module.outside.notes)) == [4, 16, 32, 512]
        assert callback.overhead <= 0.2

    def test_comes_before_the_first_change_of_the_batch_size_and_right_after_it(
        self, decisions: list[tuple[float, Decision]]
    ) -> None:
        seen: list[tuple[float, int]] = []

        def note(*args: Any) -> None:
            seen.append((decisions[-1][0], callback.history.num_measurements))

        callback = SurgeLRCallback(16, max_overhead=0.2)
        scheduler = BatchSizeScheduler(Milestones({0: 16, 64: 64}))
        loader = sampled(regression_data(2048, 16).dataset, 64, shuffle=False)
        make_trainer(scheduler, callback, LambdaCallback(on_train_batch_end=note)).fit(Regression(), loader)
        before = [number for size, number in seen if size == 16]
        after = [number for size, number in seen if size == 64]
        assert before[-1] >= 1
        assert after[0] == before[-1] + 1
        assert callback.law_history[before[-1]].step == 64

    @pytest.mark.slow
    @pytest.mark.parametrize("scheduler", [None, BatchSizeWarmup(16, 64, 20)])
    @pytest.mark.parametrize("dropout", [0.0, 0.2])
    def test_a_run_that_affords_none_is_told_so_once_and_what_would(
        self, caplog: pytest.LogCaptureFixture, dropout: float, scheduler: Any
    ) -> None:
        def measured(max_overhead: float, law: Any = "measured") -> tuple[int, list[str]]:
            caplog.clear()
            module, callback = Regression(), SurgeLRCallback(8, law, max_overhead=max_overhead)
            module.net.insert(1, nn.Dropout(dropout))
            with caplog.at_level("INFO"):
                trained(module, regression_data(640, 16), *filter(None, [scheduler]), callback, max_epochs=2)
            said = [text for text in caplog.messages if "the smallest measurement passes" in text]
            return len(callback.history), said

        count, (said,) = measured(0.01)
        assert said.startswith("Nothing") is (count == 0) is (scheduler is None)
        assert ("accumulate_grad_batches=2" in said) is (scheduler is None)
        assert "of the 1280 examples" in said
        assert measured(0.01, "sqrt") == (0, [])
        enough = float(re.findall(r"max_overhead=([\d.]+)\b", said)[-1])
        assert all(count and not told for count, told in map(measured, (enough, 1.2 * enough, 3.0 * enough)))


class TestArguments:
    @staticmethod
    def _run(*args: Any, **options: Any) -> tuple[SurgeLRCallback, Regression]:
        callback = SurgeLRCallback(*args, **({"probe_examples": 16} | options))
        module = trained(Regression(), regression_data(16 * 16, 16), callback)
        return callback, module

    @pytest.mark.parametrize(("every", "measurements"), [(1, 15), (3, 5), (15, 1), (16, 0)])
    def test_probe_every(self, every: int, measurements: int) -> None:
        callback, _ = self._run(4, probe_every=every)
        assert callback.history.num_measurements == measurements

    @pytest.mark.parametrize(("examples", "measured"), [(16, 16.0), (17, 32.0), (64, 64.0)])
    def test_probe_examples(self, examples: int, measured: float) -> None:
        callback, _ = self._run(4, probe_every=1, probe_examples=examples)
        latest = callback.history.latest
        assert latest is not None
        assert latest.statistics.batch_size == measured

    def test_lr_scale_bounds(self, decisions: list[tuple[float, Decision]]) -> None:
        _, module = self._run(4, probe_every=1, lr_scale_bounds=(1.0, 1.0))
        assert module.group_lrs == [[0.01]] * 16
        assert decisions[0][1].predicted == 2.0
        assert decisions[0][1].reason == "bounded above by lr_scale_bounds"

    def test_max_drift_per_step(self, decisions: list[tuple[float, Decision]]) -> None:
        def steepest(drift: float) -> float:
            decisions.clear()
            self._run(4, objective="progress", probe_every=1, max_drift_per_step=drift, half_life=1.0)
            used = [decision.used for _, decision in decisions]
            return max(after / before for before, after in itertools.pairwise(used)) - 1.0

        assert steepest(0.001) == pytest.approx(0.001)
        assert steepest(0.01) == pytest.approx(0.01)

    def test_half_life(self) -> None:
        short, _ = self._run(16, probe_every=1, half_life=0.1)
        long, _ = self._run(16, probe_every=1, half_life=100.0)
        latest = short.history.latest
        assert latest is not None
        assert short.history.stats().trace_cov == pytest.approx(latest.statistics.trace_cov, rel=0.01)
        assert long.history.stats().trace_cov != pytest.approx(latest.statistics.trace_cov, rel=0.01)

    def test_custom_scalars_can_be_left_out_and_other_ranks_write_none(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for rank, wanted in ((1, True), (0, False), (0, True)):
            monkeypatch.setattr(rank_zero_only, "rank", rank)
            logger = TensorBoardLogger(tmp_path)
            callback = SurgeLRCallback(4, "sqrt", custom_scalars=wanted)
            make_trainer(callback, logger=logger).fit(Slope(), ones(4, 2))
            assert any(tmp_path.rglob("*tfevents*")) == (rank == 0)
            assert rank == 1 or len(layouts_in(logger)) == wanted


class TestLogging:
    def _fit(self, logger: Any, make_optimizer: MakeOptimizer = adamw) -> tuple[SurgeLRCallback, Regression]:
        callback, data = probing(log_peak=True), regression_data(16 * 16, 16)
        return callback, trained(Regression(make_optimizer), data, callback, logger=logger)

    def test_to_csv_has_every_quantity_and_its_standard_error(
        self, tmp_path: Path, decisions: list[tuple[float, Decision]]
    ) -> None:
        logger = CSVLogger(tmp_path)
        callback, module = self._fit(logger)
        logged = columns(logger)
        assert logged["surge/lr_used"] == pytest.approx([lr for (lr,) in module.group_lrs], rel=1e-6)
        assert logged["surge/lr_scheduled"] == pytest.approx([0.01] * 16)
        predicted = [0.01 * decision.predicted for _, decision in decisions]
        assert logged["surge/lr_predicted"] == pytest.approx(predicted, rel=1e-6)
        assert logged["surge/batch_size"] == [16.0] * 16
        law = callback.law
        assert isinstance(law, EstimatedLaw)
        assert law.num_measurements == 15 == callback.history.num_measurements
        assert (callback.law_history[-1].step, callback.law_history[-1].law) == (15, law)
        stats = callback.history.stats()
        expected = {
            "peak_batch_size": law.peak.batch_size,
            "peak_lr": law.peak.lr,
            "critical_batch_size": law.critical_batch_size,
            "noise_scale": stats.noise_scale,
            "alignment": 2.0 * law.gain(16) / law.lr(16),
            "curvature": 2.0 * law.gain(16) / law.lr(16) ** 2,
            "overhead": callback.overhead,
            "critical_batch_size_standard_error": law.standard_error(lambda law: law.critical_batch_size),
            "lr_scale_standard_error": decisions[-1][1].standard_error,
        }
        for name, value in expected.items():
            assert logged[f"surge/{name}"][-1] == pytest.approx(value, rel=1e-5), name
        for name in ("alignment", "curvature", "noise_scale", "critical_batch_size"):
            assert 0.0 < logged[f"surge/{name}_standard_error"][-1] < math.inf
        assert 0.0 < logged["surge/overhead_time"][-1] < 1.0
        assert callback.lr_scale(64) == callback._learner.policy.decide(64).used  # type: ignore[union-attr]

    def test_of_peaks_has_standard_errors_where_there_is_a_peak(self) -> None:
        statistics = [ChunkStatistics(8.0, 1.0, noise, ()) for noise in (8.0, 12.0)]
        history = history_of([Measurement(each, (SizedValue(8.0, 1.0),), 1.0) for each in statistics], 1e12)
        law = halves(*(measured_law(2.0, 48.0, 1.0, signal) for signal in (1.0, 0.9, 1.1)))
        metrics = law_metrics(history, law, 16.0)
        # r = c N^2 / D_0 = 4: the peak is at 48 / 3, N(16) = 2 / 2, D(16) = 1 + 1.
        assert metrics["surge/peak_batch_size"] == pytest.approx(16.0)
        assert metrics["surge/peak_lr"] == pytest.approx(0.5)
        assert metrics["surge/critical_batch_size"] == pytest.approx(48.0 / 5.0)
        assert metrics["surge/alignment"] == pytest.approx(1.0)
        assert metrics["surge/curvature"] == pytest.approx(2.0)
        assert metrics["surge/noise_scale"] == pytest.approx(10.0)
        for name in ("peak_batch_size", "peak_lr", "critical_batch_size", "curvature"):
            assert metrics[f"surge/{name}_standard_error"] > 0.0, name
        # At N = 1 half of D's spread of 0.2, the two replicates weigh the same, and Student's factor for two.
        assert metrics["surge/curvature_standard_error"] == pytest.approx(0.1 * 1.8373, rel=1e-4)
        # Half of the spread of 4, whatever the law, as with SGD.
        for each in (metrics, law_metrics(history, None, 16.0)):
            assert each["surge/noise_scale_standard_error"] == pytest.approx(2 * 1.8373, rel=1e-4)

    def test_overhead_time_counts_every_hook(self) -> None:
        """Five of the callback's and three around the update, on a clock that ticks whenever it is read."""
        callback, ticks = SurgeLRCallback(2, "sqrt"), itertools.count()
        callback._stopwatch.clock = lambda: float(next(ticks))
        make_trainer(callback).fit(Slope(), ones(12, 4))
        assert callback._stopwatch.seconds == 3 * 8
        assert callback.overhead_time > 0.0

    @pytest.mark.parametrize("make_optimizer", [adamw, two_groups])
    def test_to_tensorboard_puts_what_belongs_together_in_one_chart(
        self, tmp_path: Path, make_optimizer: MakeOptimizer
    ) -> None:
        logger = TensorBoardLogger(tmp_path)
        self._fit(logger, make_optimizer)
        (layout,) = layouts_in(logger)
        groups = ["/0", "/1"] if make_optimizer is two_groups else [""]
        expected = {f"learning rates{group}": {f"{name}{group}" for name in SUFFIXED} for group in groups}
        expected["batch size against peak"] = {"batch_size", "peak_batch_size", "critical_batch_size"}
        expected["noise"] = {"noise_scale"}
        expected["overhead"] = {"overhead", "overhead_time"}
        charts = {title: {f"surge/{name}" for name in names} for title, names in expected.items()}
        assert layout == {"surge": charts}

    def test_a_layout_is_written_once_per_run(self, tmp_path: Path) -> None:
        for _ in range(2):
            # A resumed run writes to the same directory, from another process.
            logger = TensorBoardLogger(tmp_path, version="the-same")
            make_trainer(SurgeLRCallback(4, "sqrt"), logger=logger).fit(Slope(), ones(4, 2))
        assert len(list(Path(logger.log_dir).glob("*tfevents*"))) > 1
        assert len(layouts_in(logger)) == 1

    def test_a_users_own_layout_stays(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        logger = TensorBoardLogger(tmp_path)
        logger.experiment.add_custom_scalars({"mine": {"loss": ["Multiline", ["loss"]]}})
        with caplog.at_level("INFO"):
            make_trainer(SurgeLRCallback(4, "sqrt"), logger=logger).fit(Slope(), ones(4, 2))
        assert [list(layout) for layout in layouts_in(logger)] == [["mine"]]
        assert "this run has one already" in caplog.text
