"""For ``pytest --nbval``: what of a notebook's output is compared, and in which environment its
kernel runs."""

import os

import pytest

from workshop_utils.core import home
from workshop_utils.runtime.device import quiet_environment
from workshop_utils.series.execute_notebook import WIDGET

# Kernels inherit this process's environment.
quiet_environment(os.environ)
home.use_writable_places()
os.environ.pop("MPLBACKEND", None)


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Standard error holds progress bars and warnings: ``workshop run --save-outputs`` does not
    store it."""
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("stderr",)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Widgets are not stored either. A progress bar is one, and shows only when there was something
    to do."""
    if hasattr(item, "compare_outputs"):
        compare = item.compare_outputs
        item.compare_outputs = lambda test, ref, *args: compare(
            _without_widgets(test), _without_widgets(ref), *args
        )


def _without_widgets(outputs: list) -> list:
    return [output for output in outputs if WIDGET not in output.get("data", {})]
