"""Megatron-Core's engines on one NeMo 2.0 checkpoint, in a process of its own: ``engine_trials.py
CHECKPOINT RESULT.json``."""

import json
import random
import sys
from pathlib import Path

from workshop_utils.core.errors import WorkshopError
from workshop_utils.inference import nemo2_engine


def prompts(count: int = 14) -> list[str]:
    """Of very different lengths, so that requests finish and join at different steps."""
    draw = random.Random(2)
    return [
        "".join(draw.choice("number 0123456789?") for _ in range(draw.choice([1, 3, 8, 21, 55])))
        for _ in range(count)
    ]


def tokens(answers) -> dict[int, list[int]]:
    """Request -> new tokens."""
    return {answer.request: list(answer.tokens) for answer in answers}


def joining(model, sampling, limits) -> dict:
    """Requests that join while others run, one that never fits among them; more than there are
    places."""
    engine, waiting, found, running, refused = (
        nemo2_engine.Dynamic(model, sampling, limits),
        list(enumerate(prompts())),
        {},
        [],
        {},
    )
    while engine.busy or waiting:
        for _ in range(2 if len(running) % 3 == 0 else 0):  # two more every third step
            if waiting:
                request, prompt = waiting.pop(0)
                too_long = engine.add(100 + request, model.tokens("x" * 120))
                refused[100 + request] = too_long.refused
                assert engine.add(request, model.tokens(prompt)) is None
        running.append(engine.running)
        found |= tokens(engine.step()) if engine.busy else {}
    return {"tokens": found, "running": running, "refused": refused}


def main(checkpoint: Path, result: Path) -> None:
    model = nemo2_engine.Model(checkpoint)
    greedy = nemo2_engine.Sampling(temperature=0, num_tokens_to_generate=20)
    limits = nemo2_engine.Limits(
        max_batch_size=4,
        block_size_tokens=8,
        buffer_size_gb=0.01,
        max_tokens=128,
        inference_max_seq_length=96,
    )
    asked = [*prompts(), "x" * 90, ""]
    found = {
        name: tokens(run(model, asked, greedy, limits))
        for name, run in (("static", nemo2_engine.static), ("dynamic", nemo2_engine.dynamic))
    }
    found["refused"] = {
        answer.request: answer.refused
        for answer in nemo2_engine.dynamic(model, asked, greedy, limits)
        if answer.refused
    }
    found["joining"] = joining(model, greedy, limits)
    drawn = nemo2_engine.Sampling(
        temperature=0.8, top_p=0.9, num_tokens_to_generate=12, random_seed=7
    )
    found["drawn"] = [
        tokens(nemo2_engine.dynamic(model, asked[:6], drawn, limits)) for _ in range(2)
    ]
    few = nemo2_engine.Limits(
        max_batch_size=4,
        block_size_tokens=8,
        buffer_size_gb=0.01,
        max_tokens=64,
        inference_max_seq_length=96,
    )
    found["more than a step"] = nemo2_engine.Dynamic(model, greedy, few).add(0, [5] * 70).refused
    try:
        nemo2_engine.Dynamic(model, greedy, nemo2_engine.Limits(buffer_size_gb=0.0001))
    except WorkshopError as error:
        found["small buffer"] = str(error)
    found["texts"] = {
        answer.request: answer.text for answer in nemo2_engine.static(model, asked, greedy, limits)
    }
    result.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
