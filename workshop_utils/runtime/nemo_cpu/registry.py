"""The list of patches, the conditions they depend on, and how they are run: right after the patched
module's import."""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

LIBRARIES = {
    "torch": "2.13.0",
    "lightning": "2.4.0",
    "megatron-core": "0.13.1",
    "nemo-toolkit": "2.4.1",
}
"""Library -> the version each patch was written against."""


def no_cuda() -> bool:
    """True when torch sees no GPU."""
    import torch

    return not torch.cuda.is_available()


def no_transformer_engine() -> bool:
    """True when NVIDIA's Transformer Engine is not installed, whatever the device."""
    return importlib.util.find_spec("transformer_engine") is None


def no_apex() -> bool:
    """True when NVIDIA's Apex is not installed, whatever the device."""
    return importlib.util.find_spec("apex") is None


@functools.cache
def no_modelopt() -> bool:
    """True when NVIDIA's ModelOpt is not installed. Remembered: once the stand-in is loaded,
    ``find_spec`` finds that."""
    return importlib.util.find_spec("modelopt") is None


def always() -> bool:
    """True on every machine; the patch itself looks whether the library still has the fault."""
    return True


@dataclass(frozen=True)
class Patch:
    """One change to one module of a third-party library.

    ``module`` is the file it answers: ``change`` gets it right after its import, if the condition
    ``when`` holds. The first paragraph of the function's docstring is the ``reason``, that is, what
    happens without it.
    """

    module: str
    when: Callable[[], bool]
    change: Callable[[ModuleType], None]

    @property
    def name(self) -> str:
        return self.change.__name__

    @property
    def reason(self) -> str:
        return " ".join(self.change.__doc__.partition("\n\n")[0].split()).removesuffix(".")

    @property
    def library(self) -> str:
        """A key of :data:`LIBRARIES`."""
        top = self.module.partition(".")[0]
        return {"nemo": "nemo-toolkit", "megatron": "megatron-core"}.get(top, top)

    @property
    def version(self) -> str:
        """The version of ``library`` that the patch was written against."""
        return LIBRARIES[self.library]

    def run(self, module: ModuleType) -> None:
        """Change ``module`` if the condition holds and it has not been changed before."""
        done = module.__dict__.setdefault("_workshop_patches", set())
        if self.name not in done and self.when():
            done.add(self.name)
            self.change(module)


PATCHES: list[Patch] = []


def patch(*modules: str, when: Callable[[], bool]):
    """Decorator: register a function as the patch of ``modules`` (several where the same fault
    stands in several files)."""

    def register(change: Callable[[ModuleType], None]):
        PATCHES.extend(Patch(module, when, change) for module in modules)
        return change

    return register


_active: set[tuple[str, str]] = set()


def activate() -> None:
    """Have every registered patch run after its module's import, or at once where the module is
    already loaded."""
    import wrapt

    for entry in PATCHES:
        if (entry.name, entry.module) not in _active:
            _active.add((entry.name, entry.module))
            wrapt.register_post_import_hook(entry.run, entry.module)
