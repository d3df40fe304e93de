"""`python run_recipe.py FILE`: run the recipe in FILE with NeMo-Run, which starts torchrun, and that the workers.

FILE is what NeMo-Run's own serialiser wrote: the form in which NeMo-Run hands a recipe to its workers, too.
"""

import sys
from pathlib import Path

import nemo_run as run
from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer
from torchx.specs import AppState

if __name__ == "__main__":
    recipe = ZlibJSONSerializer().deserialize(Path(sys.argv[1]).read_text())
    executor = run.LocalExecutor(ntasks_per_node=1, launcher="torchrun")
    with run.Experiment("by-hand") as experiment:
        experiment.add(recipe, executor=executor, name="train")
        experiment.run(sequential=True, tail_logs=True)
    sys.exit(any(job.state != AppState.SUCCEEDED for job in experiment.jobs))
