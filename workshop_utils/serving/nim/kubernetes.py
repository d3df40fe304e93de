"""A NIM as Kubernetes objects: a claim for the cache, one for the adapters, a Deployment, a
Service. The key stays in a Secret.

The objects are checked against the schemas of Kubernetes; no cluster has run them here.
"""

from __future__ import annotations

import json
import re
from typing import Any

from workshop_utils.core.errors import WorkshopError
from workshop_utils.serving.nim.compose import as_comments
from workshop_utils.serving.nim.docker import CACHE, KEY, PORT, STORE, Nim

SECRET, PULL_SECRET = "ngc-api", "ngc-registry"
# As in NIM's Helm chart; the volumes are writable for this user and group.
_SECURITY = {"fsGroup": 1000, "runAsUser": 1000, "runAsNonRoot": True}
_COPIER = "busybox:1.37.0"


def manifest(nim: Nim, cache_size: str = "100Gi", store_size: str = "10Gi") -> list[dict[str, Any]]:
    """The objects, checked against the schemas of Kubernetes (:func:`check`).

    The two Secrets are referred to and not written, so that no key is in a file; :func:`header`
    says how to make them. ``nim.port`` is that of the Service; ``nim.store`` and ``nim.cache`` are
    claims here.

    Raises:
        WorkshopError: a size is no quantity, or ``nim.gpus`` is no number.
    """
    for option, size in (("--cache-size", cache_size), ("--store-size", store_size)):
        if not re.fullmatch(r"[1-9]\d*(Ki|Mi|Gi|Ti|K|M|G|T)", size):
            raise WorkshopError(
                f"{option} is {size!r}, which is no quantity of Kubernetes: give one such as 100Gi."
            )
    if not nim.gpus.isdigit():
        raise WorkshopError(
            f"--gpus is {nim.gpus!r}; Kubernetes hands out a number of GPUs: give one, such as "
            "--gpus 1."
        )
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
            "spec": {
                "selector": label,
                "ports": [{"name": "http", "port": nim.port, "targetPort": "http"}],
            },
        },
    ]
    for each in objects:
        check(each)
    return objects


def header(nim: Nim) -> str:
    """What has to be done beside ``kubectl apply``, as comments of YAML: the Secrets, and the
    adapters into their claim."""
    pod = f"{nim.name}-fill"
    overrides = json.dumps({"apiVersion": "v1", "spec": _copier(nim)}, separators=(",", ":"))
    return as_comments(
        "First, the key: for the NIM, and for its image. It stays in the cluster.",
        f'  kubectl create secret generic {SECRET} --from-literal={KEY}="${KEY}"',
        f"  kubectl create secret docker-registry {PULL_SECRET} --docker-server=nvcr.io "
        f"--docker-username='$oauthtoken' --docker-password=\"${KEY}\"",
        "Then this file: kubectl apply -f THIS_FILE",
        "Then the adapters, each directory of a store (workshop nim stage), by a pod that may "
        "write where the NIM only reads:",
        f"  kubectl run {pod} --image={_COPIER} --restart=Never --overrides='{overrides}'",
        f"  kubectl wait --for=condition=Ready pod/{pod}",
        f"  kubectl cp store/NAME {pod}:/store/NAME",
        f"  kubectl delete pod {pod} --grace-period=1",
    )


def check(document: dict[str, Any]) -> None:
    """Raise :class:`WorkshopError` where ``document`` breaks the schema of its kind in the newest
    Kubernetes that is known here."""
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


def _copier(nim: Nim) -> dict[str, Any]:
    """A pod that keeps the claim of the adapters open for ``kubectl cp``."""
    container = {
        "name": "fill",
        "image": _COPIER,
        "command": ["sleep", "3600"],
        "volumeMounts": [{"name": "store", "mountPath": "/store"}],
    }
    volumes = [_claimed(nim, "store")]
    return {"securityContext": _SECURITY, "containers": [container], "volumes": volumes}


def _pod(nim: Nim) -> dict[str, Any]:
    # Docker's 16GB, which is binary, as Kubernetes writes it.
    shared_memory = re.sub(r"([KMG])B?$", r"\1i", nim.shm_size)
    key = {"name": KEY, "valueFrom": {"secretKeyRef": {"name": SECRET, "key": KEY}}}
    ready, live = (
        {"httpGet": {"path": f"/v1/health/{state}", "port": "http"}} for state in ("ready", "live")
    )
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
        "securityContext": _SECURITY,
        "containers": [container],
        "volumes": [
            _claimed(nim, "cache"),
            _claimed(nim, "store"),
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": shared_memory}},
        ],
    }


def _claimed(nim: Nim, name: str) -> dict[str, Any]:
    return {"name": name, "persistentVolumeClaim": {"claimName": f"{nim.name}-{name}"}}
