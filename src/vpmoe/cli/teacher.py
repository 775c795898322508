"""`vpmoe teacher`: what a teacher is worth before it is paid for."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from vpmoe.cli.grammar import ConfigFile, Json, Overrides, Overwrite, Verbs
from vpmoe.cli.render import console, print_facts, print_json, print_table
from vpmoe.errors import CheckFailedError, RunError

app = typer.Typer(cls=Verbs, rich_markup_mode=None, help="Examine a teacher before using it.")

_COLORS = {"ok": "green", "failed": "bold red", "skipped": "dim"}


@app.command()
def doctor(
    config: ConfigFile,
    overrides: Overrides = None,
    sequences: Annotated[
        int, typer.Option("--sequences", min=8, help="Conversations that are asked about.")
    ] = 64,
    tolerance: Annotated[
        float, typer.Option("--tolerance", min=0.0, help="Nats per token between two ways.")
    ] = 0.03,
    as_json: Json = False,
) -> None:
    """Look for what makes a teacher's answers silently wrong, and name it.

    CONFIG is one of vpmoe score or of stage 3, or a teacher's own table. Shifted or stale answers,
    order, other prompts or efforts than the student's, vocabulary, temperature, truncated lists;
    with teacher.reference, the same model in this process, also weights and precision. Exits with
    3 when anything is wrong.
    """
    from vpmoe.cli.kinds import load_any
    from vpmoe.stages.examine_teacher import examine_subject, subject_of

    subject = subject_of(load_any(config, overrides or []), sequences=sequences)
    findings = examine_subject(subject, tolerance_nats=tolerance)
    failed = [finding.check for finding in findings if finding.state == "failed"]
    if as_json:
        print_json({"ok": not failed, "findings": [asdict(finding) for finding in findings]})
    else:
        _print_findings(findings)
    if failed:
        raise CheckFailedError(
            f"{config}: {len(failed)} of {len(findings)} checks failed: {', '.join(failed)}",
            hint="mend the teacher before it is asked for more; docs/teachers.md explains each",
        )
    if not as_json:
        print_facts([("ok", f"{subject.config.kind} teacher, {len(subject.documents)} sequences")])


@app.command()
def noise(
    config: ConfigFile,
    overrides: Overrides = None,
    sequences: Annotated[
        int, typer.Option("--sequences", min=1, help="Conversations that are measured on.")
    ] = 16,
    out: Annotated[
        Path | None, typer.Option("--out", help="File to write, over the usual place.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Measure what a KL is when student and teacher are the same.

    The floor of every divergence by every path: states, codecs of the target store, a server, in
    float32 and bfloat16. It is kept in noise.json beside the targets or the run, where `vpmoe
    report` and `vpmoe eval` find it.
    """
    from vpmoe.cli.kinds import load_any
    from vpmoe.stages.examine_teacher import subject_of
    from vpmoe.stages.noise import measure_noise, noise_path, write_noise

    settings = load_any(config, overrides or [])
    path = out or noise_path(settings)
    if path.exists() and not overwrite:
        raise RunError(f"{path} is already there", hint="add --overwrite, or choose another --out")
    found = measure_noise(subject_of(settings, sequences=sequences))
    write_noise(found, path)
    if as_json:
        print_json(found)
        return
    dtypes = list(dict.fromkeys(floor["dtype"] for floor in found["floors"]))
    rows: dict[tuple[str, str], list[str]] = {}
    for floor in found["floors"]:
        rows.setdefault((floor["path"], floor["loss"]), []).append(f"{floor['nats']:.1e}")
    cells = [[f"{loss}, {by}", *values] for (by, loss), values in sorted(rows.items())]
    print_table(["nats/token", *dtypes], cells)
    print_facts([("labels", f"{found['labels']:,}"), ("noise", str(path))])


def _print_findings(findings: list) -> None:
    from rich.text import Text

    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        line = Text(f"{finding.check:<{width}}  ", style="bold cyan")
        line += Text(f"{finding.state:<7}  ", style=_COLORS[finding.state])
        console().print(line + Text(finding.detail, style="default"))
