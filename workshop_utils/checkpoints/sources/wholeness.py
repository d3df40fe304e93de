"""Is a model's directory whole? Cheap checks: names and sizes, no weight is read."""

import json
from collections.abc import Callable
from pathlib import Path

HEADER_LENGTH = (
    8  # bytes; a safetensors file starts with the length of its JSON header, little endian
)


def huggingface(directory: Path) -> bool:
    """Config, tokenizer and every safetensors shard are there, and no shard is shorter than its
    header says."""
    if not all(
        (directory / name).is_file()
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json")
    ):
        return False
    index = directory / "model.safetensors.index.json"
    try:
        names = (
            set(json.loads(index.read_bytes())["weight_map"].values())
            if index.is_file()
            else {"model.safetensors"}
        )
        return all(_is_whole_safetensors(directory / name) for name in names)
    except (OSError, ValueError, KeyError):
        return False


def nemo2(directory: Path) -> bool:
    """The files of a NeMo 2.0 checkpoint are there, and no weight file is empty."""
    wanted = (
        "context/model.yaml",
        "context/io.json",
        "weights/.metadata",
        "weights/metadata.json",
        "weights/common.pt",
    )
    weights = list((directory / "weights").glob("*.distcp"))
    return (
        all((directory / name).is_file() for name in wanted)
        and bool(weights)
        and all(w.stat().st_size for w in weights)
    )


CHECKS: dict[str, Callable[[Path], bool]] = {"huggingface": huggingface, "nemo2": nemo2}


def _is_whole_safetensors(file: Path) -> bool:
    """Format: https://huggingface.co/docs/safetensors (length of the header, header, tensors to the
    end of the file)."""
    with file.open("rb") as content:
        length = int.from_bytes(content.read(HEADER_LENGTH), "little")
        if length > file.stat().st_size:
            return False
        header = json.loads(content.read(length))
    end = max(
        (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"),
        default=0,
    )
    return file.stat().st_size == HEADER_LENGTH + length + end
