"""Write docs/full-student.md and its picture from runs of the whole student, or check the page.

python scripts/full_student.py                              write the page and the picture
python scripts/full_student.py --check                      exit 1 if the page is stale
python scripts/full_student.py --collect NAME=FOLDER... --device NAME
                                                            keep what is shown of these runs (names
                                                            of RUNS); the others stay as they are
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "full-student.json"
RATES = REPOSITORY / "benchmarks" / "results" / "rates.json"
PAGE = REPOSITORY / "docs" / "full-student.md"
PICTURE = REPOSITORY / "docs" / "full-student.png"
RUNS = (
    "long",
    *("fused", "control"),  # at the rates of the config
    *("gentle_fused", "gentle_control", "gentle_reference", "gentle_reference_again"),
)
# What is compared -> the two runs; the first pair is what the tolerance is about, the third what
# it is measured by.
PAIRS = {
    "fused, reference": ("gentle_fused", "gentle_reference"),
    "control, reference": ("gentle_control", "gentle_reference"),
    "fused, control": ("gentle_fused", "gentle_control"),
    "fused, control; the config's rates": ("fused", "control"),
}
ASKED, MEASURE = "fused, reference", "fused, control"
STATED = 25  # steps that the reference had made when the tolerance was stated
FIXED_PCT = 5.0  # a tolerance that would not depend on a control, for comparison
EXPERTS = 79 * 256  # the first of 80 layers has none
SHOWN = (1, 2, 3, 5, 10, 15, 20, 25, 30, 40, 50)

KEPT = {
    "reasoning": "train/loss/reasoning",
    "final": "train/loss/final",
    "tokens": "train/tokens",
    "grad_norm": "grad_norm/all",
    "load_balance": "train/load_balance_loss",
    "cv_pct": "router/cv_pct_mean",
    "entropy": "router/entropy_mean",
    "max_load_pct": "router/max_load_pct",
    "dead": "router/dead_experts",
    "active": "router/active_experts_mean",
    "bias_range": "router/bias_range",
    "step_s": "time/step_s",
    "forward_backward_s": "time/forward_backward_s",
    "optimizer_s": "time/optimizer_s",
    "data_s": "time/data_s",
    "tokens_per_s": "tokens_per_s",
    "peak_gib": "memory/gpu_peak_gib",
    "headroom_pct": "memory/gpu_headroom_pct",
}


def collect(folders: dict[str, Path], device: str) -> None:
    """Replace the columns of some runs, all of which are of one device."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    if unknown := sorted(set(folders) - set(RUNS)):
        sys.exit(f"no such runs: {', '.join(unknown)}; there are {', '.join(RUNS)}")
    if found["device"] != device:
        sys.exit(f"runs on {device} beside others on {found['device']} cannot be compared")
    runs = found["runs"] | {name: columns(folder) for name, folder in folders.items()}
    found["runs"] = {name: runs[name] for name in RUNS if name in runs}
    RESULTS.write_text(json.dumps(found) + "\n", encoding="utf-8")


