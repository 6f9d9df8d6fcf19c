from __future__ import annotations

import contextlib
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_surge.laws.base import MeasuredLaw, SGDLaw
from lightning_surge.laws.edge import EdgeLaw
from lightning_surge.laws.theorems import Theorem3Law
from lightning_surge.runs.run_log import RunLog, RunLogError, law_from_numbers, read_run
from tests.logged_runs import LAW, as_log, rows, several_optimizers, write_csv, write_events

WRITERS = pytest.mark.parametrize("write", [write_csv, write_events])


def numbers(run: RunLog, name: str) -> tuple[list[int], list[float]]:
    series = run.get(name)
    return series.steps.tolist(), series.values.tolist()


class TestReading:
    @WRITERS
    def test_returns_what_was_logged(self, tmp_path, write):
        table = {
            4: {"surge/lr_used": 1e-3, "surge/peak_batch_size": math.inf},
            9: {"surge/lr_used": 2e-3, "surge/peak_batch_size": 32.5, "train_loss": 1.5},
            14: {"surge/lr_used": 0.0, "surge/peak_batch_size": math.nan},
        }
        write(tmp_path, table)
        run = read_run(tmp_path)
        assert (run.source, run.notes) == (str(tmp_path), ())
        for name, expected in [
            ("lr_used", [1e-3, 2e-3, 0.0]),
            ("peak_batch_size", [math.inf, 32.5, math.nan]),
        ]:
            np.testing.assert_array_equal(run.get(name).steps, [4, 9, 14])
            # Event files hold single precision.
            single = np.float32(expected).astype(np.float64)
            np.testing.assert_array_equal(run.get(name).values, single if write is write_events else expected)
        assert run.series["train_loss"] == (np.array([9]), np.array([1.5]))
        assert ("val_loss" in run.series) == (write is write_csv)

    @WRITERS
    def test_a_file_is_as_good_as_its_directory(self, tmp_path, write):
        path = write(tmp_path, rows())
        assert numbers(read_run(path), "batch_size") == numbers(read_run(tmp_path), "batch_size")

    def test_keeps_every_point_of_a_long_run(self, tmp_path):
        write_events(tmp_path, {step: {"surge/batch_size": step} for step in range(11_000)})
        np.testing.assert_array_equal(read_run(str(tmp_path)).get("batch_size").values, np.arange(11_000))

    def test_scalars_that_other_writers_keep_as_tensors(self, tmp_path):
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(tmp_path)) as writer:
            writer.add_scalar("surge/batch_size", 8, global_step=3, new_style=True)
        assert numbers(read_run(tmp_path), "batch_size") == ([3], [8.0])

    def test_event_files_count_where_there_are_both(self, tmp_path):
        write_csv(tmp_path, rows(batch_size=1.0))
        write_events(tmp_path, rows(batch_size=2.0))
        assert set(read_run(tmp_path).get("batch_size").values) == {2.0}

    def test_the_table_counts_where_event_files_know_nothing(self, tmp_path):
        write_csv(tmp_path, rows(batch_size=1.0))
        write_events(tmp_path, {1: {"train_loss": 2.0}})
        assert set(read_run(tmp_path).get("batch_size").values) == {1.0}


class TestResumed:
    def test_files_are_joined(self, tmp_path):
        for part, steps in enumerate([(1, 2), (3, 4)]):
            write_events(tmp_path, {step: {"surge/batch_size": 8 * step} for step in steps}, f".{part}")
        assert numbers(read_run(tmp_path), "batch_size") == ([1, 2, 3, 4], [8, 16, 24, 32])

    def test_the_tenth_file_of_a_process_comes_after_its_ninth(self, tmp_path):
        """Begun within the same second, as TensorBoard names them: time, host, process, count."""
        for count, size in ((9, 1.0), (10, 2.0)):
            path = write_events(tmp_path / str(count), {1: {"surge/batch_size": size}})
            path.rename(tmp_path / f"events.out.tfevents.1700000000.host.123.{count}")
        assert numbers(read_run(tmp_path), "batch_size") == ([1], [2.0])

    def test_what_a_resumed_run_took_back_is_left_out(self, tmp_path):
        """The second file begins again at step 3; a standard error known before is not one of its own."""
        first = {step: {"surge/batch_size": 1.0, "surge/x_standard_error": 0.1} for step in (1, 2, 3, 4, 5)}
        second = {step: {"surge/batch_size": 2.0} for step in (3, 4)}
        write_events(tmp_path, first, ".0")
        write_events(tmp_path, second, ".1")
        run = read_run(tmp_path)
        assert numbers(run, "batch_size") == ([1, 2, 3, 4], [1.0, 1.0, 2.0, 2.0])
        assert numbers(run, "x_standard_error") == ([1, 2], [np.float32(0.1)] * 2)

    def test_steps_repeated_in_a_table_appear_once(self, tmp_path):
        lines = ["epoch,step,surge/batch_size", "0,1,1.0", "0,2,1.0", "0,3,1.0", "0,2,2.0", "0,5,2.0"]
        (tmp_path / "metrics.csv").write_text("\n".join(lines) + "\n")
        assert numbers(read_run(tmp_path), "batch_size") == ([1, 2, 5], [1.0, 2.0, 2.0])

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.integers(0, 20), min_size=1, max_size=40))
    def test_steps_increase_whatever_was_written(self, steps):
        from lightning_surge.runs.log_files import _increasing

        order = np.arange(len(steps), dtype=np.float64)
        kept = _increasing(np.array(steps), order)
        assert (np.diff(kept.steps) > 0).all()
        assert kept.values[-1] == order[-1]
        for step, position in zip(kept.steps, kept.values, strict=True):
            assert all(later > step for later in steps[int(position) + 1 :])


