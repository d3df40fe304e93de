"""Keep a library's chatter out of the page unless it fails. Works for C++ and child processes too: file descriptors are moved."""

import contextlib
import functools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def hidden_output(lines: int = 30) -> Iterator[None]:
    """Send standard output and error of this process to a file; after an exception show its last ``lines``."""
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile("w+") as log, contextlib.ExitStack() as stack:
        # A notebook's sys.stdout is no file: Python's prints are caught by redirection, everything else by descriptor.
        stack.enter_context(contextlib.redirect_stdout(log))
        stack.enter_context(contextlib.redirect_stderr(log))
        saved = {number: os.dup(number) for number in (1, 2)}
        try:
            for number in saved:
                os.dup2(log.fileno(), number)
            yield
        except BaseException:
            log.flush()
            log.seek(0)
            tail = log.read().splitlines()[-lines:]
            stack.callback(lambda: print(*tail, sep="\n", file=sys.stderr))
            raise
        finally:
            for number, copy in saved.items():
                os.dup2(copy, number)
                os.close(copy)


def quiet(function: Callable) -> Callable:
    """``function`` under :func:`hidden_output`."""

    @functools.wraps(function)
    def silent(*args, **kwargs):
        with hidden_output():
            return function(*args, **kwargs)

    return silent
