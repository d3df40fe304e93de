"""Patches of Megatron-Core 0.13.1: hard-coded CUDA devices, fused kernels, and the paged attention kernels of its engine."""

import contextlib
from types import ModuleType

from .registry import no_cuda, no_transformer_engine, patch
from .torch_cuda import CpuTorch


@patch(
    "megatron-core",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.optimizer.optimizer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.transformer.utils",
    "megatron.core.tensor_parallel.data",
    "megatron.core.utils",
    "megatron.core.rerun_state_machine",
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.inference.contexts.dynamic_context",
    "megatron.core.dist_checkpointing.mapping",
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.dist_checkpointing.strategies.two_stage",
    when=no_cuda,
    reason="device='cuda' and pin_memory=True are written in the source: 'Torch not compiled with CUDA enabled'",
)
def cuda_literals_in_megatron(module: ModuleType) -> None:
    """Give the module a ``torch`` that makes its tensors on the CPU. Narrower, and faster, than a mode around every operation."""
    module.torch = CpuTorch(module.torch)


@patch("megatron-core", "megatron.core.tensor_parallel.random", when=no_cuda,
       reason="only seeded where a GPU exists: 'cuda rng state model-parallel-rng is not added'")  # fmt: skip
def random_states_of_the_gpu(module: ModuleType) -> None:
    """There is one generator on a CPU; forking the tracker leaves it alone."""
    module.CudaRNGStatesTracker.fork = lambda self, name=None: contextlib.nullcontext()
    module.model_parallel_cuda_manual_seed = lambda *args, **kwargs: None


FUSIONS = ("apply_rope_fusion", "gradient_accumulation_fusion", "bias_dropout_fusion", "bias_activation_fusion",
           "masked_softmax_fusion", "persist_layer_norm", "cross_entropy_loss_fusion", "tp_comm_overlap")  # fmt: skip


@patch("megatron-core", "megatron.core.transformer.transformer_config", when=no_transformer_engine,
       reason="NeMo's LlamaConfig asks for fused kernels that come with Transformer Engine or Apex: ValueError in __post_init__")  # fmt: skip
def fusions_off(module: ModuleType) -> None:
    """Turn the fusions off before the configuration checks itself."""
    config = module.TransformerConfig
    check = config.__post_init__

    def post_init(self):
        for name in FUSIONS:
            if getattr(self, name, None):
                setattr(self, name, False)
        check(self)

    config.__post_init__ = post_init
