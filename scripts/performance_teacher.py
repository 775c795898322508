"""The part of docs/performance.md on how fast a teacher scores."""

from collections.abc import Callable
from typing import Any

BAR = 2.0  # times the best of transformers
EXTRA_BAR = 15  # percent that the likeliest ids may cost
PACKING_BAR = 5  # percent that packing may cost


def teacher_scoring(
    found: dict[str, Any], table: Callable[[list[str], list[list[Any]]], str]
) -> str:
    """Ours beside transformers, at every number of tokens at a time that was tried."""
    plain = [row for row in found["rows"] if row["reads"] == "log-probs"]
    peer = max(row["tokens_per_s"] for row in plain if row["what"] != "vpmoe")
    ours = max((row for row in plain if row["what"] == "vpmoe"), key=lambda r: r["tokens_per_s"])
    top = next(
        row
        for row in found["rows"]
        if row["reads"].startswith("top")
        and (row["what"], row["batch_tokens"]) == ("vpmoe", ours["batch_tokens"])
    )
    extra = 100 * (ours["tokens_per_s"] / top["tokens_per_s"] - 1)
    rows = [
        [
            row["what"],
            row["reads"],
            row["batch_tokens"],
            row["tokens_per_s"],
            row["mfu_pct"],
            row["peak_gib"],
            row["tokens_per_s"] / peer,
        ]
        for row in found["rows"]
    ]
    head = ["what", "reads", "tokens at a time", "tokens/s", "MFU %", "GiB", "times the best peer"]
    runs = {row.get("run") for row in found["rows"]}
    same = "in one process" if len(runs) == 1 and None not in runs else "in different runs"
    return "\n\n".join(
        [
            "## Teacher scoring: GPT-OSS-20B's shape",
            f"{found['device']}, torch {found['torch']}, Triton {found['triton']}, "
            f"{found['date']}; random bf16 weights, {found['layers']} layers. "
            f"{found['sequences']} sequences with lengths of SYNTH conversations (mean "
            f"{found['mean_length']}, longest {found['longest']:,}), {found['tokens']:,} tokens; "
            f"results on the CPU included. Both on the same kind of device, {same}. transformers: "
            "plain forward and log-softmax, sorted by length, padded, grouped_mm experts; its "
            "layers are not compiled.",
            table(head, rows),
            f"{ours['tokens_per_s'] / peer:.2f} times the best peer (bar {BAR:.0f}); the likeliest "
            f"ids cost {extra:.1f} % more (bar {EXTRA_BAR}). What binds: the products. In a "
            "profile of 2026-11-20 a row of 16,384 tokens took 227 ms of kernels: 117 for grouped "
            "products of the experts (some 670 TFLOP/s), 28 for the products around the attention, "
            "25 for the head's; 15 for the experts' gate, 12 for the attention, 9 for reading the "
            "logits.",
        ]
    )


def teacher_packing(
    found: dict[str, Any], table: Callable[[list[str], list[list[Any]]], str]
) -> str:
    """`vpmoe score` with each codec beside the same teacher that packs nothing."""
    names = (
        *("codec", "bytes_per_label", "alone_tokens_per_s"),
        *("packed_tokens_per_s", "slower_packed_pct"),
        *("stored_tokens_per_s", "slower_stored_pct", "labels_packed_per_s"),
    )
    head = ["codec", "bytes per label", "teacher alone", "and packed", "slower by, %"]
    head += ["and stored", "slower by, %", "labels packed per s"]
    packed, stored = (
        max(found["rows"], key=lambda row: row[name])
        for name in ("slower_packed_pct", "slower_stored_pct")
    )
    first, slower = found["rows"][0], packed["slower_packed_pct"]
    times = first["repetitions"]
    turns = f"median of {times} in turns" if times > 1 else "once each way, so without a spread"
    return "\n\n".join(
        [
            "### While scores are packed",
            f"{found['device']}, torch {found['torch']}, {found['date']}; `python -m "
            "benchmarks.teacher_scoring --parts packing`: the same shape, "
            f"{found['layers']} layers, {first['tokens']:,} tokens of SYNTH conversations in "
            f"{first['pieces']} calls to the teacher, {turns}; tokens/s. Alone: the teacher says "
            "what the codec asks for, likeliest or drawn ids too. Packed: answers "
            "checked and packed on another thread while the teacher reads on, as `vpmoe score` "
            "does. Stored: the whole stage, which also selects, ranks ids and writes. Labels per "
            "second: checked and packed with nothing beside it, transfers included.",
            table(head, [[row.get(name) for name in names] for row in found["rows"]]),
            f"Packing slows the teacher by {slower:.1f} % at most ({packed['codec']}; bar "
            f"{PACKING_BAR}, {'met' if slower <= PACKING_BAR else 'missed'}). That is an upper "
            "number: the last call's answers are packed with no teacher beside it, here one of "
            f"{first['pieces']}. The whole stage takes {stored['slower_stored_pct']:.1f} % longer "
            f"at most ({stored['codec']}).",
        ]
    )
