"""Processes that end with the one that started them, however that ended. Linux only; elsewhere
nothing happens.

torchrun ends its workers when it is asked to stop, but not when it is killed; and nothing ends
torchrun when the command line or the kernel that started it is killed. The environment variable
below, which holds the launcher's process number, makes every Python process below ours ask the
kernel for it.
"""

import ctypes
import os
import signal
import sys

VARIABLE = "WORKSHOP_DIE_WITH_PARENT"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent() -> None:
    """Have this process killed when its parent ends, if the environment asks for it."""
    launcher = os.environ.get(VARIABLE)
    if not launcher or not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The parent may have ended in between, or before: init has adopted this process then.
    if os.getppid() != parent or (parent == 1 and launcher != "1"):
        os.kill(os.getpid(), signal.SIGKILL)
