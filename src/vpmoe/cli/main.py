"""The verbs; nothing heavy is imported before a verb runs."""

import contextlib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from vpmoe import __version__
from vpmoe.cli import (
    chat,
    check,
    count,
    data,
    demo,
    evaluate,
    export,
    profile,
    report,
    score,
    targets,
    teacher,
    train,
)
from vpmoe.cli.complaints import complain
from vpmoe.cli.grammar import Verbs

HELP = """Distil a large open reasoning model into a small mixture-of-experts student.

A config file comes first, overrides after it, spelled as in the file:

\b
  vpmoe check configs/stages/1-warm-start.toml
  vpmoe train configs/stages/1-warm-start.toml optimizer.lr=2e-3
"""

# megatron-core and torch speak, at every start, of parts that we do not use.
NOISE = (
    "Transformer Engine and Apex are not installed",
    "full scope is deprecated",
    "torch.distributed is disabled",
)
ORDER = [
    "check",
    "count",
    "data",
    "teacher",
    "score",
    "targets",
    "train",
    "profile",
    "eval",
    "export",
    "chat",
    "report",
    "demo",
]


class _InOrder(Verbs):
    def list_commands(self, ctx: Any) -> list[str]:  # typer would put groups last
        del ctx
        return ORDER


app = typer.Typer(
    cls=_InOrder,
    help=HELP,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: half the start-up time, and docs/cli.md is the same text
)


@app.callback()
def vpmoe(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> int:
    """The verbs of vpmoe."""
    del debug  # taken off the command line before it gets here, so that it may stand anywhere
    if version:
        sys.stdout.write(f"vpmoe {__version__}\n")
    elif context.invoked_subcommand is None:
        sys.stdout.write(context.get_help() + "\n")
        return 2
    return 0


for name, verb in {
    "check": check.check,
    "count": count.count,
    "score": score.score,
    "train": train.train,
    "eval": evaluate.evaluate,
    "export": export.export,
    "chat": chat.chat,
    "report": report.report,
    "profile": profile.profile,
    "demo": demo.demo,
}.items():
    app.command(name)(verb)
app.add_typer(data.app, name="data")
app.add_typer(targets.app, name="targets")
app.add_typer(teacher.app, name="teacher")


def run(arguments: Sequence[str]) -> int:
    """The exit code of one command line; errors are said on stderr, never raised.

    0 success, 1 a user's mistake, 2 wrong usage, 3 a failed check, 130 interrupted.
    """
    debug = "--debug" in arguments
    words = [word for word in arguments if word != "--debug"]
    for said in NOISE:
        warnings.filterwarnings("ignore", message=said)
    try:
        code = typer.main.get_command(app).main(words, prog_name="vpmoe", standalone_mode=False)
    except Exception as error:
        if debug:
            raise
        return complain(error)
    if code == 130:
        sys.stderr.write("interrupted\n")
    return code if isinstance(code, int) else 0


def entry() -> None:
    """Run the command line of this process and exit with its code."""
    code = 1
    with contextlib.suppress(KeyboardInterrupt):
        code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has left, as `head` does; Python's own flush would moan
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
