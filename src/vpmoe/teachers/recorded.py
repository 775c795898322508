"""What a teacher once said about a dataset, read back from a target store."""

from pathlib import Path
from typing import ClassVar, Literal

from vpmoe.config import Config
from vpmoe.teachers.base import TEACHER_LOGPROBS
from vpmoe.teachers.store import TargetStore


class RecordedTeacherConfig(Config):
    """Log-probs that `vpmoe score` wrote; they speak of their dataset, and of no new text."""

    kind: Literal["recorded"] = "recorded"
    path: Path
    """Folder of a finished target store."""

    provides: ClassVar[frozenset[str]] = frozenset({TEACHER_LOGPROBS})

    def build(self) -> TargetStore:
        """The store, with every checksum verified.

        Raises:
            DataError: If it is missing, unfinished or damaged.
        """
        return TargetStore(self.path)
