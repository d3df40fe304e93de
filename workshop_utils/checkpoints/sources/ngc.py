"""Models of NVIDIA's registry, NGC: the ``ngc`` command where it is installed, else NVIDIA's
``ngcsdk``.

ngcsdk pins versions that cannot live beside NeMo's, so it gets a virtual environment of its own,
made on first use. What comes from here already is a NeMo 2.0 checkpoint and is left as NVIDIA wrote
it.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from workshop_utils.checkpoints.sources import follow, proxy, wholeness
from workshop_utils.checkpoints.sources.catalogue import Model
from workshop_utils.core import paths
from workshop_utils.core.errors import FetchError, GatedModel
from workshop_utils.core.progress import progress_bar

SDK = "ngcsdk==4.37.0"
KEY_PAGE = "https://org.ngc.nvidia.com/setup/api-keys"
_SAID = {
    r"Client Error: 401|Invalid apikey|Missing API key": "refused",
    r"Client Error: 403": "no access",
    r"accept terms": "terms",
    r"Client Error: 404|could not be found": "not found",
}
"""What the ``ngc`` command prints -> kind of failure."""


def plan(model: Model) -> str:
    client = "the ngc command" if shutil.which("ngc") else f"{SDK} in {paths.shown(_environment())}"
    return (
        f"download {model.address} with {client}, check the size (and sha256, where stated) of "
        "each file"
    )


def download(model: Model, target: Path, progress: bool = True) -> None:
    """Make ``target``, the NeMo 2.0 checkpoint of ``model``: whole or not at all.

    Raises GatedModel when the key is missing, refused or without access, FetchError for anything
    else that fails. With ngcsdk a new start skips the files that were finished; the ``ngc`` command
    begins again.
    """
    if not _key() and not shutil.which("ngc"):
        raise GatedModel(
            f"{model.address}: NGC wants a key. Make a personal key with the service 'NGC "
            f"Catalog' at {KEY_PAGE}, set NGC_API_KEY to it and start again"
        )
    staging = paths.models_dir() / f".{model.name}.ngc-download"
    staging.mkdir(parents=True, exist_ok=True)
    if shutil.which("ngc"):
        _with_command(model, staging, progress)
    else:
        _with_sdk(model, staging, progress)
    _move(model, staging, target)
    shutil.rmtree(staging)


def _key() -> str | None:
    return os.environ.get("NGC_API_KEY") or os.environ.get("NGC_CLI_API_KEY")


def _with_sdk(model: Model, staging: Path, progress: bool) -> None:
    driver = Path(__file__).with_name("ngc_driver.py")
    command = [str(_python_of_sdk()), str(driver), model.address, str(staging)]
    bars = {"total": model.size, "desc": model.name, "unit": "B", "unit_scale": True}
    said: dict = {}
    log = staging / "driver.log"
    with log.open("w") as errors, progress_bar(**bars, shown=progress) as bar:
        driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            for line in driver.stdout:
                said = json.loads(line)
                if "total" in said:
                    bar.total = said["total"]
                    bar.update(said["done"] - bar.n)
        finally:
            driver.terminate()
            status = driver.wait()
    if status != 0:
        last = (log.read_text(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise _explained(model, said.get("error", "failed"), said.get("message", last))


def _with_command(model: Model, staging: Path, progress: bool) -> None:
    command = ["ngc", "registry", "model", "download-version", model.address]
    command += ["--dest", str(staging), "--format_type", "json"]
    environment = dict(os.environ)
    if key := _key():  # older versions of the command read no other name
        environment["NGC_CLI_API_KEY"] = key
    log = staging / "ngc.log"
    status = follow.run(command, log, staging, model.size, model.name, progress, environment)
    text = log.read_text(errors="replace")
    if status != 0:
        kinds = (kind for pattern, kind in _SAID.items() if re.search(pattern, text))
        raise _explained(model, next(kinds, "failed"), " ".join(text.split())[-300:])


def _explained(model: Model, kind: str, message: str) -> FetchError:
    if kind == "refused":
        return GatedModel(
            f"{model.address}: NGC refuses the key in NGC_API_KEY (401). Make a new personal key "
            f"with the service 'NGC Catalog' at {KEY_PAGE}; an old-style key needs NGC_CLI_ORG "
            "too"
        )
    if kind in ("no access", "terms"):
        return GatedModel(
            f"{model.address}: the account of this key has no access. Open {model.licence_url}, "
            "sign in with the same account and organisation, accept the terms, then start again"
        )
    if kind == "not found":
        return FetchError(
            f"{model.address}: NGC has no such model or version (404), or this key may not see it"
        )
    url = os.environ.get("NGC_CLI_API_URL") or "https://api.ngc.nvidia.com"
    through = proxy.of_environment(url, message)
    if "make a connection" in message or "not reachable" in message:
        why = f"NGC cannot be reached.{through} Check the network and start again"
    else:
        said = proxy.without_credentials(message)
        why = f"NGC's client failed: {said}.{through} Start again"
    return FetchError(f"{model.address}: {why}; finished files are kept")


def _move(model: Model, staging: Path, target: Path) -> None:
    """NGC puts the checkpoint in a folder named after model and version."""
    checkpoint = next((file.parent.parent for file in staging.rglob("context/model.yaml")), None)
    if checkpoint is None or not wholeness.nemo2(checkpoint):
        raise FetchError(
            f"{model.address}: what NGC sent is not a whole NeMo 2.0 checkpoint (context/ and "
            f"weights/). Delete {paths.shown(staging)} and start again"
        )
    with paths.new_directory(target) as part:
        for child in checkpoint.iterdir():
            child.rename(part / child.name)


def _environment() -> Path:
    return paths.models_dir() / ".ngc-client"


def _python_of_sdk() -> Path:
    """The Python of the client's environment, which is made (again) when it was never finished."""
    environment = _environment()
    python, finished = environment / "bin" / "python", environment / f"{SDK}.installed"
    if not finished.is_file():
        venv = [sys.executable, "-m", "venv", "--clear", str(environment)]
        _run(venv, "a virtual environment cannot be made")
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", SDK]
        _run(pip, f"{SDK} cannot be installed")
        finished.touch()
    return python


def _run(command: Sequence[str], failure: str) -> None:
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode != 0:
        said = (result.stdout + result.stderr).strip() or "no message"
        last = proxy.without_credentials(said.splitlines()[-1]).rstrip(".")
        through = f".{proxy.of_pip(said)}" if "pip" in command else ""
        raise FetchError(
            f"{paths.shown(_environment())}: {failure} for the NGC client: {last}{through}"
        )
