"""Python imports a module of this name at start-up. It applies the patches in processes that
inherit our ``PYTHONPATH``.

Only the first ``sitecustomize`` on the path is ever imported, so this one runs the next one (a
distribution's own) as well.
"""

import importlib.machinery
import importlib.util
import os
import sys

_here = os.path.dirname(os.path.abspath(__file__))
_elsewhere = [path for path in sys.path if os.path.abspath(path or ".") != _here]
_next = importlib.machinery.PathFinder.find_spec("sitecustomize", _elsewhere)
if _next is not None and _next.loader is not None:
    _next.loader.exec_module(importlib.util.module_from_spec(_next))

# Tools that only borrow this environment (pip, for one) may run in a Python without the package:
# leave them alone.
if (
    importlib.util.find_spec("workshop_utils") is not None
    and importlib.util.find_spec("wrapt") is not None
):
    from workshop_utils.runtime.nemo_cpu import apply
    from workshop_utils.runtime.orphans import die_with_parent

    die_with_parent()
    apply()
