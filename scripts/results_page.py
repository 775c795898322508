"""docs/results.md from the files of benchmarks/results: no number in it was typed."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from distillation_page import distillation_text, distillkit_text

STAGES = {
    "teacher": "teacher",
    "baseline": "baseline: cross-entropy alone",
    "1-warm-start": "after stage 1",
    "2-offline": "after stage 2",
    "3-on-policy": "after stage 3",
}


def results_page(results: Path) -> str:
    """The page as Markdown.

    Args:
        results: Folder with `demo-seed-N.json`, `tiny-real-*.json` and `demo-teacher.json`.
    """
    demos = [_read(path) for path in sorted(results.glob("demo-seed-*.json"))]
    real = [_read(path) for path in sorted(results.glob("tiny-real-*.json"))]
    parts = ["# Results", INTRO]
    parts += ["## The demo", _demo_text(demos)] if demos else []
    parts += ["## Real rows", _real_text(real)] if real else []
    parts += ["## Targets and losses", distillation_text(results)]
    parts += ["## Beside DistillKit", distillkit_text(results)]
    parts += ["## The dataset builder", _builder_text(_read(results / "data-build.json"))]
    parts += ["## The demo's teacher", _teacher_text(_read(results / "demo-teacher.json"))]
    return "\n\n".join(parts) + "\n"


INTRO = """What was run, with which commands, on which machine, and what came out. Every figure is
from `benchmarks/results/`, where a command wrote it. What is not here was not run."""


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _demo_text(demos: Sequence[dict[str, Any]]) -> str:
    machine = demos[0]["machine"]
    seeds = ", ".join(str(demo["seed"]) for demo in demos)
    lines = [
        f"`vpmoe demo seed=N run=runs/demo-N`, seeds {seeds}, on {machine['cores']} cores of "
        f"{machine['processor']}, torch {machine['torch']}. Exact match on "
        f"{demos[0]['rows'][0]['exact_match']['count']} held-out problems, greedy, with the Wilson "
        "95 % interval of each seed.",
        "",
        "| model | " + " | ".join(f"seed {demo['seed']}" for demo in demos) + " | mean |",
        "|---|" + "--:|" * (len(demos) + 1),
    ]
    for name, said in STAGES.items():
        rows = [_row(demo, name) for demo in demos]
        cells = [_interval(row["exact_match"]) for row in rows]
        average = mean(row["exact_match"]["share"] for row in rows)
        lines.append(f"| {said} | " + " | ".join(cells) + f" | {average:.1%} |")
    lines += ["", "| model | valid Harmony | KL to the teacher, nats per token | student tokens |"]
    lines.append("|---|--:|--:|--:|")
    for name, said in STAGES.items():
        rows = [_row(demo, name) for demo in demos]
        gaps = [row["reverse_kl_nats"] for row in rows if row["reverse_kl_nats"] is not None]
        tokens = [row["tokens"] for row in rows if row["tokens"]]
        cells = (
            f"{mean(row['valid_harmony'] for row in rows):.1%}",
            f"{mean(gaps):.3f}" if gaps else "",
            f"{mean(tokens):,.0f}" if tokens else "",
        )
        lines.append(f"| {said} | " + " | ".join(cells) + " |")
    ahead = sum(demo["beats_baseline"] for demo in demos)
    apart = sum(demo["intervals_apart"] for demo in demos)
    minutes = ", ".join(f"{demo['machine']['seconds'] / 60:.1f}" for demo in demos)
    lines += [
        "",
        f"The pipeline was ahead of the baseline in {ahead} of {len(demos)} seeds, with intervals "
        f"apart in {apart}. A share of the training traces is wrong (`corpus.flawed_share` in "
        "`configs/demo/demo.toml`), always on the same visible kind of question, so perfect "
        "imitation stops short by about that share. Every model is judged at its last checkpoint, "
        "the baseline too; the teacher's own computing is not counted. Means over the seeds; "
        "minutes per seed: "
        f"{minutes}"
        f"{', other work on the same cores' if machine.get('shared') else ''}.",
    ]
    return "\n".join(lines)


def _row(demo: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in demo["rows"] if row["model"] == name)


def _interval(match: dict[str, float]) -> str:
    return f"{match['share']:.1%} ({match['low']:.1%} to {match['high']:.1%})"


def _real_text(runs: Sequence[dict[str, Any]]) -> str:
    lines = [
        "The 888 rows of the SYNTH sample, the full vocabulary of 201,088 ids, the `tiny-real` "
        "student. Mean loss per held-out token in nats, beside an add-one unigram model of the "
        "train split's labels.",
        "",
        "| where | student tokens | reasoning | unigram | final | unigram | tokens/s |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for run in runs:
        loss, plain = run["heldout"]["loss"], run["heldout"]["unigram_loss"]
        lines.append(
            f"| {run['machine']['device']}, torch {run['machine']['torch']} "
            f"| {run['tokens_seen']:,} | {loss['reasoning']:.3f} | {plain['reasoning']:.3f} "
            f"| {loss['final']:.3f} | {plain['final']:.3f} | {run['tokens_per_s']:,.0f} |"
        )
    for run in runs:
        lines += ["", f"{run['machine']['device']}:", "", "```bash", *run["commands"], "```"]
    return "\n".join(lines)


def _builder_text(run: dict[str, Any]) -> str:
    speed = run["million_tokens_per_cpu_s"]
    return (
        f"`python benchmarks/data_build.py SAMPLE.parquet`, one core of {run['cpu']}: the sample "
        f"repeated to {run['rows']:,} rows with distinct ids, median of "
        f"{len(run['runs']['builder'])} runs, CPU seconds with start-up. The whole builder: "
        f"{speed['builder']:.2f} M tokens/s in {run['builder_peak_mib']:.0f} MiB; openai-harmony, "
        f"rendering alone: {speed['harmony']:.2f}; "
        f"tiktoken, encoding alone: {speed['tiktoken']:.2f}."
    )


def _teacher_text(teacher: dict[str, Any]) -> str:
    match = teacher["held_out_exact_match"]
    families = ", ".join(f"{k} {v:.1%}" for k, v in match.items() if k != "total")
    return (
        f"`scripts/make_teacher_table.py`, then `scripts/train_demo_teacher.py` on one "
        f"{teacher['device']}, torch {teacher['torch']}: {teacher['parameters']:,} parameters, "
        f"{teacher['tokens']:,} tokens in {teacher['seconds']:.0f} s. Exact match on "
        f"{teacher['problems_per_family']} held-out problems of each family, greedy: "
        f"{match['total']:.1%} ({families})."
    )
