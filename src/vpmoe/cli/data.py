"""`vpmoe data`: build, show and verify datasets."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from vpmoe.cli.grammar import ConfigFile, DryRun, Json, Overrides, Overwrite, Verbs
from vpmoe.cli.render import console, flat, print_facts, print_json, progress, say_checked

app = typer.Typer(cls=Verbs, rich_markup_mode=None, help="Build, show and verify datasets.")

Split = Annotated[Literal["train", "valid"], typer.Option("--split", help="Which part.")]
DatasetFolder = Annotated[Path, typer.Argument(metavar="DATASET", help="A folder `build` made.")]


@app.command()
def build(
    config: ConfigFile,
    overrides: Overrides = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Turn SYNTH rows into tokens, spans and a manifest.

    An interrupted build goes on at its last finished shard; a finished one is refused
    without --overwrite.
    """
    from vpmoe.cli.sizing import dataset_facts
    from vpmoe.config import fingerprint, load, resolved
    from vpmoe.data.build import DataConfig, build_dataset

    settings = load(config, DataConfig, overrides or [])
    if dry_run:
        tree = resolved(settings)
        print_facts([*flat(tree), ("fingerprint", fingerprint(tree))])
        return
    with progress("rows") as tick:
        manifest = build_dataset(settings, overwrite=overwrite, progress=tick)
    if as_json:
        print_json(manifest)
    else:
        print_facts([("dataset", str(settings.output)), *dataset_facts(manifest)])


@app.command()
def show(
    dataset: DatasetFolder,
    example: Annotated[int, typer.Option("--example", help="Which conversation, from 0.")] = 0,
    split: Split = "train",
) -> None:
    """Print one conversation in color, with its masks and counts.

    DATASET may name a split too, as in data/synth-kd-v1/valid.
    """
    from vpmoe.data.dataset import Dataset
    from vpmoe.data.show import Example
    from vpmoe.data.split import SPLITS

    for name in SPLITS:
        if dataset.name == name:
            dataset, split = dataset.parent, name
    console().print(Example(Dataset(dataset, split), example))


@app.command()
def verify(dataset: DatasetFolder, as_json: Json = False) -> None:
    """Check every byte of a dataset against its manifest.

    Hashes, alignment, masks, spans, structure of the tokens, counts. Exits with 3 when anything is
    wrong.
    """
    from vpmoe.data.verify import verify_dataset

    with progress("sequences") as tick:
        report = verify_dataset(dataset, progress=tick)
    say_checked(
        report,
        dataset,
        hint="rebuild it with: vpmoe data build CONFIG --overwrite",
        as_json=as_json,
    )
    if not as_json:
        counts = {"rows": report.rows, "tokens": report.tokens, "files": report.files}
        print_facts([*flat(counts), ("ok", f"{dataset} is what its manifest says")])
