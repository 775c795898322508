"""`vpmoe train`: run one stage."""

from typing import Annotated

import typer

from vpmoe.cli.grammar import ConfigFile, DryRun, Overrides

RunName = Annotated[
    str, typer.Option("--run", metavar="NAME", help="Run folder under runs/, or a path.")
]


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    run: RunName = "",
    resume: Annotated[bool, typer.Option("--resume", help="Go on at the last checkpoint.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Train a student by one stage: warm_start, offline or on_policy.

    The run folder is named after the config unless --run says otherwise. --resume refuses a
    config that has changed, and shows the difference.
    """
