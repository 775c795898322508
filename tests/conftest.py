"""Fixtures every room shares."""

import os
from pathlib import Path

import pytest

from tests import shapes

shapes.install()

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with the real SYNTH sample, the vocabulary file and the evaluation sets."""
    folder = Path(os.environ.get("VPMOE_SHARED", REPOSITORY.parent / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set VPMOE_SHARED to the folder that holds data/")
    return folder
