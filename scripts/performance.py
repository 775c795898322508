"""Write docs/performance.md from benchmarks/results, or check that it is up to date.

python scripts/performance.py            write the page
python scripts/performance.py --check    exit 1 if it is stale
"""

import json
import sys
from pathlib import Path
from typing import Any

from gpu_tests import gpu_tests
from performance_sampling import sampling
from performance_teacher import teacher_packing, teacher_scoring

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
PAGE = REPOSITORY / "docs" / "performance.md"

# (bar, stretch) in the units of each table.
BARS = {
    "student, forward+backward": (70_000, 85_000),
    "whole step": (66_000, 80_000),
    "NorMuon + AdamW step": (130, 100),
}

# Kernels: (bar, stretch) in ms at 16,384 tokens, and what keeps the kernel from being faster.
TRAFFIC = "traffic and latency: 280 TFLOP/s forward; tiles of 128 rows were no faster"
TILES = "short chains of small products: 260 TFLOP/s forward, local"
KERNELS = {
    "routed experts, even routing": (0.66, 0.45, TRAFFIC),
    "routed experts, power law 0.7": (None, None, TRAFFIC),
    "routed experts, power law 1.1": (None, None, TRAFFIC),
    "routed experts, even routing, fp32 sums": (None, None, "the sums are read and written"),
    "local attention, rows of 2,048": (0.34, 0.17, TILES),
    "local attention, rows of 8,192": (None, None, TILES),
    "global attention, rows of 2,048": (0.65, None, TILES),
    "global attention, rows of 8,192": (None, None, TILES),
    "router's choice alone": (0.05, None, "maxima over registers"),
    "router with balance": (None, None, "products with few columns"),
    "head + cross-entropy": (37, 30, "products, at two thirds of their peak"),
}

INTRO = """# Performance

<!-- written by scripts/performance.py from benchmarks/results; do not edit -->

`kernels = "fused"` runs the student's hot paths in kernels for one NVIDIA GPU with bfloat16
weights; `kernels = "reference"` is what they must equal, and `"grouped"` a second opinion: the
reference with all experts of a layer in one product of PyTorch's. Asked for where they cannot run,
kernels stop the run with the reason: another implementation is never taken instead.

| hot path | how |
| --- | --- |
| routed experts | slots sorted by expert, a fixed table of tiles, both products in one kernel |
| router | logits from two bf16 terms of the weight, summed in fp32; one kernel chooses and counts |
| attention | one range of keys per query, no table of blocks; the sink starts the softmax |
| heads | one product for all projections, one kernel for all between it and attention |
| norms | one kernel with the residual stream; gradients of gain and bias summed on the way back |
| rest of a layer's dense part | one `torch.compile` per kind of layer and shape |
| head + loss | chunks of bf16 logits overwritten by their gradient; head summed in fp32 |
| optimizer | one pass over a parameter before and one after the orthogonalization |

The sampler has a decoding step of its own: eight launches per layer, a CUDA graph per step, rings
for windows, slots that finished conversations leave and new ones enter."""


