"""A NIM as a Docker Compose file (https://docs.docker.com/reference/compose-file).

Docker Compose is not here, nor the schema of its files: the tests compare the fields with those of
the reference and of ``docker run``.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import yaml

from workshop_utils.serving.nim.docker import CACHE, KEY, PORT, STORE, Nim

_PROBE = (
    f"import urllib.request as r; r.urlopen('http://127.0.0.1:{PORT}/v1/health/ready', timeout=5)"
)


def compose(nim: Nim) -> dict[str, Any]:
    """The service of ``nim``. The key is passed on from the shell that runs ``docker compose up``,
    by its name."""
    devices = {"driver": "nvidia", "capabilities": ["gpu"]}
    if nim.gpus.startswith("device="):
        devices["device_ids"] = nim.gpus.removeprefix("device=").split(",")
    else:
        devices["count"] = nim.gpus if nim.gpus == "all" else int(nim.gpus)
    service = {
        "image": nim.image,
        "container_name": nim.name,
        "user": str(os.getuid()),
        "shm_size": nim.shm_size,
        "ports": [f"127.0.0.1:{nim.port}:{PORT}"],
        "environment": [
            KEY,
            *(f"{name}={_literal(value)}" for name, value in nim.environment.items()),
        ],
        "volumes": [
            _bind(nim.cache, CACHE),
            _bind(nim.store, STORE) | {"read_only": True},
        ],
        "deploy": {"resources": {"reservations": {"devices": [devices]}}},
        "healthcheck": {
            "test": ["CMD", "python3", "-c", _PROBE],
            "interval": "10s",
            "timeout": "10s",
            "retries": 3,
            "start_period": "30m",
        },
        "restart": "unless-stopped",
    }
    return {"services": {"nim": service}}


def header(nim: Nim) -> str:
    """What has to be done before ``docker compose up``, as comments of YAML."""
    return as_comments(
        "First, as the user who starts it, in the shell that starts it:",
        f"  mkdir -p {shlex.join([str(nim.cache.resolve()), str(nim.store.resolve())])}",
        f"  export {KEY}=...",
        "Then: docker compose -f THIS_FILE up --detach",
    )


def as_comments(*lines: str) -> str:
    """``lines`` as comments of YAML, also where one of them has a line break in it."""
    return "".join(f"# {part}".rstrip() + "\n" for line in lines for part in line.splitlines())


def as_yaml(*documents: dict[str, Any]) -> str:
    """``documents`` as YAML, in the order of their fields; values with special characters are
    quoted."""
    return yaml.dump_all(
        documents, Dumper=_Plain, sort_keys=False, width=120, explicit_start=len(documents) > 1
    )


class _Plain(yaml.SafeDumper):
    """Writes what occurs twice twice, and no anchors."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _bind(source: Path, target: str) -> dict[str, Any]:
    """A directory of this machine. One that is missing is told: docker would make it root's, where
    the container cannot write."""
    return {
        "type": "bind",
        "source": _literal(str(source.resolve())),
        "target": target,
        "bind": {"create_host_path": False},
    }


def _literal(text: str) -> str:
    """Compose would take ``$`` for a variable."""
    return text.replace("$", "$$")
