"""The part of docs/performance.md that speaks of sampling."""

from collections.abc import Callable
from typing import Any

AGREEMENT = "sampler against trainer"
BAR, STRETCH = 13_000, 20_000  # tokens per second at a batch of 64
ROOFLINE_MS = {1: 0.30, 8: 0.57, 64: 2.02, 256: 3.42}  # weights once, keys and values, 4.26 TB/s

Table = Callable[..., str]


def sampling(found: dict[str, Any], trained: list[dict[str, Any]], table: Table) -> str:
    """Speed, agreement and memory of the sampler; `trained` holds rows of the whole-model run."""
    named: dict[str, list[dict[str, Any]]] = {}
    for row in [*found["rows"], *(row for row in trained if row["what"] == AGREEMENT)]:
        named.setdefault(row["what"], []).append(row)
    parts = [
        f"## Sampling: {found['layers']} layers, prompts of {found['prompt']}, "
        f"{found['new']} new tokens",
        f"{found['device']}, torch {found['torch']}, Triton {found['triton']}, {found['date']}. "
        "Random weights and tokens, temperature 1. Tokens per second count whole calls, prompts "
        "included, graphs captured before.",
        *_speed(found, named, table),
        *_continuous(named, table),
        *_kernels(found, named, table),
        *_agreement(named, table),
    ]
    for held in named.get("memory", []):
        parts.append(
            f"GiB reserved before a round of 64, at its peak and after it: {held['before_gib']}, "
            f"{held['during_gib']}, {held['after_gib']}."
        )
    return "\n\n".join(parts)


def _speed(found: dict[str, Any], named: dict[str, list[dict[str, Any]]], table: Table) -> list:
    rows = []
    for row in named["student"]:
        at_64 = (BAR, STRETCH) if row["batch"] == 64 else (None, None)
        steps = row["steps_alone_tokens_per_s"]
        numbers = row["tokens_per_s"], row["step_ms"], steps, row["prompts_ms"]
        rows.append(["student", row["batch"], *numbers, *at_64])
    peer = found["peer"]
    when = "" if peer["same_run"] else " (earlier run)"
    rows.append([f"{peer['what']}{when}", 64, peer["tokens_per_s"], *[None] * 5])
    columns = ["what", "batch", "tokens/s", "step ms", "steps alone, tokens/s", "prompts ms"]
    ours = next(row for row in named["student"] if row["batch"] == 64)
    ratio = ours["tokens_per_s"] / peer["tokens_per_s"]
    bare = [
        [row["batch"], row["step_ms"], ROOFLINE_MS[row["batch"]]]
        for row in named.get("step without head and draw", [])
    ]
    balanced = named.get("step with balanced experts", [])
    said = (
        f"{ratio:.1f} times the peer. A random student's deep layers send all tokens to the same "
        f"few experts ({found['last_layer_experts_in_use']} in the last layer), so that these "
        "steps read fewer weights than those of a trained one would; "
    )
    if balanced:
        said += "with selection biases that spread the tokens, as in training:"
    else:
        said += "steps with evenly used experts have not been measured."
    parts = [table([*columns, "bar", "stretch"], rows), said]
    if balanced:
        names = ("batch", "step_ms", "steps_alone_tokens_per_s", "experts_in_use")
        cells = [[row[name] for name in names] for row in balanced]
        parts.append(table(["batch", "step ms", "tokens/s", "experts in use, of 256"], cells))
    if bare:
        parts += [
            "The step without head and draw, beside the time that reading every weight in use and "
            "the cache once would take with evenly used experts:",
            table(["batch", "ms", "roofline ms"], bare),
        ]
    return parts


def _continuous(named: dict[str, list[dict[str, Any]]], table: Table) -> list[str]:
    flows = [*named.get("continuous", []), *named.get("batch after batch", [])]
    if not flows:
        return []
    one = flows[0]
    return [
        f"{one['prompts']} prompts, {one['tokens']:,} tokens in completions of geometric lengths "
        f"up to {one['longest']}, {one['slots']} slots; batches capture a new graph where they "
        "need a larger cache:",
        table(
            ["slots", "seconds", "tokens/s"],
            [[row["what"], row["seconds"], row["tokens_per_s"]] for row in flows],
        ),
    ]


def _kernels(found: dict[str, Any], named: dict[str, list[dict[str, Any]]], table: Table) -> list:
    kernels = named.get("kernel", [])
    if not kernels:
        return []
    names = ("kernel", "launches", "sum_us", "median_us")
    variants = named.get("variant of the step, batch 64", [])
    return [
        f"Where a step of 64 goes, {found['layers']} layers, kernels one after another:",
        table(
            ["kernel", "launches", "us", "median us"], [[row[n] for n in names] for row in kernels]
        ),
        "What was tried, the step without head and draw (single runs; the clock drifts by some "
        "percent between them):",
        table(["variant", "ms"], [[row["variant"], row["step_ms"]] for row in variants]),
    ]


def _agreement(named: dict[str, list[dict[str, Any]]], table: Table) -> list[str]:
    rows = named.get(AGREEMENT, [])
    if not rows:
        return []
    has_noise = any("drawn_trainer_against_reference" in row for row in rows)
    is_replayed = any(row["routing"] == "replayed" for row in rows)
    return [
        "Log-probs of the sampler beside those of the trainer's forward pass over the same "
        "tokens, mean absolute difference in nats (bar 0.02), and how often a greedy token is the "
        "trainer's likeliest. Random routers choose between near ties, so that rounding alone "
        "changes experts, layer after layer."
        + (
            " The trainer's own distance from the reference kernels says how much of that there "
            "is; with `fixed` routing a large selection bias names the same experts for all tokens."
            if has_noise
            else " How much of the difference at 80 layers is that has not been measured on a GPU. "
            "In Triton's interpreter, 80 layers of hidden size 128 with 16 experts: with the same "
            "experts for all tokens, final states after a decoding step are 0.012 to 0.013 "
            "(relative) from float64, those of the reference in bfloat16 0.017; with random "
            "routers 0.02 to 0.34 and 0.19 to 0.33."
        )
        + (
            " In `replayed` rows the trainer takes the experts that the sampler used, as stage 3 "
            "does; the completions are those of the row before."
            if is_replayed
            else " Stage 3 replays the sampler's experts; that has not been measured on a GPU."
        ),
        table(
            [
                "weights",
                "layers",
                "routing",
                "drawn",
                "greedy",
                "trainer - reference",
                "same greedy token, %",
            ],
            [
                [
                    row.get("weights", "random, small embeddings"),
                    row["layers"],
                    row["routing"],
                    row["drawn_mean_abs_nats"],
                    row["greedy_mean_abs_nats"],
                    row.get("drawn_trainer_against_reference"),
                    row["greedy_same_pct"],
                ]
                for row in rows
            ],
        ),
    ]