def load(name: str) -> dict[str, Any]:
    """One file of results."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(head: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *([_text(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _text(cell: Any) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, int):
        return f"{cell:,}"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def whole_model() -> str:
    """The student beside its peer, passes, whole steps and the optimizer."""
    found = load("whole-model")
    rows = [row for row in found["rows"] if not row.get("failed")]
    earlier = load("peers")["rows"]
    measured = [r["tokens_per_s"] for r in rows if is_peer(r) and r.get("ms")]
    best = max(measured or [r["tokens_per_s"] for r in earlier])
    columns = [
        "what",
        "tokens",
        "ms",
        "±",
        "tokens/s",
        "MFU %",
        "GiB",
        "ratio",
        "bar",
        "stretch",
        "note",
    ]
    lines = [speed_line(row, best) for row in rows if row.get("tokens")]
    for row in earlier:
        what = f"{row['what']} (earlier run)"
        numbers = row["tokens"], row["ms"], None, row["tokens_per_s"]
        lines.append([what, *numbers, None, row["peak_gib"], None, None, None, None])
    kept = [r["activation_kb_per_token_and_layer"] for r in rows if r.get("how") == "launched"
            and "activation_kb_per_token_and_layer" in r]  # fmt: skip
    texts = [
        "## The 80 layers",
        f"{found['device']}, torch {found['torch']}, Triton {found['triton']}, {found['date']}; "
        "`python -m benchmarks.whole_model`, medians. Passes add into float32 sums of gradients; "
        "a whole step is 524,288 slots on the trainer's path, with data, norms, optimizer and "
        "router biases. Tokens are those of documents, without padding.",
        *([found["incomplete"]] if "incomplete" in found else []),
        table(columns, lines),
        *optimizer_text(rows),
        *(step_text(row) for row in rows if row["what"] == "whole step"),
        *routing_text(rows),
    ]
    if kept:
        texts.append(
            f"A forward pass keeps {max(kept):.1f} KB per token and layer for its backward pass, "
            "embedding and final states included (bar 22)."
        )
    return "\n\n".join([*texts, *first_text(rows)])


def is_peer(row: dict[str, Any]) -> bool:
    """Whether a row is another library's."""
    return row["what"].startswith("transformers")


def speed_line(row: dict[str, Any], best: int) -> list[Any]:
    """One line of the table of speeds."""
    how = f", {row['how']}" if "how" in row else ""
    slots = row.get("micro_batch_slots") or row.get("slots") or row["tokens"]
    what = f"{row['what']}{how}, micro-batches of {slots:,}"
    if row["ms"] is None:
        return [what, row["tokens"], row["why"], *[None] * 8]
    ratio = None if is_peer(row) else f"{row['tokens_per_s'] / best:.2f}"
    bars = BARS.get(row["what"], (None, None))
    numbers = (row["ms"], row["spread_ms"], row["tokens_per_s"], row.get("mfu_pct"))
    return [what, row["tokens"], *numbers, row["peak_gib"], ratio, *bars, row.get("note")]


def optimizer_text(rows: list[dict[str, Any]]) -> list[str]:
    """The optimizer's own time."""
    name = "NorMuon + AdamW step"
    bar, stretch = BARS[name]
    return [
        f"Optimizer step, {row['parameters']:,} parameters, {row['momentum']} momentum: "
        f"{row['ms']:.0f} ms (bar {bar}, stretch {stretch}); norms of the gradients by role "
        f"{row['gradient_norms_ms']:.1f} ms. Clipping is a factor on the way in and costs no pass."
        for row in rows
        if row["what"] == name
    ]


def step_text(row: dict[str, Any]) -> str:
    """Where a whole step goes."""
    return (
        f"Of a whole step's {row['ms'] / 1e3:.2f} s, data take {row['data_ms']:.0f} ms, micro-"
        f"batches {row['forward_backward_ms']:,.0f} ms, norms, optimizer and routers "
        f"{row['optimizer_ms']:.0f} ms."
    )


def routing_text(rows: list[dict[str, Any]]) -> list[str]:
    """How uneven the loads were."""
    for row in rows:
        if "optimizer_steps_before" in row:
            return [
                f"Routing is the router's own after {row['optimizer_steps_before']} optimizer "
                f"steps: the busiest expert of a layer has "
                f"{row['busiest_expert_over_mean_median_layer']:.1f} times the mean load in the "
                f"median layer and {row['busiest_expert_over_mean']:.1f} times in the worst; no "
                "token is dropped."
            ]
    return []


