import contextlib
import math
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_surge.laws.base import SGDLaw
from lightning_surge.laws.theorems import Theorem3Law
from lightning_surge.runs.log_files import joined, read_run
from lightning_surge.runs.run_log import RunLog, RunLogError, Series, law_from_numbers
from tests.logged_runs import LAW, as_log, rows, several_optimizers, write_csv, write_events

WRITERS = pytest.mark.parametrize("write", [write_csv, write_events])


def numbers(run: RunLog, name: str) -> tuple[list[int], list[float]]:
    series = run.get(name)
    return series.steps.tolist(), series.values.tolist()


class TestReading:
    @WRITERS
    def test_returns_what_was_logged_under_surge(self, tmp_path, write):
        table = {
            4: {"surge/lr_used": 1e-3, "surge/peak_batch_size": math.inf},
            9: {"surge/lr_used": 2e-3, "surge/peak_batch_size": 32.5, "train_loss": 1.5},
            14: {"surge/lr_used": 0.0, "surge/peak_batch_size": math.nan},
        }
        path = write(tmp_path, table)
        for run in (read_run(str(tmp_path)), read_run(path)):
            assert (set(run.series), run.notes) == ({"surge/lr_used", "surge/peak_batch_size"}, ())
            for name, expected in [
                ("lr_used", [1e-3, 2e-3, 0.0]),
                ("peak_batch_size", [math.inf, 32.5, math.nan]),
            ]:
                # Event files hold single precision.
                single = np.float32(expected).astype(np.float64)
                np.testing.assert_array_equal(run.get(name).steps, [4, 9, 14])
                np.testing.assert_array_equal(
                    run.get(name).values, single if write is write_events else expected
                )
        assert read_run(path, also=["train_loss"]).series["train_loss"] == (np.array([9]), np.array([1.5]))

    def test_event_files_count_where_there_are_both(self, tmp_path):
        write_csv(tmp_path, rows(batch_size=1.0))
        write_events(tmp_path, {1: {"train_loss": 2.0}}, ".0")
        assert set(read_run(tmp_path).get("batch_size").values) == {1.0}
        write_events(tmp_path, rows(batch_size=2.0), ".1")
        assert set(read_run(tmp_path).get("batch_size").values) == {2.0}

    @pytest.mark.parametrize("end", ["\n", "\r\n"])
    @pytest.mark.parametrize("step_column", ["step", "trainer/global_step"])
    def test_tables_as_other_programs_leave_them(self, tmp_path, end, step_column):
        """Blank lines, lines of commas, a byte-order mark, float steps; a line without a step is told."""
        head = f"epoch,{step_column},surge/batch_size"
        lines = [head, "0,9.0,16", "", "0,19.0,32", ",,", "", "0,,64", "0,2.9e1,64", ""]
        (tmp_path / "metrics.csv").write_text(end.join(lines), encoding="utf-8-sig", newline="")
        run = read_run(tmp_path)
        assert numbers(run, "batch_size") == ([9, 19, 29], [16.0, 32.0, 64.0])
        assert ["1 incomplete lines were left out" in note for note in run.notes] == [True]


class TestJoining:
    """Files of a run that was stopped and resumed."""

    def test_files_are_joined_in_the_order_in_which_they_were_begun(self, tmp_path):
        """Within the same second the tenth comes after the ninth: time, host, process, count."""
        for count in (9, 10):
            path = write_events(
                tmp_path / str(count), {1: {"surge/batch_size": count}, count: {"surge/batch_size": 1}}
            )
            path.rename(tmp_path / f"events.out.tfevents.1700000000.host.123.{count}")
        assert numbers(read_run(tmp_path), "batch_size") == ([1, 10], [10.0, 1.0])

    def test_what_a_resumed_run_took_back_is_left_out(self, tmp_path):
        """The second file begins again at step 3; a standard error known before is not one of its own."""
        first = {step: {"surge/batch_size": 1.0, "surge/x_standard_error": 0.1} for step in (1, 2, 3, 4, 5)}
        write_events(tmp_path, first, ".0")
        write_events(tmp_path, {step: {"surge/batch_size": 2.0} for step in (3, 4)}, ".1")
        run = read_run(tmp_path)
        assert numbers(run, "batch_size") == ([1, 2, 3, 4], [1.0, 1.0, 2.0, 2.0])
        assert numbers(run, "x_standard_error") == ([1, 2], [np.float32(0.1)] * 2)

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.integers(0, 20), min_size=1, max_size=40))
    def test_steps_increase_whatever_was_written(self, steps):
        order = np.arange(len(steps), dtype=np.float64)
        kept = joined([{"surge/x": Series(np.array(steps), order)}])["surge/x"]
        assert (np.diff(kept.steps) > 0).all()
        assert kept.values[-1] == order[-1]
        for step, position in zip(kept.steps, kept.values, strict=True):
            assert all(later > step for later in steps[int(position) + 1 :])


class TestChoosing:
    def test_the_newest_version_is_read_and_said(self, tmp_path):
        for version in (1, 9, 10):
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
        for index in range(11):
            write_csv(tmp_path / f"run{index:02d}" / "version_0", {1: {"surge/batch_size": 1.0}})
        message = r"got 11 in '.*': choose among run00/version_0, .* run07/version_0 and 3 more\."
        with pytest.raises(RunLogError, match=message):
            read_run(tmp_path)


