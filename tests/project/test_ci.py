"""The workflow: once for each pull request, with no more rights than it needs, and on Debian's own
Python as well."""

import pytest
import yaml
from places import ROOT

WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
# YAML 1.1 reads the key "on" as true.
EVENTS = WORKFLOW[True]


def commands(job: dict) -> str:
    return "\n".join(step.get("run", "") for step in job["steps"])


def test_a_pull_request_is_run_once():
    assert EVENTS["push"] == {"branches": ["main"]}
    assert "pull_request" in EVENTS
    assert WORKFLOW["concurrency"]["group"] == "${{ github.workflow }}-${{ github.ref }}"


def test_it_may_only_read():
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert not any("permissions" in job for job in WORKFLOW["jobs"].values())


@pytest.mark.parametrize("name", WORKFLOW["jobs"])
def test_every_job_keeps_what_pip_fetched_and_ends(name):
    job = WORKFLOW["jobs"][name]
    assert job["timeout-minutes"] <= 90
    steps = [(step.get("with", {}).get("cache"), step.get("uses", "")) for step in job["steps"]]
    assert any(cache == "pip" or "actions/cache@" in uses for cache, uses in steps)


def test_the_quick_tests_run_on_the_python_of_debian_12():
    job = WORKFLOW["jobs"]["debian"]
    assert job["container"] == "debian:12"
    assert "make env PYTHON=/usr/bin/python3.11" in commands(job)
    assert ".venv/bin/python -m pytest --numprocesses 2 --dist worksteal tests" in commands(job)