def first_text(rows: list[dict[str, Any]]) -> list[str]:
    """What compilers cost once."""
    first = {row["caches"]: row["s"] for row in rows if row["what"] == "first pass"}
    if len(first) < 2:
        seconds = load("profile-8-layers")["first_step_s"]
        return [
            f"The first step compiles: {seconds:.0f} s (8 layers, an empty compiler cache, the "
            "kernels of heads and norms compiled before)."
        ]
    return [
        f"The first pass compiles: {first['empty']:.0f} s with empty caches, {first['full']:.0f} s "
        "with full ones; as long for 8 layers as for 80, since layers of a kind share their code."
    ]


def kernels() -> str:
    """Every kernel beside the best peer of the same run."""
    found = load("kernels")
    lines = [line for measure in KERNELS for line in lines_of(measure, found["rows"])]
    columns = ["what", "tokens", "ms", "±", "GiB", "peer", "ms", "ratio", "bar", "stretch"]
    by_kernel = [
        [f"{row['measure']}, {row['tokens']:,}", f"`{part['kernel']}`", part["calls"], part["us"]]
        for row in found["rows"]
        for part in (row.get("kernels") or [])[:12]
        if row["tokens"] == 32_768
    ]
    return "\n\n".join(
        [
            "## Kernels",
            f"{found['device']}, torch {found['torch']}, Triton {found['triton']}, "
            f"{found['date']}. Forward + backward, CUDA-graph replay, L2 flushed, medians and half "
            "the distance between the 10th and the 90th percentile. The peer is the fastest of "
            "those tried in the same run; grouped_mm computes no biases. GiB: at most, beyond "
            "states and head (bar 4 for the head)." + other_days(found),
            table([*columns, "bound by"], lines),
            "GPU time by kernel, the longest of each, caches not flushed:",
            table(["of", "kernel", "calls", "us"], by_kernel),
        ]
    )


def other_days(found: dict[str, Any]) -> str:
    """Which rows were measured on another day than the last ones."""
    days: dict[str, list[str]] = {}
    for row in found["rows"]:
        if row["who"] == "ours" and row["measure"] in KERNELS and row["date"] != found["date"]:
            names = days.setdefault(row["date"], [])
            names += [row["measure"]] if row["measure"] not in names else []
    said = "".join(f" Measured on {day}: {'; '.join(names)}." for day, names in days.items())
    return said + (f" {found['note']}" if "note" in found else "")


def losses() -> str:
    """Every loss on logits beside cross-entropy and beside what it cannot do without."""
    found = load("losses")
    floors = {row["what"]: row.get("floor_ms") for row in found["rows"]}
    rows = [
        [row["what"], row["ms"], row["spread_ms"], row.get("ratio_to_cross_entropy"),
         floors[row["what"]], row.get("ratio_to_floor"), row.get("peak_gib")]
        for row in found["rows"]
    ]  # fmt: skip
    columns = ["loss", "ms", "±", "of cross-entropy", "floor, ms", "of floor", "GiB"]
    return "\n\n".join(
        [
            f"## Losses, {found['tokens']:,} tokens, {found['vocab']:,} ids",
            f"{found['device']}, torch {found['torch']}, Triton {found['triton']}, "
            f"{found['date']}. Forward + backward of head and loss, launched from Python in chunks "
            f"of {found['chunk_rows']:,} rows, medians. Bar for losses on labels and stored "
            "targets: 1.3 times cross-entropy. A loss on a teacher's states multiplies them with "
            "its head as well (width 2,880, the student's is 1,024): its floor is cross-entropy "
            "and that product alone, and no bar of 1.3 times cross-entropy can be met. Liger was "
            "not installed there; the peer is cross-entropy in compiled, recomputed chunks. GiB: "
            "two chunks of logits were held then, as against one in the table of kernels.",
            table(columns, rows),
        ]
    )


