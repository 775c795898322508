"""The parts of docs/results.md on targets and losses, and their picture."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

METHODS = ("cross_entropy", "confidence", "renormalized", "bucket", "sampled", "exact")
SOURCES = {
    "confidence": "logprob",
    "renormalized": "top",
    "bucket": "top",
    "sampled": "sampled",
}
PICTURE = "distillation.png"


def distillation_text(results: Path) -> str:
    """Stage 2 by every kind of target, as Markdown."""
    found = json.loads((results / "distillation-demo.json").read_text(encoding="utf-8"))
    seeds = sorted({row["seed"] for row in found["rows"]})
    state_bytes = 4 * 64  # float32 states of the demo's teacher, 64 wide, if one stored them
    lines = [
        f"`{found['command']}`, {found['cores']} cores of {found['device']}, torch "
        f"{found['torch']}. The demo's flawed traces and its GPT-OSS-architecture teacher; the "
        f"same fresh student, the same order of documents and {found['tokens']:,} student tokens "
        f"for every method; K = {found['k']} of 91 ids; {len(seeds)} seeds of weights, order and "
        "problems, mean and standard deviation. KL(teacher || student) is exact over the "
        "vocabulary at every trained label of held-out documents.",
        "",
        f"![Held-out KL and exact match of each method]({PICTURE})",
        "",
        "| method | held-out KL, nats | exact match | bytes per label | training, s |",
        "|---|--:|--:|--:|--:|",
    ]
    for method in METHODS:
        rows = _rows(found, method)
        kl = [row["kl_nats"] for row in rows]
        match = [row["exact_match"]["total"]["share"] for row in rows]
        lines.append(
            f"| {rows[0]['what']} | {_spread(kl, 3)} | {100 * mean(match):.1f} ± "
            f"{100 * stdev(match):.1f} % | {_bytes(found, method, state_bytes)} "
            f"| {mean(row['train_s'] for row in rows):.0f} |"
        )
    best = min(METHODS, key=lambda m: mean(row["kl_nats"] for row in _rows(found, m)))
    lines += [
        "",
        f"Lowest mean KL: {_rows(found, best)[0]['what']}. Distributions beat single "
        "log-probabilities by far in KL; renormalising the entries gives much of it away. Exact "
        "match moves more between seeds than between the methods that see distributions: three "
        "seeds do not order those. Bytes are those of the store's files, sample ids and checksums "
        "included, which weigh more on short documents than on real ones; states were not stored, "
        "the teacher ran beside the student.",
        "",
        "Not run: the same on real rows with the whole vocabulary, `python -m "
        "benchmarks.distillation synth OUT --teacher FOLDER` with a teacher from `python -m "
        "benchmarks.codec_teacher OUT --save FOLDER`, which needs one GPU.",
    ]
    return "\n".join(lines)


def _rows(found: Mapping[str, Any], method: str) -> list[dict[str, Any]]:
    return [row for row in found["rows"] if row["method"] == method]


def _spread(values: Sequence[float], digits: int) -> str:
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def _bytes(found: Mapping[str, Any], method: str, state_bytes: int) -> str:
    if method == "exact":
        return f"({state_bytes} if stored)"
    if method not in SOURCES:
        return "0"
    sizes = [s["bytes_per_label"] for s in found["stores"] if s["codec"] == SOURCES[method]]
    return f"{mean(sizes):.1f}"


def distillkit_text(results: Path) -> str:
    """Side by side with DistillKit, as Markdown."""
    found = json.loads((results / "distillkit.json").read_text(encoding="utf-8"))
    shapes = list(dict.fromkeys(row["teacher"] for row in found["codecs"]))
    codecs = list(dict.fromkeys(row["codec"] for row in found["codecs"]))
    by_codec = {(row["codec"], row["teacher"]): row for row in found["codecs"]}
    lines = [
        "`python -m benchmarks.distillkit CHECKOUT`, its own code at commit "
        f"`{found['distillkit_commit'][:10]}`, one CPU thread, torch {found['torch']}. "
        f"{found['positions']} positions of each of four synthetic teachers, {found['vocab']:,} "
        "ids. Bytes per token, and KL(teacher || rebuilt) in nats with the mass outside the "
        "entries spread evenly.",
        "",
        "| codec | " + " | ".join(f"{shape}: bytes | KL" for shape in shapes) + " |",
        "|---|" + "--:|--:|" * len(shapes),
    ]
    for codec in codecs:
        cells = [
            f"{by_codec[codec, shape]['bytes']:.0f} | {by_codec[codec, shape]['kl_nats']:.4f}"
            for shape in shapes
        ]
        lines.append(f"| {codec} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Losses on the same 128 exact entries, against a student with another tail: relative error "
        "of the gradient by the logits, beside the exact divergence over the vocabulary.",
        "",
        "| loss | T | " + " | ".join(shapes) + " |",
        "|---|--:|" + "--:|" * len(shapes),
    ]
    by_loss = {(r["loss"], r["temperature"], r["teacher"]): r for r in found["losses"]}
    for loss, temperature in dict.fromkeys((r["loss"], r["temperature"]) for r in found["losses"]):
        cells = [f"{by_loss[loss, temperature, s]['gradient_error']:.1e}" for s in shapes]
        lines.append(f"| {loss} | {temperature:.0f} | " + " | ".join(cells) + " |")
    gap = max(
        abs(
            by_loss["forward KL, bucket", 1.0, s]["value"]
            / by_loss["DistillKit, symmetric_uniform", 1.0, s]["value"]
            - 1
        )
        for s in shapes
    )
    lines += [
        "",
        f"At temperature 1 our bucket and its `symmetric_uniform` are the same function (values "
        f"within {gap:.0e}). At temperature 2 the mass outside the entries has to be counted as "
        "many ids, not as one: its gradient is then several times the exact one, ours is short of "
        "it, as the tail's own shape is unknown to both.",
    ]
    return "\n".join(lines)


def draw(results: Path, path: Path) -> None:
    """Write the picture of the experiment."""
    from vpmoe.evals.report.theme import DOTS_PER_INCH, LIGHT, drawing, name_rows, new_figure

    found = json.loads((results / "distillation-demo.json").read_text(encoding="utf-8"))
    with drawing(LIGHT):
        figure, axes = new_figure(1, 2, height=3.6)
        measures = (
            ("held-out KL(teacher || student), nats", lambda row: row["kl_nats"]),
            ("exact match, %", lambda row: 100 * row["exact_match"]["total"]["share"]),
        )
        for ax, (title, value) in zip(axes[0], measures, strict=True):
            names = [(_rows(found, m)[0]["what"], LIGHT.ink) for m in METHODS]
            name_rows(ax, names, named=ax is axes[0][0])
            for place, method in enumerate(METHODS):
                values = [value(row) for row in _rows(found, method)]
                ax.errorbar(
                    mean(values), place, xerr=stdev(values), fmt="o", color=LIGHT.color(0),
                    markersize=6, linewidth=1.6, capsize=3,
                )  # fmt: skip
                ax.plot(values, [place + 0.22] * len(values), "o", color=LIGHT.muted, markersize=3)
            ax.set_xlim(left=0)
            ax.grid(visible=True, axis="x")
            ax.grid(visible=False, axis="y")
            ax.set_title(title)
        figure.savefig(path, dpi=DOTS_PER_INCH / 2, format="png")
