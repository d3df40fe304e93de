"""Run a downloader that shows no progress of its own, and show how its files grow."""

import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from workshop_utils.core.progress import progress_bar

BLOCK = 512  # bytes; the unit of st_blocks, whatever the file system's own block is
PAUSE = 0.2  # seconds between two looks


def run(
    command: Sequence[str],
    log: Path,
    folder: Path,
    size: int,
    label: str,
    progress: bool,
    environment: Mapping[str, str],
) -> int:
    """Run ``command`` until it ends and return its exit status; everything it prints goes to
    ``log``.

    The bar counts the bytes written under ``folder`` towards ``size``. The command is stopped when
    this function is interrupted.
    """
    bars = {"total": size, "desc": label, "unit": "B", "unit_scale": True}
    with log.open("w") as output, progress_bar(**bars, shown=progress) as bar:
        streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, env=environment, **streams)
        try:
            while process.poll() is None:
                bar.update(min(size, sum(_written(folder))) - bar.n)
                time.sleep(PAUSE)
        finally:
            process.terminate()
            status = process.wait()
        if status == 0:
            bar.update(size - bar.n)
    return status


def _written(folder: Path) -> Iterator[int]:
    """Bytes on the disk of each file: some clients give a file its full size at once."""
    for here, _, names in os.walk(folder):
        for name in names:
            try:
                yield os.stat(os.path.join(here, name)).st_blocks * BLOCK
            except FileNotFoundError:  # moved while we looked
                continue
