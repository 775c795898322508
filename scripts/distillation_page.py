"""The parts of docs/results.md on targets and losses, and their picture."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

METHODS = ("cross_entropy", "confidence", "renormalized", "bucket", "prior", "sampled", "exact")
SOURCES = {
    "confidence": "logprob",
    "renormalized": "top",
    "bucket": "top",
    "prior": "prior",
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
        f"same fresh student and {found['tokens']:,} student tokens for every method, in the same "
        f"order for all that read a store; K = {found['k']} of 91 ids; {len(seeds)} seeds of "
        "weights, order and problems, mean and standard deviation. KL(teacher || student) is exact "
        "over the vocabulary at every trained label of held-out documents.",
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
    lines += [
        "",
        f"{_order(found)} Exact match moves more between seeds than between the methods that see "
        "distributions, and so does KL between neighbors: three seeds do not order those. Beside "
        "a prior the least is kept of this teacher, which is nearly sure: its rare doubts are "
        "worth less than the codec's `worth_nats`, and go into the tail. Bytes are those of the "
        "store's files, sample ids and checksums included, which weigh more on short documents "
        "than on real ones; states were not stored, the teacher ran beside the student.",
    ]
    return "\n".join([*lines, "", *_synth_lines(results)])


def _synth_lines(results: Path) -> list[str]:
    """The same on real rows, if it was run."""
    found = _synth(results)
    if found is None:
        return [
            "Not run: the same on real rows with the whole vocabulary, `python -m "
            "benchmarks.distillation synth OUT --teacher FOLDER` with a teacher from `python -m "
            "benchmarks.codec_teacher OUT --save FOLDER`, which needs one GPU."
        ]
    lines = [
        *("### The same on real rows", ""),
        _synth_said(found, results),
        "",
        "| method | seeds | held-out KL, nats | held-out loss, nats | bytes per label "
        "| training, s |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for method in _methods(found):
        rows = _rows(found, method)
        kl, loss = ([row[name] for row in rows] for name in ("kl_nats", "loss"))
        lines.append(
            f"| {rows[0]['what']} | {len(rows)} | {_spread(kl, 3)} | {_spread(loss, 3)} "
            f"| {_bytes(found, method, found['anchors'].get('state_bytes', 0))} "
            f"| {mean(row['train_s'] for row in rows):.0f} |"
        )
    for name, said in (("untrained", "no training"), ("unigram", "frequencies of the labels")):
        if name in found["anchors"]:
            row = found["anchors"][name]
            lines.append(f"| {said} | | {row['kl_nats']:.3f} | {row['loss']:.3f} | | |")
    lines.append(f"| the teacher itself | | 0 | {found['rows'][0]['teacher_loss']:.3f} | | |")
    return [*lines, "", *_findings(found), *_missing(found)]


def _findings(found: Mapping[str, Any]) -> list[str]:
    """What the table of real rows says, and what it does not."""
    means = {m: mean(row["kl_nats"] for row in _rows(found, m)) for m in _methods(found)}
    ranked = sorted(means, key=lambda method: means[method])
    names = {m: f"{_rows(found, m)[0]['what']} ({means[m]:.2f})" for m in ranked}
    text = _order(found)
    plain = found["anchors"].get("unigram", {}).get("kl_nats")
    if plain is not None:
        above = [method for method in ranked if means[method] > plain]
        ahead = [names[method] for method in ranked if method not in above]
        text += (
            f" Better on average than the frequencies of the labels ({plain:.2f}): "
            f"{_listed(ahead) or 'none'}."
        )
        if len(above) > 1:
            text += (
                f" The other {len(above)} lie above, from {means[above[0]]:.2f} to "
                f"{means[above[-1]]:.2f}; the seeds of one of them are up to "
                f"{max(_width(found, method) for method in above):.2f} apart, so that three seeds "
                "do not order them."
            )
    mass = 100 * found["rows"][0]["teacher_top64_mass"]
    return [
        f"{text} The {found['k']} likeliest ids hold {mass:.0f} % of this teacher's mass: of the "
        f"other {100 - mass:.0f} % a tail bucket says how much it is and not where, renormalised "
        "entries say nothing of it, and labels one id each. The demo's teacher is nearly sure: "
        "there the tail matters little. All students are far from their teacher after so few "
        "tokens.",
        "",
        "Several runs shared the GPU: the seconds compare methods, they are no speed.",
    ]


def _order(found: Mapping[str, Any]) -> str:
    """The methods by their mean KL."""
    means = {m: mean(row["kl_nats"] for row in _rows(found, m)) for m in _methods(found)}
    digits = 2 if max(means.values()) > 1 else 3
    names = [
        f"{_rows(found, m)[0]['what']} ({means[m]:.{digits}f})"
        for m in sorted(means, key=lambda m: means[m])
    ]
    return f"From the lowest mean KL to the highest: {'; '.join(names)}."


def _width(found: Mapping[str, Any], method: str) -> float:
    """How far the best and the worst seed are apart."""
    values = [row["kl_nats"] for row in _rows(found, method)]
    return max(values) - min(values)


def _listed(names: list[str]) -> str:
    """Names as a sentence has them."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def _synth_said(found: Mapping[str, Any], results: Path) -> str:
    """What was run on real rows, and who taught."""
    seeds, row = sorted({row["seed"] for row in found["rows"]}), found["rows"][0]
    read = [row["student_tokens"] for row in found["rows"]]
    text = (
        f"`{found['command']}`, {found['device']}, torch {found['torch']}. The SYNTH sample, all "
        "201,088 ids, the `tiny-real` student in bfloat16, "
        f"{found['tokens']:,} student tokens for every method ({min(read):,} to {max(read):,}); "
        f"K = {found['k']}; {len(seeds)} seeds of weights and order, "
        f"{len(found['rows'])} runs. The teacher"
    )
    about = json.loads((results / "codec-teacher.json").read_text(encoding="utf-8"))
    if abs(about["best"]["loss"] - row["teacher_loss"]) < 1e-3:  # it is this one that is kept
        text += (
            f" has the GPT-OSS architecture and {about['parameters']:,} parameters; it read "
            f"{about['best']['tokens']:,} tokens of the same train split in "
            f"{about['best']['seconds']:.0f} s (`benchmarks/codec_teacher.py`). It"
        )
    text += (
        f" has a loss of {row['teacher_loss']:.3f} nats on the held-out labels and an entropy of "
        f"{row['teacher_entropy_nats']:.3f}; its {found['k']} likeliest ids hold "
        f"{100 * row['teacher_top64_mass']:.0f} % of its mass."
    )
    seen = found["anchors"].get("teacher_on_train_text")
    if seen:
        text += (
            f" On text that it has read, which is what the students train on: loss "
            f"{seen['teacher_loss']:.3f}, entropy {seen['teacher_entropy_nats']:.3f}."
        )
    return text


