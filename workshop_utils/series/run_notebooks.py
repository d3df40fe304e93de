"""The whole series without a browser: every notebook in order, a table at the end, and
``runs/workshop/report.json``."""

import re
import shutil
from collections.abc import Callable, Sequence
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
    ("3", "03", "03_compat"). WorkshopError where there are none."""
    folder = paths.root() / "notebooks"
    notebooks = sorted(file for file in folder.glob("*.ipynb") if re.match(r"\d\d_", file.name))
    if not notebooks:
        raise WorkshopError(
            f"no notebooks in {folder}. Run the command in a clone of the repository, or set "
            "WORKSHOP_ROOT to one."
        )
    names = [file.stem for file in notebooks]
    chosen = set()
    for name in only:
        start = name.zfill(2) if name.isdigit() else name
        matching = {file for file in notebooks if file.stem.startswith(start)}
        if not matching:
            raise WorkshopError(
                f"there is no notebook {name!r}; there are "
                f"{', '.join(names)}.{did_you_mean(nearest(name, names))}"
            )
        chosen |= matching
    return sorted(chosen) if only else notebooks


def run_notebooks(only: Sequence[str] = (), save_outputs: bool = False) -> list[NotebookResult]:
    """Run the notebooks; one result for each of the series, also of those not asked for (skipped).

    Executed copies go to ``runs/workshop/notebooks/``; with ``save_outputs`` those that passed
    replace their originals. The report is written after every notebook. One that fails does not
    stop the next: each makes what it needs. After Ctrl-C the rest is skipped, and the interrupted
    one says so.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    everything, chosen = find_notebooks(), find_notebooks(only)
    results = {file: NotebookResult(file.stem, 0.0, "skipped") for file in everything}
    if not only:
        report.forget_results()
    report.write_report(list(results.values()))
    console, text = Console(), TextColumn("{task.description}")
    columns = (SpinnerColumn(), text, BarColumn(bar_width=20), TimeElapsedColumn())
    live = {"console": console, "transient": True, "disable": not console.is_terminal}
    with Progress(*columns, **live) as bar:
        task = bar.add_task("", total=None)
        for number, file in enumerate(chosen, 1):
            # The backslash: rich would take the bracket for one of its tags.
            title = rf"\[{number}/{len(chosen)}] {file.stem}"
            bar.reset(task, description=title, total=None, start=True)

            def on_cell(cell: int, cells: int, title: str = title) -> None:
                here = {"completed": cell - 1, "total": cells}
                bar.update(task, description=f"{title}, cell {cell}/{cells}", **here)

            row = results[file] = _run(file, on_cell, save_outputs)
            report.write_report(list(results.values()))
            line = f"{SYMBOLS[row.result]} {row.result:7} {row.name}  {_minutes(row.seconds)}"
            line += f"\n    {row.error}" if row.error else ""
            console.print(line, markup=False, highlight=False, soft_wrap=True)
            if was_interrupted([row]):
                break
    return list(results.values())


def was_interrupted(results: Sequence[NotebookResult]) -> bool:
    """True if Ctrl-C ended the run."""
    return any(row.result == "skipped" and row.error for row in results)


def summary(results: Sequence[NotebookResult]) -> str:
    """The table, the first error of each notebook that failed, what was made and measured."""
    width = max(len(row.name) for row in results)
    figures = report.build_report(results)
    return "\n".join(
        [
            f"{'notebook':{width}}   time   result",
            *(
                f"{row.name:{width}}  {_minutes(row.seconds):>5}   {SYMBOLS[row.result]} "
                f"{row.result}"
                for row in results
            ),
            f"{'':{width}}  {_minutes(sum(row.seconds for row in results)):>5}",
            *(f"\n{row.name}: {row.error}" for row in results if row.error),
            "\nmade:",
            *(
                f"  {key:18} {path or '(nothing yet)'}"
                for key, path in figures["artifacts"].items()
            ),
            "measured:",
            *(f"  {key:18} {_figure(key, value)}" for key, value in figures["metrics"].items()),
            f"\nexecuted copies: {paths.shown(_copies())}",
            f"report: {paths.shown(report.report_file())}",
        ]
    )


def _run(file: Path, on_cell: Callable[[int, int], None], save_outputs: bool) -> NotebookResult:
    """Execute, store the executed copy, and the original's outputs where that is asked for."""
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


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def _figure(key: str, value: float | None) -> str:
    if value is None:
        return "(not measured)"
    return f"{value:.0f} s" if key.endswith("seconds") else f"{value:.1%}"
