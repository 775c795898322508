"""`vpmoe check`: validate, resolve and size up configs before anything is spent."""

from typing import Annotated

import typer

from vpmoe.cli.grammar import Json, split_words
from vpmoe.cli.render import print_facts, print_heading, print_json
from vpmoe.errors import ConfigError


def check(
    words: Annotated[
        list[str],
        typer.Argument(metavar="CONFIG|KEY=VALUE", help="Config files, then overrides."),
    ],
    as_json: Json = False,
) -> None:
    """Validate configs, resolve them, count, estimate; touches no GPU.

    Every problem of every file is listed. The fingerprint is what a run of this config carries.
    """
    files, overrides = split_words(words)

    from vpmoe.cli.kinds import load_any
    from vpmoe.cli.sizing import facts
    from vpmoe.config import fingerprint, resolved

    configs, problems = [], []
    for file in files:
        try:
            configs.append((file, load_any(file, overrides)))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    said = []
    for index, (file, config) in enumerate(configs):
        screen = [*facts(config), ("ok", f"fingerprint {fingerprint(resolved(config))}")]
        if as_json:
            said.append({"file": str(file), "config": resolved(config), **dict(screen)})
            continue
        if len(configs) > 1:
            print_heading(str(file), first=index == 0)
        print_facts(screen)
    if as_json:
        print_json(said)
