"""Run one notebook without a browser, in a kernel of this interpreter, and say how it ended."""

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from workshop_utils.core import paths
from workshop_utils.core.errors import WorkshopError
from workshop_utils.runtime.device import quiet_environment

CELL_TIMEOUT = 1800
"""Seconds a single cell may take. Training on a slow machine is the longest one."""

PATIENCE = 2
"""Seconds that an interrupted cell gets to stop what it started, before its kernel is killed."""

WIDGET = "application/vnd.jupyter.widget-view+json"


@dataclass(frozen=True)
class Execution:
    """``result`` is passed, failed or interrupted; ``notebook`` holds the outputs of the cells that
    ran."""

    notebook: dict
    seconds: float
    result: str
    error: str | None = None


def execute(
    file: Path,
    on_cell: Callable[[int, int], None] = lambda number, total: None,
    timeout: int = CELL_TIMEOUT,
) -> Execution:
    """Run the notebook ``file`` in its own folder. ``file`` itself is only read.

    The kernel is always the one of the running interpreter, whatever kernels are installed for the
    user. Ctrl-C (or SIGTERM) interrupts the cell that runs, so that it can stop its own processes;
    a second one kills the kernel.

    Args:
        on_cell: called before each code cell with its number (from 1) and the number of code cells.
        timeout: seconds a cell may take.

    Raises:
        WorkshopError: ``file`` is not a notebook.
    """
    from asyncio import CancelledError

    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    notebook = _read(file)
    client = _new_client(notebook, cwd=file.resolve().parent, on_cell=on_cell, timeout=timeout)
    start = time.monotonic()
    error = None
    try:
        client.execute(env=_environment())
    except CellExecutionError as failure:
        error = f"{client.place()}: {failure.ename}: {_plain(failure.evalue)}"
    except CellTimeoutError:
        error = f"{client.place()}: took longer than {timeout} s"
    except DeadKernelError:
        error = (
            f"{client.place()}: the kernel died. Most often memory ran out: close other programs "
            "and run again"
        )
    except (_Stopped, CancelledError):
        pass
    except RuntimeError as failure:
        error = f"the kernel did not start: {failure}"
    result = "interrupted" if client.stopped else "failed" if error else "passed"
    if client.stopped:
        error = f"interrupted at {client.place()}"
    return Execution(notebook, time.monotonic() - start, result, error)


def save(notebook: dict, target: Path) -> Path:
    """Write ``notebook`` to ``target``, all or nothing, without what differs from run to run or
    cannot be shown again.

    Dropped: widgets (their state lives in the kernel only), standard error (progress bars and
    warnings), the time of each cell's execution, and the version of Python.
    """
    import nbformat

    notebook["metadata"].pop("widgets", None)
    notebook["metadata"]["language_info"] = {"name": "python"}
    for cell in notebook["cells"]:
        for volatile in ("execution", "ExecuteTime", "collapsed", "scrolled"):
            cell["metadata"].pop(volatile, None)
        if cell["cell_type"] == "code":
            cell["outputs"] = [output for output in cell["outputs"] if not _volatile(output)]
    return paths.write_text(target, nbformat.writes(notebook) + "\n")


def _read(file: Path) -> dict:
    import nbformat

    try:
        return nbformat.read(file, as_version=4)
    except (ValueError, KeyError, AttributeError) as error:
        raise WorkshopError(
            f"{paths.shown(file)} is not a notebook: {error}. Get it back with: git checkout "
            f"{file.name}"
        ) from None


def _volatile(output: dict) -> bool:
    return output.get("name") == "stderr" or WIDGET in output.get("data", {})


