"""What all benchmarks share: the device, times of replayed graphs, students, batches, results."""

import gc
import json
import statistics
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
FLUSH_BYTES = 256 << 20  # four times the L2 of an H200


def describe_device() -> dict[str, Any]:
    """What a result must be read with."""
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def free() -> None:
    """Give memory back between measurements."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def qwen3_moe(layers: int, **settings: Any) -> Any:
    """The peer: transformers' Qwen3-MoE of the student's size, on the GPU, random bf16 weights."""
    import transformers

    config = transformers.Qwen3MoeConfig(
        vocab_size=201_088,
        num_hidden_layers=layers,
        hidden_size=1024,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
        num_experts=256,
        num_experts_per_tok=4,
        moe_intermediate_size=88,  # 85 would be equal; grouped_mm wants multiples of 8
        norm_topk_prob=True,
        tie_word_embeddings=False,
        **settings,
    )
    config._attn_implementation = "sdpa"
    config._experts_implementation = "grouped_mm"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = transformers.Qwen3MoeForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model


@dataclass(frozen=True)
class Times:
    """Milliseconds of repetitions."""

    values: list[float]

    def summary(self) -> dict[str, float]:
        """Median, and half the distance between the 10th and the 90th percentile."""
        ordered = sorted(self.values)
        low, high = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
        return {
            "ms": round(statistics.median(ordered), 4),
            "spread_ms": round((high - low) / 2, 4),
            "repetitions": len(ordered),
        }


def graph_times(function: Callable[[], Any], *, repetitions: int = 20) -> Times:
    """Times of a function replayed as a CUDA graph, the L2 flushed before each repetition."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = function()
    return _times(graph.replay, repetitions, kept)


def launch_times(function: Callable[[], Any], *, repetitions: int = 5, warmup: int = 2) -> Times:
    """Times of a function as Python launches it."""
    for _ in range(warmup):
        function()
    return _times(function, repetitions, None)


def kernel_times(function: Callable[[], Any], *, repetitions: int = 5) -> list[dict[str, Any]]:
    """GPU time of each kernel of a function, the longest first; the caches stay as they are."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repetitions):
            function()
        torch.cuda.synchronize()
    found = [
        {
            "kernel": event.key[:80],
            "calls": event.count // repetitions,
            "us": round(event.self_device_time_total / repetitions, 1),
        }
        for event in profile.key_averages()
        if event.self_device_time_total
    ]
    return sorted(found, key=lambda row: -row["us"])


def _times(function: Callable[[], Any], repetitions: int, kept: Any) -> Times:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    values = []
    for _ in range(repetitions):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        values.append(begin.elapsed_time(end))
    del kept
    return Times(values)


def forward_backward(forward: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> Callable:
    """A function that runs forward and backward with one fixed gradient of the output.

    Leaves whose gradient goes into their `main_grad` get none here.
    """
    with torch.no_grad():
        grad = torch.randn_like(forward())
    return lambda: torch.autograd.grad(forward(), leaves, grad, allow_unused=True)


def config_of(name: str, **changes: Any) -> Any:
    """A student's config from configs/models, with changes."""
    from vpmoe.models.config import StudentConfig

    with (REPOSITORY / "configs" / "models" / f"{name}.toml").open("rb") as file:
        return StudentConfig(**(tomllib.load(file) | changes))


def packed_batch(
    rows: int, seq: int, *, vocab: int, documents: int = 4, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Random tokens, each row with documents of random lengths; labels are the next tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab, (rows, seq + 1), generator=generator)
    cuts = torch.rand(rows, documents - 1, generator=generator).mul(seq).long()
    place = torch.arange(seq)
    document_ids = (place[None, :, None] >= cuts[:, None, :]).sum(dim=2)
    document_ids -= document_ids[:, :1].clone()
    # Two cuts at one place would skip a number; numbers must count through.
    steps = torch.nn.functional.pad((document_ids.diff(dim=1) > 0).long(), (1, 0))
    document_ids = steps.cumsum(dim=1)
    starts = torch.where(steps > 0, place, 0).cummax(dim=1).values
    found = {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "document_ids": document_ids,
        "positions": place - starts,
    }
    return {name: value.cuda() for name, value in found.items()}


def write_results(path: Path, rows: list[dict[str, Any]], **extra: Any) -> None:
    """Rows with the device they were measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**describe_device(), **extra, "rows": rows}, indent=1) + "\n")


def kept_rows(path: Path, **about: Any) -> list[dict[str, Any]]:
    """Rows of an earlier result, for a command that measures a part again.

    Raises:
        SystemExit: Device, versions or what else is said of all rows differ: one header would lie,
            and to write over them would lose them.
    """
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    now = {**describe_device(), **about}
    others = [
        f"{name} {found.get(name)}, not {value}"
        for name, value in now.items()
        if name != "date" and found.get(name) != value
    ]
    if others:
        sys.exit(f"{path} has rows of {'; '.join(others)}: move it away, or give another --out")
    return found["rows"]


class Record:
    """Rows of a results file of which a command measures some parts, each written at once.

    A part's first new row takes the place of all its earlier ones; parts that are not measured keep
    theirs. A row has the time at which its run began: two of one run were measured side by side.
    """

    def __init__(self, path: Path, **about: Any) -> None:
        self.path, self.about = path, about
        self.rows, self.renewed = kept_rows(path, **about), set[str]()
        if not all("part" in row for row in self.rows):
            sys.exit(f"{path} has rows of no part: move it away, or give another --out")
        self.run = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

    def add(self, row: dict[str, Any]) -> None:
        """A row, which names its part."""
        print(row, flush=True)
        if row["part"] not in self.renewed:
            self.renewed.add(row["part"])
            self.rows = [other for other in self.rows if other["part"] != row["part"]]
        self.rows.append({**row, "run": self.run})
        write_results(self.path, self.rows, **self.about)


def loss_of(student: Any, batch: dict[str, torch.Tensor], *, chunk_rows: int) -> torch.Tensor:
    """Cross-entropy of all labels of a batch and the routers' auxiliary loss."""
    from vpmoe.losses.base import LossInputs
    from vpmoe.losses.cross_entropy import CrossEntropyConfig
    from vpmoe.losses.load_balance import load_balance_loss

    output = student(
        batch["tokens"], positions=batch["positions"], document_ids=batch["document_ids"]
    )
    labels = batch["labels"].flatten()
    inputs = LossInputs(
        hidden=output.hidden.flatten(0, 1),
        head_weight=student.head_weight,
        labels=labels,
        span_ids=torch.ones_like(labels, dtype=torch.uint8),
        content_mask=torch.ones_like(labels, dtype=torch.bool),
    )
    scales = torch.tensor([0.0, 1 / labels.numel(), 0.0], device=labels.device)
    result = CrossEntropyConfig(chunk_rows=chunk_rows).build()(inputs, scales)
    balance = load_balance_loss(
        output.load_balance_sum, coefficient=1e-4, num_documents=output.num_documents
    )
    return result.total + balance
