"""Models that tell how likely they find given tokens; `TeacherConfig` is the list of them."""

from typing import Annotated

from pydantic import Field

from vpmoe.teachers.local import LocalTeacherConfig
from vpmoe.teachers.recorded import RecordedTeacherConfig

TeacherConfig = Annotated[LocalTeacherConfig | RecordedTeacherConfig, Field(discriminator="kind")]