class TestRefusing:
    @pytest.mark.parametrize(
        ("path", "message"),
        [
            ("nowhere", r"got '.*nowhere', which does not exist: pass"),
            ("", r"got '.*' without any: pass what logger\.log_dir"),
            ("hparams.yaml", r"event file .* a metrics\.csv, .* MLflow, got '.*hparams\.yaml': pass"),
        ],
    )
    def test_what_is_no_run_is_named(self, tmp_path, path, message):
        (tmp_path / "hparams.yaml").write_text("{}\n")
        (tmp_path / "metrics.csv").mkdir()
        with pytest.raises(RunLogError, match=message):
            read_run(tmp_path / path)

    @WRITERS
    def test_a_run_without_the_callback_is_named_with_its_keys(self, tmp_path, write):
        write(tmp_path, {1: {"train_loss": 2.0}})
        with pytest.raises(
            RunLogError, match=r"train_loss.* was logged and no key that begins with 'surge/'"
        ):
            read_run(tmp_path)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", r"got .* with no column 'step' among \[\] in line 1: mend that line, or pass"),
            (b"time,loss\n1,2\n", r"no column 'step' among \['time', 'loss'\]"),
            (b"step,surge/batch_size\n", "no key that begins with 'surge/'.*: train for at least"),
            (b"step,surge/batch_size\n1,8\n2,eight\n", r"with .*'eight' in line 3"),
            (b"step,surge/batch_size\nx,8\n2,8\n", r"Expected a table of .*'x'"),
            (b"step,surge/batch_size\n1.5,8\n2,8\n", r"with a step of '1.5' in line 2"),
            (b"step,surge/batch_size\ninf,8\n", r"Expected a table of .*inf"),
            (b"step,surge/batch_size\n99999999999999999999,8\n", "Expected a table of"),
            (b"\x89PNG\r\n\x1a\n\xff\xfe", "Expected a table of"),
            (b"step,surge/batch_size\n1," + b"8" * 200_000 + b"\n", "Expected a table of"),
        ],
    )
    def test_tables_that_are_none(self, tmp_path, content, message):
        (tmp_path / "metrics.csv").write_bytes(content)
        with pytest.raises(RunLogError, match=message):
            read_run(tmp_path)

    def test_a_file_that_may_not_be_read(self, tmp_path, monkeypatch):
        def refuse(*args, **kwargs):
            raise PermissionError("not for you")

        write_csv(tmp_path, rows())
        monkeypatch.setattr(Path, "open", refuse)
        with pytest.raises(RunLogError, match="not for you: check their permissions"):
            read_run(tmp_path)


class TestDamaged:
    @pytest.mark.parametrize("end", ["0,3", "0,3,1", "0,3,16"])
    def test_the_last_line_of_a_killed_run_is_left_out(self, tmp_path, end):
        """`16` may be the beginning of `160`."""
        (tmp_path / "metrics.csv").write_text("epoch,step,surge/batch_size\n0,1,8\n0,2,8\n" + end)
        run = read_run(tmp_path)
        assert run.get("batch_size").steps.tolist() == [1, 2]
        assert "1 incomplete lines" in run.notes[0]

    @settings(max_examples=40, deadline=None)
    @given(cut=st.integers(0, 2000), flip=st.integers(0, 2000))
    def test_whatever_happens_to_a_file_there_is_no_other_error(self, cut, flip):
        for write in (write_csv, write_events):
            with tempfile.TemporaryDirectory() as directory:
                path = write(Path(directory), {step: {"surge/batch_size": 8.0} for step in range(9)})
                content = bytearray(path.read_bytes())
                content[flip % len(content)] ^= 0x55
                path.write_bytes(content[: cut % len(content)])
                with contextlib.suppress(RunLogError):
                    assert read_run(path).series


class TestRunLog:
    def test_a_missing_key_is_named_with_those_found(self):
        run = as_log({10: {"surge/batch_size": 8.0, "val_loss": 1.0}})
        with pytest.raises(
            RunLogError, match=r"'surge/lr_used/0', got these surge keys: \['surge/batch_size'\]"
        ):
            run.require("lr_used", "0")

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
        assert as_log(rows()).optimizers == as_log(rows()).groups == ()

    def test_each_is_read_as_if_it_were_alone(self):
        run = as_log(several_optimizers())
        first, second = run.of_group("opt0"), run.of_group("opt1")
        assert (first.at("batch_size", 30), second.at("batch_size", 30)) == (60.0, 120.0)
        assert (first.last_step, first.base_batch_size) == (50, 60.0)
        assert first.at("lr_used", 30, "opt0") == 1e-3
        assert first.law_at(30) == LAW
        assert second.law_at(30) == replace(LAW, noise_curvature=3.0, signal_curvature=3.0)
        assert "loss" in first.series
        # Steps at which the law of one has changed are no news of the other.
        assert first.law_steps.tolist() == [10]
        assert second.law_steps.tolist() == [10, 20, 30, 40, 50]
        assert first.groups == first.optimizers == ("opt0",)

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
            SGDLaw(max_lr=0.1, noise_scale=30.0),
            Theorem3Law(noise_scale=30.0, peak_lr=0.5),
            Theorem3Law(noise_scale=math.inf, peak_lr=math.inf, sqrt_coefficient=0.25),
        ],
    )
    def test_every_kind_is_known_by_its_numbers(self, law):
        logged = {name: value for name, value in asdict(law).items() if value is not None}
        assert law_from_numbers(logged | {"smallest_measured": 4.0}) == law

    def test_of_the_retired_objective_loses_its_edge(self):
        assert law_from_numbers(asdict(LAW) | {"edge_limit": 0.1, "edge_sq_slope": 0.2}) == LAW

    @pytest.mark.parametrize(
        "broken", [{}, {"alignment_limit": 1.0}, {**asdict(LAW), "alignment_limit": 0.0}]
    )
    def test_numbers_of_no_law(self, broken):
        assert law_from_numbers(broken) is None
