"""Tables as people have them: other kinds of files, names, separators, gaps, and damage."""

import gzip
import io
import json
import math
import os
import pickle
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lightning_surge.tables.columns import NAMES, WORDS, Columns, as_text, find_columns, numbers
from lightning_surge.tables.read import MIXED, read_table, read_tables

HEADER = "batch_size,lr,loss,seed\n"
RUNS = pd.DataFrame(
    [
        {"batch_size": size, "lr": lr, "loss": 1 + abs(math.log(lr * 300)) + seed / 64, "seed": seed}
        for size in (16, 64, 1024)
        for lr in (0.000961, 0.002, 0.0041)
        for seed in (0, 1)
    ]
)
NESTED = [
    {
        "config": {"lr": one["lr"], "bs": one["batch_size"]},
        "summary/val/loss": one["loss"],
        "seed": one["seed"],
    }
    for one in RUNS.to_dict("records")
]
CSV = RUNS.to_csv(index=False)
NOTED = CSV.replace("seed", "seed,note", 1).replace("0\n", "0,gr\u00fcn\n").replace("1\n", "1,\n")


def parquet(frame: pd.DataFrame) -> bytes:
    frame.to_parquet(buffer := io.BytesIO())
    return buffer.getvalue()


def written(tmp_path: Path, text: str | bytes, name: str = "runs.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


class TestFiles:
    @pytest.mark.parametrize(
        "content",
        [
            CSV,
            CSV.replace("\n", "\r\n"),
            CSV.replace(",", "\t"),
            CSV.replace(",", " "),
            RUNS.to_csv(index=False, sep=";", decimal=","),
            "\ufeff# made by hand\n\n" + CSV.replace("\n", "\n,,,\n\n", 1) + "\n",
            CSV + CSV.split("\n", 1)[0] + "\n",
            CSV.encode("utf-16"),
            NOTED.encode("cp1252"),
            gzip.compress(CSV.encode()),
            RUNS.to_json(orient="records"),
            RUNS.to_json(orient="records", lines=True) + "\n\n",
            RUNS.to_json(),
            json.dumps(RUNS.to_dict("list"), indent=1),
            json.dumps(NESTED),
            parquet(RUNS),
            parquet(RUNS.set_index(["batch_size", "lr"])),
            parquet(RUNS.astype({"batch_size": "Int32", "lr": object, "seed": str})),
        ],
    )
    def test_the_same_runs_in_other_forms(self, tmp_path: Path, content: str | bytes) -> None:
        table = read_table(written(tmp_path, content, "runs.txt"))
        found = (table.batch_sizes, table.lrs, table.outcomes, table.seeds)
        for values, name in zip(found, RUNS, strict=True):
            np.testing.assert_allclose(values, RUNS[name], rtol=1e-9, err_msg=name)

    def test_pipes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(CSV.encode())))
        assert read_table("-").lrs.size == len(RUNS)
        os.mkfifo(tmp_path / "pipe")
        writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(gzip.compress(CSV.encode()),))
        writer.start()
        assert read_table(tmp_path / "pipe").lrs.size == len(RUNS)
        writer.join()

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("", "Expected a header and rows, got the empty file"),
            ("# only a comment\n", "Expected a header and rows, got the empty file"),
            (HEADER, r"Expected at least one row, got none in .*: add runs"),
            (HEADER + ",,,\nNaN,None,,1\n", "Expected at least one run, got blank rows in"),
            (HEADER + "8,0.1\n", "Expected 4 fields, as in the header, got 2 on line 2 of .*: correct"),
            ("# c\n" + HEADER + "8,1,1,0\n\n8,1,1,0,1\n", "got .*4 fields in line 4, saw 5, counted from"),
            (HEADER + '8,1,"1,0\n', "Expected CSV, got .*: .*unexpected end of data"),
            ("batch_size,lr,lr,loss\n8,1,1,1\n", "Expected distinct columns, got 'lr' twice"),
            (b"\x00\x01\x02\xff" * 9, "Expected a table, got bytes that are no text"),
            (CSV.encode("utf-16") + b"\x00", "Expected "),
            (gzip.compress(CSV.encode())[:-9], "Expected a whole gzip file, got"),
            (parquet(RUNS)[:-40], "Expected a Parquet file, got .*write it again"),
            ('[{"batch_size": 8}, ', "Expected JSON with one object per run, got .*line 1"),
            ('{"lr": 1}\n[2]\n', "Expected JSON with one object per run"),
            ("[" * 100_000, "Expected JSON with one object per run"),
            (pickle.dumps(1), "Expected a table, got a pickle, .*: save it with DataFrame.to_csv"),
            (b"PK\x03\x04\x00", "got a ZIP archive, as Excel files"),
            (b"SQLite format 3\0", "got an SQLite database, .*: name the study of a sweep sqlite:///FILE"),
            ("<!DOCTYPE html>", "got HTML or XML"),
        ],
    )  # fmt: skip
    def test_what_is_no_table_is_named(self, tmp_path: Path, content: str | bytes, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            read_table(written(tmp_path, content))

    def test_paths_and_folders_of_other_programs(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"Expected an existing file, got .*nowhere"):
            read_table(tmp_path / "nowhere.csv")
        with pytest.raises(IsADirectoryError, match=r"got the directory .*: name the table in it"):
            read_table(tmp_path)
        for name, kind in (("w/offline-run/run.wandb", "W&B folder"), ("m/0/meta.yaml", "MLflow store")):
            (tmp_path / name).parent.mkdir(parents=True)
            (tmp_path / name).touch()
            with pytest.raises(IsADirectoryError, match=f"got an? {kind}, .*: .*csv|CSV"):
                read_table(tmp_path / name[0])

    @pytest.mark.parametrize("package", ["pandas", "pyarrow"])
    def test_without_its_library_the_extra_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
    ) -> None:
        monkeypatch.delitem(sys.modules, "lightning_surge.tables.files", raising=False)
        path = written(tmp_path, parquet(RUNS) if package == "pyarrow" else CSV)
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-surge\[fit\]'"):
            read_table(path)


