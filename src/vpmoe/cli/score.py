"""`vpmoe score`: a teacher's log-probs of a dataset, on disk."""

from typing import Annotated

import typer

from vpmoe.cli.grammar import ConfigFile, DryRun, Json, Overrides, Overwrite
from vpmoe.cli.render import flat, print_facts, print_json, progress


def score(
    config: ConfigFile,
    overrides: Overrides = None,
    split: Annotated[str, typer.Option("--split", help="train or valid, over the file's.")] = "",
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Keep on disk what a teacher thinks of a dataset's answers.

    An interrupted run goes on where it stopped; nothing is scored twice.
    """
    from vpmoe.config import fingerprint, load, resolved
    from vpmoe.stages.score import ScoreConfig, run

    words = [*(overrides or []), *([f"split={split}"] if split else [])]
    settings = load(config, ScoreConfig, words)
    if dry_run:
        tree = resolved(settings)
        print_facts([*flat(tree), ("fingerprint", fingerprint(tree))])
        return
    with progress("tokens") as tick:
        manifest = run(settings, overwrite=overwrite, progress=tick)
    if as_json:
        print_json(manifest)
        return
    header, scores = manifest["header"], manifest["teacher_logprobs"]
    teacher = header["teacher"]
    effort = header["reasoning_effort"] or "the dataset's"
    facts = [
        ("targets", str(settings.output)),
        ("teacher", f"{teacher['name']}, {teacher['dtype']}, reasoning effort {effort}"),
        ("scored", f"{manifest['samples']:,} samples, {manifest['labels']:,} labels"),
    ]
    for span in ("reasoning", "final"):
        if scores[span]["labels"]:
            low, high = scores[span]["q0.05"], scores[span]["q0.95"]
            text = f"mean log-prob {scores[span]['mean']:.4f}, 5 to 95 %: {low:.4f} to {high:.4f}"
            facts.append((span, text))
    print_facts(facts)
