"""`vpmoe eval`: what a student can do."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from vpmoe.cli.grammar import DryRun, Json, Overrides
from vpmoe.cli.render import print_facts, print_json, print_table

Checkpoint = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or a run for its newest one.")
]
Suite = Annotated[
    Path | None, typer.Option("--suite", metavar="CONFIG", help="What to measure, as a file.")
]


def evaluate(
    checkpoint: Checkpoint,
    overrides: Overrides = None,
    suite: Suite = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Measure loss, form, right answers and lengths of a checkpoint.

    What to measure comes from --suite and KEY=VALUE, as in data=data/synth-kd-v1 documents=64;
    without a dataset or problems, it is the dataset that the run was trained on. The report is
    kept in the run's folder, where `vpmoe report` finds it. Same checkpoint, same numbers.
    """
    from vpmoe.cli.sizing import facts
    from vpmoe.config import apply_overrides, read_tree, validate
    from vpmoe.evals.checkpoint import evaluate_checkpoint
    from vpmoe.evals.noise import read_noise
    from vpmoe.evals.suite import EvalConfig
    from vpmoe.storage.runs import read_config

    tree = apply_overrides(read_tree(suite) if suite else {}, overrides or [])
    if not tree.get("data") and not tree.get("problems"):
        tree["data"] = _own_data(checkpoint)
    config = validate(EvalConfig, tree, source=str(suite or "eval"))
    if dry_run:
        print_facts([("model", str(checkpoint)), *facts(config)])
        return
    report, path = evaluate_checkpoint(checkpoint, config)
    found = report.as_dict()
    if as_json:
        print_json(found)
        return
    _print_losses(found.get("heldout", {}))
    noise = read_noise(path.parent, read_config(path.parent) or {})
    floor = noise.of("k3") if noise else None
    print_facts([*_facts(found, floor), ("data", config.data or "none"), ("report", str(path))])


def _own_data(checkpoint: Path) -> str:
    from vpmoe.storage.runs import read_config

    config = read_config(checkpoint) or read_config(checkpoint.parent) or {}
    return str(config.get("data", ""))


def _print_losses(heldout: Mapping[str, Any]) -> None:
    if not heldout:
        return
    measures = ["loss", "content_loss", "unigram_loss", "unigram_content_loss"]
    measures = [name for name in measures if heldout.get(name)]
    rows = [
        [span, f"{tokens:,}", *(f"{heldout[name][span]:.4f}" for name in measures)]
        for span, tokens in heldout["token_counts"].items()
        if tokens
    ]
    names = [name.removesuffix("_loss").replace("_", " ") for name in measures]
    print_table(["nats/token", "tokens", *names], rows)


def _facts(found: Mapping[str, Any], floor: float | None) -> list[tuple[str, str]]:
    model = found["model"]
    facts = [("model", ", ".join(f"{key} {value}" for key, value in model.items()))]
    if "exact_match" in found:
        match = found["exact_match"]
        families = ", ".join(f"{k} {_percent(v)}" for k, v in match["families"].items())
        facts.append(("exact match", f"{_interval(match['total'])}: {families}"))
    if "format" in found:
        broken = {k: n for k, n in found["format"]["failures"].items() if n}
        said = ", ".join(f"{name} {count}" for name, count in broken.items())
        facts.append(("well-formed", _interval(found["format"]["valid"]) + (said and f": {said}")))
    if "lengths" in found:
        lengths = found["lengths"]
        means = (f"{name} {lengths[name]['mean']:.0f}" for name in ("reasoning", "final"))
        cut = _percent(lengths["truncated"])
        facts.append(("mean tokens", f"{', '.join(means)}; {cut} reached the cap"))
    if "teacher_gap" in found:
        gap = found["teacher_gap"]
        k3, tokens = gap["k3"]["all"], gap["token_counts"]["all"]
        noise = "" if floor is None else f", noise floor {floor:.1e}"
        facts.append(
            ("reverse KL", f"{k3:.4f} nats per token to the teacher, {tokens:,} tokens{noise}")
        )
    return facts


def _percent(share: Mapping[str, Any]) -> str:
    return f"{100 * share['share']:.1f} %"


def _interval(share: Mapping[str, Any]) -> str:
    low, high = 100 * share["low"], 100 * share["high"]
    return f"{_percent(share)} of {share['count']} (95 % interval {low:.1f} to {high:.1f})"