class TestChoosing:
    def test_the_newest_version_is_read_and_said(self, tmp_path):
        for version in (2, 9, 10):
            write_csv(tmp_path / f"version_{version}", rows(batch_size=float(version)))
        run = read_run(tmp_path)
        assert set(run.get("batch_size").values) == {10.0}
        assert run.notes == (f"reading {tmp_path / 'version_10'}, the newest of 3 runs",)

    def test_a_single_run_below_is_read_and_said(self, tmp_path):
        write_csv(tmp_path / "logs" / "mine", rows())
        run = read_run(tmp_path)
        assert run.notes == (f"reading {tmp_path / 'logs' / 'mine'}",)
        assert run.last_step == 50

    def test_different_runs_are_named_to_choose_from(self, tmp_path):
        for name in ("first/version_0", "second/version_0"):
            write_csv(tmp_path / name, rows())
        with pytest.raises(
            RunLogError, match=r"got 2 in '.*': choose among first/version_0, second/version_0\."
        ):
            read_run(tmp_path)

    def test_many_runs_are_counted(self, tmp_path):
        for index in range(11):
            write_csv(tmp_path / f"run{index:02d}", {1: {"surge/batch_size": 1.0}})
        with pytest.raises(RunLogError, match=r"got 11 in .* run07 and 3 more\."):
            read_run(tmp_path)


class TestRefusing:
    def test_a_missing_directory_is_named(self, tmp_path):
        with pytest.raises(RunLogError, match=r"got '.*nowhere', which does not exist: pass"):
            read_run(tmp_path / "nowhere")

    def test_a_directory_without_logs_is_named(self, tmp_path):
        (tmp_path / "hparams.yaml").write_text("{}\n")
        with pytest.raises(RunLogError, match=r"got '.*' without any: pass what logger\.log_dir"):
            read_run(tmp_path)

    def test_a_file_of_another_kind_is_named(self, tmp_path):
        (tmp_path / "hparams.yaml").write_text("{}\n")
        with pytest.raises(
            RunLogError, match=r"event file .* or a metrics\.csv, got '.*hparams\.yaml': pass"
        ):
            read_run(tmp_path / "hparams.yaml")

    @WRITERS
    def test_a_run_without_the_callback_is_named_with_its_keys(self, tmp_path, write):
        write(tmp_path, {1: {"train_loss": 2.0}})
        with pytest.raises(
            RunLogError, match=r"train_loss.* was logged and no key that begins with 'surge/'"
        ):
            read_run(tmp_path)

    def test_a_run_that_logged_nothing_is_named(self, tmp_path):
        write_events(tmp_path, {})
        with pytest.raises(RunLogError, match=r"in which nothing was logged .* train for at least"):
            read_run(tmp_path)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", r"with a column 'step', got .* with the columns \[\]"),
            (b"time,loss\n1,2\n", r"with a column 'step', got .* \['time', 'loss'\]"),
            (b"step,surge/batch_size\n", "nothing was logged"),
            (b"step,surge/batch_size\n1,8\n2,eight\n", r"Expected numbers in .*'eight' before line 4"),
            (b"step,surge/batch_size\nx,8\n2,8\n", r"Expected numbers in .*'x'"),
            (b"step,surge/batch_size\n99999999999999999999,8\n", "Expected numbers in"),
            (b"\x89PNG\r\n\x1a\n\xff\xfe", "Expected a text file with columns"),
            (b"step,surge/batch_size\n1," + b"8" * 200_000 + b"\n", "Expected a text file with columns"),
        ],
    )
    def test_tables_that_are_none(self, tmp_path, content, message):
        (tmp_path / "metrics.csv").write_bytes(content)
        with pytest.raises(RunLogError, match=message):
            read_run(tmp_path)

    @pytest.mark.parametrize(
        "content", [b"", b"not an event file at all", b"\x00" * 64, bytes(range(256)) * 8]
    )
    def test_event_files_that_are_none(self, tmp_path, content):
        (tmp_path / "events.out.tfevents.1").write_bytes(content)
        with pytest.raises(RunLogError, match="nothing was logged"):
            read_run(tmp_path)

    def test_a_directory_in_the_place_of_the_table(self, tmp_path):
        (tmp_path / "metrics.csv").mkdir()
        with pytest.raises(RunLogError, match="without any"):
            read_run(tmp_path)


