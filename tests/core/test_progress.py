"""Progress in a file or a pipe: lines for people who read it later, nothing that only a terminal
understands."""

import os
import pty
import subprocess
import sys
import termios

from workshop_utils.core.progress import progress_bar, quiet_libraries


def test_a_line_for_every_tenth(capsys):
    with progress_bar(total=1000, desc="copying", unit="B", mininterval=0) as bar:
        for _ in range(1000):
            bar.update(1)
    text = capsys.readouterr().err
    told = [line.split()[1] for line in text.splitlines()]
    assert told == [f"{percent}%" for percent in range(0, 101, 10)]
    assert text.splitlines()[-1].startswith("copying: 100% 1000/1000 [") and text.endswith("\n")
    assert "\r" not in text and "\x1b" not in text


def test_what_has_no_end_yet_is_named_once(capsys):
    with progress_bar(desc="loading", dynamic_ncols=True) as bar:
        for _ in range(5):
            bar.refresh()
        bar.reset(total=2)
        bar.set_description("training")
        bar.n = 1
        bar.set_postfix_str("loss 1.250")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "loading: ..."
    assert lines[-1].startswith("training: 50% 1/2 [") and "loss 1.250" in lines[-1]
    assert len(lines) == len(set(lines)) <= 5


def test_what_is_quick_or_not_to_be_shown_is_silent(capsys):
    list(progress_bar(range(10), desc="quick", delay=2))
    list(progress_bar(range(10), False, desc="hidden"))
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_live_bar():
    script = (
        "from workshop_utils.core.progress import progress_bar\nfor _ in progress_bar(range(3), "
        "desc='live'): pass"
    )
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    subprocess.run([sys.executable, "-c", script], stderr=theirs, check=True)
    os.close(theirs)
    assert b"\rlive: 100%" in os.read(ours, 10000)


def test_libraries_draw_no_bars_of_their_own():
    """Those that look at the environment, when they are imported."""
    environment = dict(os.environ)
    quiet_libraries(environment)
    script = (
        "from tqdm.auto import tqdm\nlist(tqdm(range(3)))\n"
        "from huggingface_hub.utils import tqdm\nlist(tqdm(range(3)))\n"
        "from transformers.utils import logging\nlist(logging.tqdm(range(3)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    kept = {"TQDM_DISABLE": "0"}
    quiet_libraries(kept)
    assert kept["TQDM_DISABLE"] == "0"
