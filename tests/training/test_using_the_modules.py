"""docs/using-the-modules.md: its three files, run one after the other in a folder of somebody
else's."""

import json
import os
import re
import subprocess
import sys

import pytest
from places import ROOT
from tiny_model import make_tiny_model

PAGE = (ROOT / "docs" / "using-the-modules.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE, re.DOTALL))


@pytest.mark.slow
def test_the_files_of_the_page_work(tmp_path):
    make_tiny_model(tmp_path / "tiny")
    rows = [{"question": f"number {i}?", "answer": f"it is {i}"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    printed, environment = {}, os.environ | {"WORKSHOP_DEVICE": "cpu"}
    for name, code in FILES.items():
        (tmp_path / name).write_text(code)
        pipes = {"capture_output": True, "text": True, "check": False}
        done = subprocess.run([sys.executable, name], cwd=tmp_path, env=environment, **pipes)
        assert done.returncode == 0, f"{name}: {done.stderr[-3000:]}"
        printed[name] = done.stdout
    assert "training: 24 rows" in printed["make.py"] and "test: 8 rows" in printed["make.py"]
    assert (tmp_path / "run/checkpoints/step=3-last/weights/adapter_metadata.json").is_file()
    lines = [line for line in printed["answer.py"].splitlines() if line[:2] in ("0 ", "1 ")]
    answers = dict(line.split(" ", 1) for line in lines)
    assert answers["0"].startswith(("b'", 'b"')) and "together more than 64" in answers["1"]
