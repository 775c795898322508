"""Scoring speed of a teacher of GPT-OSS-20B's shape on one GPU, beside transformers in one run.

python -m benchmarks.teacher_scoring
python -m benchmarks.teacher_scoring --layers 4 --tokens 65536    a quick look
python -m benchmarks.teacher_scoring --parts packing              what packing adds, alone

Weights are random bfloat16 numbers drawn on the GPU, the head's wide enough for distributions of
some three nats; token ids are random; lengths are those of the conversations of a SYNTH sample,
rendered and cut as for training. The peer is the plain forward of transformers and a log-softmax of
its logits in float32, of sequences sorted by length and padded on the right. Its attention, and how
many tokens it takes at a time, are tried out: the best counts. Packing reads the conversations
themselves, through `vpmoe score`'s own path: see benchmarks/teacher_packing.py.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.common import REPOSITORY, RESULTS, Record, write_results
from benchmarks.whole_model import free

SAMPLE = REPOSITORY.parent / "shared" / "data" / "synth" / "synth_sample.parquet"
VOCAB = 201_088
TOP = 64
DRAWS = 32
PEERS = ["eager:8192", "flex_attention:8192", "flex_attention:16384"]
FLOP_PER_TOKEN = 2 * 3_608_307_264  # GPT-OSS-20B's active weights but the input embedding
SHARPNESS = 4.0  # of the head's weights, beside the 0.02 that transformers draws with
PARTS = ("peer", "ours", "packing")
GEMM_FLOPS = 796e12  # measured ceiling of a bf16 product on an H200


def synth_lengths(sample: Path) -> list[int]:
    """Tokens of every conversation of a sample, as `vpmoe data build` writes them."""
    from benchmarks.teacher_packing import conversations

    with tempfile.TemporaryDirectory() as folder:
        dataset = conversations(sample, Path(folder) / "data")
        return [len(dataset.tokens(index)) for index in range(len(dataset))]


def sequences_of(lengths: list[int], budget: int) -> list[np.ndarray]:
    """Random ids of the given lengths, over again until there are about `budget` tokens."""
    random = np.random.default_rng(0)
    total, found = 0, []
    while total < budget:
        length = lengths[len(found) % len(lengths)]
        found.append(random.integers(0, VOCAB, length))
        total += length
    return found


def build(layers: int) -> Any:
    """GPT-OSS-20B with weights drawn on the GPU."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(num_hidden_layers=layers, num_local_experts=32)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = GptOssForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        model.lm_head.weight.mul_(SHARPNESS)
    return model


