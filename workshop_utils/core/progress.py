"""Progress bars: live in a notebook and on a terminal, a line for each tenth elsewhere."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, MutableMapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm


def progress_bar(over: Iterable | None = None, shown: bool = True, **options) -> tqdm:
    """A bar of tqdm ``over`` an iterable, or to be updated; ``options`` are tqdm's."""
    return progress_bar_class()(over, disable=not shown, **options)


def progress_bar_class() -> type[tqdm]:
    """The class of tqdm that suits this process."""
    from tqdm import auto, notebook

    live = issubclass(auto.tqdm, notebook.tqdm_notebook) or sys.stderr.isatty()
    return auto.tqdm if live else _lines()


def quiet_libraries(environment: MutableMapping[str, str]) -> None:
    """Switch off the bars of libraries not yet imported, unless a person has said otherwise."""
    for name in (
        "TQDM_DISABLE",
        "HF_HUB_DISABLE_PROGRESS_BARS",
        "HF_DATASETS_DISABLE_PROGRESS_BARS",
    ):
        environment.setdefault(name, "1")


@functools.cache
def _lines() -> type[tqdm]:
    from tqdm import tqdm

    class Lines(tqdm):
        """No carriage return, and no more than eleven lines for each description."""

        said: tuple | None = None

        def __init__(self, *words, **options):
            # "gui" is tqdm's word for: it is displayed by `display` below.
            super().__init__(*words, **options | {"gui": True})
            if not self.disable and self.delay <= 0:
                self.display()

        def display(self, *_, **__) -> bool:
            news = self.desc, self.total and int(10 * self.n / self.total)
            if news != self.said:
                self.said = news
                form = "{percentage:.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
                form = form if self.total else "..."
                text = self.format_meter(**self.format_dict | {"prefix": "", "bar_format": form})
                print(f"{self.desc.removesuffix(': ')}: {text}", file=self.fp, flush=True)
            return True

        def close(self) -> None:
            if not self.disable and self.said:
                self.display()
            super().close()

    return Lines