def _missing(found: Mapping[str, Any]) -> list[str]:
    """Runs that are not in the table."""
    there = {(row["seed"], row["method"]) for row in found["rows"]}
    seeds = sorted({seed for seed, _ in there})
    names = [f"{m} of seed {s}" for s in seeds for m in METHODS if (s, m) not in there]
    return ["", f"Missing: {', '.join(names)}."] if names else []


def _synth(results: Path) -> dict[str, Any] | None:
    path = results / "distillation-synth.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _methods(found: Mapping[str, Any]) -> list[str]:
    """Those that were run, in the tables' order."""
    return [method for method in METHODS if _rows(found, method)]


def _rows(found: Mapping[str, Any], method: str) -> list[dict[str, Any]]:
    return [row for row in found["rows"] if row["method"] == method]


def _spread(values: Sequence[float], digits: int) -> str:
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {_stdev(values):.{digits}f}"


def _stdev(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def _bytes(found: Mapping[str, Any], method: str, state_bytes: int) -> str:
    if method == "exact":
        return f"({state_bytes} if stored)" if state_bytes else "-"
    if method not in SOURCES:
        return "0"
    sizes = [s["bytes_per_label"] for s in found["stores"] if s["codec"] == SOURCES[method]]
    return f"{mean(sizes):.1f}" if sizes else "-"


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


def _mark(ax: Any, value: float, name: str, color: str) -> None:
    """A line through all rows of a panel, and what it is."""
    ax.axvline(value, color=color, linewidth=1, linestyle=":")
    ax.annotate(
        name, (value, 1), xycoords=("data", "axes fraction"), xytext=(-4, -9),
        textcoords="offset points", ha="right", color=color, fontsize=8.5,
    )  # fmt: skip


def draw(results: Path, path: Path) -> None:
    """Write the picture of the experiment."""
    from vpmoe.evals.report.theme import DOTS_PER_INCH, LIGHT, drawing, name_rows, new_figure

    demo = json.loads((results / "distillation-demo.json").read_text(encoding="utf-8"))
    synth = _synth(results)
    panels: list[tuple[str, Mapping[str, Any], Callable[[Any], float]]] = [
        ("demo: KL, nats", demo, lambda row: row["kl_nats"]),
        ("demo: exact match, %", demo, lambda row: 100 * row["exact_match"]["total"]["share"]),
    ]
    if synth is not None:
        panels.append(("real rows: KL, nats", synth, lambda row: row["kl_nats"]))
    names = [(_rows(demo, method)[0]["what"], LIGHT.ink) for method in METHODS]
    with drawing(LIGHT):
        figure, axes = new_figure(1, len(panels), height=3.6)
        for ax, (title, found, value) in zip(axes[0], panels, strict=True):
            name_rows(ax, names, named=ax is axes[0][0])
            for place, method in enumerate(METHODS):
                values = [value(row) for row in _rows(found, method)]
                if not values:
                    continue
                ax.errorbar(
                    mean(values), place, xerr=_stdev(values), fmt="o", color=LIGHT.color(0),
                    markersize=6, linewidth=1.6, capsize=3,
                )  # fmt: skip
                ax.plot(values, [place + 0.22] * len(values), "o", color=LIGHT.muted, markersize=3)
            if found is synth and "unigram" in found["anchors"]:
                _mark(ax, found["anchors"]["unigram"]["kl_nats"], "frequencies", LIGHT.muted)
            ax.set_xlim(left=0)
            ax.grid(visible=True, axis="x")
            ax.grid(visible=False, axis="y")
            ax.set_title(title)
        figure.savefig(path, dpi=DOTS_PER_INCH / 2, format="png")
