"""Is a model's directory whole? Cheap checks, one for each format: names and sizes, no weight is
read."""

import json
from pathlib import Path

HEADER_LENGTH = 8  # bytes; a safetensors file starts with the length of its JSON header
_NEEDED = ("config.json", "tokenizer.json", "tokenizer_config.json")
_NEMO2 = (
    "context/model.yaml",
    "context/io.json",
    "weights/.metadata",
    "weights/metadata.json",
    "weights/common.pt",
)


def huggingface(directory: Path) -> bool:
    """Config, tokenizer and every shard are there, and no shard is shorter than its header says."""
    index, names = directory / "model.safetensors.index.json", {"model.safetensors"}
    try:
        if index.is_file():
            names = set(json.loads(index.read_bytes())["weight_map"].values())
        shards = [directory / name for name in names]
        there = all((directory / name).is_file() for name in _NEEDED)
        return there and all(map(_is_whole_safetensors, shards))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def nemo2(directory: Path) -> bool:
    sizes = [file.stat().st_size for file in (directory / "weights").glob("*.distcp")]
    return bool(sizes) and all(sizes) and all((directory / name).is_file() for name in _NEMO2)


def _is_whole_safetensors(file: Path) -> bool:
    """Format: https://huggingface.co/docs/safetensors (length of the header, header, tensors to the
    end of the file)."""
    size = file.stat().st_size
    with file.open("rb") as content:
        length = int.from_bytes(content.read(HEADER_LENGTH), "little")
        if length > size:
            return False
        header = json.loads(content.read(length))
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    return size == HEADER_LENGTH + length + end
