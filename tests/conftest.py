"""Fixtures that more than one module of tests uses."""

import os
import signal

import checkpoint_samples
import hypothesis
import pytest

# A worker of pytest-xdist is told that it has 80 columns; the commands that tests start inherit it.
os.environ.pop("COLUMNS", None)

# How long an example takes says something about the machine and what else it does.
hypothesis.settings.register_profile(
    "workshop", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("workshop")


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_can_be_sent():
    """A shell lets a job in the background ignore SIGINT, and its children with it: `make test &`
    would not see Ctrl-C work."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    """A directory with the NeMo 2.0 checkpoints ``plain`` and ``gpu``, made once; tests copy what
    they change."""
    directory = tmp_path_factory.mktemp("nemo2")
    checkpoint_samples.make(directory)
    return directory


@pytest.fixture(scope="session")
def bridged_tiny(tmp_path_factory):
    """A folder with a random two-layer Llama as ``hf/tiny``, imported by NeMo as ``nemo2/tiny``,
    and as the view ``bridged/tiny``."""
    import subprocess
    import sys

    from tiny_model import make_tiny_model

    from workshop_utils.checkpoints.convert.bridge import bridge

    folder = tmp_path_factory.mktemp("tiny")
    make_tiny_model(folder / "hf" / "tiny")
    command = [
        sys.executable,
        "-m",
        "workshop_utils",
        "import",
        str(folder / "hf" / "tiny"),
        "--out",
        str(folder / "nemo2" / "tiny"),
    ]
    subprocess.run(command, check=True, capture_output=True)
    bridge(folder / "nemo2" / "tiny", folder / "bridged" / "tiny")
    return folder


@pytest.fixture(scope="session")
def nemo2_trained(bridged_tiny, tmp_path_factory):
    """A folder where NeMo 2.0 trained ``bridged_tiny`` for four steps with each scheme of
    ``nemo2_trains``: ``SCHEME/checkpoints/*-last``."""
    import subprocess
    import sys

    import nemo2_trains

    folder = tmp_path_factory.mktemp("nemo2_trained")
    nemo2_trains.write_data(folder / "data")
    command = [
        sys.executable,
        nemo2_trains.__file__,
        str(bridged_tiny / "nemo2" / "tiny"),
        str(folder),
        *nemo2_trains.SCHEMES,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder
