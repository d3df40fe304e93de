"""A NIM as a Docker Compose file (https://docs.docker.com/reference/compose-file)."""

from __future__ import annotations

import os
from typing import Any

import yaml

from workshop_utils.nim.docker import CACHE, KEY, PORT, STORE, Nim

_PROBE = f"import urllib.request as r; r.urlopen('http://127.0.0.1:{PORT}/v1/health/ready', timeout=5)"


def compose(nim: Nim) -> dict[str, Any]:
    """The service of ``nim``. The key is passed on from the shell that runs ``docker compose up``, by its name."""
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
        "environment": [KEY, *(f"{name}={_literal(value)}" for name, value in nim.environment.items())],
        "volumes": [
            {"type": "bind", "source": _literal(str(nim.cache.resolve())), "target": CACHE},
            {"type": "bind", "source": _literal(str(nim.store.resolve())), "target": STORE, "read_only": True},
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


def as_yaml(*documents: dict[str, Any]) -> str:
    """``documents`` as YAML, in the order of their fields; values with special characters are quoted."""
    return yaml.dump_all(documents, Dumper=_Plain, sort_keys=False, width=120, explicit_start=len(documents) > 1)


class _Plain(yaml.SafeDumper):
    """Writes what occurs twice twice, and no anchors."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _literal(text: str) -> str:
    """Compose would take ``$`` for a variable."""
    return text.replace("$", "$$")
