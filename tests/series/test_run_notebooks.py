"""The runner, on notebooks made here, in real kernels."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from workshop_utils.cli import main
from workshop_utils.core.errors import WorkshopError
from workshop_utils.series import report
from workshop_utils.series import run_notebooks as module
from workshop_utils.series.execute_notebook import WIDGET, Execution, execute, save
from workshop_utils.series.run_notebooks import find_notebooks, run_notebooks, summary


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty workshop in a folder of its own."""
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    (tmp_path / "notebooks").mkdir()
    return tmp_path


def notebook(root: Path, name: str, *cells: str) -> Path:
    file = root / "notebooks" / f"{name}.ipynb"
    code = map(new_code_cell, cells)
    nbformat.write(new_notebook(cells=[new_markdown_cell("# One"), *code]), file)
    return file


def stdout(file: Path) -> list[str]:
    outputs = [out for cell in nbformat.read(file, 4).cells for out in cell.get("outputs", [])]
    return ["".join(output.get("text", "")) for output in outputs]


def read_report(root: Path) -> dict:
    return json.loads((root / "runs" / "workshop" / "report.json").read_text())


def test_a_failing_notebook_is_named_and_stops_nothing(root, capsys):
    (root / "notebooks" / "00_half.ipynb").write_text('{"cells": [')
    fails = "raise ValueError('no such file\\nand more')"
    broken = notebook(root, "01_broken", "x = 1", fails, "print('never')")
    # One that announces its cause keeps the cause's last line.
    cause = "raise OSError('`one` failed:\\n  File x, line 1\\nPermissionError: /.cache\\n')"
    notebook(root, "02_announces", cause)
    notebook(root, "03_last", "print('still run')")
    before = broken.read_bytes()
    assert main(["run"]) == 1
    half, *rows = read_report(root)["notebooks"]
    assert half.pop("error").startswith("notebooks/00_half.ipynb is not a notebook")
    named = [(row["name"], row["result"], row.get("error")) for row in rows]
    assert named == [
        ("01_broken", "failed", "cell [2]: ValueError: no such file"),
        ("02_announces", "failed", "cell [1]: OSError: `one` failed: PermissionError: /.cache"),
        ("03_last", "passed", None),
    ]
    assert [set(row) for row in (half, rows[-1])] == [{"name", "seconds", "result"}] * 2
    assert "01_broken: cell [2]: ValueError: no such file" in capsys.readouterr().out
    assert stdout(root / "runs" / "workshop" / "notebooks" / "03_last.ipynb") == ["still run\n"]
    assert broken.read_bytes() == before


def test_the_kernel_is_this_interpreter_whatever_the_user_has_installed(root, monkeypatch, capsys):
    other = root / "jupyter" / "kernels" / "python3"
    other.mkdir(parents=True)
    words = {"argv": ["/bin/false"], "display_name": "other", "language": "python"}
    (other / "kernel.json").write_text(json.dumps(words))
    monkeypatch.setenv("JUPYTER_PATH", str(root / "jupyter"))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(root / "jupyter"))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    notebook(
        root,
        "00_only",
        "from workshop_utils.series import report\nreport.record_metric('tuned_exact_match', 0.9)",
        "import os, sys, shutil\n"
        "print(sys.executable, os.getcwd(), os.environ['WANDB_MODE'], shutil.which('torchrun'))",
    )
    assert main(["run"]) == 0
    torchrun = Path(sys.executable).parent / "torchrun"
    said = stdout(root / "runs" / "workshop" / "notebooks" / "00_only.ipynb")[-1]
    assert said == f"{sys.executable} {root / 'notebooks'} disabled {torchrun}\n"
    metrics = {"base_exact_match": None, "tuned_exact_match": 0.9, "train_seconds": None}
    assert read_report(root)["metrics"] == metrics
    assert "tuned_exact_match  90.0%" in capsys.readouterr().out


def test_a_cell_that_takes_too_long_and_a_kernel_that_dies(root):
    slow = execute(notebook(root, "00_slow", "import time", "time.sleep(60)"), timeout=1)
    assert (slow.result, slow.error) == ("failed", "cell [2]: took longer than 1 s")
    dead = execute(notebook(root, "01_dead", "import os; os._exit(9)"))
    assert dead.result == "failed"
    assert dead.error.startswith("cell [1]: the kernel died")


def test_cells_are_counted_and_an_expected_error_is_none(root):
    file = notebook(root, "00_expected", "1", "raise ValueError", "3")
    written = nbformat.read(file, 4)
    written.cells[2].metadata["tags"] = ["raises-exception"]
    nbformat.write(written, file)
    seen = []
    assert execute(file, lambda number, total: seen.append((number, total))).result == "passed"
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_outputs_are_saved_without_what_is_volatile(root):
    printed = "import sys; print('kept'); print('dropped', file=sys.stderr)"
    good = notebook(root, "00_good", printed, "import ipywidgets; ipywidgets.IntSlider()", "41 + 1")
    bad = notebook(root, "01_bad", "print('not stored')", "1 / 0")
    before = bad.read_bytes()
    run_notebooks(save_outputs=True)
    text = good.read_text()
    saved = json.loads(text)
    assert stdout(good) == ["kept\n", ""]
    assert saved["cells"][3]["outputs"][0]["data"] == {"text/plain": ["42"]}
    assert WIDGET not in text
    assert saved["metadata"]["language_info"] == {"name": "python"}
    assert set(saved["metadata"]) <= {"kernelspec", "language_info"}
    assert all(not cell["metadata"] for cell in saved["cells"])
    assert bad.read_bytes() == before
    run_notebooks(["0"], save_outputs=True)
    assert good.read_text() == text, "a second run changes nothing"