class TestColumns:
    @pytest.mark.parametrize(
        "names",
        [
            "Batch Size|Learning Rate|Loss|Seed",
            "global_batch_size|learning_rate|val_loss|random_seed",
            "BATCH_SIZE|LR|eval/loss|SEED",
            "params.bs|params.lr|metrics.val_loss|params.seed",
            "config/batch_size|config/optimizer.lr|final_loss|config/seed",
            "params_batch_size|params_lr|value|user_attrs_seed",
            "data.init_args.batch_size|model.init_args.lr|Val/Loss_epoch|seed_everything",
            "Batch size (tokens)|peak_lr|validation loss [nats]|seed",
            "B|\u03b7|test_loss|repetition",
            "config/train_loop_config/batch_size|config/train_loop_config/lr|val_loss|config/seed",
            "batch size|best learning rate|final loss|seed",
        ],
    )
    def test_usual_names_are_taken_and_said(self, names: str) -> None:
        columns = names.split("|")
        other = {"_step": 9, "val/accuracy": 0.5, "min_lr": 0.0, "eval_batch_size": 4, "smooth loss": 3.0}
        found, notes = find_columns(RUNS.set_axis(columns, axis=1).assign(**other), Columns(), "runs.csv")
        assert found == dict(zip(RUNS, columns, strict=True))
        assert all(repr(name) in notes[0] for role, name in found.items() if name.lower() != role)

    def test_a_held_out_loss_counts_before_the_training_loss(self) -> None:
        frame = RUNS.rename(columns={"loss": "val/loss"}).assign(**{"train/loss": 1.0, "empty_loss": ""})
        assert find_columns(frame, Columns(), "")[0]["loss"] == "val/loss"

    def test_columns_with_equal_values_are_one(self) -> None:
        frame = RUNS.assign(learning_rate=RUNS["lr"])
        assert find_columns(frame, Columns(), "")[0]["lr"] == "lr"

    def test_all_roles_without_a_column_or_with_several_are_told_at_once(self) -> None:
        frame = pd.DataFrame(
            {"micro_batch_size": [8, 8], "lr": [1, 2], "peak_lr": [3, 4], "val_acc": [0.1, 0.2]}
        )
        message = (
            r"in 'x\.csv', got 'micro_batch_size', 'lr', 'peak_lr', 'val_acc': lr may be 'lr', 'peak_lr'; "
            r"batch_size has no column \(close: 'micro_batch_size'\); loss or steps or examples has no "
            r"column \(close: 'val_acc'\)\. Pass --lr-column NAME --batch-size-column NAME --loss"
        )
        with pytest.raises(ValueError, match=message):
            find_columns(frame, Columns(), "x.csv")
        named = Columns(batch_size="Micro Batch Size", lr="peak_lr")
        found, _ = find_columns(frame, named, "x.csv", maximize=True)
        assert found == {"batch_size": "micro_batch_size", "lr": "peak_lr", "loss": "val_acc"}

    def test_several_losses_are_ambiguous_unless_one_is_named(self) -> None:
        frame = RUNS.assign(test_loss=1.5, steps=3)
        with pytest.raises(ValueError, match=r"loss may be 'loss', 'test_loss'\. Pass --loss-column"):
            find_columns(frame, Columns(), "")
        assert find_columns(frame, Columns(loss="test_loss"), "")[0]["loss"] == "test_loss"
        assert "loss" not in find_columns(frame, Columns(), "", measure="steps")[0]

    def test_a_name_that_fits_no_column(self) -> None:
        with pytest.raises(ValueError, match=r"Expected --lr-column to name one column of .*, got 'eta'"):
            find_columns(RUNS, Columns(lr="eta"), "")

    def test_what_is_missing_is_empty_text(self) -> None:
        frame = pd.DataFrame({"width": [64.5, None, " x "]}, dtype=object)
        assert as_text(frame, "width")["width"].tolist() == ["64.5", "", "x"]

    def test_every_role_has_its_names_in_the_list(self) -> None:
        assert tuple(NAMES) == Columns._fields
        assert all(names[0] == role for role, names in NAMES.items())
        for words in [*WORDS["roles"].values(), *WORDS["fallbacks"].values()]:
            assert len(words.split()) == len(set(words.split()))


