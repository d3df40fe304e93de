"""Run one notebook without a browser, in a kernel of this interpreter, and say how it ended."""

import os
import re
import sys
import time
from asyncio import CancelledError
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from workshop_utils.core import paths
from workshop_utils.core.errors import WorkshopError
from workshop_utils.runtime.device import quiet_environment

CELL_TIMEOUT = 1800
"""Seconds a single cell may take. Training on a slow machine is the longest one."""

WIDGET = "application/vnd.jupyter.widget-view+json"


@dataclass(frozen=True)
class Execution:
    """``result``: passed, failed or interrupted. ``notebook`` has the outputs of cells that ran."""

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

    At Ctrl-C or SIGTERM nbclient interrupts the cell that runs, so that it can stop its own
    processes, and kills a kernel that has not ended after five seconds.

    Args:
        on_cell: called before each code cell with its number (from 1) and the number of code cells.
        timeout: seconds a cell may take.

    Raises:
        WorkshopError: ``file`` is not a notebook.
    """
    import nbformat
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpecManager
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    try:
        notebook = nbformat.read(file, as_version=4)
    except (ValueError, KeyError, AttributeError) as error:
        raise WorkshopError(
            f"{paths.shown(file)} is not a notebook: {error}. Get it back with: git checkout "
            f"{file.name}"
        ) from None
    code = [index for index, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    place = "its start"

    def cell_starts(cell: dict, cell_index: int) -> None:
        nonlocal place
        client.shutdown_kernel = "graceful"
        number = code.index(cell_index) + 1
        place = f"cell [{number}]"
        on_cell(number, len(code))

    # Without folders to search, "python3" can only be the interpreter that runs this.
    own = KernelSpecManager(kernel_dirs=[])
    client = NotebookClient(
        notebook,
        km=AsyncKernelManager(kernel_spec_manager=own, transport_encryption="auto"),
        timeout=timeout,
        resources={"metadata": {"path": str(file.resolve().parent)}},
        record_timing=False,
        coalesce_streams=True,
        shutdown_kernel="immediate",  # until the first cell: a starting kernel would complain
        on_cell_execute=cell_starts,
    )
    start, error = time.monotonic(), None
    try:
        client.execute(env=_environment(), cleanup_kc=True)
    except CellExecutionError as failure:
        error = f"{place}: {failure.ename}: {_plain(failure.evalue)}"
    except CellTimeoutError:
        error = f"{place}: took longer than {timeout} s"
    except DeadKernelError:
        error = f"{place}: the kernel died. Most often memory ran out: close other programs "
        error += "and run again"
    except (Exception, CancelledError) as failure:
        if not _stopped(client) and not isinstance(failure, RuntimeError):
            raise
        error = f"the kernel did not start: {failure}"
    result = "failed" if error else "passed"
    if _stopped(client):
        result, error = "interrupted", f"interrupted at {place}"
    return Execution(notebook, time.monotonic() - start, result, error)


def save(notebook: dict, target: Path) -> Path:
    """Write ``notebook`` to ``target``, all or nothing, without what differs from run to run or
    cannot be shown again: widgets (their state lives in the kernel only), standard error (progress
    bars and warnings), the time of each cell's execution, and the version of Python."""
    import nbformat

    notebook["metadata"].pop("widgets", None)
    notebook["metadata"]["language_info"] = {"name": "python"}
    for cell in notebook["cells"]:
        for volatile in ("execution", "ExecuteTime", "collapsed", "scrolled"):
            cell["metadata"].pop(volatile, None)
        if cell["cell_type"] == "code":
            cell["outputs"] = [
                output
                for output in cell["outputs"]
                if output.get("name") != "stderr" and WIDGET not in output.get("data", {})
            ]
    return paths.write_text(target, nbformat.writes(notebook) + "\n")


def _stopped(client) -> bool:
    """Whether nbclient's own handler of signals has run: what it then raises differs."""
    return hasattr(client, "_async_cleanup_kernel_future")


def _plain(text: str) -> str:
    """An error's first line, uncoloured; if it announces a cause, with the last line, too."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).strip().split("\n")
    return f"{lines[0]} {lines[-1].strip()}" if lines[0].endswith(":") and lines[1:] else lines[0]


def _environment() -> dict[str, str]:
    """Without telemetry, and with the programs of this interpreter (torchrun) on PATH."""
    environment = dict(os.environ)
    quiet_environment(environment)
    # What a notebook draws must not depend on the settings of whoever started the run.
    environment.pop("MPLBACKEND", None)
    programs = [str(Path(sys.executable).parent), environment.get("PATH", os.defpath)]
    return environment | {"PATH": os.pathsep.join(programs)}
