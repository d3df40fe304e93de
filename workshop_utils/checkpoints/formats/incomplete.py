"""Files that look like weights by their name and are not there: pointers of Git LFS, web pages,
nothing at all."""

from pathlib import Path

from workshop_utils.core.paths import shown

_MAX_BYTES = 1_000_000
_MAX_FILES = 2000
_WEIGHTS = (".safetensors", ".bin", ".distcp", ".pt", ".ckpt", ".nemo", ".gguf", "")


def sentence(path: Path) -> str | None:
    """What the file ``path`` is instead of weights, and what to do; None for anything else."""
    size = path.stat().st_size
    if size == 0:
        return f"{shown(path)} is empty: a download or a copy that broke off. Get it again."
    if size > _MAX_BYTES:
        return None
    with path.open("rb") as file:
        start = file.read(200).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return (
            f"{shown(path)} is a pointer of Git LFS ({size} bytes), not the file itself. In the "
            "clone: git lfs pull. Elsewhere: download the model again."
        )
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return (
            f"{shown(path)} is a web page, likely an error message of the server. Open it to "
            "read why, and download the file again."
        )
    return None


def find(path: Path) -> str | None:
    """The :func:`sentence` for ``path``, or for the first such file in the directory ``path``."""
    if path.is_file():
        return sentence(path)
    below = sorted([*path.glob("*"), *path.glob("*/*")])[:_MAX_FILES]
    files = (file for file in below if file.suffix in _WEIGHTS and file.is_file())
    return next((why for file in files if (why := sentence(file))), None)
