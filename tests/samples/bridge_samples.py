"""The checkpoints in ``tests/data/checkpoints``: small ones by writers that the environment of this
project does not have.

Each is written by the library itself, on a CPU, with ``PYTHONPATH=. python
tests/samples/bridge_samples.py WRITER tests/data/checkpoints``:

    megatron-bridge-0.3.1   ``llama`` and ``lora`` by Megatron-Bridge and Megatron-Core 0.16.1,
        which go before the environment on the path (PYTHONPATH=OVERLAY:.)
        pip install --no-deps --target OVERLAY megatron-bridge==0.3.1 megatron-core==0.16.1 \\
            transformers==4.57.6 tokenizers==0.22.2
    megatron-bridge-0.6.2   the same by Megatron-Core 0.19.2, whose checkpoints have no
        ``common.pt``; in an environment of Python 3.12
        pip install torch==2.13.0 torchvision transformers==5.12.1 peft==0.18.1 accelerate \\
            datasets einops hydra-core omegaconf pillow psutil rich six tensorboard wrapt
        pip install --no-deps megatron-bridge==0.6.2 megatron-core==0.19.2
    megatron-core-0.19.2    ``iter_0000003`` with what Megatron-LM saves; in the same environment
    python-3.11.2           the same by Megatron-Core 0.13.1 and torch in this project's
        environment, made with Debian 12's own Python, which pickles enumerations as calls of
        ``getattr``; and ``state.pt`` by ``torch.save``
"""

import argparse
import contextlib
import importlib
import importlib.abc
import importlib.machinery
import json
import os
import shutil
import signal
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path


class Absent(type):
    """A class without instances: each attribute is another one, and as a decorator it changes
    nothing."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(name, (), {})

    def __call__(cls, *arguments, **options):
        decorates = len(arguments) == 1 and callable(arguments[0])
        return arguments[0] if decorates else Absent("absent", (), {})


class AbsentModule(types.ModuleType):
    """A module with anything in it that is asked for."""

    __version__ = "0"
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(name, (), {})


class StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules ``names`` and all below them: libraries for GPUs, which are imported
    without asking and not called here."""

    def __init__(self, *names: str) -> None:
        self.names = names
        sys.meta_path.insert(0, self)

    def find_spec(self, name, path=None, target=None):
        if any(name == stood_in or name.startswith(f"{stood_in}.") for stood_in in self.names):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return AbsentModule(spec.name)

    def exec_module(self, module): ...


def without_gpu() -> None:
    """Let Megatron-Core and Megatron-Bridge be imported, and work, on a CPU."""
    # Newer Megatron-Core asks the one of the environment for its version, and it has none.
    sys.modules["nvidia_resiliency_ext"] = None
    from workshop_utils.runtime import nemo_cpu

    nemo_cpu.apply()
    StandIn("triton")
    # Sees that there is no Transformer Engine, before there is a stand-in for it.
    importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")
    import torch

    StandIn("transformer_engine", "modelopt", "megatron.energon")
    torch.cuda.get_rng_state = lambda *arguments: torch.zeros(16, dtype=torch.uint8)


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    """Process groups of this process alone."""
    import torch.distributed
    from megatron.core import parallel_state

    with tempfile.TemporaryDirectory() as store:
        place = f"file://{store}/store"
        torch.distributed.init_process_group("gloo", init_method=place, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        yield
        torch.distributed.destroy_process_group()


def megatron_bridge() -> None:
    """``llama`` as ``import_ckpt`` makes it of one in Hugging Face format; ``lora`` as a
    fine-tuning saves it, after one step of training."""
    without_gpu()
    import megatron.bridge.peft.utils
    import torch
    from megatron.bridge import AutoBridge
    from megatron.bridge.models import gpt_provider
    from megatron.bridge.training.model_load_save import temporary_distributed_context
    from tiny_model import make_tiny_model

    megatron.bridge.peft.utils.HAVE_TE = False
    gpt_provider.default_layer_spec.__code__ = gpt_provider.local_layer_spec.__code__
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    make_tiny_model(Path("hf"), hidden_size=8, intermediate_size=16, **heads)
    config = Path("hf", "tokenizer_config.json")
    named_by_llama_3 = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.write_text(json.dumps(json.loads(config.read_text()) | named_by_llama_3))
    with temporary_distributed_context("gloo"):
        AutoBridge.import_ckpt("hf", "llama", torch_dtype=torch.float32)
        save_lora(AutoBridge.from_hf_pretrained("hf", torch_dtype=torch.float32))


def save_lora(bridge) -> None:
    """Train a LoRA of ``bridge``'s model for one step and save it in ``lora``, as Megatron-Bridge's
    ``finetune`` does."""
    import torch
    from megatron.bridge.peft.lora import LoRA
    from megatron.bridge.training import config
    from megatron.bridge.training.checkpointing import save_checkpoint
    from megatron.bridge.training.optim import setup_optimizer
    from megatron.bridge.training.state import GlobalState
    from megatron.bridge.training.tokenizers.config import TokenizerConfig

    lora = LoRA(target_modules=["linear_qkv"], dim=4, alpha=8, dropout=0.0)
    provider = bridge.to_megatron_provider(load_weights=True)
    provider.params_dtype = provider.pipeline_dtype = torch.float32
    provider.finalize()
    provider.register_pre_wrap_hook(lambda chunks: lora(chunks, training=True))
    whole, decay = {"use_distributed_optimizer": False}, ("start_weight_decay", "end_weight_decay")
    decay = dict.fromkeys(decay, 0.01)
    ddp = config.DistributedDataParallelConfig(**whole)
    model = provider.provide_distributed_model(ddp_config=ddp, use_cpu_initialization=True)
    state = GlobalState()
    state.cfg = config.ConfigContainer(
        model=provider,
        train=None,
        optimizer=config.OptimizerConfig(optimizer="adam", lr=1e-3, min_lr=0.0, **whole),
        ddp=ddp,
        scheduler=config.SchedulerConfig(lr_decay_iters=10, **decay),
        dataset=None,
        logger=config.LoggerConfig(),
        dist=None,
        peft=lora,
        tokenizer=TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model="hf"),
        checkpoint=config.CheckpointConfig(save="lora", pretrained_checkpoint="llama"),
    )
    for chunk in model:
        for parameter in chunk.parameters():
            if parameter.requires_grad:
                parameter.main_grad.fill_(1)
    # What ConfigContainer.validate() does, but for a training and its data.
    state.cfg.optimizer.finalize()
    steps = state.cfg.scheduler
    steps.lr_warmup_steps, steps.lr_decay_steps, steps.wd_incr_steps = 0, 10, 10
    optimizer, scheduler = setup_optimizer(state.cfg.optimizer, state.cfg.scheduler, model)
    optimizer.step()
    state.train_state.step = 1
    save_checkpoint(state, model, optimizer, scheduler, num_floating_point_operations_so_far=0)


