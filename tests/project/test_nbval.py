"""The comparison of stored outputs: it must overlook what differs from run to run, and nothing
else."""

import re
import shutil
import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output
from nbval.plugin import get_sanitize_patterns
from places import ROOT

from workshop_utils.series.execute_notebook import execute, save

SANITIZE = ROOT / "tests" / "nbval_sanitize.cfg"
MASKED = [
    ("took 12.3 s, 17 tokens/s", "took 9.01 s, 250 tokens/s"),
    ("/home/ada/clone/models/nemo2/one", "/srv/x/models/nemo2/one"),
    ("started 2026-01-31 10:00:00", "started 2027-12-01T23:59:59.1"),
    ("[00:10<00:05]", "[01:10<02:05]"),
    ("torch 2.13.0+cpu", "torch 2.13.0+cu128"),
    ("<object at 0x7f12ab34cd56>", "<object at 0x7fffffffffff>"),
    ("/tmp/tmpab12/x.nemo", "/tmp/tmpcd34/x.nemo"),
    ("\x1b[31mred\x1b[0m", "red"),
    ("loss: 3.128 at step 1", "loss: 3.121 at step 1"),
]
KEPT = [
    ("30 layers", "31 layers"),
    ("rank 0.52", "rank 0.61"),
    ("models/nemo2/one", "models/nemo2/two"),
    ("True", "False"),
    ("2.13.0", "2.14.0"),
    ("loss 0.016", "loss 0.026"),
    ("loss: 3.128 at step 1", "loss: 3.128 at step 2"),
    ("adapter 168 91.1%", "adapter 168 90.5%"),
    ("priority: 154 of 168 rows right", "priority: 153 of 168 rows right"),
]


def sanitized(text: str) -> str:
    for pattern, replacement in get_sanitize_patterns(SANITIZE.read_text()):
        text = re.sub(pattern, replacement, text)
    return text


@pytest.mark.parametrize(
    ("first", "second", "same"), [(*pair, pair in MASKED) for pair in MASKED + KEPT]
)
def test_only_what_differs_from_run_to_run_is_masked(first, second, same):
    assert (sanitized(first) == sanitized(second)) == same


def test_what_the_runner_stores_compares_equal_and_another_output_is_found(tmp_path):
    """By ``pytest --nbval`` as ``make test`` calls it."""
    stored, changed = tmp_path / "00_stored.ipynb", tmp_path / "01_changed.ipynb"
    cells = [
        "from pathlib import Path\ndone = Path('done').exists()\nPath('done').touch()",
        # A progress bar is shown only when there is something to do: as in a download.
        "from tqdm.auto import tqdm\nfor _ in tqdm([] if done else [1, 2], disable=done): pass\n"
        "print('there')",
        "import time, sys; print('warning', file=sys.stderr); print(f'took {time.time():.2f} s')",
        "import ipywidgets; ipywidgets.IntSlider()",
        "6 * 7",
    ]
    nbformat.write(new_notebook(cells=[new_code_cell(cell) for cell in cells]), stored)
    done = execute(stored)
    assert done.result == "passed", done.error
    save(done.notebook, stored)
    outputs = [new_output("stream", name="stdout", text="41 layers\n")]
    cell = new_code_cell("print('42 layers')", outputs=outputs, execution_count=1)
    nbformat.write(new_notebook(cells=[cell]), changed)
    shutil.copy(ROOT / "conftest.py", tmp_path)
    options = ["--nbval", "--nbval-current-env", "--nbval-sanitize-with", str(SANITIZE)]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", "."]
    compared = subprocess.run(
        [*command, *options, "."], check=False, capture_output=True, text=True, cwd=tmp_path
    )
    assert compared.returncode == 1
    assert "1 failed, 5 passed" in compared.stdout, compared.stdout
    assert "Cell outputs differ" in compared.stdout and "01_changed" in compared.stdout
