"""A NIM as Kubernetes objects: a claim for the cache, one for the adapters, a Deployment, a Service. The key stays in a Secret."""

from __future__ import annotations

import re
from typing import Any

from workshop_utils.errors import WorkshopError
from workshop_utils.nim.docker import CACHE, KEY, PORT, STORE, Nim

SECRET, PULL_SECRET = "ngc-api", "ngc-registry"
_QUANTITY = re.compile(r"[1-9]\d*(Ki|Mi|Gi|Ti|K|M|G|T)")


def manifest(nim: Nim, cache_size: str = "100Gi", store_size: str = "10Gi") -> list[dict[str, Any]]:
    """The objects, checked against the schemas of Kubernetes (:func:`check`).

    The two Secrets are referred to and not written, so that no key is in a file:
    ``kubectl create secret generic ngc-api --from-literal=NGC_API_KEY=...`` and
    ``kubectl create secret docker-registry ngc-registry --docker-server=nvcr.io --docker-username='$oauthtoken' --docker-password=...``.

    Raises:
        WorkshopError: a size is no quantity, or ``nim.gpus`` is no number.
    """
    for option, size in (("--cache-size", cache_size), ("--store-size", store_size)):
        if not _QUANTITY.fullmatch(size):
            raise WorkshopError(f"{option} is {size!r}, which is no quantity of Kubernetes: give one such as 100Gi.")
    if not nim.gpus.isdigit():
        raise WorkshopError(f"--gpus is {nim.gpus!r}; Kubernetes hands out a number of GPUs: give one, such as --gpus 1.")
    label = {"app.kubernetes.io/name": nim.name}
    objects = [
        _claim(f"{nim.name}-cache", label, cache_size),
        _claim(f"{nim.name}-store", label, store_size),
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": nim.name, "labels": label},
            "spec": {
                "replicas": 1,
                # The new pod would wait for ever for the GPU of the old one.
                "strategy": {"type": "Recreate"},
                "selector": {"matchLabels": label},
                "template": {"metadata": {"labels": label}, "spec": _pod(nim)},
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": nim.name, "labels": label},
            "spec": {"selector": label, "ports": [{"name": "http", "port": PORT, "targetPort": "http"}]},
        },
    ]
    for one in objects:
        check(one)
    return objects


def check(document: dict[str, Any]) -> None:
    """Raise :class:`WorkshopError` where ``document`` breaks the schema of its kind in the newest Kubernetes that is known here."""
    import kubernetes_validate

    try:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as error:
        place = ".".join(map(str, error.path))
        raise WorkshopError(f"{document.get('kind')}: {place}: {error.message}") from error


def _claim(name: str, label: dict[str, str], size: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name, "labels": label},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": size}}},
    }


def _pod(nim: Nim) -> dict[str, Any]:
    key = {"name": KEY, "valueFrom": {"secretKeyRef": {"name": SECRET, "key": KEY}}}
    ready, live = ({"httpGet": {"path": f"/v1/health/{state}", "port": "http"}} for state in ("ready", "live"))
    container = {
        "name": "nim",
        "image": nim.image,
        "env": [key, *({"name": name, "value": value} for name, value in nim.environment.items())],
        "ports": [{"name": "http", "containerPort": PORT}],
        "resources": {"limits": {"nvidia.com/gpu": nim.gpus}},
        # The first start downloads the model: an hour may pass.
        "startupProbe": ready | {"periodSeconds": 10, "failureThreshold": 360},
        "readinessProbe": ready | {"periodSeconds": 10},
        "livenessProbe": live | {"periodSeconds": 10, "failureThreshold": 6},
        "volumeMounts": [
            {"name": "cache", "mountPath": CACHE},
            {"name": "store", "mountPath": STORE, "readOnly": True},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
        ],
    }
    return {
        "imagePullSecrets": [{"name": PULL_SECRET}],
        # As in the Helm chart of NIM: the volumes have to be writable for this group.
        "securityContext": {"fsGroup": 1000, "runAsUser": 1000, "runAsNonRoot": True},
        "containers": [container],
        "volumes": [
            {"name": "cache", "persistentVolumeClaim": {"claimName": f"{nim.name}-cache"}},
            {"name": "store", "persistentVolumeClaim": {"claimName": f"{nim.name}-store"}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": _shared_memory(nim.shm_size)}},
        ],
    }


def _shared_memory(size: str) -> str:
    """Docker's ``16GB``, which is binary, as Kubernetes writes it."""
    return re.sub(r"([KMG])B?$", r"\1i", size)
