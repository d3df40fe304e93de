"""What NGC answers to ngcsdk when it downloads a model: the endpoints below, over TLS, because the
client accepts nothing else."""

import base64
import hashlib
import json
import ssl
import subprocess
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from http_double import Answer, Request

TARGET = "nvidia/nemo/tiny:2.0"
MODEL = "/v2/org/nvidia/team/nemo/models/tiny"
STORE = "/store/"
KEY = "nvapi-good"


class Ngc:
    """One model version. ``status`` is what listing its files answers; ``cut`` shortens a file's
    content, by name."""

    def __init__(self, files: dict[str, bytes]):
        self.files = files
        self.status = 200
        self.cut: dict[str, int] = {}
        self.url = ""  # of the server, once it runs

    def __call__(self, request: Request) -> Answer:
        path = urlsplit(request.path).path
        if path == "/v3/keys/get-caller-info":
            if request.body != f"credentials={KEY}".encode():
                return failure(401)
            user = {"roles": [{"org": {"name": "me"}}]}
            return success({"type": "PERSONAL_KEY", "orgName": "me", "user": user})
        if path.startswith(STORE):
            name = path.removeprefix(STORE)
            return Answer(self.files[name], cut=self.cut.get(name))
        if self.status != 200:
            return failure(self.status)
        if path == MODEL:
            return success({"model": {"name": "tiny", "latestVersionIdStr": "2.0"}})
        if path == f"{MODEL}/versions/2.0":
            return success({"modelVersion": {"versionId": "2.0", "status": "UPLOAD_COMPLETE"}})
        if path == f"{MODEL}/versions/2.0/files":
            return success({"modelFiles": [listed(*file) for file in self.files.items()]})
        if path == f"{MODEL}/2.0/files":
            name = parse_qs(urlsplit(request.path).query)["path"][0]
            return success({"urls": [f"{self.url}{STORE}{name}"], "filepath": [name]})
        return failure(404)


def checkpoint() -> dict[str, bytes]:
    """The files of a NeMo 2.0 checkpoint, as far as their names go."""
    names = [f"context/{name}" for name in ("model.yaml", "io.json")]
    names += [f"weights/{name}" for name in (".metadata", "metadata.json", "common.pt")]
    shards = {f"weights/__0_{number}.distcp": bytes([number]) * 100_000 for number in range(2)}
    return {name: name.encode() for name in names} | shards


def listed(name: str, content: bytes) -> dict:
    digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
    return {"path": name, "sizeInBytes": len(content), "sha256_base64": digest}


def success(body: dict, code: str = "SUCCESS", status: int = 200, **more: str) -> Answer:
    content = json.dumps(body | {"requestStatus": {"statusCode": code, **more}}).encode()
    return Answer(content, status, {"Content-Type": "application/json"})


def failure(status: int) -> Answer:
    return success({}, "FAILED", status, statusDescription=f"refused with {status}")


def certificate(folder: Path) -> tuple[Path, ssl.SSLContext]:
    """A certificate for 127.0.0.1 that its holder signed, and the server's side of it."""
    signed, key = folder / "certificate.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-keyout", str(key), "-out", str(signed)]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(signed, key)
    return signed, context
