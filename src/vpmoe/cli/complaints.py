"""How errors are said: `error:` with the cause, `hint:` with the remedy, on stderr."""

import errno
import os
import sys

from vpmoe.errors import ConfigError, VpmoeError

_OS_HINTS = {
    errno.ENOSPC: "free some space, or write somewhere else",
    errno.EDQUOT: "free some space, or write somewhere else",
    errno.EACCES: "check the permissions of that path",
    errno.EPERM: "check the permissions of that path",
    errno.EROFS: "write somewhere else: that file system is read-only",
    errno.ENOENT: "check the path",
    errno.EISDIR: "give a file, not a folder",
    errno.ENOTDIR: "give a folder, not a file",
}


def complain(error: Exception) -> int:
    """Say on stderr what went wrong and what to do; the value is the exit code."""
    problems, code = _problems(error)
    for message, hint in problems:
        _say("error", message, color=31)
        if hint:
            _say("hint", hint, color=36)
    return code


def _problems(error: Exception) -> tuple[list[tuple[str, str]], int]:
    if isinstance(error, ConfigError):
        return error.problems, error.exit_code
    if isinstance(error, VpmoeError):
        return [(error.message, error.hint)], error.exit_code
    if hasattr(error, "format_message"):  # every complaint of typer's parser
        return [_usage(error)], 2
    if isinstance(error, OSError) and error.errno:
        what = f"{error.filename}: " if error.filename else ""
        said = (error.strerror or os.strerror(error.errno)).lower()
        return [(f"{what}{said}", _OS_HINTS.get(error.errno, ""))], 1
    name = type(error).__name__
    if name == "OutOfMemoryError" or isinstance(error, MemoryError):
        said = " ".join(str(error).split()) or "out of memory"
        return [(said[0].lower() + said[1:], "lower the micro batch size or the length")], 1
    said = " ".join(str(error).split())[:300]
    return [(f"vpmoe itself failed: {name}: {said}", "add --debug to see where")], 1


def _usage(error: Exception) -> tuple[str, str]:
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "vpmoe"
    option = getattr(error, "option_name", None)
    near = getattr(error, "possibilities", None)
    if option and near is not None:
        hint = f"did you mean {near[0]}?" if near else f"see: {command} --help"
        return f"{command} has no option {option}", hint
    parameter = getattr(error, "param", None)
    if type(error).__name__ == "MissingParameter" and parameter and context:
        name = (parameter.metavar or parameter.name).upper()
        usage = context.command.get_usage(context).replace("Usage:", "usage:", 1)
        return f"{command} needs {name}", " ".join(usage.split())
    full = str(getattr(error, "format_message", str)())
    said = " ".join(full.split()).rstrip(".") or "wrong usage"
    known = getattr(context.command, "commands", None) if context else None
    hint = f"commands: {', '.join(known)}" if known else f"see: {command} --help"
    return said[0].lower() + said[1:], hint


def _say(word: str, text: str, *, color: int) -> None:
    colored = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    label = f"\033[1;{color}m{word}:\033[0m" if colored else f"{word}:"
    sys.stderr.write(f"{label} {text}\n")
