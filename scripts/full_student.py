"""Write docs/full-student.md and its picture from runs of the whole student, or check the page.

python scripts/full_student.py                              write the page and the picture
python scripts/full_student.py --check                      exit 1 if the page is stale
python scripts/full_student.py --collect LONG FUSED REFERENCE --device NAME
                                                            keep what is shown of three runs
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "full-student.json"
PAGE = REPOSITORY / "docs" / "full-student.md"
PICTURE = REPOSITORY / "docs" / "full-student.png"
TOLERANCE_PCT = 5.0  # of the loss of both spans together, at every step

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


def collect(runs: dict[str, Path], device: str) -> None:
    """Columns of the runs' metrics."""
    found: dict[str, Any] = {"device": device, "runs": {}}
    for name, folder in runs.items():
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        columns = {key: [_short(row.get(full)) for row in rows] for key, full in KEPT.items()}
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        names = ("batch", "kernels", "cuda_graph", "activation_checkpointing", "seed", "schedule")
        kept = {key: config.get(key) for key in names}
        kept["optimizer"] = config["optimizer"]
        found["runs"][name] = {"config": kept, "steps": len(rows), **columns}
    RESULTS.write_text(json.dumps(found) + "\n", encoding="utf-8")


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def loss_of(run: dict[str, Any]) -> list[float]:
    """Loss of both spans together."""
    return [a + b for a, b in zip(run["reasoning"], run["final"], strict=True)]


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[float]:
    """Percent by which the losses of two runs differ, step by step."""
    pairs = zip(loss_of(one), loss_of(other), strict=False)
    return [100 * abs(a - b) / b for a, b in pairs]


def mean(values: list[float]) -> float:
    """Of the numbers that are there."""
    return statistics.fmean(v for v in values if v is not None)


