"""The rows of a data file, each with its place for messages: JSON Lines, JSON, CSV, Parquet,
Arrow."""

import csv
import gzip
import io
import json
import re
import zlib
from pathlib import Path
from typing import Any

from workshop_utils.core import paths
from workshop_utils.core.errors import DataError

FORMATS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
"""Ending of a file -> the builder of ``datasets`` that reads it."""


def ending(path: Path | str) -> str:
    """What decides how ``path`` is read: its suffix, or the one before ``.gz``."""
    path = Path(path)
    return Path(path.stem if path.suffix.lower() == ".gz" else path).suffix.lower()


def rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Every row of ``path`` with its place ("my.csv, line 3"); a file of another ending is taken
    for JSON Lines. DataError names file and line."""
    kind = ending(path)
    if FORMATS.get(kind) in ("parquet", "arrow"):
        found = _table(Path(path), FORMATS[kind])
    elif FORMATS.get(kind) == "csv":
        found = _csv(path, "\t" if kind == ".tsv" else ",")
    else:
        text = _text(path).removeprefix("\ufeff")
        found = _array(text, path) if text.lstrip()[:1] == "[" and kind == ".json" else None
        found = _json_lines(text, path) if found is None else found
    if not found:
        raise DataError(f"{paths.shown(path)} holds no rows: write one JSON object a line.")
    return found


def lines(path: Path) -> list[str]:
    """The lines of a text file, ended by newlines alone; DataError where it is no UTF-8 text."""
    return _text(path).split("\n")


def _text(path: Path) -> str:
    path, name = Path(path), paths.shown(path)
    if not path.is_file():
        raise DataError(f"{name} {'is not a file' if path.exists() else 'does not exist'}.")
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        return content.decode()
    except UnicodeDecodeError as error:
        wide = content[:2] in (b"\xff\xfe", b"\xfe\xff")
        where = f"{error.reason} at byte {error.start}{'; it looks like UTF-16' * wide}"
        raise DataError(f"{name} is not UTF-8 text ({where}). Save it as UTF-8.") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{name}: its gzip data is damaged ({error}). Get it again.") from None
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror}.") from None


def json_object(line: str, where: str) -> dict:
    """The object in ``line``; DataError where there is none, or one no tokenizer takes."""
    row = _json(line, where)
    if not isinstance(row, dict):
        raise DataError(
            f"{where}: a {type(row).__name__}, not an object with `messages`, or `input` and "
            "`output`."
        )
    return row


def _json(text: str, where: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict:
        if len(found := dict(pairs)) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{twice!r} stands twice in one object: take one of them out")
        return found

    try:
        value = json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno}).") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON that can be read ({error}).") from None
    if "\\u" in text and re.search("[\ud800-\udfff]", json.dumps(value, ensure_ascii=False)):
        raise DataError(
            f"{where}: half of a surrogate pair (\\ud800 to \\udfff) is no character. Take it out."
        )
    return value


def _json_lines(text: str, path: Path) -> list[tuple[str, dict]]:
    name = paths.shown(path)
    if ending(path) == ".json" and "\n" in text.strip():
        try:
            json.loads(text)
        except json.JSONDecodeError:
            pass  # JSON Lines under the name of JSON
        else:
            raise DataError(
                f"{name}: one object over many lines. Give a list of rows, or one object a line."
            )
    return [
        (where, json_object(line, where))
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip() and (where := f"{name}, line {number}")
    ]


def _array(text: str, path: Path) -> list[tuple[str, dict]]:
    name = paths.shown(path)
    found = [(f"{name}, row {number}", row) for number, row in enumerate(_json(text, name), 1)]
    for where, row in found:
        if not isinstance(row, dict):
            raise DataError(f"{where}: a {type(row).__name__}, not an object.")
    return found


def _csv(path: Path, separator: str) -> list[tuple[str, dict]]:
    """Every value is a text; a row has as many as the first line names."""
    name, text = paths.shown(path), _text(path).removeprefix("\ufeff")
    csv.field_size_limit(1 << 30)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    found, begin = [], 1
    try:
        columns = next(reader, [])
        if len(set(columns)) < len(columns):
            raise DataError(f"{name}, line 1: a column stands twice: {', '.join(columns)}.")
        begin = reader.line_num + 1
        for values in reader:
            where, begin = f"{name}, line {begin}", reader.line_num + 1
            if not values:
                continue
            if len(values) != len(columns):
                raise DataError(
                    f"{where}: {len(values)} values for the {len(columns)} columns "
                    f"{', '.join(columns)}. Put quotes around a text with {separator!r} in it."
                )
            found.append((where, dict(zip(columns, values, strict=True))))
    except csv.Error as error:
        raise DataError(f"{name}, line {begin}: not CSV that can be read ({error}).") from None
    return found


def _table(path: Path, builder: str) -> list[tuple[str, dict]]:
    name = paths.shown(path)
    if not path.is_file():
        raise DataError(f"{name} {'is not a file' if path.exists() else 'does not exist'}.")
    import datasets
    import pyarrow

    try:
        with paths.temporary_directory("workshop-data-") as scratch:
            table = datasets.load_dataset(
                builder, data_files=str(path), split="train", cache_dir=str(scratch)
            ).to_list()
    except (
        datasets.exceptions.DatasetsError,
        pyarrow.ArrowException,
        ValueError,
        OSError,
    ) as error:
        said = " ".join(str(error.__cause__ or error).split())[:300]
        raise DataError(f"{name} is no {builder} file that can be read ({said}).") from None
    return [(f"{name}, row {number}", row) for number, row in enumerate(table, 1)]
