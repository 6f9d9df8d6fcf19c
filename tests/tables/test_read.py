"""Tables as people have them: other names, separators, gaps, and damage."""

from __future__ import annotations

import builtins
import math
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lightning_surge.tables.read import Columns, read_table

HEADER = "batch_size,lr,loss,seed\n"


def written(tmp_path: Path, text: str | bytes, name: str = "runs.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


class TestCSV:
    def test_rows_in_their_order(self, tmp_path: Path) -> None:
        table = read_table(written(tmp_path, HEADER + "8,1e-3,2.5,0\n16, 0.002 ,2.25,1\n"))
        assert table.measure == "loss"
        assert table.batch_sizes.tolist() == [8, 16]
        assert table.lrs.tolist() == [1e-3, 2e-3]
        assert table.outcomes.tolist() == [2.5, 2.25]
        assert table.seeds is not None
        assert table.seeds.tolist() == [0, 1]
        assert table.targets is None
        assert table.notes == ()

    @pytest.mark.parametrize("separator", [",", ";", "\t"])
    @pytest.mark.parametrize("end", ["\n", "\r\n"])
    def test_separators_line_ends_comments_marks_and_blank_lines(
        self, tmp_path: Path, separator: str, end: str
    ) -> None:
        lines = ["\ufeff# made by hand", "", '"batch_size",lr,loss', '"8",0.1,1', "", "8,0.2,2", ",,"]
        lines = [line if line.startswith("\ufeff") else line.replace(",", separator) for line in lines]
        table = read_table(written(tmp_path, end.join(lines)))
        assert table.outcomes.tolist() == [1, 2]

    @pytest.mark.parametrize("failed", ["", "nan", "NaN", "inf", "-inf", " ", "1e38"])
    def test_runs_that_failed(self, tmp_path: Path, failed: str) -> None:
        table = read_table(written(tmp_path, f"batch_size,lr,loss\n8,0.1,{failed}\n8,0.1,1\n"))
        assert table.outcomes.tolist() == [math.inf, 1]

    def test_steps_from_examples(self, tmp_path: Path) -> None:
        table = read_table(written(tmp_path, "batch_size,lr,examples,target\n8,0.1,800,2.5\n16,0.1,,1.5\n"))
        assert table.measure == "steps"
        assert table.outcomes.tolist() == [100, math.inf]
        assert table.targets is not None
        assert table.targets.tolist() == [2.5, 1.5]

    def test_a_loss_counts_before_steps_unless_asked(self, tmp_path: Path) -> None:
        path = written(tmp_path, "batch_size,lr,loss,steps\n8,0.1,2.5,100\n")
        table = read_table(path)
        assert (table.measure, table.outcomes.tolist()) == ("loss", [2.5])
        assert "--measure steps" in table.notes[0]
        table = read_table(path, measure="steps")
        assert (table.measure, table.outcomes.tolist(), table.notes) == ("steps", [100], ())

    def test_examples_in_another_unit_are_said(self, tmp_path: Path) -> None:
        text = "batch_size,lr,steps,examples\n8,0.1,100,102400\n16,0.1,50,102400\n"
        assert read_table(written(tmp_path, text)).notes == (
            "examples are 128 times steps x batch_size: count both in one unit; only the steps are used",
        )

    def test_columns_by_other_names(self, tmp_path: Path) -> None:
        text = "bs,config.lr,val/loss,run\n8,0.1,2,b\n8,0.1,3,a\n"
        names = Columns(batch_size="bs", lr="config.lr", loss="val/loss", seed="run")
        table = read_table(written(tmp_path, text), names)
        assert table.outcomes.tolist() == [2, 3]
        assert table.seeds is not None
        assert table.seeds.tolist() == [1, 0]


class TestErrors:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "Expected a header and rows, got the empty file"),
            ("# only a comment\n", "Expected a header and rows, got the empty file"),
            (HEADER, r"Expected at least one row, got none in .*: add runs"),
            ("batch_size,loss\n8,1\n", r"a column 'lr' in .*, got 'batch_size', 'loss': .*--lr-column"),
            ("lr,loss\n8,1\n", r"a column 'batch_size' in .*--batch-size-column"),
            ("batch_size,lr\n8,1\n", r"column 'loss' or 'steps' or 'examples' in .*--loss-column or --steps"),
            ("batch_size,lr,loss\n8,0.1\n", "Expected 3 fields, as in the header, got 2 on line 2"),
            ("# c\nbatch_size,lr,loss\n8,1,1\n8,1,1,1\n", r"Expected 3 fields, .*, got 4 on line 4"),
            (HEADER + "8,x,1,0\n", "Expected numbers in column 'lr', got 'x' on line 2: leave the field"),
            (HEADER + "8,1,1,0\n8,1,OOM,0\n", "Expected numbers in column 'loss', got 'OOM' on line 3"),
            (HEADER + "0,1,1,0\n", "Expected 0 < batch_size < 1e\\+30, got batch_size=0 on line 2: correct"),
            (HEADER + "8,,1,0\n", "Expected 0 < lr < 1e\\+30, got lr=nan on line 2"),
            (HEADER + "8,-1,1,0\n", "Expected 0 < lr < 1e\\+30, got lr=-1 on line 2"),
            ("batch_size,lr,steps\n8,1,0\n", "Expected steps > 0, or blank .*, got steps=0 on line 2"),
            ("batch_size,lr,steps,target\n8,1,5,\n", "Expected finite target, got target=nan on line 2"),
            ("batch_size,lr,lr,loss\n8,1,1,1\n", "Expected distinct columns, got 'lr' twice"),
            (b"\xff\xfe\x00\x01binary", "Expected text in UTF-8, got other bytes in .*: save it as CSV"),
            (b"PK\x03\x04\x00\x00", "Expected "),
            (HEADER + '8,1,"1,0\n', "Expected CSV, got .*: unexpected end of data; write"),
            (HEADER.encode() + b"8,1,\x001,0\n", "Expected "),
            (HEADER + "8,1," + "1" * 200_000 + ",0\n", "Expected CSV, got .*field larger than"),
        ],
    )
    def test_what_cannot_be_read_is_said(self, tmp_path: Path, text: str | bytes, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            read_table(written(tmp_path, text))

    def test_paths(self, tmp_path: Path) -> None:
        with pytest.raises(IsADirectoryError, match="Expected a file, got the directory"):
            read_table(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"Expected an existing file, got .*nowhere"):
            read_table(tmp_path / "nowhere.csv")

    def test_measure_asks_for_its_column(self, tmp_path: Path) -> None:
        path = written(tmp_path, HEADER + "8,1,1,0\n")
        with pytest.raises(ValueError, match="Expected a column 'loss' or 'steps' or 'examples'"):
            read_table(path, measure="steps")


class TestParquet:
    def test_the_same_runs_as_csv(self, tmp_path: Path) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        rows = {
            "batch_size": pyarrow.array([8, 16, 32], pyarrow.int32()),
            "lr": pyarrow.array([0.1, 0.25, 0.5], pyarrow.float32()),
            "steps": pyarrow.array([100, None, 300]),
            "seed": ["b", "a", "b"],
            "target": [2.5, 2.5, 1.5],
        }
        parquet.write_table(pyarrow.table(rows), tmp_path / "runs.parquet")
        found = read_table(tmp_path / "runs.parquet")
        text = "batch_size,lr,steps,seed,target\n8,0.1,100,b,2.5\n16,0.25,,a,2.5\n32,0.5,300,b,1.5\n"
        wanted = read_table(written(tmp_path, text))
        assert found.measure == wanted.measure
        for name in ("batch_sizes", "outcomes", "seeds", "targets"):
            np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
        np.testing.assert_allclose(found.lrs, wanted.lrs, rtol=1e-7)

    def test_damage_and_wrong_types(self, tmp_path: Path) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        with pytest.raises(ValueError, match=r"Expected a Parquet file, got .*write it again"):
            read_table(written(tmp_path, "batch_size,lr\n", "runs.parquet"))
        whole = tmp_path / "whole.parquet"
        parquet.write_table(
            pyarrow.table({"batch_size": [8] * 999, "lr": ["x"] * 999, "loss": [1.0] * 999}), whole
        )
        with pytest.raises(ValueError, match="Expected numbers in column 'lr', got 'x' on row 1"):
            read_table(whole)
        with pytest.raises(ValueError, match=r"Expected a Parquet file, got .*write it again"):
            read_table(written(tmp_path, whole.read_bytes()[:-40], "cut.parquet"))

    def test_without_pyarrow_the_extra_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for module in [name for name in sys.modules if name.split(".")[0] == "pyarrow"]:
            monkeypatch.delitem(sys.modules, module)
        real = builtins.__import__

        def refusing(name: str, *args: object, **kwargs: object) -> object:
            if name.split(".")[0] == "pyarrow":
                raise ModuleNotFoundError("No module named 'pyarrow'")
            return real(name, *args, **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr(builtins, "__import__", refusing)
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-surge\[parquet\]'"):
            read_table(written(tmp_path, "", "runs.parquet"))


def test_a_hundred_thousand_rows_take_well_under_a_second(tmp_path: Path) -> None:
    lines = "".join(f"{8 << i % 5},{1e-3 * 2 ** (i % 7)},{1 + i % 11},{i % 100}\n" for i in range(100_000))
    path = written(tmp_path, HEADER + lines)
    begin = time.process_time()
    assert read_table(path).lrs.size == 100_000
    assert time.process_time() - begin < 2
