"""Logits of many checkpoints by NeMo itself, in one process: loading NeMo takes longer than all the
tiny models.

Run as a script: ``nemo_loads.py nemo2|nemo1 OUT.npz TOKENS.npy CHECKPOINT...`` writes the logits of
each checkpoint, in order, to OUT.
"""

import subprocess
import sys
from pathlib import Path

import numpy


def logits(
    form: str, checkpoints: list[Path], tokens: numpy.ndarray, scratch: Path
) -> list[numpy.ndarray]:
    """fp32 ``[batch, sequence, vocabulary]`` of each of ``checkpoints`` (``form`` is ``nemo2`` or
    ``nemo1``) for ``tokens`` ``[batch, sequence]``."""
    numpy.save(scratch / "tokens.npy", tokens)
    command = [
        sys.executable,
        __file__,
        form,
        scratch / f"{form}.npz",
        scratch / "tokens.npy",
        *checkpoints,
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    with numpy.load(scratch / f"{form}.npz") as found:
        return [found[str(index)] for index in range(len(checkpoints))]


def _nemo2(checkpoint: Path, tokens):
    """By ``nemo_load``, which is how NeMo's exporters load: the context first, then the weights
    under its names."""
    import torch
    from nemo.lightning import io
    from nemo.lightning.io.api import load_context

    load_context(checkpoint / "context")  # all of it, the trainer too
    model, trainer = io.ModelConnector(checkpoint).nemo_load(checkpoint)
    module = model.module.eval()
    assert model.tokenizer.text_to_ids("abc")
    with torch.inference_mode():
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        found = module(tokens, positions, None).float().numpy()
    trainer._teardown()
    return found


def _nemo1(checkpoint: Path, tokens):
    from workshop_utils.inference import nemo1_engine
    from workshop_utils.inference.nemo1_engine import NemoModel

    if checkpoint.is_file():
        # The workshop gives it directories only; NeMo takes archives as well.
        nemo1_engine._check = lambda *arguments: None
    return NemoModel(checkpoint).logits(tokens.tolist())


if __name__ == "__main__":
    from workshop_utils.runtime import nemo_cpu

    nemo_cpu.apply()
    import torch

    load = {"nemo2": _nemo2, "nemo1": _nemo1}[sys.argv[1]]
    given = torch.from_numpy(numpy.load(sys.argv[3]))
    numpy.savez(
        sys.argv[2],
        **{str(index): load(Path(path), given) for index, path in enumerate(sys.argv[4:])},
    )
