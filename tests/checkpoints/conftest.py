"""Fixtures of the tests of checkpoints."""

import pytest
from tiny_model import make_tiny_model


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository of the test's own."""
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A Hugging Face directory with a tiny Llama and its tokenizer; tests copy what they change."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "hf")
