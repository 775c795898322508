"""`vpmoe demo`: the whole pipeline, small."""

from pathlib import Path
from typing import Annotated, Any

import typer

from vpmoe.cli.grammar import DryRun, Json, Overwrite, split_words
from vpmoe.cli.render import console, print_facts, print_json, print_table
from vpmoe.errors import UsageError

DEFAULT = Path("configs/demo/demo.toml")


def demo(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="CONFIG|KEY=VALUE", help=f"By default {DEFAULT}."),
    ] = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Distil a teacher into a tiny student, stage by stage, on a laptop.

    A baseline with the same student and as many tokens learns by cross-entropy alone. The table
    says what each stage bought, and whether the pipeline beat the baseline. Called again, it goes
    on where it stopped.
    """
    given = words or []
    if not any(Path(word).suffix in {".toml", ".yaml", ".yml"} for word in given):
        given = [str(DEFAULT), *given]
    files, overrides = split_words(given)
    if len(files) > 1:
        raise UsageError(f"demo takes one config, not {len(files)}")

    from vpmoe.config import load
    from vpmoe.stages.demo import DemoConfig, placed, run
    from vpmoe.train.hooks import ProgressBar

    config = placed(load(files[0], DemoConfig, overrides))
    if dry_run:
        print_facts([("would write", f"{config.run}/"), ("seed", str(config.seed))])
        return
    say = console(stderr=as_json).print
    result = run(config, overwrite=overwrite, say=say, observers=lambda: [ProgressBar()])
    if as_json:
        print_json(result)
        return
    print_table(result["columns"], [_cells(row) for row in result["rows"]])
    say(result["verdict"])
    say(f"report  {result['report']}")


def _cells(row: dict[str, Any]) -> list[str]:
    match, gap, tokens = row["exact_match"], row["reverse_kl_nats"], row["tokens"]
    return [
        row["model"],
        f"{match['share']:.1%} ({100 * match['low']:.0f} to {100 * match['high']:.0f})",
        f"{row['valid_harmony']:.1%}",
        "" if gap is None else f"{gap:.3f}",
        "" if tokens is None else f"{tokens:,}",
    ]
