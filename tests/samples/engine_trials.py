"""Megatron-Core's engines on one NeMo 2.0 checkpoint, in a process of its own: ``engine_trials.py
CHECKPOINT RESULT.json``."""

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

from workshop_utils.core.errors import WorkshopError
from workshop_utils.inference import nemo2_engine
from workshop_utils.inference.sampling import Sampling

GREEDY = Sampling(temperature=0, max_new_tokens=20)
LIMITS = nemo2_engine.EngineLimits(
    max_batch_size=4,
    block_size_tokens=8,
    buffer_size_gb=0.01,
    max_tokens=128,
    inference_max_seq_length=96,
)


def prompts(count: int = 14) -> list[str]:
    """Of very different lengths, so that requests finish and join at different steps."""
    draw = random.Random(2)
    return [
        "".join(draw.choice("number 0123456789?") for _ in range(draw.choice([1, 3, 8, 21, 55])))
        for _ in range(count)
    ]


def tokens(answers) -> dict[int, list[int]]:
    return {answer.request: list(answer.tokens) for answer in answers}


def joining(model) -> dict:
    """Requests that join while others run, one that never fits among them; more than there are
    places."""
    engine, waiting = nemo2_engine.Dynamic(model, GREEDY, LIMITS), list(enumerate(prompts()))
    done, running, refused = {}, [], {}
    while engine.busy or waiting:
        for _ in range(2 if len(running) % 3 == 0 else 0):  # two more every third step
            if waiting:
                request, prompt = waiting.pop(0)
                too_long = engine.add(100 + request, model.tokens("x" * 120))
                refused[100 + request] = too_long.refused
                assert engine.add(request, model.tokens(prompt)) is None
        running.append(engine.running)
        done |= tokens(engine.step()) if engine.busy else {}
    return {"tokens": done, "running": running, "refused": refused}


def main(checkpoint: Path, result: Path) -> None:
    model, asked = nemo2_engine.Model(checkpoint), [*prompts(), "x" * 90, ""]
    static = list(nemo2_engine.static(model, asked, GREEDY, LIMITS))
    dynamic = list(nemo2_engine.dynamic(model, asked, GREEDY, LIMITS))
    drawn = Sampling(temperature=0.8, top_p=0.9, max_new_tokens=12, seed=7)
    engine = nemo2_engine.Dynamic(model, GREEDY, replace(LIMITS, max_tokens=64))
    found = {
        "static": tokens(static),
        "dynamic": tokens(dynamic),
        "refused": {answer.request: answer.refused for answer in dynamic if answer.refused},
        "texts": {answer.request: answer.text for answer in static},
        "joining": joining(model),
        "drawn": [tokens(nemo2_engine.dynamic(model, asked[:6], drawn, LIMITS)) for _ in range(2)],
        "more than a step": engine.add(0, [5] * 70).refused,
    }
    try:
        nemo2_engine.Dynamic(model, GREEDY, nemo2_engine.EngineLimits(buffer_size_gb=0.0001))
    except WorkshopError as error:
        found["small buffer"] = str(error)
    result.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