def sharded_state() -> dict:
    """What Megatron-LM saves, in small: ``args``, weights, an ``_extra_state``, the random state
    and the state of its rerun machine."""
    import numpy
    import torch
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.enums import ModelType
    from megatron.core.rerun_state_machine import RerunMode, RerunState, RerunStateMachine
    from megatron.core.transformer.enums import AttnBackend

    arguments = argparse.Namespace(
        num_layers=1,
        hidden_size=8,
        params_dtype=torch.bfloat16,
        attention_backend=AttnBackend.flash,
        model_type=ModelType.encoder_or_decoder,
        exit_signal=signal.SIGTERM,
        data_cache_path=Path("cache"),
    )
    final, layers = "decoder.final_layernorm.weight", "decoder.layers.mlp.linear_fc2"
    one = (0, 0, 1)
    stacked = ShardedTensor.from_rank_offsets(
        f"{layers}.weight", torch.ones(4, 8), one, prepend_axis_num=1
    )
    extra = torch.zeros(3, dtype=torch.uint8)
    weights = {
        "final": ShardedTensor.from_rank_offsets(final, torch.ones(8)),
        "layers": stacked,
        "extra": ShardedObject(f"{layers}._extra_state", extra, (1,), (0,)),
    }
    machine = RerunStateMachine(mode=RerunMode.VALIDATE_RESULTS)
    machine.state = RerunState.INITIAL_RUN
    random = {
        "np_rng_state": numpy.random.RandomState(0).get_state(),
        "torch_rng_state": torch.zeros(8, dtype=torch.uint8),
    }
    return {
        "args": arguments,
        "checkpoint_version": 3.0,
        "iteration": 3,
        "model": weights,
        "rerun_state_machine": machine.state_dict(None, "torch_dist"),
        "rng_state": ShardedObject("rng_state", [random], (1, 1), (0, 0)),
    }


def megatron_core() -> None:
    """``iter_0000003``, by whichever Megatron-Core is on the path."""
    without_gpu()
    from megatron.core import dist_checkpointing

    Path("iter_0000003").mkdir()
    with one_rank():
        metadata = {"singleton_local_shards": False}
        dist_checkpointing.save(sharded_state(), "iter_0000003", content_metadata=metadata)


def python_3_11_2() -> None:
    """As :func:`megatron_core`, and ``state.pt``: its common state as ``torch.save`` writes it."""
    import torch

    if sys.version_info[:3] != (3, 11, 2):
        sys.exit("This is to be Debian 12's Python 3.11.2.")
    megatron_core()
    torch.save(torch.load("iter_0000003/common.pt", weights_only=False), "state.pt")


WRITERS = {
    "megatron-bridge-0.3.1": megatron_bridge,
    "megatron-bridge-0.6.2": megatron_bridge,
    "megatron-core-0.19.2": megatron_core,
    "python-3.11.2": python_3_11_2,
}


if __name__ == "__main__":
    writer, target = sys.argv[1], Path(sys.argv[2]).resolve()
    # Paths go into the files: those of a directory that is gone, not of this machine.
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)
        WRITERS[writer]()
        shutil.rmtree("hf", ignore_errors=True)
        shutil.copytree(work, target / writer)
