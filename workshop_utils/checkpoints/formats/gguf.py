"""GGUF files (llama.cpp): the header, read without the gguf package, which trusts what the file
says and takes 4.8 s and 310 MB for a vocabulary of 128,000 tokens with its merges (here: 0.04 s).

    magic "GGUF", version (uint32), number of tensors, number of key/value pairs (uint64 each)
    key/value pairs: key, type, value              (strings: length as uint64, then UTF-8; arrays:
    type, count, elements)
    tensors: name, number of dimensions, dimensions, type, offset in the data
    padding to general.alignment, then the data

The first dimension is the one that lies together in memory, so shapes are turned round here. A
quantised type packs a block of elements, so the bytes of a tensor follow from its type. Source:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and ggml/include/ggml.h.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from workshop_utils.checkpoints.formats import decoder_config
from workshop_utils.checkpoints.formats.findings import Report, stop
from workshop_utils.checkpoints.formats.summary import Checkpoint, Kind, dtypes
from workshop_utils.checkpoints.formats.tensor import Tensor, whole
from workshop_utils.core.errors import DamagedCheckpoint, NotACheckpoint, UnsupportedCheckpoint
from workshop_utils.core.paths import shown

MAGIC = b"GGUF"
MAX_HEADER = 256 * 1024**2
"""Bytes; a vocabulary of 256,000 tokens with its merges takes some 10 MB."""

MAX_PAIRS, MAX_TENSORS, MAX_KEPT = 65_536, 1_000_000, 1024

_SCALARS = dict(zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9

_TABLE = """
0 float32 1 4, 1 float16 1 2, 2 Q4_0 32 18, 3 Q4_1 32 20, 6 Q5_0 32 22, 7 Q5_1 32 24,
8 Q8_0 32 34, 9 Q8_1 32 40, 10 Q2_K 256 84, 11 Q3_K 256 110, 12 Q4_K 256 144,
13 Q5_K 256 176, 14 Q6_K 256 210, 15 Q8_K 256 292, 16 IQ2_XXS 256 66, 17 IQ2_XS 256 74,
18 IQ3_XXS 256 98, 19 IQ1_S 256 50, 20 IQ4_NL 32 18, 21 IQ3_S 256 110, 22 IQ2_S 256 82,
23 IQ4_XS 256 136, 24 int8 1 1, 25 int16 1 2, 26 int32 1 4, 27 int64 1 8, 28 float64 1 8,
29 IQ1_M 256 56, 30 bfloat16 1 2, 34 TQ1_0 256 54, 35 TQ2_0 256 66, 39 MXFP4 32 17
"""
_TYPES = {
    int(number): (name, int(elements), int(width))
    for number, name, elements, width in (row.split() for row in _TABLE.split(","))
}
"""Number of a type -> name, elements of a block, bytes of a block."""


@dataclass(frozen=True)
class Array:
    """An array that was passed over: only its length is kept."""

    length: int


@dataclass(frozen=True)
class Header:
    """``fields`` are the key/value pairs; long arrays, such as the vocabulary, are
    :class:`Array`."""

    version: int
    fields: dict[str, Any]
    tensors: tuple[Tensor, ...]


def describe(path: Path, report: Report = stop) -> Checkpoint:
    """Describe the GGUF file ``path``; errors as :func:`read_header`, and UnsupportedCheckpoint for
    an adapter."""
    header = read_header(path, report)
    fields, names = header.fields, {tensor.name for tensor in header.tensors}
    vocabulary = _length(fields.get("tokenizer.ggml.tokens"))
    kind = str(fields.get("general.architecture", "architecture not named"))
    precision = next(iter(dtypes(header.tensors)), "no tensors")
    notes = []
    parts = fields.get("split.count")
    if isinstance(parts, int) and parts > 1:
        notes.append(f"one of {parts} files; the tensors of the others are not listed")
    if "rope_freqs.weight" in names:
        notes.append("the scaling of the rope is in the tensor rope_freqs.weight")
    if fields.get("general.type") == "adapter":
        raise UnsupportedCheckpoint(
            f"{shown(path)} is a LoRA for llama.cpp (llama-cli --lora), which nothing here reads. "
            "Give the PEFT adapter that it was made of."
        )
    return Checkpoint(
        path=path,
        kind=Kind.GGUF,
        detail=f"{kind}, {precision}",
        variant=kind,
        architecture=decoder_config.gguf(fields, names, vocabulary),
        nbytes=path.stat().st_size,
        tensors=header.tensors,
        tokenizer=_tokenizer(fields, vocabulary),
        adapter=None,
        notes=tuple(notes),
        version=f"GGUF {header.version}",
    )


def read_header(path: Path, report: Report = stop) -> Header:
    """The header of the GGUF file ``path``.

    Raises :class:`NotACheckpoint` (another format), :class:`UnsupportedCheckpoint` (version 1,
    unknown type) and :class:`DamagedCheckpoint` (cut off, or sizes that make no sense). A tensor
    whose bytes are not in the file goes to ``report``.
    """
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise NotACheckpoint(
                f"{shown(path)} is no GGUF file: it does not begin with the letters GGUF."
            )
        reader = _Reader(file, shown(path), path.stat().st_size)
        version = reader.number("I")
        if version & 0xFFFF == 0:
            raise UnsupportedCheckpoint(
                f"{shown(path)} is big-endian. Turn it round: gguf-convert-endian {path.name} "
                "little"
            )
        if version not in (2, 3):
            raise UnsupportedCheckpoint(
                f"{shown(path)} is GGUF version {version}; 2 and 3 are read. Convert the model "
                "again with llama.cpp."
            )
        tensors, pairs = reader.number("Q"), reader.number("Q")
        if tensors > MAX_TENSORS or pairs > MAX_PAIRS:
            raise DamagedCheckpoint(
                f"{shown(path)} claims {tensors:,} tensors and {pairs:,} key/value pairs; no "
                "model has so many."
            )
        fields = {}
        for _ in range(pairs):
            key = reader.text()
            if key in fields:
                raise DamagedCheckpoint(f"{shown(path)} has the key {key!r} twice.")
            fields[key] = reader.value(reader.number("I"))
        entries = [reader.tensor() for _ in range(tensors)]
        alignment = fields.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 65536 or alignment & (alignment - 1):
            raise DamagedCheckpoint(
                f"{shown(path)}: general.alignment is {alignment!r}, which is no power of two."
            )
        start = -(-reader.position // alignment) * alignment
    return Header(version, fields, tuple(_placed(path, entries, start, report)))


class _Reader:
    """Reads the header block by block, as far as it goes, and never past MAX_HEADER."""

    def __init__(self, file: IO[bytes], where: str, length: int) -> None:
        self.file, self.where, self.length = file, where, length
        self.data, self.at, self.base = b"", 0, file.tell()

    @property
    def position(self) -> int:
        return self.base + self.at

    def need(self, count: int) -> None:
        """Have ``count`` more bytes in ``data`` at ``at``."""
        if self.position + count > MAX_HEADER:
            raise DamagedCheckpoint(
                f"{self.where}: the header is longer than {MAX_HEADER:,} bytes, or one of its "
                "lengths is wrong."
            )
        if self.position + count > self.length:
            raise DamagedCheckpoint(
                f"{self.where} is cut off inside its header. Download it again."
            )
        while len(self.data) - self.at < count:
            more = self.file.read(max(1 << 18, count))
            self.data, self.base, self.at = self.data[self.at :] + more, self.base + self.at, 0

    def number(self, kind: str) -> Any:
        length = struct.calcsize("=" + kind)
        self.need(length)
        (found,) = struct.unpack_from("<" + kind, self.data, self.at)
        self.at += length
        return found

    def text(self) -> str:
        length = self.number("Q")
        self.need(length)
        self.at += length
        return self.data[self.at - length : self.at].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        """The next value; arrays longer than MAX_KEPT, and those of strings, are passed over."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise DamagedCheckpoint(
                f"{self.where}: a value has the type {kind}, which GGUF does not have."
            )
        inner, count = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            width = struct.calcsize("=" + _SCALARS[inner])
            if count <= MAX_KEPT:
                return [self.number(_SCALARS[inner]) for _ in range(count)]
            self.need(count * width)
            self.at += count * width
        elif inner == _STRING:
            self.pass_over_texts(count)
        else:
            raise DamagedCheckpoint(
                f"{self.where}: an array of the type {inner} is no part of a model."
            )
        return Array(count)

    def pass_over_texts(self, count: int) -> None:
        """Skip ``count`` strings: the vocabulary and the merges, some hundred thousand."""
        unpack = struct.Struct("<Q").unpack_from
        for _ in range(count):
            if len(self.data) - self.at < 8:
                self.need(8)
            (length,) = unpack(self.data, self.at)
            if len(self.data) - self.at < 8 + length:
                self.need(8 + length)
            self.at += 8 + length

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self.text(), self.number("I")
        if dimensions > 8:
            raise DamagedCheckpoint(f"{self.where}: {name!r} has {dimensions} dimensions.", name)
        shape = tuple(reversed([self.number("Q") for _ in range(dimensions)]))
        return name, shape, self.number("I"), self.number("Q")


