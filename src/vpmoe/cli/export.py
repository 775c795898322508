"""`vpmoe export`: a checkpoint for others to load."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from vpmoe.cli.evaluate import Checkpoint
from vpmoe.cli.grammar import DryRun, Json, Overwrite
from vpmoe.cli.render import flat, gib, print_facts, print_json

Format = Annotated[Literal["hf"], typer.Option("--to", help="hf: a transformers checkpoint.")]
Out = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Folder to make.")]


def export(
    checkpoint: Checkpoint,
    out: Out,
    to: Format = "hf",
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Write a checkpoint as weights, config, tokenizer and model card.

    The logits of the export are compared with the checkpoint's before the folder gets its name.
    """
    from vpmoe.export.hf import export_hf, require_absent

    require_absent(out, overwrite=overwrite)
    if dry_run:
        print_facts([("would write", str(out)), ("from", str(checkpoint)), ("format", to)])
        return
    result = export_hf(checkpoint, out, overwrite=overwrite)
    if as_json:
        print_json(result.manifest)
        return
    files = result.manifest["files"]
    size = sum(entry["bytes"] for entry in files.values())
    parity = flat({"parity": result.manifest["parity"]})
    print_facts([("export", str(result.path)), *parity, ("files", f"{len(files)}, {gib(size)}")])
