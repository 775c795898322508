"""`vpmoe demo`: the whole pipeline, small."""

from pathlib import Path
from typing import Annotated

import typer

from vpmoe.cli.grammar import DryRun, Json, Overwrite
from vpmoe.cli.render import console, print_facts, print_json, print_table

Out = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where all of it goes.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of data, weights and samples.")]


def demo(
    out: Out = Path(".demo"),
    seed: Seed = 0,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Distil a teacher into a tiny student, stage by stage, on a laptop.

    A baseline with the same student and as many tokens learns by cross-entropy alone. The table
    says what each stage bought, and whether the pipeline beat the baseline.
    """
    if dry_run:
        print_facts([("would write", f"{out}/"), ("seed", str(seed))])
        return

    from vpmoe.stages.pipeline import run_demo

    say = console(stderr=as_json).print
    result = run_demo(out, seed=seed, overwrite=overwrite, say=say)
    if as_json:
        print_json(result)
        return
    print_table(result["columns"], result["rows"])
    say(result["verdict"])
    say(f"report  {result['report']}")
