"""Times and memory of every loss on the 6 B student's head, forward and backward, in one run.

python -m benchmarks.losses                    16,384 tokens, 201,088 ids, 64 entries

Launched from Python, as in training; medians. A loss on a teacher's states multiplies them with the
teacher's head as well: its floor is cross-entropy's time plus that product's, measured alone.
"""

import argparse
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.common import RESULTS, launch_times, write_results

from vpmoe.losses import (
    ConfidenceWeightedConfig,
    CrossEntropyConfig,
    ForwardKLConfig,
    GeneralizedJSDConfig,
    LossInputs,
    RandomSamplingConfig,
    ReverseKLConfig,
    SampledReverseKLConfig,
    SkewedForwardKLConfig,
    SkewedReverseKLConfig,
)

DIM, TEACHER_DIM, VOCAB, ENTRIES = 1024, 2880, 201_088, 64
ROWS: list[dict[str, Any]] = []

LOSSES = {
    "cross-entropy": CrossEntropyConfig(),
    "confidence-weighted": ConfidenceWeightedConfig(),
    "sampled reverse KL": SampledReverseKLConfig(),
    "forward KL, top-64 and tail": ForwardKLConfig(),
    "forward KL, top-64, temperature 2": ForwardKLConfig(temperature=2.0),
    "forward KL, top-64, label mix": ForwardKLConfig(label_weight=0.1),
    "forward KL, top-64, temperature 2, label mix": ForwardKLConfig(
        temperature=2.0, label_weight=0.1
    ),
    "forward KL, top-64, tail by its prior": ForwardKLConfig(tail="prior"),
    "reverse KL, top-64": ReverseKLConfig(),
    "generalised JSD, top-64": GeneralizedJSDConfig(),
    "skewed forward KL, top-64": SkewedForwardKLConfig(),
    "skewed reverse KL, top-64": SkewedReverseKLConfig(),
    "random sampling, 12 ids": RandomSamplingConfig(),
}

EXACT = {
    "forward KL, teacher's states": ForwardKLConfig(against="hidden"),
    "forward KL, teacher's states, temperature 2, label mix": ForwardKLConfig(
        against="hidden", temperature=2.0, label_weight=0.1
    ),
    "reverse KL, teacher's states": ReverseKLConfig(against="hidden"),
    "generalised JSD, teacher's states": GeneralizedJSDConfig(against="hidden"),
    "skewed forward KL, teacher's states": SkewedForwardKLConfig(against="hidden"),
    "skewed reverse KL, teacher's states": SkewedReverseKLConfig(against="hidden"),
}


def make_inputs(tokens: int) -> LossInputs:
    """States, heads and targets; ids are distinct in each row."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, DIM, device="cuda").bfloat16().requires_grad_()
    head = (torch.randn(VOCAB, DIM, device="cuda") * 0.03).bfloat16().requires_grad_()
    stride = VOCAB // ENTRIES
    ids = torch.randint(0, stride, (tokens, ENTRIES), device="cuda")
    ids += stride * torch.arange(ENTRIES, device="cuda")
    mass = torch.randn(tokens, ENTRIES + 1, device="cuda").mul(2).log_softmax(dim=1)
    return LossInputs(
        hidden=hidden,
        head_weight=head,
        labels=torch.randint(0, VOCAB, (tokens,), device="cuda"),
        span_ids=torch.ones(tokens, dtype=torch.uint8, device="cuda"),
        content_mask=torch.ones(tokens, dtype=torch.bool, device="cuda"),
        teacher_logprobs=-torch.rand(tokens, device="cuda"),
        rollout_logprobs=-torch.rand(tokens, device="cuda"),
        target_ids=ids,
        target_logprobs=mass[:, :-1].contiguous(),
        target_tail=mass[:, -1].contiguous(),
        target_prior=torch.randn(VOCAB, device="cuda").log_softmax(0),
        target_cap=mass[:, :-1].amin(dim=1),
    )


def measure(what: str, run: Callable[[], Any], base_ms: float | None, **more: Any) -> float:
    """One line of the table; its milliseconds."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    times = launch_times(run, repetitions=7)
    row = {"what": what, **times.summary(), "peak_gib": round(peak, 2), **more}
    if base_ms is not None:
        row["ratio_to_cross_entropy"] = round(row["ms"] / base_ms, 3)
    ROWS.append(row)
    print(row, flush=True)
    return float(row["ms"])