def timed(work: Callable[[], Any], tokens: int, repetitions: int) -> dict[str, Any]:
    """Tokens per second of whole calls, results on the CPU included; the first is not counted."""
    begin = time.perf_counter()
    work()
    first, times = time.perf_counter() - begin, []
    for _ in range(repetitions):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    times.sort()
    middle = times[len(times) // 2]
    return {
        "tokens_per_s": round(tokens / middle),
        "seconds": round(middle, 4),
        "spread_s": round((times[-1] - times[0]) / 2, 4),
        "repetitions": repetitions,
        "first_call_s": round(first, 1),
        "mfu_pct": round(100 * FLOP_PER_TOKEN * tokens / middle / GEMM_FLOPS, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
    }


def padded_batches(sequences: list[np.ndarray], batch_tokens: int) -> list[list[np.ndarray]]:
    """Neighbors in length, as many as `batch_tokens` hold with padding."""
    batches: list[list[np.ndarray]] = []
    for sequence in sorted(sequences, key=len, reverse=True):
        if batches and len(batches[-1][0]) * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(sequence)
        else:
            batches.append([sequence])
    return batches


@torch.inference_mode()
def score_plainly(model: Any, batches: list[list[np.ndarray]], top: int) -> list[torch.Tensor]:
    """What a user of transformers writes; `top` adds the likeliest tokens by `torch.topk`."""
    found = []
    for batch in batches:
        width = max(map(len, batch))
        tokens = torch.zeros(len(batch), width, dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for row, sequence in enumerate(batch):
            tokens[row, : len(sequence)] = torch.from_numpy(sequence)
            mask[row, : len(sequence)] = 1
        tokens, mask = tokens.cuda(), mask.cuda()
        logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        logprobs = logits[:, :-1].float().log_softmax(dim=-1)
        found.append(logprobs.gather(2, tokens[:, 1:, None])[..., 0].cpu())
        if top:
            found += [part.cpu() for part in logprobs.topk(top, dim=-1)]
    return found


def peer(
    model: Any, sequences: list[np.ndarray], tries: list[str], repetitions: int
) -> Iterator[dict[str, Any]]:
    """transformers, with each attention and number of tokens at a time that is to be tried."""
    import transformers

    tokens, rows = sum(map(len, sequences)), []

    def attempt(attention: str, size: int, top: int) -> dict[str, Any]:
        model.set_attn_implementation(attention)
        batches = padded_batches(sequences, size)
        free()
        row = {
            "part": f"peer, {size}",
            "what": f"transformers {transformers.__version__}, {attention}",
            "reads": f"top-{top}" if top else "log-probs",
            "batch_tokens": size,
            "experts": model.config._experts_implementation,
        }
        try:
            row |= timed(lambda: score_plainly(model, batches, top), tokens, repetitions)
        except torch.OutOfMemoryError:
            row |= {"tokens_per_s": 0, "why": "out of memory"}
        return row

    found = [text.split(":") for text in tries]
    for attention, size in found:
        rows.append(attempt(attention, int(size), 0))
        yield rows[-1]
    best = max(range(len(rows)), key=lambda index: rows[index]["tokens_per_s"])
    yield attempt(found[best][0], int(found[best][1]), TOP)
    model.set_attn_implementation("eager")


def fused(model: Any, size: int) -> Any:
    """The model as a local teacher with fused kernels."""
    from vpmoe.teachers.base import TeacherIdentity
    from vpmoe.teachers.local import LocalTeacher

    identity = TeacherIdentity("random", "", "", "bfloat16", "none", "")
    return LocalTeacher(model, identity=identity, batch_tokens=size, fused=True)


def ours(
    teacher: Any, sequences: list[np.ndarray], size: int, repetitions: int
) -> Iterator[dict[str, Any]]:
    """The local teacher with fused kernels: log-probs, the likeliest ids, draws."""
    tokens = sum(map(len, sequences))
    for reads, work in {
        "log-probs": lambda: teacher.score(sequences),
        f"top-{TOP}": lambda: teacher.score_top(sequences, TOP),
        f"{DRAWS} draws": lambda: teacher.score_sampled(sequences, DRAWS, 0),
    }.items():
        free()
        row = {"part": f"ours, {size}", "what": "vpmoe", "reads": reads, "batch_tokens": size}
        yield row | timed(work, tokens, repetitions)


def pack(teacher: Any, args: argparse.Namespace) -> None:
    """What packing costs, in a file of its own."""
    from benchmarks.teacher_packing import conversations, packing

    free()
    with tempfile.TemporaryDirectory() as folder:
        dataset = conversations(args.sample, Path(folder) / "data")
        options = {"fraction": args.fraction, "repetitions": args.repetitions, "device": "cuda"}
        rows = packing(teacher, dataset, **options)
    about = {"layers": args.layers, "batch_tokens": args.size}
    write_results(args.out.with_name("teacher-packing.json"), rows, **about)


def main() -> None:
    """All on the same weights; what was measured is written after each part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=98_304)
    parser.add_argument("--size", type=int, default=32_768)
    parser.add_argument("--peer", nargs="*", default=PEERS, help="attention:tokens at a time")
    parser.add_argument("--fraction", type=float, default=0.2, help="of the sample, for packing")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--sample", type=Path, default=SAMPLE)
    parser.add_argument("--lengths", type=Path, help="JSON list, instead of rendering the sample")
    parser.add_argument("--out", type=Path, default=RESULTS / "teacher-scoring.json")
    args = parser.parse_args()
    sequences, record = begin(args) if set(args.parts) & {"peer", "ours"} else ([], None)
    model = build(args.layers)
    if "peer" in args.parts:
        for row in peer(model, sequences, args.peer, args.repetitions):
            record.add(row)
    teacher = fused(model, args.size)
    if "packing" in args.parts:
        pack(teacher, args)
    if "ours" in args.parts:
        for row in ours(teacher, sequences, args.size, args.repetitions):
            record.add(row)


def begin(args: argparse.Namespace) -> tuple[list[np.ndarray], Record]:
    """The sequences that both sides read, and the file; each size is a part of its own."""
    given = args.lengths
    known = json.loads(given.read_text()) if given else synth_lengths(args.sample)
    sequences = sequences_of(known, args.tokens)
    lengths = [len(sequence) for sequence in sequences]
    record = Record(
        args.out,
        layers=args.layers,
        sequences=len(lengths),
        tokens=sum(lengths),
        mean_length=round(float(np.mean(lengths)), 1),
        longest=max(lengths),
    )
    return sequences, record


if __name__ == "__main__":
    main()
