"""Ctrl-C of a command: one line, exit status 130, and an end within seconds, whatever the libraries
of the command make of it.

A command ends at Ctrl-C as any Python program does: ``KeyboardInterrupt`` unwinds it, and what it
has half-written goes. Two things make that long or loud. Some libraries catch the exception in the
middle of their imports and fail later, with a traceback of something else; and a process with torch
and NeMo in it takes seconds to end. So the unwinding has a time limit, after which what is
half-written is removed by a thread; and Python's own teardown is left out.
"""

import contextlib
import os
import signal
import sys
import threading
from types import FrameType
from typing import NoReturn

from workshop_utils.core import paths

PATIENCE = {signal.SIGINT: 2.0, signal.SIGTERM: 1.0}
"""Seconds that a command has to unwind. SIGTERM comes from another program, often a command of ours
that is being interrupted itself."""

_ending = threading.Lock()
_interrupted = threading.Event()
_watched: set[int] = set()
"""The process that :func:`watch` was called in; one that it forks has the handlers, too."""


def watch() -> None:
    """Have Ctrl-C and SIGTERM interrupt this process, which is a command's own."""
    _watched.add(os.getpid())
    for number in PATIENCE:
        # A shell lets its jobs in the background ignore Ctrl-C.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt)


def has_come() -> bool:
    """Whether one of the signals has come."""
    return _interrupted.is_set()


def _interrupt(number: int, frame: FrameType | None) -> None:
    if os.getpid() not in _watched:  # forked: its parent says what there is to say
        os._exit(130)
    if _interrupted.is_set():  # the second Ctrl-C of an impatient person would stop the cleaning up
        return
    _interrupted.set()
    # For the exception below in a callback, where Python cannot go on with it.
    sys.unraisablehook = lambda unraisable: None
    timer = threading.Timer(PATIENCE[number], end)
    timer.daemon = True
    timer.start()
    raise KeyboardInterrupt


def end() -> NoReturn:
    """End what this process has started, remove what is half-written, say "interrupted", and end
    this process at once, with 130."""
    import psutil

    # and never released: the main thread may come here while the other one is at it
    _ending.acquire()
    # Writers of Megatron-Core and their managers are no daemons that end with this process, and
    # hold its pipes.
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            process.kill()
    paths.remove_unfinished()
    with contextlib.suppress(OSError, ValueError):  # a reader that has gone
        sys.stdout.flush()
        print("interrupted", file=sys.stderr, flush=True)
    os._exit(130)
