"""The whole series without a browser: every notebook in order, a table at the end, and
``runs/workshop/report.json``."""

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from workshop_utils.core import paths
from workshop_utils.core.errors import WorkshopError
from workshop_utils.core.nearest import did_you_mean, nearest
from workshop_utils.series import report
from workshop_utils.series.execute_notebook import execute, save
from workshop_utils.series.report import NotebookResult

SYMBOLS = {"passed": "✓", "failed": "✗", "skipped": "–"}


def find_notebooks(only: Sequence[str] = ()) -> list[Path]:
    """The notebooks ``NN_*.ipynb`` in order; with ``only``, those whose number or name is given
    ("3", "03", "03_compat").

    Raises:
        WorkshopError: there are none, or ``only`` names one that is not there.
    """
    folder = paths.root() / "notebooks"
    found = sorted(file for file in folder.glob("*.ipynb") if re.match(r"\d\d_", file.name))
    if not found:
        raise WorkshopError(
            f"no notebooks in {folder}. Run the command in a clone of the repository, or set "
            "WORKSHOP_ROOT to one."
        )
    chosen = []
    for wanted in only:
        matching = [
            file
            for file in found
            if file.stem.startswith(wanted.zfill(2) if wanted.isdigit() else wanted)
        ]
        if not matching:
            names = [file.stem for file in found]
            raise WorkshopError(
                f"there is no notebook {wanted!r}; there are "
                f"{', '.join(names)}.{did_you_mean(nearest(wanted, names))}"
            )
        chosen += matching
    return [file for file in found if file in chosen] if only else found


def run_notebooks(only: Sequence[str] = (), save_outputs: bool = False) -> list[NotebookResult]:
    """Run the notebooks and return one result for each of the series, also of those that were not
    asked for (skipped).

    Executed copies go to ``runs/workshop/notebooks/``; with ``save_outputs`` those that passed
    replace their originals. The report is written after every notebook. One that fails does not
    stop the next: each makes what it needs. After Ctrl-C the rest is skipped, and the result of the
    interrupted one says "interrupted".

    Raises:
        WorkshopError: see :func:`find_notebooks`.
    """
    everything, chosen = find_notebooks(), find_notebooks(only)
    results = {file: NotebookResult(file.stem, 0.0, "skipped") for file in everything}
    if not only:
        report.forget_results()
    report.write_report(list(results.values()))
    with _progress(chosen) as progress:
        for file in chosen:
            results[file] = _run(file, progress.start(file), save_outputs)
            report.write_report(list(results.values()))
            progress.finish(results[file])
            if was_interrupted([results[file]]):
                break
    return list(results.values())


def was_interrupted(results: Sequence[NotebookResult]) -> bool:
    """True if Ctrl-C ended the run."""
    return any(row.result == "skipped" and row.error for row in results)


def summary(results: Sequence[NotebookResult]) -> str:
    """The closing text: the table, the first error of each notebook that failed, and what was made
    and measured."""
    width = max(len(row.name) for row in results)
    lines = [f"{'notebook':{width}}   time   result"]
    lines += [
        f"{row.name:{width}}  {_minutes(row.seconds):>5}   {SYMBOLS[row.result]} {row.result}"
        for row in results
    ]
    lines.append(f"{'':{width}}  {_minutes(sum(row.seconds for row in results)):>5}")
    lines += [f"\n{row.name}: {row.error}" for row in results if row.error]
    made = report.build_report(results)
    lines += ["", "made:"]
    lines += [f"  {key:18} {place or '(nothing yet)'}" for key, place in made["artifacts"].items()]
    lines += ["measured:"]
    lines += [f"  {key:18} {_figure(key, value)}" for key, value in made["metrics"].items()]
    lines += [
        "",
        f"executed copies: {paths.shown(_copies())}",
        f"report: {paths.shown(report.report_file())}",
    ]
    return "\n".join(lines)


def _run(file: Path, on_cell: Callable[[int, int], None], save_outputs: bool) -> NotebookResult:
    """Execute, store the executed copy, and the original's outputs where that is wanted."""
    try:
        execution = execute(file, on_cell)
    except WorkshopError as error:
        return NotebookResult(file.stem, 0.0, "failed", str(error))
    copy = save(execution.notebook, _copies() / file.name)
    if save_outputs and execution.result == "passed":
        with paths.new_file(file) as part:
            shutil.copyfile(copy, part)
    result = "skipped" if execution.result == "interrupted" else execution.result
    return NotebookResult(file.stem, round(execution.seconds, 1), result, execution.error)


def _copies() -> Path:
    return paths.runs_dir() / "workshop" / "notebooks"


class _Progress:
    """One live line on a terminal, one line a notebook elsewhere."""

    def __init__(self, bar, chosen: Sequence[Path]):
        self.bar, self.chosen = bar, list(chosen)
        self.task = bar.add_task("", total=None)

    def start(self, file: Path):
        """Show that ``file`` starts. Returns the function to call with (number of the cell, cells)
        as each cell starts."""
        title = f"[{self.chosen.index(file) + 1}/{len(self.chosen)}] {file.stem}"
        self.bar.reset(self.task, description=rf"\{title}", total=None, start=True)
        return lambda number, total: self.bar.update(
            self.task,
            description=rf"\{title}, cell {number}/{total}",
            completed=number - 1,
            total=total,
        )

    def finish(self, row: NotebookResult) -> None:
        """Print the result of a notebook and, below it, its error if there is one."""
        line = f"{SYMBOLS[row.result]} {row.result:7} {row.name}  {_minutes(row.seconds)}"
        self.bar.console.print(
            line + (f"\n    {row.error}" if row.error else ""),
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


@contextlib.contextmanager
def _progress(chosen: Sequence[Path]) -> Iterator[_Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console()
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        yield _Progress(bar, chosen)


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def _figure(key: str, value: float | None) -> str:
    if value is None:
        return "(not measured)"
    return f"{value:.0f} s" if key.endswith("seconds") else f"{value:.1%}"
