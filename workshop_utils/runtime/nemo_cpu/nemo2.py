"""Patches of the NeMo 2.0 API (``nemo.lightning`` and ``nemo.collections.llm``) of nemo-toolkit
2.4.1."""

import importlib.machinery
import signal
import sys
import threading
from types import ModuleType, SimpleNamespace

from .registry import no_cuda, no_modelopt, no_transformer_engine, patch


@patch("nemo.lightning.io.pl", when=no_cuda)
def loaded_tensors_stay_on_cpu(module: ModuleType) -> None:
    """asserts torch.cuda.is_initialized() after loading a checkpoint."""
    module._fix_tensors_device = lambda checkpoint: checkpoint


def local_layer_norm_name(name):
    """Name of a layer norm in Megatron-Core's local layer spec for its name in Transformer Engine's
    fused layers."""
    if not isinstance(name, str):
        return name
    return name.replace(".self_attention.linear_qkv.layer_norm_", ".input_layernorm.").replace(
        ".mlp.linear_fc1.layer_norm_", ".pre_mlp_layernorm."
    )


@patch("nemo.lightning.io.state", when=no_transformer_engine)
def layer_norm_names_of_connectors(module: ModuleType) -> None:
    """importers and exporters name the layer norms as Transformer Engine fuses them: they match
    nothing in a local-spec model.

    Rename both sides of a mapping when neither model has fused layer norms and one has separate
    ones."""
    original = module.apply_transforms

    def names(model):
        is_state = isinstance(model, module._ModelState)
        return (model if is_state else getattr(model, "module", model)).state_dict().keys()

    def apply_transforms(source, target, mapping, *args, **kwargs):
        if any("layer_norm_" in f"{key}{value}" for key, value in mapping.items()):
            known = " ".join([*names(source), *names(target)])
            if ".linear_qkv.layer_norm_" not in known and ".pre_mlp_layernorm." in known:
                renamed = local_layer_norm_name
                mapping = {renamed(key): renamed(value) for key, value in mapping.items()}
        return original(source, target, mapping, *args, **kwargs)

    module.apply_transforms = apply_transforms


class _EmptySettings(ModuleType):
    """Stands in for ModelOpt modules whose attributes are read, as settings, while NeMo is
    imported."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return {}


@patch("nemo", when=no_modelopt)
def modelopt_at_import(module: ModuleType) -> None:
    """nemo.collections.llm reads modelopt.torch.speculative.EAGLE3_DEFAULT_CFG at import; the
    ModelOpt releases it wants do not import with torch 2.13.

    Put empty modules in its place. Nothing in the workshop quantises or distils."""
    for name in ("modelopt", "modelopt.torch", "modelopt.torch.speculative"):
        stand_in = _EmptySettings(name)
        stand_in.__path__ = []
        stand_in.__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules.setdefault(name, stand_in)


@patch("nemo.collections.llm.modelopt.quantization.quantizer", when=no_modelopt)
def export_without_modelopt(module: ModuleType) -> None:
    """export_ckpt(target='hf') first asks ModelOpt whether the model is quantised."""
    module.export_hf_checkpoint = lambda *args, **kwargs: None


@patch(
    "nemo.collections.llm.gpt.data.utils",
    "nemo.collections.nlp.data.language_modeling.text_memmap_dataset",
    when=no_cuda,
)
def index_workers_can_be_stopped(module: ModuleType) -> None:
    """the pool that indexes data files inherits Lightning's SIGTERM handler, survives
    Pool.terminate() and hangs join(): seen with the fork start method, which is what a CPU run
    uses.

    Workers are forked while SIGTERM has its default meaning."""
    original = module.build_index_files

    def build_index_files(*args, **kwargs):
        if threading.current_thread() is not threading.main_thread():
            return original(*args, **kwargs)
        handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            return original(*args, **kwargs)
        finally:
            signal.signal(signal.SIGTERM, handler)

    module.build_index_files = build_index_files


@patch("nemo.collections.llm.peft.lora", when=no_transformer_engine)
def lora_without_transformer_engine(module: ModuleType) -> None:
    """LoRA asks of every layer whether it is a te.Linear: UnavailableError,
    'transformer_engine.pytorch could not be imported'.

    No layer is one: ``te.Linear`` becomes a class without instances."""
    module.te = SimpleNamespace(Linear=type("NoTransformerEngineLinear", (), {}))


@patch("nemo.collections.llm.peft.utils", when=no_transformer_engine)
def adapters_without_transformer_engine(module: ModuleType) -> None:
    """Megatron-Core puts mocks in place of Transformer Engine's layers, which NeMo takes for the
    real ones: TypeError, 'isinstance() arg 2 must be a type'."""
    module.HAVE_TE = False


@patch("nemo.lightning.pytorch.callbacks.progress_printer", when=no_cuda)
def timers_of_one_process(module: ModuleType) -> None:
    """rank 0, which alone prints, gathers Megatron's timers from all ranks: over gloo the next
    collective operation of the others meets that one, and the run hangs at its first checkpoint
    with two processes."""
    original = module.ProgressPrinter.log_megatron_timers

    def log_megatron_timers(self, timers):
        import torch

        return original(self, timers) if torch.distributed.get_world_size() == 1 else None

    module.ProgressPrinter.log_megatron_timers = log_megatron_timers
