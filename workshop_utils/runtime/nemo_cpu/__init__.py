"""NeMo and Megatron-Core on a machine without a GPU: a set of small, named patches and the one call
that applies them.

    from workshop_utils.runtime.nemo_cpu import apply
    apply()                     # before the first import of nemo or megatron

``apply`` loads neither torch nor NeMo. Each patch (see :mod:`.registry`) names the library, version
and file it answers and the condition under which it is needed; it runs right after the module it
patches has been imported, and only if its condition holds then. On a machine with a GPU,
Transformer Engine and Apex, only the LoRA mixin fix remains.

Child processes inherit the patches: ``apply`` puts ``nemo_cpu/inherited`` on ``PYTHONPATH``, whose
``sitecustomize`` calls it again. That covers torchrun's workers, the processes that write
checkpoints, and a training script that knows nothing of us.
"""

import os
from pathlib import Path

_INHERITED = str(Path(__file__).parent / "inherited")


def apply(device: str | None = None) -> None:
    """Register every patch, for this process and for the processes it starts. Calling it again
    changes nothing.

    ``device`` "cpu", or without it ``WORKSHOP_DEVICE=cpu``, hides the GPUs of a machine that has
    some. Has to run before torch is imported for that.

    ``os.environ`` changes for it, as the libraries ask no other way: ``PYTHONPATH``,
    ``CUDA_VISIBLE_DEVICES``, the places of :mod:`workshop_utils.core.home`, and from patches
    ``TORCHDYNAMO_DISABLE`` and ``NVIDIA_PYTORCH_VERSION``.
    """
    from workshop_utils.core import home

    from . import megatron_core, nemo2, nemo_script_path, paged_attention, torch_cuda  # noqa: F401  each registers its patches when imported
    from .registry import activate

    if (device or os.environ.get("WORKSHOP_DEVICE")) == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    home.use_writable_places()  # NeMo makes directories when it is imported
    inherit(os.environ)
    activate()


def inherit(environment: dict[str, str]) -> None:
    """Set ``PYTHONPATH`` in ``environment`` so that Python processes started with it apply the
    patches too."""
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    package_root = str(Path(__file__).parents[3])
    missing = [path for path in (_INHERITED, package_root) if path not in paths]
    environment["PYTHONPATH"] = os.pathsep.join(missing + paths)
