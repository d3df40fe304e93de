"""The ``docker run`` command of a NIM, and the container that it starts.

Flags, variables and paths are those of NIM's pages ("Getting started", "Parameter-efficient
fine-tuning", "Environment variables"). No NIM was run here: it needs a GPU and a key.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from workshop_utils.core import paths
from workshop_utils.core.errors import NimFailed, WorkshopError
from workshop_utils.runtime.device import gpu_name
from workshop_utils.serving.nim.store import MAX_RANK

KEY = "NGC_API_KEY"
PORT = 8000
"""Where a NIM listens inside its container."""
CACHE, STORE = "/opt/nim/.cache", "/opt/nim/loras"
"""Where a container finds the downloaded model and the adapters."""
#: What docker writes when it refuses, and what to do about it.
_EXPLAINED = (
    (r"permission denied.*docker.*sock|docker.*sock.*permission denied",
     "this user may not use docker: add it to the group docker, or use sudo"),
    (r"cannot connect to the docker daemon|daemon is not running",
     "docker is installed, but its daemon does not run: sudo systemctl start docker"),
    (r"could not select device driver|nvidia-container-cli|unknown.*runtime.*nvidia",
     "docker cannot reach the GPU: install the NVIDIA Container Toolkit, `sudo nvidia-ctk runtime "
     "configure --runtime=docker`, and restart docker"),
    (r"unauthorized|authentication required|denied: requested access|invalid credentials",
     f"log in first: echo \"${KEY}\" | docker login nvcr.io -u '$oauthtoken' --password-stdin"),
    (r"manifest unknown|manifest for .* not found|not found: manifest",
     "there is no such image: look the tag up in NVIDIA's catalogue "
     "(https://catalog.ngc.nvidia.com)"),
    (r"port is already allocated|address already in use",
     "the port is taken: stop what uses it, or choose another --port"),
    (r"the container name .* is already in use",
     "a container of that name exists: `docker rm -f NAME`, or choose another --name"),
    (r"no space left on device", "the disk is full: images and models need tens of gigabytes"),
)  # fmt: skip


def check_image(image: str) -> str:
    """``image``, if it is pinned by a tag other than ``latest``, or by a digest; else raise
    :class:`WorkshopError`."""
    repository, at, digest = image.partition("@")
    path, colon, tag = repository.rpartition(":")
    if not colon or "/" in tag:
        path, tag = repository, ""
    if not re.fullmatch(r"\w[\w.-]*(:\d+)?(/[\w.-]+)*(:[\w.-]+)?", repository) or (
        at and not re.fullmatch(r"sha256:[0-9a-f]{64}", digest)
    ):
        raise WorkshopError(
            f"--image is {image!r}, which is no image: give REGISTRY/PATH:TAG or "
            "REGISTRY/PATH@sha256:DIGEST (64 hexadecimal digits)."
        )
    if not at and tag in ("", "latest"):
        what = "has no tag, which means :latest" if not tag else "is :latest"
        raise WorkshopError(
            f"--image {image} {what}: next month that is another program. Pin a version, "
            f"{path}:TAG, or a digest, {path}@sha256:..."
        )
    return image


_COUNT = Field(gt=0, description="it has to be above 0")


@dataclass(frozen=True)
class Nim:
    """A NIM with adapters. ``store`` and ``cache`` are directories of this machine, ``refresh`` is
    in seconds.

    ``profile`` is a NIM_MODEL_PROFILE; NIM's pages advise one that names LoRA (``-feat_lora``)
    where the model has it.

    Raises:
        WorkshopError: a value that docker or NIM would refuse, or an image that is not pinned; the
            message names the field.
    """

    image: Annotated[str, AfterValidator(check_image)]
    store: Path = field(default_factory=paths.adapter_store)
    cache: Path = field(default_factory=lambda: Path.home() / ".cache" / "nim")
    name: Annotated[
        str,
        Field(
            pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$",
            description="a container's and a Kubernetes name has up to 63 of a-z, 0-9 and '-', "
            "none of '-' at its ends",
        ),
    ] = "workshop-nim"
    port: Annotated[int, Field(gt=0, le=65535, description="it has to be between 1 and 65535")] = (
        PORT
    )
    gpus: Annotated[
        str,
        Field(
            pattern=r"^(all|[1-9]\d*|device=[\w,-]+)$",
            description="give all, a number, or device=0,1 (indices or UUIDs of `nvidia-smi -L`)",
        ),
    ] = "all"
    shm_size: Annotated[
        str,
        Field(pattern=r"^[1-9]\d*[KMG]B?$", description="give a number and a unit, such as 16GB"),
    ] = "16GB"
    refresh: Annotated[int, _COUNT] = 60
    max_lora_rank: Annotated[int, _COUNT] = MAX_RANK
    max_gpu_loras: Annotated[int, _COUNT] = 8
    max_cpu_loras: Annotated[int, _COUNT] = 16
    profile: str | None = None

    @model_validator(mode="wrap")
    @classmethod
    def _named(cls, given: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(given)
        except ValidationError as error:
            first = error.errors()[0]
            name, hint = first["loc"][0], first["msg"]
            if name in cls.__pydantic_fields__:
                hint = cls.__pydantic_fields__[name].description or hint
            option = f"--{str(name).replace('_', '-')}"
            raise WorkshopError(f"{option} is {first['input']!r}; {hint}.") from None

    @model_validator(mode="after")
    def _fitting(self) -> Nim:
        if self.max_cpu_loras < self.max_gpu_loras:
            raise WorkshopError(
                f"--max-cpu-loras {self.max_cpu_loras} is below --max-gpu-loras "
                f"{self.max_gpu_loras}: every adapter on the GPU is in host memory, too."
            )
        if self.store.exists() and not self.store.is_dir():
            raise NimFailed(f"--store: {paths.shown(self.store)} is no directory of adapters.")
        for name in ("store", "cache"):
            if ":" in str(getattr(self, name)):
                raise WorkshopError(
                    f"--{name} is {getattr(self, name)}: docker cannot mount a path with a colon."
                )
        return self

    @property
    def environment(self) -> dict[str, str]:
        """The variables of the container, but for the key, which is passed on by its name."""
        variables = {
            "NIM_PEFT_SOURCE": STORE,
            "NIM_PEFT_REFRESH_INTERVAL": str(self.refresh),
            "NIM_MAX_LORA_RANK": str(self.max_lora_rank),
            "NIM_MAX_GPU_LORAS": str(self.max_gpu_loras),
            "NIM_MAX_CPU_LORAS": str(self.max_cpu_loras),
        }
        return variables | ({"NIM_MODEL_PROFILE": self.profile} if self.profile else {})

    @property
    def url(self) -> str:
        """Where it answers on this machine."""
        return f"http://127.0.0.1:{self.port}"


def command(nim: Nim) -> list[str]:
    """The arguments that start ``nim`` in the background, on this machine's loopback address only.
    The key is not in them."""
    # docker reads a comma as the next field.
    gpus = f'"{nim.gpus}"' if "," in nim.gpus else nim.gpus
    options = (
        ("--name", nim.name),
        ("--gpus", gpus),
        ("--shm-size", nim.shm_size),
        ("-u", str(os.getuid())),
        ("-p", f"127.0.0.1:{nim.port}:{PORT}"),
        ("-e", KEY),
        *(("-e", f"{name}={value}") for name, value in nim.environment.items()),
        ("-v", f"{nim.cache.resolve()}:{CACHE}"),
        ("-v", f"{nim.store.resolve()}:{STORE}:ro"),
    )
    return ["docker", "run", "--detach", *(word for pair in options for word in pair), nim.image]


def script(nim: Nim) -> str:
    """:func:`command` for a shell, one option a line, after the directories: docker would make
    those that are missing, as root's.

    The current directory, the home and the user are left to the shell.
    """
    words = command(nim)
    options = zip(words[3:-1:2], words[4:-1:2], strict=True)
    lines = [
        f'{option} "$(id -u)"' if option == "-u" else f"{option} {_quoted(value)}"
        for option, value in options
    ]
    directories = " ".join(
        _quoted(str(directory.resolve())) for directory in (nim.cache, nim.store)
    )
    return f"mkdir -p {directories}\n" + " \\\n  ".join(
        [shlex.join(words[:3]), *lines, _quoted(words[-1])]
    )


def _quoted(word: str) -> str:
    """``word`` for a shell, which finds the current directory and the home itself."""
    for name, place in (("PWD", Path.cwd()), ("HOME", Path.home())):
        if word.startswith(f"{place}/"):
            return f'"${name}"/{shlex.quote(word.removeprefix(f"{place}/"))}'
    return shlex.quote(word)


def preflight(nim: Nim, environment: Mapping[str, str]) -> None:
    """Raise :class:`NimFailed` with all that is missing on this machine: docker, a GPU, the key,
    the store; make the cache."""
    missing = []
    if not shutil.which("docker"):
        missing.append("docker is not installed: https://docs.docker.com/engine/install")
    if not environment.get("DOCKER_HOST") and not gpu_name():
        missing.append(
            "no NVIDIA GPU is found (nvidia-smi -L lists none), and a NIM needs one. To learn "
            "without: workshop serve"
        )
    if not environment.get(KEY, "").strip():
        missing.append(
            f"{KEY} is not set, and the model is downloaded with it: get a key at "
            f"https://org.ngc.nvidia.com/setup, then export {KEY}"
        )
    if not nim.store.is_dir():
        missing.append(
            f"there is no store {paths.shown(nim.store)}: workshop nim stage ADAPTER --name NAME "
            f"--store {paths.shown(nim.store)}"
        )
    if missing:
        raise NimFailed("\n  - ".join(["A NIM cannot be started here:", *missing]))
    try:
        nim.cache.mkdir(parents=True, exist_ok=True)  # docker would make it root's
    except OSError as error:
        raise NimFailed(
            f"the cache {nim.cache} cannot be made ({error.strerror}): name another directory "
            "with --cache"
        ) from None


def start(nim: Nim) -> str:
    """Start the container and return its id. Downloads the image first where it is missing.

    Raises:
        NimFailed: docker refused. Its words were printed; the message says what to do.
    """
    written = []
    with subprocess.Popen(
        command(nim), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stderr:  # the progress of the download
            print(line, end="", file=sys.stderr)
            written.append(line)
        identity = process.stdout.read().strip()
    if process.returncode:
        raise NimFailed(
            f"docker could not start the container (status {process.returncode}); it says why "
            f"above.{_advice(''.join(written))}\nIf it made the container all the same, remove "
            f"that before you try again: docker rm {nim.name}"
        )
    return identity


def ended(name: str) -> str | None:
    """How the container ``name`` ended, or None while it runs."""
    state = "{{.State.Running}} {{.State.ExitCode}} {{.State.OOMKilled}}"
    answer = _docker("inspect", "--format", state, name)
    if answer.returncode:
        return "it is gone"
    running, status, killed = ([*answer.stdout.split(), "false", "?", "false"])[:3]
    if running == "true":
        return None
    how = "was killed: out of host memory" if killed == "true" else f"ended with status {status}"
    return f"it {how}"


def logs(name: str) -> str:
    """All that the container has written."""
    answer = _docker("logs", name)
    return answer.stdout + answer.stderr


def _advice(text: str) -> str:
    """What to do about the refusal ``text`` of docker, where its cause is known."""
    known = [
        fix for pattern, fix in _EXPLAINED if re.search(pattern, text, re.IGNORECASE | re.DOTALL)
    ]
    return f"\nWhat to do: {known[0]}." if known else ""


def _docker(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["docker", *words], check=False, capture_output=True, text=True, errors="replace"
    )
