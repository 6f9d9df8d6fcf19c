"""Open a table of runs, whatever kind of file it is, as a pandas DataFrame.

The first bytes tell the kind, not the name, so that a pipe or a renamed file is read too. The frame's index
says where a row stands in the file, and the index's name what it counts: lines or rows.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import sys
import zlib
from pathlib import Path
from typing import Any

import pandas as pd

from lightning_surge.tables.columns import WORDS
from lightning_surge.tables.study import is_study, read_study

EXPORT = "export the runs as CSV or Parquet"


def read_frame(source: str | Path) -> pd.DataFrame:
    """Open a table, a file, a pipe or `-`, as it stands: the text of CSV is not yet taken for numbers."""
    name = str(source)
    if is_study(name):
        return _in_rows(read_study(name))
    frame = _parse(_content(name), "standard input" if name == "-" else repr(name))
    frame = frame.set_axis([str(column).strip() for column in frame.columns], axis=1)
    if (again := frame.columns.duplicated()).any():
        twice = frame.columns[again][0]
        raise ValueError(f"Expected distinct columns, got {twice!r} twice in {name!r}: rename one.")
    return frame


def _content(name: str) -> bytes:
    if name == "-":
        return sys.stdin.buffer.read()
    path = Path(name)
    if path.is_dir():
        for pattern, (kind, remedy) in WORDS["folders"].items():
            if any(next(path.glob(above + pattern), None) for above in ("", "*/", "*/*/")):
                raise IsADirectoryError(f"Expected a file, got {kind}, {name!r}: {remedy}.")
        raise IsADirectoryError(f"Expected a file, got the directory {name!r}: name the table in it.")
    if not path.exists():
        raise FileNotFoundError(f"Expected an existing file, got {name!r}: check the path.")
    return path.read_bytes()


def _parse(data: bytes, name: str) -> pd.DataFrame:
    if data.startswith(b"\x1f\x8b"):
        try:
            return _parse(gzip.decompress(data), name)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"Expected a whole gzip file, got {name}: {error}; copy it again.") from error
    if data.startswith(b"PAR1"):
        return _parquet(data, name)
    for magic, (kind, remedy) in WORDS["kinds"].items():
        if data.startswith(bytes.fromhex(magic)):
            raise ValueError(f"Expected a table, got {kind}, {name}: {remedy}.")
    text = _text(data, name)
    return _json(text, name) if text.lstrip().startswith(("[", "{")) else _delimited(text, name)


def _text(data: bytes, name: str) -> str:
    """Decode; spreadsheets still write UTF-16 and the code page of Windows."""
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        text = data.decode("cp1252", errors="replace")
    if len(re.findall(r"[\0-\b\x0e-\x1f]", text[:4096])) > len(text[:4096]) / 100:
        raise ValueError(f"Expected a table, got bytes that are no text, {name}: {EXPORT}.")
    return text


def _parquet(data: bytes, name: str) -> pd.DataFrame:
    try:
        frame = pd.read_parquet(io.BytesIO(data))
    except ImportError as error:
        raise ModuleNotFoundError("Parquet needs pyarrow: pip install 'lightning-surge[fit]'.") from error
    except (OSError, ValueError) as error:  # pyarrow's own are of these kinds
        raise ValueError(f"Expected a Parquet file, got {name}: {error}; write it again.") from error
    levels = [level for level in frame.index.names if level is not None and level not in frame.columns]
    return _in_rows(frame.reset_index(levels) if levels else frame)


def _in_rows(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.set_axis(range(1, len(frame) + 1), axis=0).rename_axis("row")


def _json(text: str, name: str) -> pd.DataFrame:
    """A list of runs, a run per line, or columns as in pandas; deeper values get dotted names."""
    try:
        try:
            found: Any = json.loads(text)
        except json.JSONDecodeError:
            found = [json.loads(line) for line in text.splitlines() if line.strip()]
        if isinstance(found, dict):
            found = pd.DataFrame(found).to_dict("records")
        return _in_rows(pd.json_normalize(found))
    except (ValueError, TypeError, LookupError, AttributeError, NotImplementedError, RecursionError) as error:
        raise ValueError(f"Expected JSON with one object per run, got {name}: {error}; {EXPORT}.") from error


def _delimited(text: str, name: str) -> pd.DataFrame:
    """CSV by whatever separates the names in the header; comments may stand above it."""
    # Comments are emptied and not removed: lines keep their numbers.
    lines = ["" if line.startswith("#") else line for line in text.splitlines()]
    first = next((place for place, line in enumerate(lines) if line.strip()), None)
    if first is None:
        raise ValueError(f"Expected a header and rows, got the empty file {name}: write the table again.")
    separator = max(",;\t", key=lines[first].count)
    try:
        frame = pd.read_csv(
            io.StringIO("\n".join(lines[first:])),
            sep=separator if separator in lines[first] else r"\s+",
            header=None,
            dtype=object,
            keep_default_na=False,
            skip_blank_lines=False,
            engine="python",  # the other one fills short rows without a word
        )
    except ValueError as error:  # pandas' own are of this kind
        reason = f"{str(error).strip()}, counted from the header on"
        raise ValueError(f"Expected CSV, got {name}: {reason}; correct or remove the line.") from error
    frame.index = pd.RangeIndex(first + 1, first + 1 + len(frame), name="line")
    cells = frame.map(str.strip, na_action="ignore")
    header = cells.iloc[0]
    # Files that were joined repeat their header.
    cells = cells[(cells.fillna("") != "").any(axis=1) & cells.ne(header).any(axis=1)]
    missing = cells.isna().sum(axis=1)
    if missing.any():
        raise ValueError(
            f"Expected {len(header)} fields, as in the header, got {len(header) - missing.max()} on line "
            f"{missing.idxmax()} of {name}: correct or remove the line."
        )
    return cells.set_axis([str(text) or f"unnamed {place}" for place, text in enumerate(header, 1)], axis=1)
