"""One process at a time works on a path; the others wait, say for whom (at once, then every
minute), and give up after a timeout.

The lock is the operating system's (``filelock``), so it ends with the process that holds it,
however that ended: a killed job never blocks the next. A file beside it says who holds it, for
people to read; nothing depends on it.
"""

import contextlib
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from workshop_utils.core import paths
from workshop_utils.core.errors import WaitedTooLong, WorkshopError

PAUSE = 0.5  # seconds between two looks
REPEAT = 60.0  # seconds between two lines about the same wait


@contextlib.contextmanager
def alone_on(target: Path, doing: str, timeout: float) -> Iterator[None]:
    """Hold the lock of ``target`` for the block; ``doing`` says, to those who wait, what is being
    done ("importing Qwen/Qwen3-8B").

    Raises:
        WorkshopError: nothing can be written there.
        WaitedTooLong: another process has held it for ``timeout`` seconds; the message says which
            one and what it does.
    """
    from filelock import FileLock, Timeout

    target, note = Path(target), _note(Path(target))
    lock, began = FileLock(target.parent / f".{target.name}.lock"), time.monotonic()
    where, said = paths.shown(target), -REPEAT
    while True:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=min(PAUSE, timeout), poll_interval=0.05)
            break
        except Timeout:
            who, waited = holder(target) or "another process", time.monotonic() - began
            if waited >= timeout:
                raise WaitedTooLong(
                    f"waited {timeout:g} s for {who}, which holds the lock of {where}. Let it "
                    "finish or stop it, then start again; with more time it may be enough to wait "
                    "longer."
                ) from None
            if waited - said >= REPEAT:
                said, left = waited, f"{timeout - waited:.0f} s left"
                print(f"waiting for {who} to finish with {where}; {left}", file=sys.stderr)
        except OSError as error:
            raise WorkshopError(
                f"{where} cannot be made ({error.strerror}: {error.filename}). Give another place."
            ) from None
    try:
        mine = {"pid": os.getpid(), "host": socket.gethostname(), "doing": doing}
        paths.write_text(note, json.dumps(mine | {"since": f"{datetime.now():%H:%M:%S}"}))
        yield
    finally:
        note.unlink(missing_ok=True)
        lock.release()


def holder(target: Path) -> str | None:
    """Who works on ``target``, in words, as far as that process said so; it may have been killed
    since."""
    try:
        said = json.loads(_note(target).read_text(encoding="utf-8"))
        return f"process {said['pid']} on {said['host']} ({said['doing']}, since {said['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remove_leftovers(target: Path) -> None:
    """Delete temporary directories for ``target`` of programs that were killed. To be called with
    the lock held: nobody writes them."""
    for pattern in (f".{target.name}.*.partial", f".{target.name}.*.old"):
        for left in target.parent.glob(pattern):
            said = "left by a program that was stopped; removed."
            print(f"{paths.shown(left)}: {said}", file=sys.stderr)
            shutil.rmtree(left)


def _note(target: Path) -> Path:
    return target.parent / f".{target.name}.lock.holder"