class TestDamaged:
    def test_an_event_file_is_read_up_to_where_it_ends(self, tmp_path):
        path = write_events(tmp_path, {step: {"surge/batch_size": 8.0} for step in range(1, 6)})
        content = path.read_bytes()
        path.write_bytes(content[:-7])
        run = read_run(tmp_path)
        assert run.get("batch_size").steps.tolist() == [1, 2, 3, 4]
        (note,) = run.notes
        assert f"of its {len(content) - 7:,} bytes" in note

    def test_an_event_file_is_read_up_to_where_it_is_damaged(self, tmp_path):
        path = write_events(tmp_path, {step: {"surge/batch_size": 8.0} for step in range(1, 6)})
        content = bytearray(path.read_bytes())
        content[-60] ^= 0xFF
        path.write_bytes(content)
        run = read_run(tmp_path)
        assert run.get("batch_size").steps.tolist() in ([1, 2, 3], [1, 2, 3, 4])
        assert "is damaged, or still being written" in run.notes[0]

    def test_a_damaged_part_of_a_resumed_run_leaves_the_others(self, tmp_path):
        write_events(tmp_path, {1: {"surge/batch_size": 8.0}}, ".0")
        path = write_events(tmp_path, {2: {"surge/batch_size": 8.0}}, ".1")
        path.write_bytes(b"gone")
        run = read_run(tmp_path)
        assert run.get("batch_size").steps.tolist() == [1]
        assert len(run.notes) == 1

    @pytest.mark.parametrize("end", ["0,3", "0,3,1", "0,3,16"])
    def test_the_last_line_of_a_killed_run_is_left_out(self, tmp_path, end):
        """`16` may be the beginning of `160`."""
        (tmp_path / "metrics.csv").write_text("epoch,step,surge/batch_size\n0,1,8\n0,2,8\n" + end)
        run = read_run(tmp_path)
        assert run.get("batch_size").steps.tolist() == [1, 2]
        assert "1 incomplete lines" in run.notes[0]

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(cut=st.integers(0, 2000), flip=st.integers(0, 2000))
    def test_whatever_happens_to_a_file_there_is_no_other_error(self, tmp_path_factory, cut, flip):
        for write in (write_csv, write_events):
            path = write(
                tmp_path_factory.mktemp("run"), {step: {"surge/batch_size": 8.0} for step in range(9)}
            )
            content = bytearray(path.read_bytes())
            content[flip % len(content)] ^= 0x55
            path.write_bytes(content[: cut % len(content)])
            with contextlib.suppress(RunLogError):
                assert read_run(path).series

    def test_a_file_that_may_not_be_read(self, tmp_path, monkeypatch):
        write_csv(tmp_path, rows())

        def refuse(*args, **kwargs):
            raise PermissionError("not for you")

        monkeypatch.setattr(Path, "open", refuse)
        with pytest.raises(RunLogError, match="not for you: check their permissions"):
            read_run(tmp_path)


class TestRunLog:
    def test_a_value_at_a_step(self):
        run = as_log({10: {"surge/batch_size": 8.0}, 20: {"surge/batch_size": 16.0}})
        assert [run.at("batch_size", step) for step in (10, 20)] == [8.0, 16.0]
        assert all(math.isnan(run.at("batch_size", step)) for step in (5, 15, 25))
        assert math.isnan(run.at("absent", 10))

    def test_a_missing_key_is_named_with_those_found(self):
        run = as_log({10: {"surge/batch_size": 8.0, "val_loss": 1.0}})
        with pytest.raises(
            RunLogError, match=r"'surge/lr_used/0', got these surge keys: \['surge/batch_size'\]"
        ):
            run.require("lr_used", "0")

    def test_groups(self):
        run = as_log({1: {"surge/lr_used/decay": 1.0, "surge/lr_used/rest": 1.0, "surge/law/x": 1.0}})
        assert set(run.groups) == {"decay", "rest"}
        assert as_log(rows()).groups == ()

    def test_examples_between_two_logged_steps(self):
        run = as_log({10: {"surge/examples": 100.0}, 20: {"surge/examples": 300.0}})
        np.testing.assert_array_equal(run.examples_at([10, 15, 20, 25]), [100, 200, 300, 300])

    def test_law_steps_are_those_at_which_it_changed(self):
        table = rows((10, 20, 30, 40))
        for step in (30, 40):
            table[step]["surge/law/noise_curvature"] = 2.0
        assert as_log(table).law_steps.tolist() == [10, 30]
        assert as_log({1: {"surge/batch_size": 1.0}}).law_steps.tolist() == []

    def test_the_law_is_made_again(self):
        assert as_log(rows()).law_at(30) == LAW
        assert as_log(rows()).law_at(31) is None