def test_only_some_and_the_rest_is_skipped(root, monkeypatch):
    for name in ("00_a", "03_b", "10_c"):
        notebook(root, name, "1")
    passed = Execution(nbformat.read(root / "notebooks" / "00_a.ipynb", 4), 1.0, "passed")
    monkeypatch.setattr(module, "execute", lambda *_: passed)
    report.record_metric("train_seconds", 12)
    assert [row.result for row in run_notebooks(["3"])] == ["skipped", "passed", "skipped"]
    kept = read_report(root)["metrics"]["train_seconds"]
    assert kept == 12, "what a run before has measured stays"
    run_notebooks()
    assert read_report(root)["metrics"]["train_seconds"] is None, "a whole run starts anew"


def test_names_and_numbers_choose(root, capsys):
    for name in ("00_a", "03_b", "10_c"):
        notebook(root, name, "1")
    (root / "notebooks" / "scratch.ipynb").touch()
    assert [file.stem for file in find_notebooks()] == ["00_a", "03_b", "10_c"]
    assert [file.stem for file in find_notebooks(["10", "0"])] == ["00_a", "10_c"]
    assert [file.stem for file in find_notebooks(["03_b"])] == ["03_b"]
    assert main(["run", "--list", "--only", "3"]) == 0
    assert capsys.readouterr().out == "03_b\n"
    for words in (["0,3"], ["00, 3"], ["0,", "03_b"], ["0 3"], [",0,,3,"]):
        assert main(["run", "--list", "--only", *words]) == 0
        assert capsys.readouterr().out == "00_a\n03_b\n"
    assert main(["run", "--list", "--only", " , "]) == 1
    assert "--only names no notebook" in capsys.readouterr().err
    assert main(["run", "--only", "7"]) == 1
    assert "there is no notebook '7'; there are 00_a, 03_b, 10_c" in capsys.readouterr().err


def test_no_notebooks_at_all(root):
    with pytest.raises(WorkshopError, match="no notebooks in"):
        find_notebooks()


def test_ctrl_c_stops_the_cell_and_what_it_started(root):
    started = root / "started"
    sleep = f"['bash', '-c', 'echo $$ > {started}; exec sleep 300']"
    notebook(root, "00_a", f"import subprocess\nsubprocess.run({sleep})")
    notebook(root, "01_b", "1")
    command = [sys.executable, "-m", "workshop_utils", "run"]
    runner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: started.exists() and started.read_text().strip())
        runner.send_signal(signal.SIGINT)
        text, _ = runner.communicate(timeout=60)
    finally:
        runner.kill()
    assert runner.returncode == 130
    assert "interrupted at cell [1]" in text
    assert [row["result"] for row in read_report(root)["notebooks"]] == ["skipped", "skipped"]
    wait_until(lambda: not alive(int(started.read_text())))


STOP = """\
import os, signal, sys, jupyter_client
from workshop_utils.cli import main
import workshop_utils.series.run_notebooks as module
def stop(*_, **__):
    os.kill(os.getpid(), signal.SIGINT)
start = jupyter_client.AsyncKernelManager.start_kernel
async def started(self, **words):
    await start(self, **words)
    print(self.provisioner.pid, flush=True)
    stop()
"""


@pytest.mark.parametrize("moment", ["import", "kernel"])
def test_ctrl_c_before_the_first_cell(root, moment):
    notebook(root, "00_a", "import time\ntime.sleep(300)")
    where = {
        "import": "module.execute = stop\n",
        "kernel": "jupyter_client.AsyncKernelManager.start_kernel = started\n",
    }
    command = [sys.executable, "-c", f"{STOP}{where[moment]}sys.exit(main())", "run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 130 and done.stderr.splitlines() == ["interrupted"], done
    assert "executed copies" not in done.stdout  # no table of what did not run
    if moment == "kernel":
        assert not alive(int(done.stdout.splitlines()[0]))


def wait_until(condition, seconds: int = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_report_names_what_is_there(root):
    (root / "models").mkdir()
    assert report.record_artifact("hf_model", root / "models") == root / "models"
    report.record_artifact("test_set", root / "data" / "gone.jsonl")
    report.record_metric("base_exact_match", 0)
    made = report.build_report([report.NotebookResult("00_a", 1.5, "passed")])
    assert made["notebooks"] == [{"name": "00_a", "seconds": 1.5, "result": "passed"}]
    assert made["artifacts"] == dict.fromkeys(report.ARTIFACTS) | {"hf_model": "models"}
    assert made["metrics"]["base_exact_match"] == 0
    assert made["machine"]["cores"] >= 1 and made["machine"]["versions"]["torch"]
    assert "base_exact_match   0.0%" in summary([report.NotebookResult("00_a", 1.5, "passed")])


def test_the_report_takes_nothing_else(root):
    with pytest.raises(ValueError, match="no artifacts entry 'hf'"):
        report.record_artifact("hf", root)
    for value in (85, float("nan"), -0.1):
        with pytest.raises(ValueError, match="tuned_exact_match is"):
            report.record_metric("tuned_exact_match", value)
    assert report.read_results() == {"artifacts": {}, "metrics": {}}


def test_damaged_notes_get_a_sentence(root):
    (root / "runs" / "workshop").mkdir(parents=True)
    (root / "runs" / "workshop" / "results.json").write_text("{")
    with pytest.raises(WorkshopError, match=r"results\.json is not JSON"):
        report.read_results()


def test_saving_is_all_or_nothing(root, monkeypatch):
    file = notebook(root, "00_a", "1")
    before = file.read_bytes()
    monkeypatch.setattr(nbformat, "writes", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(nbformat.read(file, 4), file)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == ["00_a.ipynb"]
