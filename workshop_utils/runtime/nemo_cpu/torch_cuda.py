"""torch without CUDA: the calls that NeMo and Megatron-Core make whatever the device become
harmless."""

import contextlib
import os
from types import FunctionType, ModuleType

from .registry import no_cuda, patch


def _returns(value):
    return lambda *args, **kwargs: value


class _Event:
    """Stands in for ``torch.cuda.Event``: CPU work is finished when a call returns."""

    def __init__(self, *args, **kwargs): ...

    record = synchronize = wait = _returns(None)
    query = _returns(True)
    elapsed_time = _returns(0.0)


class _Stream:
    """Stands in for ``torch.cuda.Stream``: there is nothing to order."""

    def __init__(self, *args, **kwargs): ...

    synchronize = wait_stream = wait_event = _returns(None)

    def record_event(self, event=None):
        return event or _Event()


@patch("torch", when=no_cuda)
def cuda_calls_do_nothing(torch: ModuleType) -> None:
    """NeMo and Megatron-Core call torch.cuda functions unconditionally: AssertionError, 'Torch not
    compiled with CUDA enabled' or 'Found no NVIDIA driver'.

    ``torch.cuda.current_device()`` answers "cpu", so that ``device=torch.cuda.current_device()`` is
    right as it stands."""
    cuda = torch.cuda
    for name in ("synchronize", "set_device", "empty_cache", "reset_peak_memory_stats"):
        setattr(cuda, name, _returns(None))
    cuda.current_device = _returns("cpu")
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.current_stream = cuda.default_stream = _returns(_Stream())
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.nvtx.range_push = cuda.nvtx.range_pop = _returns(None)
    # Used as constructors (NeMo's get_samples_mapping) and in isinstance (NeMo's clip_grads).
    for name in ("LongTensor", "IntTensor", "FloatTensor", "HalfTensor", "BFloat16Tensor"):
        setattr(cuda, name, getattr(torch, name))


@patch("torch", when=no_cuda)
def cuda_method_keeps_the_cpu(torch: ModuleType) -> None:
    """.cuda() on tensors and modules: 'Torch not compiled with CUDA enabled'."""
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self


@patch("lightning.fabric.utilities.device_dtype_mixin", when=no_cuda)
def cuda_method_of_lightning_modules(module: ModuleType) -> None:
    """a LightningModule has a cuda() of its own, which NeMo's MegatronGPTModel.generate calls:
    TypeError in torch.device('cuda', 'cpu')."""
    module._DeviceDtypeModuleMixin.cuda = lambda self, *args, **kwargs: self


@patch("torch", when=no_cuda)
def no_compilation(torch: ModuleType) -> None:
    """Megatron-Core decorates functions with torch.compile, which wants a C++ compiler and minutes
    on a CPU; there is nothing to fuse for."""
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    torch._dynamo.config.disable = True


@patch("torch", when=no_cuda)
def autocast_of_autograd_functions(torch: ModuleType) -> None:
    """Megatron-Core's linear layers keep the state of the GPU's autocast for their backward pass:
    'expected m1 and m2 to have the same dtype' in mixed precision on a CPU."""
    for name in ("custom_fwd", "custom_bwd"):
        original = getattr(torch.amp, name)
        setattr(
            torch.amp,
            name,
            lambda *args, device_type="cpu", original=original, **kwargs: original(
                *args, device_type="cpu", **kwargs
            ),
        )


class CpuTorch:
    """``torch`` as a module sees it that writes ``device="cuda"`` in so many words: the same, but
    tensors are made on the CPU."""

    # fmt: off
    FACTORIES = (
        "tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "empty_like",
        "zeros_like",
    )
    # fmt: on

    def __init__(self, torch: ModuleType):
        self._torch = torch
        for name in self.FACTORIES:
            setattr(self, name, self._on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str):
        return getattr(self._torch, name)

    def autocast(self, device_type: str, *args, **kwargs):
        """Mixed precision of the processor where that of a GPU is written."""
        return self._torch.autocast(
            "cpu" if device_type == "cuda" else device_type, *args, **kwargs
        )

    @staticmethod
    def _on_cpu(factory):
        def make(*args, **kwargs):
            """What ``factory`` makes, on the CPU where a GPU is asked for, and never pinned."""
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs["device"] = "cpu"
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
            return factory(*args, **kwargs)

        return make


def name_types_of_the_cpu(function: FunctionType) -> None:
    """Where ``function`` compares ``tensor.type()`` with 'torch.cuda.FloatTensor' and its like,
    have it compare with the CPU's names."""

    def on_cpu(constant):
        if isinstance(constant, tuple):
            return tuple(map(on_cpu, constant))
        return constant.replace("torch.cuda.", "torch.") if isinstance(constant, str) else constant

    function.__code__ = function.__code__.replace(co_consts=on_cpu(function.__code__.co_consts))
