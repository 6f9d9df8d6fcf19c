"""Scalars of TensorBoard's event files, fast enough for millions of points.

An event file is a row of records, each framed by its length and two checksums. TensorBoard's own reader takes
40 us for a record, most of it for checksums in Python, which are not looked at here: a file that was cut ends
in the middle of a record, and one that is damaged has a record that cannot be read. Scalars of one key differ
in nothing but wall time, step and value, so that only the first of them is decoded by protobuf.

References:
    https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details for frames;
    https://protobuf.dev/programming-guides/encoding for the bytes of a scalar.
"""

from __future__ import annotations

import struct
from array import array
from contextlib import suppress
from pathlib import Path

from lightning_surge.runs.series import Points, progress

# Read at a time; and where a record is longer, its length is taken for damage.
BLOCK_BYTES, LONGEST = 1 << 24, 1 << 26
# A record follows its length (8 bytes) and the length's checksum (4), and is followed by its own (4).
HEAD, FOOT = 12, 4
LENGTH, VALUE = struct.Struct("<Q").unpack_from, struct.Struct("<f").unpack_from
# A scalar: wall time (a byte that names the field, and 8), step (1, and from 1 to 10 with seven bits each),
# what is the same for all of its key up to the byte that names the value, and at the end the value (4).
SCALAR, STEP_AT, SINGLE = b"\x09\x10", 10, b"\x15"


def read_events(path: Path, points: Points) -> str | None:
    """Read the scalars of an event file up to the first damaged record; a note says if there was one."""
    try:
        from google.protobuf.message import DecodeError
        from tensorboard.compat.proto import event_pb2
        from tensorboard.util import tensor_util
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Reading event files needs tensorboard: pip install 'lightning-surge[tensorboard]'."
        ) from error

    # By what scalars of a key have in common: where their points go, None if nobody wants them.
    known: dict[bytes, tuple[array[int], array[float]] | None] = {}

    def take(record: bytes) -> str:
        """Decode any record; the last of its keys."""
        event, key = event_pb2.Event.FromString(record), ""
        for value in event.summary.value:
            kind, key = value.WhichOneof("value"), value.tag
            if kind == "simple_value":
                number = value.simple_value
            elif kind == "tensor" and value.metadata.plugin_data.plugin_name == "scalars":
                number = float(tensor_util.make_ndarray(value.tensor))
            else:
                continue
            if points.wants(key):
                points.add(key, event.step, number)
        return key if len(event.summary.value) == 1 else ""

    def take_whole(data: bytes) -> int:
        """Take the whole records of a block; where the last good one ends."""
        at = 0
        with suppress(DecodeError, IndexError, OverflowError):
            while at + HEAD <= len(data):
                begin = at + HEAD
                end = begin + LENGTH(data, at)[0]
                if not begin < end <= len(data) - FOOT:
                    break
                common = b""
                if data[begin : begin + STEP_AT : STEP_AT - 1] == SCALAR:
                    step, shift, place = 0, 0, begin + STEP_AT
                    while (digit := data[place]) > 127:
                        step, shift, place = step | (digit & 127) << shift, shift + 7, place + 1
                    common = data[place + 1 : end - 4]
                if common not in known:
                    key = take(data[begin:end])
                    if key and common[-1:] == SINGLE:
                        known[common] = points.found.get(key)
                elif (series := known[common]) is not None:
                    series[0].append(step | digit << shift)
                    series[1].append(*VALUE(data, end - 4))
                at = end + FOOT
        return at

    read, size, rest = 0, path.stat().st_size, b""
    with path.open("rb") as file, progress(path, size) as bar:
        while (block := file.read(BLOCK_BYTES)) and len(rest) < LONGEST:
            bar.update(len(block))
            rest += block
            end = take_whole(rest)
            read, rest = read + end, rest[end:]
    if read == size:
        return None
    return f"{path} is damaged, or still being written: read {read:,} of its {size:,} bytes"
