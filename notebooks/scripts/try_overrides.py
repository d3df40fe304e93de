"""Train many variants of a run for a few steps and tell what came of each, with NeMo imported once.

    python try_overrides.py SETTINGS.json RESULTS.json

SETTINGS: {"folder": where the runs go, "data": FILE, "validation": FILE, "common": [overrides],
"variants": {name: [overrides]}}.
RESULTS: {name: {"problems", "warnings" of the preflight, "parameters", "losses" of the steps,
"validation", "bytes" of the .nemo, "change": mean Frobenius norm of what LoRA adds to a weight}}; a
variant that the preflight refuses has the first two alone.

`workshop finetune` starts torchrun, and with it NeMo, for every run. Here each run gets a forked
copy of a process that has imported it.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import torch

from workshop_utils.adapters.read import read_adapter
from workshop_utils.training.script import Plan, make_plan, read_events
from workshop_utils.training.script.configuration import compose
from workshop_utils.training.script.megatron_gpt_finetuning import train
from workshop_utils.training.script.plan import SCRIPT
from workshop_utils.checkpoints.formats.identify import identify
from workshop_utils.runtime.orphans import die_with_parent


def import_nemo() -> None:
    """What :func:`train` imports when it is called."""
    import nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model
    import nemo.collections.nlp.parts.megatron_trainer_builder
    import nemo.collections.nlp.parts.peft_config
    import nemo.utils.exp_manager  # noqa: F401


def run(plan: Plan) -> None:
    """Train in a copy of this process, with its output in the plan's log."""
    plan.write_rows()
    plan.log.parent.mkdir(parents=True)
    child = os.fork()
    if child:
        if os.waitpid(child, 0)[1]:
            sys.exit(f"{plan.run_dir.name} failed; see {plan.log}")
        return
    status = 1
    try:
        with plan.log.open("w") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        os.environ.update(plan.environment)
        die_with_parent()
        words = plan.command[plan.command.index(str(SCRIPT)) + 1 :]
        sys.argv = [str(SCRIPT), *words]
        train(compose(SCRIPT, words))
        status = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def result(plan: Plan) -> dict:
    """What came of the finished ``plan``."""
    events = read_events(plan.events)
    losses = {kind: [event["loss"] for event in events if event["event"] == kind] for kind in ("step", "validation")}
    found = {"parameters": identify(plan.adapter).parameters, "losses": losses["step"], "validation": losses["validation"],
             "bytes": plan.adapter.stat().st_size}
    # An adapter of some layers alone is one that no server reads, nor does our reader.
    if plan.config.model.peft.peft_scheme == "lora" and not plan.config.model.peft.lora_tuning.layer_selection:
        lora = read_adapter(plan.adapter)
        norms = [lora.scale * (halves.linear_out.float() @ halves.linear_in.float()).norm() for halves in lora.weights.values()]
        found["change"] = float(torch.stack(norms).mean())
    return found


def main(settings: dict) -> dict:
    """Plan, train and look at every variant, each from the beginning."""
    # a forked copy has no threads but its own, and waits for ever for those of OpenMP
    torch.set_num_threads(1)
    import_nemo()
    results, plans = {}, {}
    for name, overrides in settings["variants"].items():
        shutil.rmtree(Path(settings["folder"]) / name, ignore_errors=True)
        words = [f"exp_manager.exp_dir={settings['folder']}", *settings["common"], *overrides]
        plan = make_plan(words, data=Path(settings["data"]), validation=Path(settings["validation"]), name=name)
        results[name] = {"problems": plan.preflight.problems, "warnings": plan.preflight.warnings}
        if not plan.preflight.problems:
            plans[name] = plan
    for plan in plans.values():
        run(plan)
    return {name: found | (result(plans[name]) if name in plans else {}) for name, found in results.items()}


if __name__ == "__main__":
    # What is printed while NeMo is imported does not matter; the logs of the runs hold what they
    # say.
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
