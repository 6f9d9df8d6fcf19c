"""W&B and MLflow; where they are not installed, stand-ins decode the same records."""

import json
import math
import sqlite3
import struct
import sys
import zlib
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

from lightning_surge.cli import main
from lightning_surge.runs.log_files import read_run
from lightning_surge.runs.run_log import RunLogError

BLOCK = 1 << 15


def stand_in(monkeypatch, **modules):
    for name, contents in modules.items():
        module = ModuleType(name.replace("__", "."))
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, module.__name__, module)


def decoded(record):
    """A record as JSON: keys and values, W&B's count of rows."""
    items, count = json.loads(record)
    history = [SimpleNamespace(key="", nested_key=[key], value_json=value) for key, value in items.items()]
    return SimpleNamespace(history=SimpleNamespace(item=history, step=SimpleNamespace(num=count)))


def wandb_file(directory, records):
    """In LevelDB's format: fragments that end with their block, six bytes of which may be left over."""
    content = b":W&B" + struct.pack("<HB", 0xBEE1, 0)
    for record in records:
        rest, begun = record, False
        while rest or not begun:
            if (room := BLOCK - len(content) % BLOCK) < 7:
                content += bytes(room)
                continue
            part, rest = rest[: room - 7], rest[room - 7 :]
            kind = (3 if begun else 2) if rest else (4 if begun else 1)
            body = bytes([kind]) + part
            content += struct.pack("<IH", zlib.crc32(body), len(part)) + body
            begun = True
    (directory / "offline-run-1").mkdir(parents=True)
    path = directory / "offline-run-1" / "run-1.wandb"
    path.write_bytes(content)
    (directory / "latest-run").symlink_to("offline-run-1")
    return path


class TestWandb:
    @pytest.fixture
    def path(self, tmp_path, monkeypatch):
        stand_in(monkeypatch, wandb={}, wandb__proto={}, wandb__proto__wandb_internal_pb2={
            "Record": SimpleNamespace(FromString=decoded)
        })  # fmt: skip
        rows = [({"surge/peak_batch_size": "Infinity", "trainer/global_step": "9", "x": '"no number"'}, 0)]
        rows += [
            ({"surge/peak_batch_size": str(count), "filler": "1" * 999 * count}, count)
            for count in range(10, 99)
        ]
        return wandb_file(tmp_path / "wandb", [json.dumps(row).encode() for row in rows])

    def test_an_offline_run_is_read_from_above(self, path):
        run = read_run(path.parents[1])
        assert set(run.series) == {"surge/peak_batch_size"}
        np.testing.assert_array_equal(run.get("peak_batch_size").steps, [9, *range(10, 99)])
        np.testing.assert_array_equal(run.get("peak_batch_size").values, [math.inf, *range(10, 99)])
        assert run.notes == (f"reading {path.parent}",)

    def test_up_to_where_it_is_damaged(self, path):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        run = read_run(path)
        assert 10 < run.get("peak_batch_size").steps[-1] < 98
        assert "is damaged: read" in run.notes[0]


class TestMLflow:
    @pytest.fixture
    def client(self, monkeypatch):
        """Two runs with keys of ours, and a newer one without."""
        points = {
            "surge/batch_size": [(4, 8.0), (9, 16.0)],
            "surge/peak_batch_size": [(9, sys.float_info.max)],
        }
        runs = [
            SimpleNamespace(info=SimpleNamespace(run_id=name), data=SimpleNamespace(metrics=metrics))
            for name, metrics in (("c", {"loss": 1.0}), ("b", {"loss": 1.0, **points}), ("a", points))
        ]

        class Client:
            uris: ClassVar[list[str]] = []

            def __init__(self, tracking_uri):
                self.uris.append(tracking_uri)

            def search_experiments(self):
                return [SimpleNamespace(experiment_id="1")]

            def search_runs(self, experiments, order_by):
                assert (experiments, order_by) == (["1"], ["attributes.start_time DESC"])
                return runs

            def get_run(self, name):
                for run in runs:
                    if run.info.run_id == name:
                        return run
                raise ValueError(f"Run with id={name} not found.\nmore")

            def get_metric_history(self, name, key):
                return [SimpleNamespace(step=step, value=value) for step, value in points[key]]

        exceptions = {"MlflowException": ValueError}
        stand_in(monkeypatch, mlflow={"MlflowClient": Client}, mlflow__exceptions=exceptions)
        return Client

    @pytest.fixture
    def database(self, tmp_path):
        with sqlite3.connect(tmp_path / "mlflow.db") as connection:
            connection.execute("CREATE TABLE metrics (run_uuid, key)")
        return tmp_path / "mlflow.db"

    def test_of_a_database_the_newest_run_of_ours(self, database, client):
        for path in (database, database.parent):
            run = read_run(path)
            assert run.get("batch_size").steps.tolist() == [4, 9]
            assert run.get("peak_batch_size").values.tolist() == [math.inf]
            note = f"reading {database}/b, the newest of 2 runs; the one before is {database}/a"
            assert (run.notes, client.uris[-1]) == ((note,), f"sqlite:///{database}")
        assert read_run(database / "a").notes == ()

    def test_a_run_that_is_not_there(self, database, client):
        with pytest.raises(
            RunLogError, match=r"got '.*/nope': Run with id=nope not found\. Pass another run\."
        ):
            read_run(database / "nope")

    def test_a_store_of_files(self, tmp_path, client):
        for name in ("metrics", "params"):
            (tmp_path / "mlruns" / "1" / "b" / name).mkdir(parents=True)
        (tmp_path / "mlruns" / "1" / "b" / "meta.yaml").write_text("")
        assert read_run(tmp_path / "mlruns").get("batch_size").values.tolist() == [8.0, 16.0]
        assert client.uris == [str(tmp_path / "mlruns")]

    def test_another_database_is_left_as_it_is(self, tmp_path, client):
        """MLflow would make its tables in it."""
        (tmp_path / "study.db").write_bytes(b"")
        with pytest.raises(RunLogError, match="Expected a database of MLflow"):
            read_run(tmp_path / "study.db")
        assert client.uris == []


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_without_the_library_one_line_says_what_to_do(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "wandb.proto.wandb_internal_pb2", None)
    (path := tmp_path / {"wandb": "run-1.wandb", "mlflow": "mlflow.db"}[name]).write_bytes(b"")
    assert main(["advise", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"pip install {name}, or train with CSVLogger beside it" in line
