"""Many clients of one server, and somebody who changes its store meanwhile. For a slow test and for
``benchmarks/serving.py``."""

import shutil
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai

PROMPTS = ("Hello", "A longer prompt than the first", "?", "one two three four five six seven")
REPLACED, BROKEN, REMOVED = "replaced", "broken", "removed"


def resident_mib(pid: int) -> float:
    """Resident memory of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return round(int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024, 1)


class Trouble(threading.Thread):
    """Changes the store over and over: one adapter is replaced file by file, one is cut short and
    healed, one is removed and put back."""

    def __init__(self, store: Path, versions: tuple[Path, Path]):
        super().__init__(daemon=True)
        self.store, self.versions, self.ended, self.rounds = store, versions, threading.Event(), 0

    def run(self) -> None:
        weights = self.store / BROKEN / "adapter_model.safetensors"
        whole, kept = weights.read_bytes(), self.store.parent / "kept"
        shutil.copytree(self.store / REMOVED, kept)
        while not self.ended.is_set():
            self.rounds += 1
            weights.write_bytes(whole[: len(whole) // 2])
            shutil.rmtree(self.store / REMOVED)
            self.put(self.rounds % 2)
            self.ended.wait(1)
            weights.write_bytes(whole)
            shutil.copytree(kept, self.store / REMOVED)
            self.ended.wait(1)

    def put(self, version: int) -> None:
        """Copy a version over the adapter, file by file, the weights in two parts."""
        for file in sorted(self.versions[version].iterdir()):
            content = file.read_bytes()
            with (self.store / REPLACED / file.name).open("wb") as out:
                for part in (content[: len(content) // 2], content[len(content) // 2 :]):
                    out.write(part)
                    out.flush()
                    time.sleep(0.02)


def ask(client: openai.OpenAI, model: str, prompt: str, tokens: int) -> str:
    """One greedy answer."""
    how = {"temperature": 0, "max_tokens": tokens}
    return client.completions.create(model=model, prompt=prompt, **how).choices[0].text


def load(
    server,
    store: Path,
    versions: tuple[Path, Path],
    base: str,
    clients: int = 32,
    requests: int = 40,
    tokens: int = 24,
) -> dict:
    """``requests`` by each of ``clients``, to the base and three adapters in turn; what came back,
    and the server's memory.

    ``store`` holds version 0 of the adapter :data:`REPLACED`, :data:`BROKEN` and :data:`REMOVED`.
    """
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)
    models = (base, REPLACED, BROKEN, REMOVED)
    trouble = Trouble(store, versions)
    right = {
        (model, prompt): [ask(client, model, prompt, tokens)]
        for model in models
        for prompt in PROMPTS
    }
    trouble.put(1)
    time.sleep(3)  # longer than the refresh
    for prompt in PROMPTS:
        right[REPLACED, prompt].append(ask(client, REPLACED, prompt, tokens))
    outcome: Counter = Counter()
    memory = []

    def one_client(number: int) -> None:
        for turn in range(requests):
            model, prompt = models[(number + turn) % 4], PROMPTS[(number * 7 + turn * 3) % 4]
            try:
                text = ask(client, model, prompt, tokens)
            except openai.APIError as error:
                outcome[f"{error.code or type(error).__name__} {model}"] += 1
            else:
                outcome["right" if text in right[model, prompt] else f"WRONG {model}"] += 1
            memory.append(resident_mib(server.process.pid))

    trouble.start()
    begin = time.perf_counter()
    try:
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(one_client, range(clients)))
    finally:
        trouble.ended.set()
        trouble.join()
    seconds = time.perf_counter() - begin
    time.sleep(3)
    # The adapter that was replaced has to be at the version that was put there last; the others
    # have but one.
    last = {model: trouble.rounds % 2 if model == REPLACED else 0 for model in models}
    healed = all(
        ask(client, model, prompt, tokens) == texts[last[model]]
        for (model, prompt), texts in right.items()
    )
    log, quarter = server.log.read_text(), len(memory) // 4
    return {
        "clients": clients,
        "requests": clients * requests,
        "seconds": round(seconds, 1),
        "changes_of_the_store": trouble.rounds * 5,
        "outcomes": dict(sorted(outcome.items())),
        "all_served_again_afterwards": healed,
        "versions_differ": all(len(set(right[REPLACED, prompt])) == 2 for prompt in PROMPTS),
        "noticed": {
            "replaced": log.count(f"adapter {REPLACED}: replaced"),
            "removed": log.count(f"adapter {REMOVED}: removed"),
            "broken": log.count(f"adapter {BROKEN}: NOT served; the one before is still served"),
        },
        "resident_mib": {
            "highest_in_the_first_quarter": max(memory[:quarter]),
            "highest_in_the_last_quarter": max(memory[-quarter:]),
        },
    }