class TestValues:
    @pytest.mark.parametrize(
        ("texts", "expected"),
        [
            ("16K|0.016k|1,024|1.5M", [16_000, 16, 1024, 1.5e6]),
            ("1,024|12,345.5|1e-3", [1024, 12345.5, 1e-3]),
            ("0,001|1.024,5|3", [0.001, 1024.5, 3]),
            ("1,024|2,5", [1.024, 2.5]),
            (" 3e-4|3E-04|1_024", [3e-4, 3e-4, 1024]),
            ("None|NA|n/a|NaN|diverged| |-|#DIV/0!|not reached", [math.nan] * 9),
        ],
    )
    def test_numbers_as_people_write_them(self, texts: str, expected: list[float]) -> None:
        values, unread = numbers(pd.Series(texts.split("|")))
        assert not unread.any()
        np.testing.assert_allclose(values, expected, rtol=1e-12)

    @pytest.mark.parametrize(
        "text", ["x1", "1,2,3", "1;2", "true", "2025-01-01", "1e5e5", "9" * 500 + "Q", "0x10", "K", "2^3"]
    )
    def test_what_is_no_number(self, text: str) -> None:
        assert numbers(pd.Series([text, "1"]))[1].tolist() == [True, False]

    def test_thousands_of_the_batch_size_beside_fractions_with_commas(self, tmp_path: Path) -> None:
        table = read_table(written(tmp_path, 'bs,lr,loss\n"1,024","0,1","2,125"\n"2,048","0,25",3\n'))
        assert (table.batch_sizes.tolist(), table.outcomes.tolist()) == ([1024, 2048], [2.125, 3])

    @pytest.mark.parametrize("failed", ["", "nan", "inf", "-inf", "1e38", "None", "diverged", "NaN"])
    def test_runs_that_failed(self, tmp_path: Path, failed: str) -> None:
        table = read_table(written(tmp_path, f"batch_size,lr,loss\n8,0.1,{failed}\n8,0.1,1\n"))
        assert table.outcomes.tolist() == [math.inf, 1]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (HEADER + "8,x1,1,0\n", "Expected numbers in column 'lr', got 'x1' on line 2: write the"),
            (HEADER + "8,1,1,0\n8,1,oops,0\n", "column 'loss', got 'oops' on line 3: leave the field blank"),
            (HEADER + "0,1,1,0\n", "Expected 1 <= batch_size < 1e\\+30, got '0' on line 2: write"),
            (HEADER + "0.016,1,1,0\n", "Expected 1 <= batch_size"),
            (HEADER + "8,None,1,0\n", "got 'None' on line 2: .*leave the row out with --where"),
            (HEADER + "8,-1,1,0\n", "Expected 1e-30 <= lr < 1e\\+30, got '-1' on line 2"),
            ("batch_size,lr,steps\n8,1,0\n", "Expected steps > 0, or blank for a run that failed, got '0'"),
            ("batch_size,lr,steps,target\n8,1,5,2\n8,1,5,\n", "got '' on line 3: write the loss"),
            ("batch_size,lr,epochs\n8,1,5\n", "loss or steps or examples has no column"),
            ("batch_size,lr,examples\n32768,1,0.7\n", "one step in column 'examples', got '0.7' .*epochs"),
            ('[{"bs": 8, "lr": 1, "loss": [1]}]', r"column 'loss', got '\[1\]' on row 1"),
            (HEADER + "8,1," + "y" * 99_999 + ",0\n", "got 'y{40}...' on line 2"),
        ],
    )  # fmt: skip
    def test_what_is_out_of_range_gets_a_remedy_that_fits_its_column(
        self, tmp_path: Path, text: str, message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            read_table(written(tmp_path, text))


class TestOutcomes:
    def test_steps_from_examples(self, tmp_path: Path) -> None:
        table = read_table(written(tmp_path, "batch_size,lr,examples,target\n8,0.1,800,2.5\n16,0.1,,1.5\n"))
        assert (table.measure, table.outcomes.tolist()) == ("steps", [100, math.inf])
        assert table.targets.tolist() == [2.5, 1.5]

    def test_a_loss_counts_before_steps_unless_asked(self, tmp_path: Path) -> None:
        path = written(tmp_path, "batch_size,lr,loss,steps\n8,0.1,2.5,100\n")
        table = read_table(path)
        assert (table.measure, table.outcomes.tolist()) == ("loss", [2.5])
        assert "--measure steps" in table.notes[0]
        table = read_table(path, measure="steps")
        assert (table.measure, table.outcomes.tolist(), table.notes) == ("steps", [100], ())

    def test_larger_is_better(self, tmp_path: Path) -> None:
        path = written(tmp_path, "bs,lr,val_acc,loss\n8,0.1,0.9,2\n8,0.2,,3\n")
        (table,) = read_tables(path, maximize=True)
        assert (table.outcomes.tolist(), table.maximize) == ([-0.9, math.inf], True)

    def test_statuses_of_other_programs(self, tmp_path: Path) -> None:
        rows = "8,1,1.5,COMPLETED\n8,2,2.5,\n8,3,,diverged\n8,4,1,running\n8,5,1,Crashed\n8,6,1,PRUNED\n"
        table = read_table(written(tmp_path, "bs,lr,loss,State\n" + rows + ",,None,x\n"))
        assert table.outcomes.tolist() == [1.5, 2.5, math.inf]
        assert table.notes[1] == "rows left out, since they are blank: 1"
        assert "1 crashed, 1 running, 1 pruned" in table.notes[2]


class TestRows:
    frame = pd.concat(
        [RUNS.drop(columns="seed").assign(width=w, depth=w // 64, loss=RUNS["loss"] + w) for w in (64, 128)]
    )

    def test_settings_that_differ_within_a_cell_are_no_seeds(self, tmp_path: Path) -> None:
        logged = {"runtime": range(36), "run_name": "a", "noise": np.arange(36.0), "val_acc": 0.5}
        (note, *_) = read_table(written(tmp_path, self.frame.assign(**logged).to_csv())).notes
        assert note == (
            f"{MIXED} 'width', 'depth' are averaged as if they were seeds: pass --by width for a fit of "
            "each, or --where width=VALUE for one"
        )
        assert read_table(written(tmp_path, CSV)).notes == ()
        # A column that says which runs are seeds, by telling them apart.
        assert (
            read_table(written(tmp_path, self.frame.assign(seed=range(36)).to_csv(index=False))).notes == ()
        )

    def test_settings_with_grids_of_their_own_are_not_one_grid(self, tmp_path: Path) -> None:
        """No learning rate is shared, so that nothing looks like a seed."""
        other = self.frame.assign(
            lr=self.frame["lr"] * self.frame["width"], accumulation=self.frame["batch_size"] // 16,
            min_lr=self.frame["lr"] * self.frame["width"] / 10,
        ).drop_duplicates(["batch_size", "lr"])  # fmt: skip
        (note,) = read_table(written(tmp_path, other.to_csv(index=False))).notes
        assert note.startswith(f"{MIXED} 'width', 'depth' are fitted as one grid: pass --by width for a fit")
        # With too few of them the column may as well say who ran what.
        few = other[other["lr"].rank(method="dense") % 3 > 0]
        assert read_table(written(tmp_path, few.to_csv(index=False))).notes == ()

    def test_where_and_by(self, tmp_path: Path) -> None:
        path = written(tmp_path, self.frame.to_csv(index=False))
        (table,) = read_tables(path, where=[("Width", "64.0"), ("lr", "2e-3"), ("lr", ".0041")])
        assert (table.lrs.size, table.outcomes.max() < 128, table.notes) == (12, True, ())
        tables = read_tables(path, by=["depth", "width"])
        assert [dict(table.group) for table in tables] == [
            {"depth": "1", "width": "64"}, {"depth": "2", "width": "128"}
        ]  # fmt: skip
        assert [table.notes for table in tables] == [(), ()]
        np.testing.assert_allclose(tables[1].outcomes, RUNS["loss"] + 128)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ({"where": [("width", "9")]}, "Expected --where width=VALUE among '64', '128', got '9': choose"),
            (
                {"where": [("widht", "9")]},
                r"Expected --where to name one column .*got 'widht' \(close: 'width'\)",
            ),
            ({"by": ["heads"]}, "Expected --by to name one column"),
            ({"by": ["lr"]}, "lr has no column"),
        ],
    )
    def test_columns_and_values_that_are_not_there(
        self, tmp_path: Path, words: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            read_tables(written(tmp_path, self.frame.to_csv(index=False)), **words)
