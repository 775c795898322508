"""`vpmoe targets`: plan a capture, and look into a finished one."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vpmoe.cli.grammar import ConfigFile, Json, Overrides, Verbs
from vpmoe.cli.render import (
    print_facts,
    print_json,
    print_table,
    progress,
    say_checked,
    short,
)

if TYPE_CHECKING:
    from vpmoe.stages.plan_targets import Plan

app = typer.Typer(
    cls=Verbs, rich_markup_mode=None, help="Plan, verify, show and count a teacher's targets."
)

Store = Annotated[Path, typer.Argument(metavar="TARGETS", help="A folder `vpmoe score` wrote.")]
Data = Annotated[Path | None, typer.Option("--data", help="The dataset that was scored.")]


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    tokens: Annotated[float, typer.Option("--tokens", min=1, help="Token budget.")] = 1e9,
    labels: Annotated[int, typer.Option("--labels", min=32, help="Labels to measure.")] = 1_000,
    out: Annotated[Path, typer.Option("--out", help="Folder of the picture.")] = Path("reports"),
    as_json: Json = False,
) -> None:
    """Measure what each codec keeps of the teacher, and what it costs, before anything is captured.

    CONFIG is one of vpmoe score. Error is KL(teacher || rebuilt), what is not named spread over all
    other ids, evenly or by how often they are labels; grad is what the rebuilt distribution changes
    in a cross-entropy's gradient at the logits. Hours are the teacher's on this machine, at the
    speed just measured.
    """
    from vpmoe.config import load
    from vpmoe.stages.plan_targets import plan_targets, write_plan
    from vpmoe.stages.score import ScoreConfig

    found = plan_targets(load(config, ScoreConfig, overrides or []), places=labels)
    picture, numbers = write_plan(found, out)
    if as_json:
        print_json({**found.as_dict(), "picture": str(picture), "numbers": str(numbers)})
        return
    seen = "whole distributions"
    if not found.exact:
        seen = (
            f"its likeliest {found.kept} ids; the rest taken for uniform, so errors are too low, "
            "and those of a tail by a prior are not known"
        )
    hours = tokens / found.tokens_per_s / 3600
    print_facts(
        [
            ("teacher", f"{found.teacher}, mean entropy {found.entropy_nats:.3f} nats"),
            ("measured", f"{found.places:,} labels, {seen}"),
            ("budget", f"{short(tokens)} tokens read, {found.trained_share:.0%} of them targets"),
            (
                "teacher time",
                f"{hours:,.1f} h at {short(found.tokens_per_s)} tokens/s, as measured",
            ),
        ]
    )
    _print_points(found, tokens)
    print_facts(
        [
            (
                "adaptive",
                f"names ids by how often they are labels; that ranking takes "
                f"{found.ranking_bytes:,} bytes in each file, "
                f"{found.ranking_bytes_per_token:.2f} per token when it is full",
            )
        ]
    )
    print_facts([("picture", str(picture)), ("numbers", str(numbers))])


def _print_points(found: "Plan", tokens: float) -> None:
    columns = ("codec", "B/token", "KL nats", "grad", "ids", "TB", "packed/s")
    rows = [
        (
            p.name,
            f"{p.bytes_per_token:.1f}",
            "unbiased" if p.kl_nats is None else f"{p.kl_nats:.5f}",
            f"{p.gradient_error:.5f}",
            f"{p.entries:.1f}",
            f"{found.costs(p, tokens)[0]:.3f}",
            short(p.packed_per_s),
        )
        for p in found.points
    ]
    print_table(columns, rows)


@app.command()
def verify(targets: Store, data: Data = None, as_json: Json = False) -> None:
    """Check every checksum, decode every sample, and compare with the dataset if one is given.

    Masses of at most one, counts as the manifest says, spans and labels as the dataset's. Exits
    with 3 when anything is wrong.
    """
    from vpmoe.stages.inspect_targets import verify_targets

    with progress("samples") as tick:
        report = verify_targets(targets, data, progress=tick)
    say_checked(
        report,
        targets,
        hint="delete the shard named and run vpmoe score again; the others are kept",
        as_json=as_json,
    )
    if not as_json:
        against = f", against {data}" if report.compared else ""
        facts = f"{report.samples:,} samples, {report.labels:,} labels{against}"
        print_facts([("ok", f"{targets} is what its manifest says: {facts}")])


@app.command()
def show(
    targets: Store,
    sample: Annotated[str, typer.Argument(metavar="[SAMPLE]", help="Its id.")] = "",
    data: Data = None,
    choices: Annotated[int, typer.Option("--choices", min=1, help="Named ids of each label.")] = 4,
    as_json: Json = False,
) -> None:
    """Print one sample's labels with the ids that the store names there, the likeliest first."""
    from vpmoe.stages.inspect_targets import shown

    name, labels = shown(targets, sample, data, choices=choices)
    if as_json:
        print_json({"sample": name, "labels": [asdict(label) for label in labels]})
        return
    rows = [
        (
            repr(label.token)[1:-1] or str(label.place),
            label.span,
            f"{label.logprob:.3f}",
            "  ".join(f"{text!r} {share:.3f}" for text, share in label.choices),
            f"{label.tail_mass:.3f}" if label.choices else "",
        )
        for label in labels
    ]
    print_table(("label", "span", "log-prob", "named", "others"), rows, title=name)


@app.command()
def stats(targets: Store, as_json: Json = False) -> None:
    """Count bytes, entries and masses, and give quantiles of the log-probs of each span."""
    from vpmoe.stages.inspect_targets import target_stats

    found = target_stats(targets)
    if as_json:
        print_json(found)
        return
    header = found["header"]
    teacher = header.get("teacher", {})
    settings = header.get("codec", {"kind": "logprob"})
    codec = ", ".join(f"{key} {value}" for key, value in settings.items() if key != "kind")
    on_disk = found["bytes_per_token_on_disk"]
    print_facts(
        [
            ("targets", f"{found['samples']:,} samples in {found['shards']} shards"),
            ("teacher", f"{teacher.get('name')}, {teacher.get('quantization')}"),
            ("codec", f"{settings['kind']} {codec}"),
            (
                "bytes/token",
                f"{found['bytes_per_token']:.2f}, with ids, spans and ranking {on_disk:.2f}",
            ),
        ]
    )
    columns = ("span", "labels", "entries", "others' mass", "mean", "5 %", "50 %", "95 %")
    rows = [
        (
            name,
            f"{span['labels']:,}",
            f"{span['entries']:.2f}",
            f"{span['tail_mass']:.4f}",
            *(f"{span[f'logprob_{key}']:.3f}" for key in ("mean", "q0.05", "q0.5", "q0.95")),
        )
        for name, span in found["spans"].items()
    ]
    print_table(columns, rows)
