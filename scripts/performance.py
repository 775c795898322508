"""Write docs/performance.md from benchmarks/results, or check that it is up to date.

python scripts/performance.py            write the page
python scripts/performance.py --check    exit 1 if it is stale
"""

import json
import sys
from pathlib import Path
from typing import Any

from performance_teacher import teacher_scoring

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
PAGE = REPOSITORY / "docs" / "performance.md"

# (bar, stretch) in the units of each table.
BARS = {
    "student, forward+backward": (70_000, 85_000),
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
weights; `kernels = "reference"` is what they must equal. Asked for where they cannot run, they stop
the run with the reason: another implementation is never taken instead.

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

Decoding from a cache takes the reference's attention and the fused experts and router."""


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
    """The student beside its peers."""
    ours, peers, first = load("whole-model"), load("peers"), load("profile-8-layers")
    rows = []
    for row in ours["rows"]:
        bar, stretch = BARS[row["what"]]
        if not row["tokens"]:
            continue
        names = ("what", "tokens", "ms", "tokens_per_s", "mfu_pct", "peak_gib")
        rows.append([*(row[name] for name in names), bar, stretch])
    for row in peers["rows"]:
        what = f"{row['what']} (earlier run)"
        numbers = row["tokens"], row["ms"], row["tokens_per_s"]
        rows.append([what, *numbers, None, row["peak_gib"], None, None])
    columns = ["what", "tokens", "ms", "tokens/s", "MFU %", "GiB", "bar", "stretch"]
    best = max(row["tokens_per_s"] for row in peers["rows"])
    mine = next(row for row in ours["rows"] if row["tokens"])
    optimizer = next(row for row in ours["rows"] if not row["tokens"])
    bar, stretch = BARS[optimizer["what"]]
    return "\n\n".join(
        [
            "## The 80 layers, forward and backward",
            f"{ours['device']}, torch {ours['torch']}, Triton {ours['triton']}, {ours['date']}; "
            f"{mine['repetitions']} repetitions, spread {mine['spread_ms']:.1f} ms. Random weights "
            "and tokens, packed rows of 2,048 with four documents, real routing. The peers come "
            "from an earlier run on the same kind of device.",
            table(columns, rows),
            f"{mine['tokens_per_s'] / best:.2f} times the best peer. The busiest expert of a layer "
            f"had {mine['busiest_expert_over_mean']:.0f} times the mean load: the routers were "
            "untrained, and no token was dropped.",
            f"The first step compiles: {first['first_step_s']:.0f} s (8 layers, an empty compiler "
            "cache, the kernels of heads and norms compiled before), "
            f"{mine['first_step_s']:.0f} s with a full one.",
            f"Optimizer step, {optimizer['parameters']:,} parameters: {optimizer['ms']:.0f} ms "
            f"(bar {bar}, stretch {stretch}): over the bar.",
        ]
    )


def kernels() -> str:
    """Every kernel beside the best peer of the same run."""
    found = load("kernels")
    lines = [line for measure in KERNELS for line in lines_of(measure, found["rows"])]
    columns = ["what", "tokens", "ms", "±", "peer", "ms", "ratio", "bar", "stretch", "bound by"]
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
            "those tried in the same run; grouped_mm computes no biases.",
            table(columns, lines),
            "GPU time by kernel, the longest of each, caches not flushed:",
            table(["of", "kernel", "calls", "us"], by_kernel),
        ]
    )


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
            "not installed there; the peer is cross-entropy in compiled, recomputed chunks.",
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
            "The table above was measured with four tokens and four warps; the kernels now take "
            "two tokens for the choice and four for the rest, one warp each. All gave the same "
            "choices.",
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
        lines.append([measure, tokens, ours["ms"], ours["spread_ms"], *peer, *bars, bound])
    return lines


def profile() -> str:
    """Where a layer's time goes."""
    found = load("profile-8-layers")
    rows = [[f"`{row['kernel']}`", row["calls"], row["us"]] for row in found["rows"][:20]]
    steps = [
        [row["what"], row["layers"], row["gpu_us"] / 1e3, row["kernels_us"]["compiled"] / 1e3]
        for row in found["slices"]
    ]
    columns = ["what", "layers", "GPU ms", "of it in compiled kernels, ms"]
    return "\n\n".join(
        [
            f"## Where the time goes: {found['layers']} layers, {found['tokens']:,} tokens",
            f"{found['what']}; the 20 largest.",
            table(["kernel", "calls", "us"], rows),
            "What each step bought, as sums of kernel times, which leave out the gaps between "
            "launches. Launched from Python on a busy host, 80 layers took 510 ms with separate "
            "projections, 489 with one product (unrolled), 492 with heads in a kernel, and 534 in "
            "the end, when the launches took longer than the kernels. Replayed as a CUDA graph: "
            "not run. The merged kernels take fewer tiles per program than those of this table "
            "did: those were not timed together.",
            table(columns, steps),
        ]
    )


def main() -> None:
    """Write the page, or compare it."""
    scoring = teacher_scoring(load("teacher-scoring"), table)
    regions = [whole_model(), kernels(), losses(), router_programs(), profile(), scoring]
    page = "\n\n".join([INTRO, *regions]) + "\n"
    if "--check" in sys.argv[1:]:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page:
            sys.exit(f"{PAGE.relative_to(REPOSITORY)} is stale: run python scripts/performance.py")
        return
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
