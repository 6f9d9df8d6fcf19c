import math
import sys

import numpy as np
import pytest
from tensorboard.compat.proto.event_pb2 import Event
from torch.utils.tensorboard import SummaryWriter

from lightning_surge.runs.trackers import Points, read_events
from tests.logged_runs import write_events


def read(path, *also):
    points = Points(also)
    note = read_events(path, points)
    return points.series(), note, points.others


def test_every_point_in_order(tmp_path):
    """Steps of one to five bytes, taken back in between; negative, infinite and undefined values; step 0."""
    steps = [0, 1, 127, 128, 129, 16_383, 16_384, 5, 2**31, 2**34 - 1, 3]
    values = [1.5, -2.0, math.inf, math.nan, 0.0, -0.0, 1e-30, 8.0, 4.0, 2.0, 1.0]
    with SummaryWriter(str(tmp_path)) as writer:
        for step, value in zip(steps, values, strict=True):
            for key in ("surge/a", "surge/b", "other"):
                writer.add_scalar(key, value * (1 + (key == "surge/b")), global_step=step)
    (path,) = tmp_path.iterdir()
    series, note, others = read(path)
    assert (note, others, set(series)) == (None, {"other"}, {"surge/a", "surge/b"})
    for key, factor in (("surge/a", 1.0), ("surge/b", 2.0)):
        np.testing.assert_array_equal(series[key].steps, steps)
        np.testing.assert_array_equal(series[key].values, factor * np.float32(values).astype(np.float64))


def test_scalars_of_other_writers(tmp_path):
    """As tensors, and several in one record, among histograms, images and text."""
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("surge/a", 8, global_step=3, new_style=True)
        writer.add_histogram("surge/h", np.arange(100.0), global_step=3)
        writer.add_image("surge/i", np.zeros((3, 64, 64)), global_step=3)
        writer.add_text("surge/t", "words", global_step=3)
        event = Event(wall_time=1.0, step=4)
        event.summary.value.add(tag="surge/b", simple_value=1.0)
        event.summary.value.add(tag="surge/c", simple_value=2.0)
        writer._get_file_writer().add_event(event)
        writer.add_scalar("loss", 0.5, global_step=9)
    (path,) = tmp_path.iterdir()
    series, note, _ = read(path, "loss")
    found = {key: (one.steps[-1], one.values.tolist()) for key, one in series.items()}
    assert found["surge/a"] == (3, [8.0])
    assert found["loss"][1] == [0.5]
    assert (found["surge/b"][1], found["surge/c"][1]) == ([1.0], [2.0])
    assert (note, "surge/t" in found) == (None, False)


@pytest.mark.parametrize("place", ["length", "content", "step", "cut"])
def test_read_up_to_the_record_that_is_damaged(tmp_path, place):
    path = write_events(tmp_path, {step: {"surge/a": 8.0} for step in range(1, 6)})
    content = bytearray(path.read_bytes())
    begin = content.rindex(b"surge/a") - 17  # of the record
    if place == "step":  # longer than any number
        content[begin + 10 : begin + 22] = bytes([0xFF]) * 12
    elif place == "cut":
        del content[-7:]
    else:
        content[begin - 12 + 5 if place == "length" else begin + 12] ^= 0x7F
    path.write_bytes(content)
    series, note, _ = read(path)
    assert series["surge/a"].steps.tolist() == [1, 2, 3, 4]
    assert f"is damaged, or still being written: read {begin - 12:,} of its {len(content):,} bytes" in note


@pytest.mark.parametrize("kind", [0, 1])
def test_a_tensor_that_is_damaged(tmp_path, kind):
    """Of no type, or without a value."""
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("surge/a", 8, global_step=3, new_style=True)
        event = Event(wall_time=1.0, step=4)
        value = event.summary.value.add(tag="surge/a", tensor={"dtype": kind})
        value.metadata.plugin_data.plugin_name = "scalars"
        writer._get_file_writer().add_event(event)
    (path,) = tmp_path.iterdir()
    series, note, _ = read(path)
    assert (series["surge/a"].values.tolist(), "is damaged" in note) == ([8.0], True)


@pytest.mark.parametrize(
    ("content", "note"),
    [(b"", False), (b"not an event file at all", True), (bytes(64), True), (bytes(range(256)), True)],
)
def test_files_that_are_none(tmp_path, content, note):
    (path := tmp_path / "events.out.tfevents.1").write_bytes(content)
    series, said, _ = read(path)
    assert (series, said is not None) == ({}, note)


def test_without_tensorboard_the_extra_is_named(monkeypatch, tmp_path):
    path = write_events(tmp_path, {1: {"surge/a": 1.0}})
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"got no module .tensorboard.*pip install 'lightning-surge\[tensorboard\]'"
    ):
        read(path)