def stored(inputs: LossInputs, chunk_rows: int) -> float:
    """Losses on labels and stored targets; milliseconds of cross-entropy."""
    scales = torch.tensor([0.0, 1 / len(inputs.labels), 0.0], device="cuda")
    drawn = {
        "target_ids": inputs.target_ids[:, :12].contiguous(),
        "target_logprobs": inputs.target_logprobs[:, :12].log_softmax(dim=1),
    }
    base = None
    for name, config in LOSSES.items():
        loss = type(config)(**dict(config) | {"chunk_rows": chunk_rows}).build()
        given = inputs
        if "sampling" in name:
            given = LossInputs(**dict(vars(inputs)) | drawn)

        def run(loss: Any = loss, given: LossInputs = given) -> Any:
            total = loss(given, scales).total
            return torch.autograd.grad(total, [given.hidden, given.head_weight])

        ms = measure(name, run, base, part="stored")
        base = ms if base is None else base
    return base or 0.0


def exact(inputs: LossInputs, chunk_rows: int, base_ms: float) -> None:
    """Losses on a teacher's states, beside the time of the product they cannot do without."""
    states = torch.randn(len(inputs.labels), TEACHER_DIM, device="cuda").bfloat16()
    teacher_head = (torch.randn(VOCAB, TEACHER_DIM, device="cuda") * 0.02).bfloat16()
    given = LossInputs(
        **dict(vars(inputs)) | {"teacher_hidden": states, "teacher_head": teacher_head}
    )
    scales = torch.tensor([0.0, 1 / len(inputs.labels), 0.0], device="cuda")
    product = launch_times(
        lambda: [chunk @ teacher_head.T for chunk in states.split(chunk_rows)], repetitions=7
    )
    floor = base_ms + product.summary()["ms"]
    ROWS.append({"what": "teacher's head alone", **product.summary(), "part": "exact"})
    for name, config in EXACT.items():
        loss = type(config)(**dict(config) | {"chunk_rows": chunk_rows}).build()

        def run(loss: Any = loss) -> Any:
            total = loss(given, scales).total
            return torch.autograd.grad(total, [given.hidden, given.head_weight])

        ms = measure(name, run, base_ms, part="exact", floor_ms=round(floor, 2))
        ROWS[-1]["ratio_to_floor"] = round(ms / floor, 3)
        print(ROWS[-1]["ratio_to_floor"], flush=True)


def peers(inputs: LossInputs, base_ms: float) -> None:
    """Cross-entropy as a user would write it, in compiled and checkpointed chunks."""
    hidden, weight, labels = inputs.hidden, inputs.head_weight, inputs.labels

    def part(rows: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
        logits = (rows @ weight.T).float()
        return torch.nn.functional.cross_entropy(logits, of, reduction="sum")

    compiled = torch.compile(part, dynamic=False)

    def run() -> Any:
        parts = zip(hidden.split(4096), labels.split(4096), strict=True)
        again = torch.utils.checkpoint.checkpoint
        loss = sum(again(compiled, rows, of, use_reentrant=False) for rows, of in parts)
        return torch.autograd.grad(loss, [hidden, weight])

    measure("cross-entropy, compiled and checkpointed", run, base_ms, part="peer")


def main() -> None:
    """Measure everything; write after each part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--chunk-rows", type=int, default=4096)
    parser.add_argument("--out", type=Path, default=RESULTS / "losses.json")
    args = parser.parse_args()
    inputs = make_inputs(args.tokens)
    base = stored(inputs, args.chunk_rows)
    exact(inputs, args.chunk_rows, base)
    write_results(args.out, ROWS, tokens=args.tokens, vocab=VOCAB, chunk_rows=args.chunk_rows)
    peers(inputs, base)
    write_results(args.out, ROWS, tokens=args.tokens, vocab=VOCAB, chunk_rows=args.chunk_rows)


if __name__ == "__main__":
    main()