def columns(folder: Path) -> dict[str, Any]:
    """What is shown of a run: its settings and the columns of its metrics."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = ("batch", "kernels", "cuda_graph", "activation_checkpointing", "seed", "schedule")
    kept = {key: config.get(key) for key in (*names, "optimizer")}
    shown = {key: [_short(row.get(full)) for row in rows] for key, full in KEPT.items()}
    return {"config": kept, "steps": len(rows), **shown}


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def loss_of(run: dict[str, Any]) -> list[float]:
    """Loss of both spans together."""
    return [a + b for a, b in zip(run["reasoning"], run["final"], strict=True)]


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[float]:
    """Percent by which the losses of two runs differ, step by step as far as both went."""
    pairs = zip(loss_of(one), loss_of(other), strict=False)
    return [100 * abs(a - b) / b for a, b in pairs]


def mean(values: list[float]) -> float:
    """Of the numbers that are there."""
    return statistics.fmean(v for v in values if v is not None)


def page(found: dict[str, Any]) -> str:
    """The page."""
    run = found["runs"]["long"]
    lines = [f"| {name} | {value} |" for name, value in facts(run)]
    return "\n\n".join(
        [
            "# All 6.02 B parameters on one GPU",
            "<!-- written by scripts/full_student.py from benchmarks/results; do not edit -->",
            f"Stage 1 by `vpmoe train configs/one-gpu/1-warm-start.toml` on one {found['device']}, "
            "passes replayed as CUDA graphs, bfloat16 weights with float32 masters and sums of "
            "gradients, no activation checkpointing. The 848 conversations of the SYNTH sample "
            f"hold 0.64 M tokens, so the run reads each about {sum(run['tokens']) / 0.641e6:.0f} "
            "times: it shows that the machinery trains, not what the student can learn.",
            "![Loss, gradient norms, expert loads and speed by step](full-student.png)",
            "\n".join(["| what | |", "| --- | --- |", *lines]),
            *first_steps(json.loads(RATES.read_text(encoding="utf-8"))),
            *against_reference(found["runs"]),
        ]
    ) + "\n"  # fmt: skip


def first_steps(rates: dict[str, Any]) -> list[str]:
    """What the size of the embedding and the rates do to the first steps."""
    names = ("embedding_std", "lr", "adam_lr", "embed_lr_mult", "router_lr_mult")
    steps = (1, 2, 10, 30, 50)
    head = [*names, *(f"loss, step {n}" for n in steps), "norm, step 1", "most idle", "idle at 30"]
    lines = [head, ["---"] * len(head)]
    for row in rates["rows"]:
        # A run that was cut short has None where nothing is known.
        seen = dict(enumerate(row["reasoning"], start=1))
        losses = ["-" if seen.get(n) is None else f"{seen[n]:.2f}" for n in steps]
        idle = row["dead_experts"]
        most = max(count for count in idle if count is not None)
        last = [f"{row['grad_norm'][0]:.1f}", f"{most:,.0f}", f"{idle[29]:,.0f}"]
        lines.append([*(f"{row[name]:g}" for name in names), *losses, *last])
    return [
        "## Embeddings and rates",
        "Layers read normed states and add what does not depend on the stream's size. With rows "
        "of standard deviation 0.02 the sum of 160 branches drowns the embedding: all tokens look "
        "alike to the last layers, and one step of AdamW on a router, which moves a logit of width "
        "1,024 by up to 1,024 times its rate, sends them all to the same experts. With "
        "`embedding_std = 1` and a small rate for routers few experts starve, at the optimizer's "
        "default rates too; the loss still comes little below that of a unigram model (8.46 "
        "held-out nats per token), and better rates for 80 layers remain to be found. "
        "`python -m benchmarks.rates`, loss of reasoning in nats, gradient norms before clipping, "
        f"experts of 20,224 without a token in a step; {rates['device']}. The last variant, which "
        "the config takes, was cut after step 30; the run above is one of its own, on a longer "
        "schedule.",
        "\n".join(f"| {' | '.join(line)} |" for line in lines),
    ]


def facts(run: dict[str, Any]) -> list[list[str]]:
    """Lines of the table, for one run."""
    tail = slice(10, None)
    config, batch = run["config"], run["config"]["batch"]
    optimizer = config["optimizer"]
    finite = all(v is not None for v in run["reasoning"] + run["final"] + run["grad_norm"])
    return [
        ["learning rate of matrices, of the rest", f"{optimizer['lr']}, {optimizer['adam_lr']}"],
        ["slots of a step, of a micro-batch", f"{batch['global_batch_size'] * batch['seq_len']:,}, "
         f"{batch['micro_batch_size'] * batch['seq_len']:,}"],
        ["momentum", optimizer["momentum_dtype"]],
        ["steps, tokens of documents", f"{run['steps']}, {sum(run['tokens']) / 1e6:.2f} M"],
        ["loss of reasoning: first, best, last", _ends(run["reasoning"])],
        ["loss of final answers", _ends(run["final"])],
        ["losses and norms finite", "all" if finite else "not all"],
        ["gradient norm before clipping, most after step 10", f"{max(run['grad_norm'][10:]):.3g}"],
        ["variation of expert loads, %: first, last",
         f"{run['cv_pct'][0]:.0f}, {run['cv_pct'][-1]:.0f}"],
        ["busiest expert's share of its layer, %, last (even: 0.39)",
         f"{run['max_load_pct'][-1]:.1f}"],
        ["experts without a token in a step, of 20,224: first, most, last",
         f"{run['dead'][0]:,.0f}, {max(run['dead']):,.0f}, {run['dead'][-1]:,.0f}"],
        ["range of the selection biases, last", f"{run['bias_range'][-1]:.3f}"],
        ["tokens/s as logged, median", f"{statistics.median(run['tokens_per_s'][tail]):,.0f}"],
        ["seconds of a step", f"{statistics.median(run['step_s'][tail]):.3f}"],
        ["of which micro-batches", f"{statistics.median(run['forward_backward_s'][tail]):.3f}"],
        ["of which norms, optimizer, routers",
         f"{statistics.median(run['optimizer_s'][tail]):.3f}"],
        ["GPU memory allocated at most, GiB; free at least, %",
         f"{max(run['peak_gib']):.1f}; {min(run['headroom_pct'][1:]):.1f}"],
    ]  # fmt: skip


def _ends(values: list[float]) -> str:
    return f"{values[0]:.2f}, {min(values):.2f}, {values[-1]:.2f}"


def against_reference(runs: dict[str, Any]) -> list[str]:
    """What rounding alone does to a run, and the reference beside it."""
    apart = {name: differences(*(runs[run] for run in pair)) for name, pair in PAIRS.items()}
    fused, reference = runs["gentle_fused"], runs["gentle_reference"]
    (slots, cut), (_, finer) = _slots(fused), _slots(runs["gentle_control"])
    config = runs["fused"]["config"]["optimizer"]
    is_whole = reference["steps"] == fused["steps"]
    made = "" if is_whole else f", which made {reference['steps']} of the steps"
    over = "" if is_whole else ", and over the first steps, which the reference made"
    return [
        "## Fused kernels against the reference",
        f"The same {fused['steps']} steps of {slots:,} slots, same seed, same rows, all 80 layers, "
        f"at gentle rates (matrices {fused['config']['optimizer']['lr']}, the rest "
        f"{fused['config']['optimizer']['adam_lr']}): `fused` in micro-batches of {cut:,} slots; "
        f"its `control`, fused kernels too, of {finer:,}, which changes nothing but the order of "
        f'sums; and `kernels = "reference"`{made}. The last pair is fused and control at the '
        f"config's rates ({config['lr']}, {config['adam_lr']}). By how much the losses of both "
        "spans together differ, percent:",
        _by_step(apart, loss_of(fused)),
        f"Over whole runs{over}:",
        _by_pair(apart, None if is_whole else reference["steps"]),
        _tolerance(apart, fused["steps"]),
        _limits(apart, runs),
        _reference(reference, runs["gentle_reference_again"], fused),
    ]


def _slots(run: dict[str, Any]) -> tuple[int, int]:
    """Slots of a step and of a micro-batch."""
    batch = run["config"]["batch"]
    return tuple(batch[f"{of}_batch_size"] * batch["seq_len"] for of in ("global", "micro"))


def _by_step(apart: dict[str, list[float]], loss: list[float]) -> str:
    lines = [["step", *apart, "loss, fused"], ["---"] * (len(apart) + 2)]
    for step in SHOWN:
        cells = [f"{v[step - 1]:.2f}" if step <= len(v) else "not run" for v in apart.values()]
        lines.append([str(step), *cells, f"{loss[step - 1]:.2f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _by_pair(apart: dict[str, list[float]], first: int | None) -> str:
    """Means and maxima of whole runs, and of their first steps where a number is given."""
    head = ["pair", "steps", "mean, %", "most, %"]
    head += [f"mean of {first}", f"most of {first}"] if first else []
    lines = [[*head, f"first above {FIXED_PCT:.0f} % at step"], ["---"] * (len(head) + 1)]
    for name, values in apart.items():
        parts = (values, values[:first]) if first else (values,)
        cells = [number for part in parts for number in (mean(part), max(part))]
        lines.append(
            [name, str(len(values)), *(f"{cell:.2f}" for cell in cells), str(_first(values))]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _tolerance(apart: dict[str, list[float]], steps: int) -> str:
    """What is asked of fused and reference, and whether it holds as far as it was run."""
    asked, all_of_it = apart[ASKED], apart[MEASURE]
    measure = all_of_it[: len(asked)]
    holds = mean(asked) <= mean(measure) and max(asked) <= max(measure)
    text = (
        "**The tolerance: fused and reference are no further apart than fused and control, on "
        f"average and at most, over the same steps.** Over the {len(asked)} steps that the "
        f"reference made it {'holds' if holds else 'does not hold'}: {_against(asked, measure)}."
    )
    if len(asked) > STATED:
        later = _against(asked[STATED:], measure[STATED:])
        text += (
            f" It was stated when the reference had made {STATED}; over the steps after these: "
            f"{later}."
        )
    if len(asked) < steps:
        text += (
            f" Over all {len(all_of_it)} steps rounding alone parts two runs by "
            f"{mean(all_of_it):.2f} % on average and {max(all_of_it):.1f} % at most. **Not run: "
            f"steps {len(asked) + 1} to {steps} of the reference**, of which nothing is shown."
        )
    return text


def _against(asked: list[float], measure: list[float]) -> str:
    return (
        f"{mean(asked):.2f} % against {mean(measure):.2f} % on average, {max(asked):.1f} % against "
        f"{max(measure):.1f} % at most"
    )


def _limits(apart: dict[str, list[float]], runs: dict[str, Any]) -> str:
    """What the tolerance cannot say, and what is known beside it."""
    other = apart["control, reference"]
    first = [runs[run]["grad_norm"][0] for run in PAIRS[ASKED]]
    return (
        "Expert choices flip on rounding, steps of so few slots amplify it, and no fixed number "
        "fits that: one of "
        f"{FIXED_PCT:.0f} % at every step is first exceeded by fused and control at step "
        f"{_first(apart[MEASURE])}, by fused and reference at step {_first(apart[ASKED])}. The "
        "measure is one control, a single sample of what rounding does; the control itself is "
        f"{mean(other):.2f} % from the reference on average, {max(other):.1f} % at most. An error "
        "smaller than what rounding does to whole runs would not be seen here: for that there are "
        "the first steps (losses "
        f"{apart[ASKED][0]:.4f} % apart, gradient norms {first[0]:.4f} and {first[1]:.4f}) and the "
        "tests of single passes against float64."
    )


def _reference(reference: dict[str, Any], again: dict[str, Any], fused: dict[str, Any]) -> str:
    """How long the reference took, and that it repeats itself."""
    seconds, busy = reference["step_s"][1:], [100 * (1 - n / EXPERTS) for n in reference["dead"]]
    names, count = ("reasoning", "final", "grad_norm"), again["steps"]
    same = all(again[name] == reference[name][:count] for name in names)
    return (
        f"A step of the reference after the first takes {min(seconds):.1f} to {max(seconds):.1f} s "
        "with recomputed layers and nothing beside it, where a fused one takes "
        f"{statistics.median(fused['step_s'][2:]):.2f} s: its plain loop goes over every expert "
        f"that has a token, and {min(busy):.0f} to {max(busy):.0f} % of all {EXPERTS:,} have one. "
        f"Another run of it, cut after {count} steps, gave "
        f"{'the same' if same else 'other'} losses and gradient norms"
        f"{', to the last digit kept' if same else ''}."
    )


def _first(apart: list[float]) -> int | str:
    """Step at which the fixed tolerance is first exceeded."""
    return next((step for step, v in enumerate(apart, start=1) if v > FIXED_PCT), "none")


def draw(found: dict[str, Any]) -> None:
    """The picture."""
    from vpmoe.evals.report.theme import DOTS_PER_INCH, LIGHT, drawing, new_figure

    run, runs = found["runs"]["long"], found["runs"]
    apart = {name: differences(*(runs[r] for r in pair)) for name, pair in PAIRS.items()}
    gentle = [name for name in PAIRS if "rates" not in name]
    losses = {name: loss_of(each) for name, each in runs.items()}
    with drawing(LIGHT):
        figure, axes = new_figure(3, 3, height=9.0)
        curves = [(run["reasoning"], "reasoning"), (run["final"], "final")]
        _lines(axes[0][0], curves, "loss, nats per token")
        _lines(axes[0][1], [(run["grad_norm"], "all")], "gradient norm before clipping")
        _lines(axes[0][2], [(run["tokens_per_s"][2:], "")], "tokens/s as logged")
        _lines(axes[1][0], [(run["cv_pct"], "")], "variation of expert loads, %")
        _lines(axes[1][1], [(run["dead"], "")], "experts without a token")
        pair = [(losses[name], name) for name in ("fused", "control")]
        _lines(axes[1][2], pair, "both spans, the config's rates")
        trio = [(losses[f"gentle_{name}"], name) for name in ("fused", "control", "reference")]
        _lines(axes[2][0], trio, "both spans, gentle rates", bottom=None)
        _lines(axes[2][1], [(apart[name], name) for name in gentle], "apart, gentle rates, %")
        axes[2][1].set_ylim(top=1.5 * max(apart[MEASURE]))  # room for the legend
        name = "fused, control; the config's rates"
        _lines(axes[2][2], [(apart[name], "")], "apart, the config's rates, %")
        figure.savefig(PICTURE, dpi=DOTS_PER_INCH // 2, format="png", metadata={"Software": ""})


def _lines(
    ax: Any, curves: list[tuple[list[float], str]], title: str, *, bottom: float | None = 0
) -> None:
    from vpmoe.evals.report.theme import LIGHT

    for index, (values, name) in enumerate(curves):
        steps = range(1, len(values) + 1)
        ax.plot(steps, values, color=LIGHT.color(index), label=name, linewidth=1.4)
    if len(curves) > 1:
        ax.legend(frameon=False)
    ax.set_title(title)
    ax.set_xlabel("step")
    ax.set_ylim(bottom=bottom)


def main() -> None:
    """Collect, write or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--collect", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--device", default="NVIDIA H200")
    args = parser.parse_args()
    if args.collect:
        named = [word.partition("=")[::2] for word in args.collect]
        collect({name: Path(folder) for name, folder in named}, args.device)
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    text = page(found)
    if not args.check:
        PAGE.write_text(text, encoding="utf-8")
        draw(found)
    elif PAGE.read_text(encoding="utf-8") != text:
        sys.exit("docs/full-student.md is stale: run scripts/full_student.py")


if __name__ == "__main__":
    main()
