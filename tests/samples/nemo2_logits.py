"""NeMo 2.0's own logits: ``nemo2_logits.py OUT.npz CHECKPOINT...``. An adapter is loaded onto the
base that it records."""

import sys
from pathlib import Path

LENGTH = 12


def logits(path: Path, tokens):
    """``[batch, LENGTH, padded vocabulary]`` of the checkpoint ``path``, computed by NeMo's model
    in this process."""
    import torch
    from nemo import lightning as nl
    from nemo.collections.llm.inference import base as inference
    from nemo.lightning import io

    model = io.load_context(path / "context", subpath="model")
    strategy = nl.MegatronStrategy(
        setup_optimizers=False, process_group_backend="gloo", pipeline_dtype=torch.float32
    )
    trainer = nl.Trainer(accelerator="cpu", devices=1, num_nodes=1, strategy=strategy)
    inference._setup_trainer_and_restore_model(path=path, trainer=trainer, model=model)
    core = model
    while hasattr(core, "module"):
        core = core.module
    positions = torch.arange(LENGTH)[None].expand(len(tokens), -1)
    mask = torch.ones(LENGTH, LENGTH).tril().logical_not()[None, None]
    with torch.no_grad():
        return core.eval()(tokens, positions, mask).float().numpy()


if __name__ == "__main__":
    from nemo2_trains import reset

    from workshop_utils.runtime import nemo_cpu

    nemo_cpu.apply()
    import numpy
    import torch

    tokens = torch.randint(3, 200, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    found = {"tokens": tokens.numpy()}
    for number, name in enumerate(sys.argv[2:]):
        found[str(number)] = logits(Path(name), tokens)
        reset()
    numpy.savez(sys.argv[1], **found)
