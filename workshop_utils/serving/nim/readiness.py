"""Wait until a NIM serves, and say what its log means.

NIM's log is not specified. The patterns are messages of the public engines in it (vLLM,
TensorRT-LLM), of CUDA and of NGC's registry; what counts in the end is what ``/v1/models`` lists.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from workshop_utils.core.errors import NimFailed
from workshop_utils.core.progress import progress_bar

#: What a line of the log says, and what it means: of what went wrong, and of an adapter taken in.
_ERRORS = (
    (r"CUDA out of memory|OutOfMemoryError|cudaErrorMemoryAllocation|No available memory for the "
     r"cache blocks",
     "out of GPU memory: use a smaller profile (--profile; `list-model-profiles` in the "
     "container), fewer adapters, or another GPU"),
    (r"No space left on device",
     "the disk of the cache is full: give --cache a directory on a larger one"),
    (r"Permission denied.*(/opt/nim|\.cache)|(/opt/nim|\.cache).*Permission denied",
     "the container may not write its cache: the directory of --cache has to belong to the user "
     "that starts the NIM"),
    (r"\b401\b.*(ngc|nvidia|registry|token)|\b403\b.*(ngc|nvidia|registry)|Authentication "
     r"(Error|failed)|Invalid API key|NGC_API_KEY.*(missing|not set|invalid)",
     "NGC refused the key: it has to be valid for this model (make a new one at "
     "https://org.ngc.nvidia.com/setup)"),
    (r"No (compatible|valid|suitable|matching) profile|profile.*(not found|not "
     r"compatible|incompatible)|Could not (find|match).*profile",
     "no profile of this image fits the GPU: choose one with --profile (`list-model-profiles` in "
     "the container lists them)"),
    (r"LoRA rank \d+ is greater than max_lora_rank|rank.*(exceeds|greater than|larger than).*max",
     "an adapter's rank is above NIM_MAX_LORA_RANK: start with a higher --max-lora-rank"),
    (r"No adapter found for|(failed|unable|could not|cannot) (to )?load.*(lora|adapter|peft)|"
     r"(lora|adapter|peft).*(failed to load|could not be loaded|loading failed|is invalid)",
     "an adapter was refused: look at it with `workshop conform STORE/NAME --reader nim1`"),
    (r"Address already in use", "the port inside the container is taken"),
)  # fmt: skip
_LOADED = r"(Loaded|Added|Adding|Registered|Loading) (new )?(LoRA|adapter|PEFT)"


@dataclass(frozen=True)
class Finding:
    """A line of a log that matters, and what it means."""

    kind: Literal["error", "loaded"]
    line: str
    meaning: str


def read_log(text: str) -> list[Finding]:
    """The first line of each cause of failure in ``text``, and every line about an adapter that was
    taken in."""
    findings: dict[tuple[str, str], Finding] = {}
    for line in text.splitlines():
        for pattern, meaning in _ERRORS:
            if re.search(pattern, line, re.IGNORECASE):
                findings.setdefault((meaning, ""), Finding("error", line.strip(), meaning))
                break
        else:
            if re.search(_LOADED, line, re.IGNORECASE):
                loaded = Finding("loaded", line.strip(), "an adapter was taken in")
                findings.setdefault((loaded.meaning, line), loaded)
    return list(findings.values())


def wait(
    url: str,
    timeout: float,
    ended: Callable[[], str | None] = lambda: None,
    pause: float = 5,
    progress: bool = True,
) -> float:
    """Ask ``url/v1/health/ready`` every ``pause`` seconds until it answers 200, and return the
    seconds that took.

    ``ended`` says how the server ended, None while it runs; a bar shows the time that has passed.

    Raises:
        NimFailed: the server ended, or ``timeout`` seconds have passed; the message names the last
            answer.
    """
    import httpx

    began, last = time.monotonic(), ""
    with (
        httpx.Client(trust_env=False, timeout=10) as client,
        progress_bar(
            total=timeout,
            unit="s",
            desc="waiting",
            shown=progress,
            bar_format="{desc}: {n:.0f} of {total:.0f} s {postfix}",
        ) as bar,
    ):
        while True:
            try:
                answer = client.get(f"{url}/v1/health/ready")
                if answer.status_code == 200:
                    return time.monotonic() - began
                last = f"it answers {answer.status_code}"
            except httpx.TransportError as error:
                last = f"no answer yet ({type(error).__name__})"
            passed = time.monotonic() - began
            bar.set_postfix_str(last, refresh=False)
            bar.update(min(passed, timeout) - bar.n)
            if how := ended():
                raise NimFailed(f"the server at {url} did not become ready: {how}")
            if passed >= timeout:
                raise NimFailed(f"the server at {url} was not ready after {timeout:g} s: {last}")
            time.sleep(min(pause, timeout - passed))


def models(url: str) -> list[str]:
    """The ids in ``url/v1/models``: the base's first, then the adapters'. Raises :class:`NimFailed`
    when there is no such list."""
    import httpx

    try:
        answer = httpx.get(f"{url}/v1/models", trust_env=False, timeout=10)
        return [str(model["id"]) for model in answer.raise_for_status().json()["data"]]
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise NimFailed(f"{url}/v1/models gives no list of models: {error}") from error