def router_programs() -> str:
    """What a program of one warp is worth to the router's kernels."""
    found = load("router-programs")
    names = ("rows", "warps", "choose_us", "balance_us", "backward_us")
    rows = [[row[name] for name in names] for row in found["rows"] if row["same_results"]]
    columns = ["tokens of a program", "warps", "choice, us", "balance, us", "backward, us"]
    return "\n\n".join(
        [
            f"## The router's programs, {found['tokens']:,} tokens",
            "The kernels take two tokens for the choice and four for the rest, one warp each. All "
            "variants gave the same choices.",
            table(columns, rows),
        ]
    )


def lines_of(measure: str, rows: list[dict[str, Any]]) -> list[list[Any]]:
    """One line per number of tokens."""
    bar, stretch, bound = KERNELS[measure]
    mine = [row for row in rows if row["measure"] == measure]
    lines = []
    for ours in (row for row in mine if row["who"] == "ours"):
        tokens = ours["tokens"]
        peers = [r for r in mine if r["who"] != "ours" and r["tokens"] == tokens and "ms" in r]
        best = min(peers, key=lambda row: row["ms"], default=None)
        peer = [None, None, None]
        if best is not None:
            peer = [best["who"], best["ms"], f"{best['ms'] / ours['ms']:.2f}"]
        bars = [bar, stretch] if tokens == 16_384 else [None, None]
        numbers = ours["ms"], ours["spread_ms"], ours.get("peak_gib")
        lines.append([measure, tokens, *numbers, *peer, *bars, bound])
    return lines


def profile() -> str:
    """What `vpmoe profile` saw of a step, beside what `vpmoe check` had predicted."""
    found = load("profile-one-gpu")
    total = sum(found["regions_ms"].values())
    regions = [[name, ms, 100 * ms / total] for name, ms in found["regions_ms"].items()]
    rows = [[f"`{r['kernel'][:60]}`", r["region"], r["calls"], r["ms"]] for r in found["kernels"]]
    told, memory = found["predicted"], found["memory"]["peak_gib"]
    bought = load("profile-8-layers")["slices"]
    steps = [[row["what"], row["layers"], row["gpu_us"] / 1e3] for row in bought]
    return "\n\n".join(
        [
            f"## Where the time goes: `vpmoe profile`, {found['student']}",
            f"`vpmoe profile configs/one-gpu/1-warm-start.toml`, {found['device']}: a step of one "
            f"micro-batch of {found['micro_batch_tokens']:,} slots, {found['tokens_per_step']:,} "
            f"tokens, takes {found['step_ms']:.0f} ms, {found['tokens_per_s']:,.0f} tokens/s, "
            f"{found['mfu_pct']:.1f} % of the dense peak; `vpmoe check` predicts "
            f"{told['tokens_per_s']:,.0f} (the prediction's constants were fitted to kernel times "
            f"of an earlier state). Memory: {memory:.1f} GiB at most, predicted "
            f"{told['total_gib']:.1f}. Times of regions come from one step launched under the "
            "profiler, the step's own from replayed ones.",
            "![Regions of a step, and its memory](profile-one-gpu.png)",
            table(["region", "ms", "%"], regions),
            table(["kernel", "region", "calls", "ms"], rows[:20]),
            "What each change of the dense part bought, as sums of kernel times, which leave out "
            "the gaps between launches; measured one after the other.",
            table(["what", "layers", "GPU ms"], steps),
        ]
    )


def main() -> None:
    """Write the page, or compare it."""
    scoring = teacher_scoring(load("teacher-scoring"), table)
    regions = [whole_model(), kernels(), losses(), router_programs(), profile(), scoring]
    if (RESULTS / "teacher-packing.json").exists():
        regions.append(teacher_packing(load("teacher-packing"), table))
    regions.append(sampling(load("sampling"), load("whole-model")["rows"], table))
    regions.append(gpu_tests(load("gpu-tests"), table))
    page = "\n\n".join([INTRO, *regions]) + "\n"
    if "--check" in sys.argv[1:]:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page:
            sys.exit(f"{PAGE.relative_to(REPOSITORY)} is stale: run python scripts/performance.py")
        return
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
