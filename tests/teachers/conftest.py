"""One tiny teacher for the whole room."""

import pytest

from tests.teachers.tiny import write_teacher


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory) -> str:
    """A checkpoint on a vocabulary subset."""
    return write_teacher(tmp_path_factory.mktemp("teacher") / "tiny-teacher")
