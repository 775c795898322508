"""`vpmoe report`: runs on one page."""

from pathlib import Path
from typing import Annotated

import typer

from vpmoe.cli.grammar import DryRun, Json, Overwrite
from vpmoe.cli.render import print_facts, print_json
from vpmoe.errors import RunError


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run folders, in order.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the page.")] = Path("reports"),
    title: Annotated[str, typer.Option("--title", help="Heading of the page.")] = "",
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Draw runs on one self-contained HTML page.

    Its charts are kept as PNG files too. Several runs are compared side by side: the stages of a
    pipeline, or a run and its baseline.
    """
    page = out / "index.html"
    if page.exists() and not overwrite:
        raise RunError(f"{page} is already there", hint="add --overwrite, or choose another --out")
    if dry_run:
        print_facts([("would write", str(page)), ("from", ", ".join(map(str, runs)))])
        return

    from vpmoe.evals.report import write_report

    files = write_report(runs, out, title=title)
    if as_json:
        print_json({"page": str(files.page), "images": [str(image) for image in files.images]})
    else:
        print_facts([("page", str(files.page)), ("charts", f"{len(files.images)} PNG files")])
