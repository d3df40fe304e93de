"""A short run of every fuzzer. atheris is in an environment of its own:
``ATHERIS_PYTHON=/tmp/fuzz/bin/python pytest -m slow tests/checkpoints/test_fuzz.py``."""

import os
import subprocess
import sys

import pytest
from fuzz import readers, seeds
from places import TESTS

HERE = TESTS / "fuzz"
PYTHON = os.environ.get("ATHERIS_PYTHON", sys.executable)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    if subprocess.run(
        [PYTHON, "-c", "import atheris, yaml"], capture_output=True, check=False
    ).returncode:
        pytest.skip("atheris is not installed; see tests/fuzz/README.md")
    directory = tmp_path_factory.mktemp("corpus")
    seeds.write(directory)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("target", readers.TARGETS)
def test_nothing_is_found(corpus, target, tmp_path):
    options = [
        "-max_total_time=20",
        "-timeout=5",
        "-rss_limit_mb=700",
        "-max_len=16384",
        f"-artifact_prefix={tmp_path}/",
    ]
    done = subprocess.run(
        [PYTHON, HERE / "run.py", target, corpus / target, *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list(tmp_path.iterdir())