def _plain(text: str) -> str:
    """The first line of an error, without the colours that IPython gives it; one that announces its
    cause, with the cause's last."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).strip().split("\n")
    return f"{lines[0]} {lines[-1].strip()}" if lines[0].endswith(":") and lines[1:] else lines[0]


def _environment() -> dict[str, str]:
    """This process's environment, without telemetry, and with the programs of this interpreter
    (torchrun) on PATH."""
    environment = dict(os.environ)
    quiet_environment(environment)
    # What a notebook draws must not depend on the settings of whoever started the run.
    environment.pop("MPLBACKEND", None)
    environment["PATH"] = os.pathsep.join(
        [str(Path(sys.executable).parent), environment.get("PATH", os.defpath)]
    )
    return environment


class _Stopped(Exception):
    """Ctrl-C came between two cells."""


def _new_client(notebook: dict, cwd: Path, on_cell: Callable[[int, int], None], timeout: int):
    """An nbclient that knows which cell it runs and that interrupts, rather than kills, on the
    first Ctrl-C."""
    import asyncio

    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpecManager
    from nbclient import NotebookClient

    class OwnKernel(AsyncKernelManager):
        """A kernel of this interpreter."""

        def __init__(self, **kwargs):
            # Without folders to search, "python3" can only be the interpreter that runs this.
            super().__init__(
                kernel_spec_manager=KernelSpecManager(kernel_dirs=[]),
                transport_encryption="auto",
                **kwargs,
            )

    class Client(NotebookClient):
        """Knows its place, and can be stopped."""

        stopped = False
        number = 0

        def place(self) -> str:
            """Where it is, for a message: the code cell it runs, or the start of the notebook."""
            return f"cell [{self.number}]" if self.number else "its start"

        def cell_starts(self, cell: dict, cell_index: int) -> None:
            """Note and announce a code cell. Raises :class:`_Stopped`, instead of running it, after
            a Ctrl-C."""
            if self.stopped:
                raise _Stopped
            code = [
                index for index, one in enumerate(notebook["cells"]) if one["cell_type"] == "code"
            ]
            if cell_index in code:  # nbclient announces the text cells, too
                self.number = code.index(cell_index) + 1
                on_cell(self.number, len(code))

        async def async_start_new_kernel(self, **kwargs) -> None:
            """Start the kernel with :meth:`stop` as the handler of SIGINT and SIGTERM."""
            # nbclient has just set its own handlers, which kill the kernel and leave what it
            # started behind.
            loop, self.starting = asyncio.get_running_loop(), asyncio.current_task()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, self.stop, loop)
            async with self.ended_with_its_start():
                await super().async_start_new_kernel(**kwargs)

        async def async_start_new_kernel_client(self):
            """The client of the kernel that :meth:`async_start_new_kernel` has started."""
            async with self.ended_with_its_start():
                return await super().async_start_new_kernel_client()

        @contextlib.asynccontextmanager
        async def ended_with_its_start(self):
            """Kill the kernel where :meth:`stop` cancels the block; nbclient looks after it from
            the first cell on."""
            try:
                yield
            except asyncio.CancelledError:
                await self.km.shutdown_kernel(now=True)
                raise

        def stop(self, loop: asyncio.AbstractEventLoop) -> None:
            """Interrupt the kernel, and end it at the second call, which comes by itself after
            PATIENCE seconds."""
            if (
                not self.number
            ):  # nothing of the notebook runs yet: it is only the kernel that starts
                self.starting.cancel()
            elif not self.km.has_kernel:
                pass
            elif self.stopped:
                self.ending = loop.create_task(self.km.shutdown_kernel(now=True))
            else:
                self.ending = loop.create_task(self.km.interrupt_kernel())
                loop.call_later(PATIENCE, lambda: self.km.has_kernel and self.stop(loop))
            self.stopped, self.shutdown_kernel = True, "immediate"

    client = Client(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        kernel_manager_class=OwnKernel,
        resources={"metadata": {"path": str(cwd)}},
        record_timing=False,
        coalesce_streams=True,
        skip_cells_with_tag="skip-execution",
    )
    client.on_cell_start = client.cell_starts
    return client
