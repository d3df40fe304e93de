"""Child processes: what they inherit, how they end, and what is told when they fail."""

import os
import sys
import time

import psutil
import pytest

from workshop_utils.core.errors import WorkshopError
from workshop_utils.runtime import orphans, processes


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_child_inherits_patches_and_its_end_but_nothing_of_torchrun(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    environment = processes.environment(MINE="1")
    assert environment["MINE"] == "1" and environment[orphans.VARIABLE] == str(os.getpid())
    assert not {"RANK", "MASTER_PORT"} & environment.keys()
    code = "import os; print(os.environ['PYTHONPATH']); raise SystemExit(3)"
    assert processes.run(python(code), tmp_path / "new" / "log") == 3
    assert "nemo_cpu/inherited" in processes.tail(tmp_path / "new" / "log")


@pytest.mark.parametrize("how", ["follow", "interrupt"])
def test_the_whole_group_is_ended(tmp_path, monkeypatch, how):
    """At the caller's word, or at Ctrl-C; also a child that does not listen to SIGTERM."""
    monkeypatch.setattr(processes, "LOOK", 0.05)
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up'); time.sleep(60)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {deaf!r}])"
    log, children = tmp_path / "log", []

    def follow() -> bool:
        children[:] = psutil.Process().children(recursive=True)
        if (is_up := "up" in log.read_text()) and how == "interrupt":
            raise KeyboardInterrupt
        return is_up

    began = time.monotonic()
    try:
        assert processes.run(python(code), log, follow=follow, patience=0.2) < 0
    except KeyboardInterrupt:
        assert how == "interrupt"
    gone, alive = psutil.wait_procs(children, timeout=5)
    assert len(gone) == 2 and not alive and time.monotonic() - began < 30


def test_a_command_that_fails_is_told_with_its_last_words():
    with pytest.raises(WorkshopError, match="(?s)`workshop inspect no/such` failed:.*no/such"):
        processes.run_quietly("inspect", "no/such")
