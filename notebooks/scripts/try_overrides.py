"""Train each of several plans for a few steps, with NeMo imported once: every plan gets a forked copy of this process.

    python try_overrides.py PLANS.json        [{"overrides": [...], "environment": {...}, "log": FILE}, ...]

Started by the notebook, which makes the plans. `workshop finetune` starts torchrun, and NeMo anew, for each run. Exits with the number
of plans that failed; their logs say why.
"""

import json
import os
import sys
from pathlib import Path

import torch  # noqa: F401  before the copies are made, as is the rest below

from workshop_utils.finetune.configuration import compose
from workshop_utils.finetune.megatron_gpt_finetuning import train
from workshop_utils.finetune.plan import SCRIPT


def import_nemo() -> None:
    """What :func:`train` imports when it is called."""
    import nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model
    import nemo.collections.nlp.parts.megatron_trainer_builder
    import nemo.collections.nlp.parts.peft_config
    import nemo.utils.exp_manager  # noqa: F401


def run(overrides: list[str], environment: dict[str, str], log: str) -> int:
    """Train in a copy of this process, with its output in ``log``; returns the exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        os.environ.update(environment)
        sys.argv = [str(SCRIPT), *overrides]
        train(compose(SCRIPT, overrides))
        status = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    import_nemo()
    sys.exit(sum(run(**plan) != 0 for plan in json.loads(Path(sys.argv[1]).read_text())))
