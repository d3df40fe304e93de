"""JupyterLab on a copy of the notebooks, and a headless Chromium that looks at it."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest
from places import ROOT


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab: ``address`` ends without a slash."""

    address: str
    token: str


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """JupyterLab with nobody's settings but its own, on a free port; what the page saves does not
    reach the repository."""
    home = tmp_path_factory.mktemp("lab")
    checkpoints = shutil.ignore_patterns(".ipynb_checkpoints")
    shutil.copytree(ROOT / "notebooks", home / "tree" / "notebooks", ignore=checkpoints)
    # Cells outside the window are not drawn otherwise.
    settings = home / "settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    tracker = settings / "tracker.jupyterlab-settings"
    tracker.write_text(json.dumps({"windowingMode": "none"}))
    port, token = free_port(), secrets.token_hex(16)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1"]
    command += [f"--port={port}", "--ServerApp.port_retries=0"]
    command += [f"--ServerApp.root_dir={home / 'tree'}", f"--IdentityProvider.token={token}"]
    command += ["--LabApp.expose_app_in_browser=True"]
    command += ["--allow-root"] if os.geteuid() == 0 else []
    environment = os.environ | {"JUPYTER_PREFER_ENV_PATH": "1"}
    environment["JUPYTER_CONFIG_DIR"] = str(home / "config")
    for folder in ("settings", "workspaces"):
        environment[f"JUPYTERLAB_{folder.upper()}_DIR"] = str(home / folder)
    with (home / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            wait_for(f"http://127.0.0.1:{port}/api/status?token={token}", server, home / "log")
            yield Lab(f"http://127.0.0.1:{port}", token)
        finally:
            server.terminate()
            server.wait(timeout=30)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """A headless Chromium with a profile of its own."""
    from selenium import webdriver

    names = "chromium", "chromium-browser", "google-chrome"
    program = next(filter(None, map(shutil.which, names)), None)
    driver = shutil.which("chromedriver")
    if not program or not driver:
        pytest.fail(
            "Chromium or chromedriver is missing: run `make test-browser`, which installs them "
            "where it may"
        )
    options = webdriver.ChromeOptions()
    options.binary_location = program
    options.set_capability("goog:loggingPrefs", {"browser": "SEVERE"})
    switches = (
        "headless=new no-sandbox disable-gpu disable-quic no-first-run "
        "disable-background-networking disable-component-update"
    )
    profile = f"user-data-dir={tmp_path_factory.mktemp('chromium')}"
    for switch in (*switches.split(), "disable-sync", "window-size=1400,1800", profile):
        options.add_argument(f"--{switch}")
    chromium = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chromium
    chromium.quit()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def wait_for(address: str, server: subprocess.Popen, log: Path, seconds: int = 60) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError):
            if server.poll() is not None or time.monotonic() > end:
                pytest.fail(f"JupyterLab did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.2)
