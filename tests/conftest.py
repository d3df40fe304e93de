"""Fixtures that more than one module of tests uses."""

import checkpoint_samples
import pytest


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    """A directory with the NeMo 2.0 checkpoints ``plain`` and ``gpu``, made once; tests copy what they change."""
    directory = tmp_path_factory.mktemp("nemo2")
    checkpoint_samples.make(directory)
    return directory
