"""What can go wrong, in a user's words: one line of cause, one line of remedy."""


class VpmoeError(Exception):
    """A mistake that its reader can mend.

    Args:
        message: Cause first, then the value seen; lower case, no full stop.
        hint: What to do about it, one line; may be empty.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigError(VpmoeError):
    """One or more settings are wrong; every one of them is listed.

    Args:
        problems: (message, hint) pairs, in the order of the file.
    """

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        message, hint = problems[0]
        super().__init__(message, hint=hint)
        self.problems = problems


class DataError(VpmoeError):
    """Rows, shards, vocabularies or target stores are missing, broken or do not fit together."""


class TeacherError(VpmoeError):
    """The teacher cannot be loaded, or what it answered is not what was asked for."""


class CheckpointError(VpmoeError):
    """A checkpoint is missing, unfinished, or belongs to another run or model."""


class RunError(VpmoeError):
    """Training cannot start or go on."""


class UsageError(VpmoeError):
    """The command line itself is wrong."""

    exit_code = 2


class CheckFailedError(VpmoeError):
    """A verification ran to its end and found something wrong."""

    exit_code = 3
