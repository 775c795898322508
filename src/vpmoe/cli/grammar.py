"""The one grammar of all verbs: files first, then `key=value`, options anywhere."""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from vpmoe.errors import UsageError

_OVERRIDE = re.compile(r"[A-Za-z_][\w.-]*=")

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A .toml or .yaml file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings that win over the file's."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is already there.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")]


class Verbs(TyperGroup):
    """A group of commands that answers an unknown name with the nearest known one."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that `args` starts with.

        Raises:
            UsageError: If there is none of that name.
        """
        name = args[0]
        if name.startswith("-") or self.get_command(ctx, name):
            return super().resolve_command(ctx, args)
        near = difflib.get_close_matches(name, self.commands, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"commands: {', '.join(self.commands)}"
        raise UsageError(f"{ctx.command_path} has no command {name!r}", hint=hint)


def split_words(words: list[str]) -> tuple[list[Path], list[str]]:
    """Files and overrides of a verb that takes several files.

    A word is an override when it looks like `key=value`; a file of such a name is written `./a=b`.

    Raises:
        UsageError: If a file follows an override, or no file is given.
    """
    files: list[Path] = []
    overrides: list[str] = []
    for word in words:
        if _OVERRIDE.match(word):
            overrides.append(word)
        elif overrides:
            raise UsageError(
                f"{word!r} stands after {overrides[-1]!r}",
                hint="files come first, key=value overrides after them",
            )
        else:
            files.append(Path(word))
    if not files:
        raise UsageError("no config file given", hint="e.g. configs/models/tiny.toml")
    return files, overrides
