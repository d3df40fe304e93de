"""A tiny base, adapters of both kinds for it, and a server of them in a thread of the tests."""

import contextlib
import json
import threading
import time
from pathlib import Path

import export_samples
import torch
from tiny_model import make_tiny_model

SHAPE = export_samples.Shape(hidden=64, heads=4, groups=2, channels=16, ffn=128, layers=2)


def write_base(directory: Path) -> Path:
    """A random Llama that takes long texts, never ends one by itself, and whose outputs are too far
    apart for rounding to change any."""
    from safetensors.torch import load_file, save_file

    make_tiny_model(directory, max_position_embeddings=32768, initializer_range=0.2)
    state = load_file(directory / "model.safetensors")
    # The stop token: its logit is 0, and others are above.
    state["model.embed_tokens.weight"][2] = 0
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def write_peft(directory: Path, seed: int, **config) -> Path:
    """A random adapter for q, k and v, as PEFT writes it."""
    from safetensors.torch import save_file

    random = torch.Generator().manual_seed(seed)
    sizes = {"q_proj": 64, "k_proj": 32, "v_proj": 32}
    state = {}
    for layer in range(2):
        for module, size in sizes.items():
            stem = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            state[f"{stem}.lora_A.weight"] = torch.randn(4, 64, generator=random)
            state[f"{stem}.lora_B.weight"] = torch.randn(size, 4, generator=random)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(state, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8}
    fields |= {"bias": "none", "base_model_name_or_path": "tiny", "target_modules": sorted(sizes)}
    (directory / "adapter_config.json").write_text(json.dumps(fields | config))
    return directory


def write_nemo(
    directory: Path, seed: int = 7, targets: tuple[str, ...] = export_samples.ALL
) -> Path:
    """A random adapter as NeMo writes it: fused, interleaved, alpha twice the rank."""
    tensors = export_samples.tensors_of(SHAPE, targets)
    state = {key: value * (1 + seed / 100) for key, value in tensors.items()}
    config = export_samples.config_of(SHAPE, targets)
    export_samples.write_adapter(directory / "lora.nemo", config, state)
    return directory


@contextlib.contextmanager
def running(service, api_key: str | None = None, **options):
    """Load ``service`` and serve it on a free port; the address."""
    import uvicorn

    from workshop_utils.serving.server.app import create_app
    from workshop_utils.serving.server.server import _listen

    service.load()
    listener = _listen("127.0.0.1", 0)
    app, quiet = create_app(service, api_key, **options), {"log_level": "warning"}
    server = uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=2, **quiet))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        service.close()
        server.should_exit = True
        thread.join()


@contextlib.contextmanager
def held(engine):
    """Keep ``engine`` from its next step, so that what is submitted meanwhile arrives together."""
    release, reached = threading.Event(), threading.Event()

    def wait() -> None:
        reached.set()
        release.wait(30)

    engine._job(wait)
    reached.wait(30)
    try:
        yield
    finally:
        release.set()
