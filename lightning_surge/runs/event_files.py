"""Scalars of TensorBoard's event files, fast enough for millions of points.

An event file is a row of records, each framed by its length and two checksums. TensorBoard's own reader takes
40 us for a record, most of it for checksums in Python; a run of 100,000 logged steps has six million. Here a
block of records is checked and decoded column by column: scalars of one key differ in nothing but wall time,
step and value, so that `protobuf` has to decode only the first of them.

References:
    https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details for frames and masked
    checksums; https://protobuf.dev/programming-guides/encoding for the bytes of a scalar.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from lightning_surge.runs.series import Points, progress

__all__ = ["checksums", "read_events"]

Bytes = NDArray[np.uint8]
Integers = NDArray[np.int64]
Decoder = Callable[[bytes], list[tuple[str, int, float]]]
# Places among the records of a block, steps and values, of one key.
Found = dict[str, list[tuple[Integers, Integers, NDArray[np.float64]]]]

BLOCK_BYTES = 1 << 24
# A record follows its length (8 bytes) and the length's checksum (4), and is followed by its own (4).
HEAD, FOOT = 12, 4
# Bytes of records that are decoded: shorter ones have no room for our keys, longer ones are images and such.
SHORTEST, LONGEST = 26, 1024
# A scalar: wall time (a byte that names the field, and 8), step (1, and from 1 to 10 with seven bits each),
# what is the same for all of its key, and at the end the value (1, and 4).
WALL_TIME, STEP, VALUE = 0x09, 0x10, 0x15
STEP_AT, STEP_BYTES, VALUE_BYTES = 10, 10, 4


def read_events(path: Path, points: Points) -> str | None:
    """Read the scalars of one event file, up to the first record that is damaged.

    Args:
        path: the event file.
        points: takes what is found.

    Returns:
        What a reader should know of the file; None if it was read to its end.

    Raises:
        ModuleNotFoundError: if tensorboard is not installed.
        OSError: if the file cannot be read.
    """
    decode = _decoder()
    read, size = 0, path.stat().st_size
    with path.open("rb") as file, progress(path, size) as bar:
        rest = b""
        while block := file.read(BLOCK_BYTES):
            bar.update(len(block))
            data = rest + block
            begins, end = _frames(data)
            raw = np.frombuffer(data, dtype=np.uint8)
            lengths = np.diff(begins, append=end) - HEAD - FOOT
            whole = _count_whole(raw, begins, lengths)
            found: Found = {}
            for places, rows in _rows(raw, begins[:whole], lengths[:whole]):
                _decode_rows(rows[:, :-FOOT], places, decode, points, found)
            for key, parts in found.items():
                order, steps, values = (np.concatenate(columns) for columns in zip(*parts, strict=True))
                points.add(key, steps[np.argsort(order)], values[np.argsort(order)])
            read += end if whole == begins.size else int(begins[whole])
            rest = data[end:]
            head = np.frombuffer(rest[:HEAD], dtype=np.uint8)[None]
            # A length that is wrong may be one that no file ever reaches.
            if whole < begins.size or (len(rest) >= HEAD and not _match(head[:, :8], head[:, 8:]).all()):
                break
    if read == size:
        return None
    return f"{path} is damaged, or still being written: read {read:,} of its {size:,} bytes"


def _decoder() -> Decoder:
    try:
        from tensorboard.compat.proto import event_pb2
        from tensorboard.util import tensor_util
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Reading event files needs tensorboard: pip install 'lightning-surge[tensorboard]'."
        ) from error

    def decode(record: bytes) -> list[tuple[str, int, float]]:
        """Key, step and value of each scalar in a record."""
        event = event_pb2.Event.FromString(record)
        scalars = []
        for value in event.summary.value:
            kind = value.WhichOneof("value")
            if kind == "simple_value":
                scalars.append((value.tag, event.step, value.simple_value))
            elif kind == "tensor" and value.metadata.plugin_data.plugin_name == "scalars":
                scalars.append((value.tag, event.step, float(tensor_util.make_ndarray(value.tensor))))
        return scalars

    return decode


def _frames(data: bytes) -> tuple[Integers, int]:
    """Where each whole frame begins, and where the last one ends."""
    begins, at, unpack, size = [], 0, struct.Struct("<Q").unpack_from, len(data)
    while at + HEAD <= size:
        (length,) = unpack(data, at)
        if at + HEAD + length + FOOT > size:
            break
        begins.append(at)
        at += HEAD + length + FOOT
    return np.array(begins, dtype=np.int64), at


def _rows(raw: Bytes, begins: Integers, lengths: Integers) -> Iterator[tuple[Integers, Bytes]]:
    """The records of each length with their checksums, shape `(n, length + FOOT)`, and their places."""
    for length in np.unique(lengths[(lengths >= SHORTEST) & (lengths <= LONGEST)]):
        places = np.flatnonzero(lengths == length)
        yield places, sliding_window_view(raw, length + FOOT)[begins[places] + HEAD]


def _count_whole(raw: Bytes, begins: Integers, lengths: Integers) -> int:
    """How many records come before the first one that is damaged; of most, only the length is checked."""
    if not begins.size:
        return 0
    heads = sliding_window_view(raw, HEAD)[begins]
    whole = _match(heads[:, :8], heads[:, 8:])
    for places, rows in _rows(raw, begins, lengths):
        whole[places] &= _match(rows[:, :-FOOT], rows[:, -FOOT:])
    return whole.size if whole.all() else int(np.argmin(whole))


def _match(rows: Bytes, stored: Bytes) -> NDArray[np.bool_]:
    """Whether each row's checksum is the one that was stored beside it."""
    same: NDArray[np.bool_] = checksums(rows) == np.ascontiguousarray(stored).view("<u4")[:, 0]
    return same