class TestSeveralOptimizers:
    def test_are_named(self):
        run = as_log(several_optimizers())
        assert sorted(run.optimizers) == sorted(run.groups) == ["opt0", "opt1"]
        assert as_log(rows()).optimizers == ()

    def test_each_is_read_as_if_it_were_alone(self):
        run = as_log(several_optimizers())
        first, second = run.of_group("opt0"), run.of_group("opt1")
        assert (first.at("batch_size", 30), second.at("batch_size", 30)) == (60.0, 120.0)
        assert (first.last_step, first.base_batch_size) == (50, 60.0)
        assert first.at("lr_used", 30, "opt0") == 1e-3
        assert first.law_at(30) == LAW
        assert second.law_at(30) == MeasuredLaw(
            **asdict(LAW) | {"noise_curvature": 3.0, "signal_curvature": 3.0}
        )
        assert "loss" in first.series

    def test_nothing_of_the_other_is_left(self):
        """Steps at which the law of one has changed are no news of the other."""
        run = as_log(several_optimizers())
        assert run.of_group("opt0").law_steps.tolist() == [10]
        assert run.of_group("opt1").law_steps.tolist() == [10, 20, 30, 40, 50]
        assert run.of_group("opt0").groups == run.of_group("opt0").optimizers == ("opt0",)

    def test_the_tenth_is_not_the_first(self):
        table = several_optimizers()
        for row in table.values():
            row |= {key.replace("opt0", "opt10"): 7.0 for key in row if key.endswith("opt0")}
        assert as_log(table).of_group("opt0").at("batch_size", 30) == 60.0
        assert as_log(table).of_group("opt10").at("batch_size", 30) == 7.0

    def test_groups_of_an_optimizer(self):
        run = as_log(several_optimizers({"opt0": ("0", "1")})).of_group("opt0/1")
        assert sorted(run.groups) == ["opt0/0", "opt0/1"]
        assert run.at("lr_used", 30, "opt0/1") == 1e-3
        assert run.at("batch_size", 30) == 60.0

    @pytest.mark.parametrize("group", [None, "", "body", "opt7"])
    def test_any_other_name_changes_nothing(self, group):
        run = as_log(several_optimizers())
        assert run.of_group(group) is run


class TestLaws:
    @pytest.mark.parametrize(
        "law",
        [
            LAW,
            EdgeLaw(**asdict(LAW), edge_limit=0.1, edge_sq_slope=0.2),
            SGDLaw(max_lr=0.1, noise_scale=30.0),
            Theorem3Law(noise_scale=30.0, peak_lr=0.5),
            Theorem3Law(noise_scale=math.inf, peak_lr=math.inf, sqrt_coefficient=0.25),
        ],
    )
    def test_every_kind_is_known_by_its_numbers(self, law):
        logged = {name: value for name, value in asdict(law).items() if value is not None}
        assert law_from_numbers(logged | {"smallest_measured": 4.0}) == law

    @pytest.mark.parametrize(
        "broken", [{}, {"alignment_limit": 1.0}, {**asdict(LAW), "alignment_limit": 0.0}]
    )
    def test_numbers_of_no_law(self, broken):
        assert law_from_numbers(broken) is None

    def test_single_precision_changes_nothing_that_matters(self):
        rounded = law_from_numbers(
            {name: float(np.float32(value / 3)) for name, value in asdict(LAW).items()}
        )
        exact = MeasuredLaw(**{name: value / 3 for name, value in asdict(LAW).items()})
        assert rounded.lr(77.0) == pytest.approx(exact.lr(77.0), rel=1e-6)


def test_a_long_table_is_read_in_seconds(tmp_path):
    """100,000 rows; the time grows in proportion to them."""
    body = "".join(f"0,{step},{step},0.5,\n0,{step},,,1.5\n" for step in range(50_000))
    (tmp_path / "metrics.csv").write_text("epoch,step,surge/batch_size,surge/overhead,val_loss\n" + body)
    begin = time.process_time()
    run = read_run(tmp_path)
    assert time.process_time() - begin < 5.0
    assert run.get("batch_size").steps.size == 50_000


def test_without_tensorboard_the_extra_is_named(monkeypatch, tmp_path):
    write_events(tmp_path, rows())
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing.event_file_loader", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-surge\[tensorboard\]'"):
        read_run(tmp_path)
