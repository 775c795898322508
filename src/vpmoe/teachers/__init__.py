"""Models that tell how likely they find given tokens; `TeacherConfig` is the list of them."""

from typing import Annotated

from pydantic import Field

from vpmoe.teachers.local import LocalTeacherConfig
from vpmoe.teachers.recorded import RecordedTeacherConfig
from vpmoe.teachers.server import ServerTeacherConfig

TeacherConfig = Annotated[
    LocalTeacherConfig | RecordedTeacherConfig | ServerTeacherConfig, Field(discriminator="kind")
]