def checksums(rows: Bytes) -> NDArray[np.uint32]:
    """Masked CRC-32C of each row, as event files store it.

    Args:
        rows: bytes, shape `(n, length)`.

    Returns:
        Shape `(n,)`.

    Example:
        Unmasked, the checksum of these nine bytes is 0xE3069283, by which implementations are checked.

        >>> (masked,) = checksums(np.frombuffer(b"123456789", dtype=np.uint8)[None]).tolist()
        >>> rotated = (masked - 0xA282EAD8) % 2**32
        >>> hex((rotated << 15 | rotated >> 17) % 2**32)
        '0xe3069283'
    """
    crc: Any = np.full(len(rows), 0xFFFFFFFF, dtype=np.uint32)
    for column in np.ascontiguousarray(rows.T):
        crc = CRC_TABLE[(crc ^ column) & 0xFF] ^ (crc >> np.uint32(8))
    crc = ~crc
    masked: NDArray[np.uint32] = ((crc >> 15) | (crc << 17)) + np.uint32(0xA282EAD8)
    return masked


def _crc_table() -> NDArray[np.uint32]:
    """CRC-32C of every byte; the polynomial is Castagnoli's, its bits reversed."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(0x82F63B78), table >> 1)
    return table


CRC_TABLE = _crc_table()


def _decode_rows(rows: Bytes, places: Integers, decode: Decoder, points: Points, found: Found) -> None:
    """Decode records of one length, of those that differ in wall time, step and value only the first."""
    plain = (rows[:, [0, STEP_AT - 1, -VALUE_BYTES - 1]] == (WALL_TIME, STEP, VALUE)).all(axis=1)
    digits, values = rows[:, STEP_AT : STEP_AT + STEP_BYTES], rows[:, -VALUE_BYTES:]
    # The last byte of a step, and only that, is below 128.
    widths = 1 + np.argmax(digits < 128, axis=1)
    inside = plain[:, None] & (np.arange(STEP_BYTES) < widths[:, None])
    steps = (((digits & 0x7F) * inside).astype(np.int64) << 7 * np.arange(STEP_BYTES)).sum(axis=1)
    singles = np.ascontiguousarray(values).view("<f4")[:, 0].astype(np.float64)
    masked = rows.copy()
    masked[:, STEP_AT : STEP_AT + STEP_BYTES][inside] = 0
    masked[plain, 1 : STEP_AT - 1] = 0
    masked[plain, -VALUE_BYTES:] = 0
    _, kinds = np.unique(masked.view(f"V{rows.shape[1]}")[:, 0], return_inverse=True)
    order = np.argsort(kinds, kind="stable")
    for alike in np.split(order, np.flatnonzero(np.diff(kinds[order])) + 1):
        scalars = decode(rows[alike[0]].tobytes())
        if plain[alike[0]] and [one[2] for one in scalars] == [singles[alike[0]]]:
            if points.wants(key := scalars[0][0]):
                found.setdefault(key, []).append((places[alike], steps[alike], singles[alike]))
            continue
        for index in alike:
            for key, step, value in decode(rows[index].tobytes()):
                if points.wants(key):
                    one = (places[[index]], np.array([step]), np.array([value]))
                    found.setdefault(key, []).append(one)
