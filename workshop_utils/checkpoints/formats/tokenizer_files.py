"""Kind and size of the vocabulary of a tokenizer's directory, where they can be told in a few
milliseconds."""

from collections.abc import Iterator
from pathlib import Path

from workshop_utils.checkpoints.formats.safe_text import read_json
from workshop_utils.core.errors import CheckpointError

MAX_BYTES = 8 * 1024**2
"""Larger vocabularies are not counted: it would take longer than everything else."""

NAMES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")

_MORE = ("generation_config.json", "special_tokens_map.json")


def is_one(path: Path) -> bool:
    return any((path / name).is_file() for name in NAMES)


def describe(path: Path) -> str | None:
    """``class, number of tokens`` of the tokenizer in ``path``; None where there is none."""
    if not is_one(path):
        return None
    kind = next(name for name in NAMES if (path / name).is_file())
    if kind == NAMES[0]:
        try:
            kind = str(read_json(path / kind).get("tokenizer_class"))
        except CheckpointError:
            kind = f"{kind} cannot be read"
    count = vocabulary(path)
    return f"{kind}, {count:,} tokens" if count else kind


def faults(path: Path) -> Iterator[CheckpointError]:
    """What is wrong with the JSON files beside the weights in ``path``, as far as is cheap to
    tell."""
    for file in (path / name for name in (*NAMES[:2], *_MORE)):
        try:
            if file.is_dir() or (file.is_file() and file.stat().st_size <= MAX_BYTES):
                read_json(file)
        except CheckpointError as fault:
            yield fault


def vocabulary(path: Path) -> int | None:
    """Number of tokens of the tokenizer in ``path``; None where that is not cheap to tell."""
    fast, sentencepiece = path / "tokenizer.json", path / "tokenizer.model"
    try:
        if fast.is_file() and fast.stat().st_size <= MAX_BYTES:
            return _count_fast(read_json(fast))
        if sentencepiece.is_file() and sentencepiece.stat().st_size <= MAX_BYTES:
            return count_pieces(sentencepiece.read_bytes())
    except CheckpointError:
        pass  # A tokenizer that cannot be read does not keep the weights from being described.
    return None


def count_pieces(content: bytes) -> int | None:
    """Pieces of a SentencePiece model: fields 1 of its protobuf message. None if it is none."""
    at, count = 0, 0
    while at < len(content):
        tag, at = _varint(content, at)
        length, at = _varint(content, at)
        # Every field at the top is a message or text of a length (wire type 2).
        if tag & 7 != 2 or at + length > len(content):
            return None
        count += tag >> 3 == 1
        at += length
    return count or None


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        byte = content[at] if at < len(content) else 0
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            break
    return value, at


def _count_fast(described: dict) -> int | None:
    model, added = described.get("model"), described.get("added_tokens")
    known = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(known, dict | list):
        return None
    entries = known if isinstance(known, list) else ()
    inside = {entry[0] for entry in entries if isinstance(entry, list) and entry} or known
    more = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    return len(known) + sum(str(token.get("content")) not in inside for token in more)