def page(found: dict[str, Any]) -> str:
    """The page."""
    run = found["runs"]["long"]
    tail = slice(len(run["reasoning"]) // 2, None)
    batch = run["config"]["batch"]
    slots = batch["global_batch_size"] * batch["seq_len"]
    finite = all(v is not None for v in run["reasoning"] + run["final"] + run["grad_norm"])
    last = -1
    rows = [
        ["steps, tokens of documents", f"{run['steps']}, {sum(run['tokens']) / 1e6:.2f} M"],
        ["loss of reasoning, first and last step", _ends(run["reasoning"])],
        ["loss of final answers", _ends(run["final"])],
        ["gradient norm before clipping, most after step 10", f"{max(run['grad_norm'][10:]):.3g}"],
        ["losses and norms finite", "all" if finite else "not all"],
        ["coefficient of variation of expert loads, first and last, %", _ends(run["cv_pct"])],
        ["busiest expert's share of a layer, first and last, % (even: 0.39)",
         _ends(run["max_load_pct"])],
        ["experts without a token in a step, of 20,224, first, most and last",
         f"{run['dead'][0]:.0f}, {max(run['dead']):.0f}, {run['dead'][last]:.0f}"],
        ["range of the selection biases, last", f"{run['bias_range'][last]:.3f}"],
        ["tokens/s as logged, median of the second half",
         f"{statistics.median(run['tokens_per_s'][tail]):,.0f}"],
        ["seconds of a step, of which optimizer, norms and logging",
         f"{statistics.median(run['step_s'][tail]):.3f}, "
         f"{statistics.median(run['optimizer_s'][tail]):.3f}"],
        ["GPU memory at its peak; free", f"{max(run['peak_gib']):.1f} GiB; "
         f"{min(run['headroom_pct']):.1f} %"],
    ]  # fmt: skip
    return "\n\n".join(
        [
            "# All 6.02 B parameters on one GPU",
            "<!-- written by scripts/full_student.py from benchmarks/results; do not edit -->",
            f"Stage 1 by `vpmoe train configs/one-gpu/1-warm-start.toml` on one {found['device']}: "
            f"{slots:,} slots a step in micro-batches of "
            f"{batch['micro_batch_size'] * batch['seq_len']:,}, fused kernels, bfloat16 weights "
            "with float32 masters, sums of gradients and momenta, no activation checkpointing. The "
            "848 conversations of the SYNTH sample hold 0.64 M tokens, so the run reads each about "
            f"{sum(run['tokens']) / 0.641e6:.0f} times: it shows that the machinery trains, "
            "not what the student can learn.",
            "![Loss, gradient norms, expert loads and speed by step](full-student.png)",
            "| what | value |\n| --- | --- |\n"
            + "\n".join(f"| {name} | {value} |" for name, value in rows),
            *against_reference(found),
        ]
    ) + "\n"  # fmt: skip


def _ends(values: list[float]) -> str:
    return f"{values[0]:.3g}, {values[-1]:.3g}"


def against_reference(found: dict[str, Any]) -> list[str]:
    """Fused and reference kernels over the same steps."""
    runs = found["runs"]
    if "reference" not in runs:
        return []
    fused, reference = runs["fused"], runs["reference"]
    apart = differences(fused, reference)
    batch = fused["config"]["batch"]
    slots = batch["global_batch_size"] * batch["seq_len"]
    verdict = "within" if max(apart) <= TOLERANCE_PCT else "beyond"
    return [
        "## Fused kernels against the reference",
        f"The same {len(apart)} steps of {slots:,} slots, same seed, same rows, all 80 layers, "
        "once with `kernels = \"fused\"` and once with `kernels = \"reference\"` (with activation "
        "checkpointing). Weights are bfloat16 in both, so that roundings differ and grow from "
        f"step to step. Losses of both spans together differ by {mean(apart):.2f} % on average, "
        f"{apart[0]:.3f} % at the first step and {max(apart):.2f} % at most: {verdict} the "
        f"{TOLERANCE_PCT:.0f} % that were allowed at any step. A step took "
        f"{statistics.median(fused['step_s'][2:]):.2f} s and "
        f"{statistics.median(reference['step_s'][2:]):.2f} s.",
    ]  # fmt: skip


def draw(found: dict[str, Any]) -> None:
    """The picture."""
    from vpmoe.evals.report.theme import DOTS_PER_INCH, LIGHT, drawing, new_figure

    run, runs = found["runs"]["long"], found["runs"]
    with drawing(LIGHT):
        figure, axes = new_figure(2, 3, height=6.2)
        curves = [(run["reasoning"], "reasoning"), (run["final"], "final")]
        _lines(axes[0][0], curves, "loss, nats per token", LIGHT)
        _lines(axes[0][1], [(run["grad_norm"], "all")], "gradient norm before clipping", LIGHT)
        _lines(axes[0][2], [(run["tokens_per_s"][2:], "")], "tokens/s as logged", LIGHT)
        _lines(axes[1][0], [(run["cv_pct"], "")], "expert loads, coefficient of variation %", LIGHT)
        _lines(axes[1][1], [(run["dead"], "")], "experts without a token", LIGHT)
        pair = [(loss_of(runs[n]), n) for n in ("fused", "reference") if n in runs]
        _lines(axes[1][2], pair, "loss of both spans, 4,096 slots a step", LIGHT)
        figure.savefig(PICTURE, dpi=DOTS_PER_INCH // 2, format="png", metadata={"Software": ""})


def _lines(ax: Any, curves: list[tuple[list[float], str]], title: str, theme: Any) -> None:
    for index, (values, name) in enumerate(curves):
        steps = range(1, len(values) + 1)
        ax.plot(steps, values, color=theme.color(index), label=name, linewidth=1.4)
    if len(curves) > 1:
        ax.legend(frameon=False)
    ax.set_title(title)
    ax.set_xlabel("step")
    ax.set_ylim(bottom=0)


def main() -> None:
    """Collect, write or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--collect", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--device", default="NVIDIA H200")
    args = parser.parse_args()
    if args.collect:
        collect(dict(zip(("long", "fused", "reference"), args.collect, strict=False)), args.device)
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    text = page(found)
    if not args.check:
        PAGE.write_text(text, encoding="utf-8")
        draw(found)
    elif PAGE.read_text(encoding="utf-8") != text:
        sys.exit("docs/full-student.md is stale: run scripts/full_student.py")


if __name__ == "__main__":
    main()