def _placed(
    path: Path, entries: list[tuple[str, tuple[int, ...], int, int]], start: int, report: Report
) -> list[Tensor]:
    """The tensors with their bytes, each checked to lie inside the file."""
    length, found, names = path.stat().st_size, [], set()
    for name, shape, kind, offset in entries:
        fault = None
        dtype, elements, width = _TYPES.get(kind, (f"type {kind}", 1, 0))
        count = math.prod(shape)
        if name in names:
            fault = f"{shown(path)} has two tensors called {name!r}."
        elif kind not in _TYPES:
            fault = f"{shown(path)}: {name} has the type {kind}, which is not known here."
        elif count >= 2**63 or count % elements or (shape and shape[-1] % elements):
            fault = (
                f"{shown(path)}: {name} has the shape {list(shape)}, which does not fill whole "
                f"blocks of {dtype}."
            )
        elif start + offset + count // elements * width > length:
            end = start + offset + count // elements * width
            fault = (
                f"{shown(path)} has {length:,} bytes but {name} ends at byte {end:,}: the file "
                "is cut off. Download it again."
            )
        if fault:
            report(DamagedCheckpoint(fault, name))
            continue
        names.add(name)
        found.append(
            whole(name, shape, dtype, path.name, start + offset, count // elements * width)
        )
    return found


def _length(value: Any) -> int | None:
    if isinstance(value, Array):
        return value.length
    return len(value) if isinstance(value, list) else None


def _tokenizer(fields: dict[str, Any], vocabulary: int | None) -> str | None:
    kind = fields.get("tokenizer.ggml.model")
    if kind is None:
        return None
    pre = fields.get("tokenizer.ggml.pre")
    return f"{kind}{f' ({pre})' if pre else ''}, in the file" + (
        f", {vocabulary:,} tokens" if vocabulary else ""
    )
