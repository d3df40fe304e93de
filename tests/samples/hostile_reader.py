"""Reads files in a process of its own, with little memory: ``hostile_reader.py DIRECTORY`` prints
one line of JSON for each.

A file is ``NUMBER.READER``. Its address space may grow by 200 MB and the file's own size; a file
that takes more than 5 s of the processor, or waits for a minute, ends the process, even inside C.
"""

import contextlib
import faulthandler
import io
import json
import resource
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

SECONDS, MEMORY = 5, 200 * 1024**2
FILES = {"__0_0.distcp": 1 << 20}


def _nemo(path: Path) -> None:
    from workshop_utils.checkpoints.formats import nemo_archive, torch_archive

    nemo_archive.read_config(path)
    with nemo_archive.open_member(path, nemo_archive.WEIGHTS) as file:
        torch_archive.read_tensors(file, f"{path}:{nemo_archive.WEIGHTS}")


def _readers() -> dict:
    from workshop_utils.checkpoints.formats import (
        gguf,
        huggingface,
        safe_text,
        torch_archive,
        torch_dist,
    )

    return {
        "index": lambda path: torch_dist.read_index(path.read_bytes(), str(path), FILES),
        "state": lambda path: torch_archive.read_tensors(io.BytesIO(path.read_bytes()), str(path)),
        "nemo": _nemo,
        "yaml": safe_text.read_yaml,
        "json": safe_text.read_json,
        "safetensors": huggingface.read_safetensors,
        "gguf": gguf.read_header,
    }


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


@contextlib.contextmanager
def bounded(size: int) -> Iterator[None]:
    """Inside, the address space may grow by MEMORY and ``size`` bytes, and the process ends after
    SECONDS of the processor."""
    most = {
        resource.RLIMIT_AS: _address_space() + MEMORY + size,
        resource.RLIMIT_CPU: int(time.process_time()) + SECONDS + 1,
    }
    hard = {kind: resource.getrlimit(kind)[1] for kind in most}
    for kind, limit in most.items():
        resource.setrlimit(kind, (limit, hard[kind]))
    faulthandler.register(signal.SIGXCPU, chain=True)
    faulthandler.dump_traceback_later(60, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        for kind, limit in hard.items():
            resource.setrlimit(kind, (limit, limit))


def main(directory: Path) -> None:
    from workshop_utils.core.errors import WorkshopError

    readers = _readers()
    for path in sorted(directory.iterdir()):
        print(json.dumps({"begun": path.name}), flush=True)
        begin = time.monotonic()
        try:
            with bounded(path.stat().st_size):
                readers[path.suffix[1:]](path)
            kind, message = "nothing", ""
        except WorkshopError as error:
            kind, message = type(error).__name__, str(error)
        except BaseException as error:
            kind, message = f"escaped: {type(error).__name__}", str(error)
        seconds = time.monotonic() - begin
        print(
            json.dumps(
                {"name": path.name, "kind": kind, "message": message[:2000], "seconds": seconds}
            ),
            flush=True,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
