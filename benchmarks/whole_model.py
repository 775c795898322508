"""Training speed of the whole student on one GPU, beside the best peer in the same run.

python -m benchmarks.whole_model --data data/tiny-real       the 80 layers and the peer
python -m benchmarks.whole_model --data … --layers 8         a quick look

Each part runs in a process of its own. The student goes through the trainer's own path (Megatron-
Core's float32 sums of gradients, graphs, NorMuon) and is trained on real rows first, so that its
routers have begun to balance; speeds count tokens of documents, not padding. The peer is
transformers' Qwen3-MoE of equal size, every layer compiled, on random tokens: it attends over whole
rows and knows no documents.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.agreement import agreement_on_data
from benchmarks.common import (
    REPOSITORY,
    RESULTS,
    Times,
    free,
    kept_rows,
    launch_times,
    packed_batch,
    qwen3_moe,
    write_results,
)

SEQ = 2048
CHUNK_ROWS = 4096
FLOP_PER_TOKEN = 3.79e9  # the 80-layer student's, forward and backward, attention at half
GEMM_FLOPS = 796e12  # measured ceiling of a bf16 product on an H200
STEP_TOKENS = 524_288
Rows = Iterator[dict[str, Any]]
FIRST_PASS = "first pass"
WARM_STEPS = 30  # optimizer steps of one micro-batch before anything is timed


def row_of(what: str, tokens: int, times: Times, **more: Any) -> dict[str, Any]:
    """One line of the table."""
    summary = times.summary()
    row = {"what": what, "tokens": tokens, **summary}
    if tokens:
        row["tokens_per_s"] = round(tokens / summary["ms"] * 1e3)
    # Reserved, not allocated: a captured pass holds its memory without owning tensors.
    row |= {"peak_gib": round(torch.cuda.max_memory_reserved() / 2**30, 1), **more}
    return row


@dataclass
class Trainee:
    """A student on the trainer's path, and what feeds it."""

    student: Any
    replica: Any
    loader: Any
    loss: Any
    config: Any
    row: int = 0
    steps: int = 0

    def micro_batches(self, tokens: int, slots: int) -> list[Any]:
        """The stream's next slots in micro-batches of so many tokens; the last may be smaller."""
        rows, end = tokens // SEQ, self.row + slots // SEQ
        begins = range(self.row, end, rows)
        self.row = end
        return [self.loader.batch(begin, min(rows, end - begin)) for begin in begins]

    def step(self, tokens: int, slots: int) -> tuple[int, dict[str, float]]:
        """One optimizer step; tokens of documents, and seconds of its parts."""
        from vpmoe.train.step import apply_gradients, sum_gradients

        marks = [time.perf_counter()]
        batches = self.micro_batches(tokens, slots)
        marks.append(time.perf_counter())
        summed = sum_gradients(self.replica, batches, self.loss, self.config)
        torch.cuda.synchronize()
        marks.append(time.perf_counter())
        self.loads = torch.stack([r.local_tokens_per_expert for r in self.student.routers()])
        steps = self.config.budget.steps
        self.metrics = apply_gradients(self.replica, self.config, step=self.steps, num_steps=steps)
        self.steps = min(self.steps + 1, steps - 1)
        torch.cuda.synchronize()
        marks.append(time.perf_counter())
        names = ("data", "forward_backward", "optimizer")
        parts = {n: b - a for n, a, b in zip(names, marks, marks[1:], strict=False)}
        self.metrics |= summed.metrics()
        return summed.num_tokens, parts

    def pass_over(self, batch: Any, *, graphed: bool) -> Callable[[], None]:
        """Forward and backward of one micro-batch into the float32 sums."""
        from vpmoe.train.graph import GraphedStudent, forward
        from vpmoe.train.step import loss_inputs

        replay = GraphedStudent(self.student, self.replica.after_backward)
        documents, here = batch.num_documents, batch.to("cuda")
        scales = torch.tensor([0.0, 1.0, 1.0], device="cuda") / batch.tokens.numel()

        def run() -> None:
            output = replay(here, documents) if graphed else forward(self.student, here, documents)
            total = self.loss(loss_inputs(self.student, here, output), scales).total
            (total + output.load_balance_sum * (1e-4 / documents)).backward()
            self.replica.after_backward()

        return run

    def busiest(self) -> dict[str, float]:
        """Load of a layer's busiest expert over the mean, in the last step."""
        ratio = self.loads.amax(dim=1) / self.loads.mean(dim=1)
        return {
            "busiest_expert_over_mean": round(float(ratio.max()), 2),
            "busiest_expert_over_mean_median_layer": round(float(ratio.median()), 2),
        }


def config_with(**changes: Any) -> Any:
    """configs/one-gpu/1-warm-start.toml, as `vpmoe train` reads it, with changes."""
    from vpmoe.config import load
    from vpmoe.stages.warm_start import WarmStartConfig

    words = [f"{key}={value}" for key, value in changes.items()]
    return load(REPOSITORY / "configs/one-gpu/1-warm-start.toml", WarmStartConfig, words)


@contextmanager
def trainee(args: argparse.Namespace, **changes: Any) -> Iterator[Trainee]:
    """A fresh student under the trainer's replica, inside a stream for graphs."""
    from vpmoe.data.dataset import Dataset
    from vpmoe.data.loader import PackedLoader
    from vpmoe.losses.cross_entropy import CrossEntropyConfig
    from vpmoe.models.student import build_student
    from vpmoe.train.device import world
    from vpmoe.train.graph import graph_stream
    from vpmoe.train.parallel import Replica

    config = config_with(**changes)
    student_config = config.student.model_copy(update={"num_layers": args.layers})
    with world("cuda") as ranks, graph_stream(ranks.device):
        student = build_student(
            student_config,
            seed=0,
            device="cuda",
            dtype=torch.bfloat16,
            kernels="fused",
        )
        student.train()
        replica = Replica(student, config.optimizer, ranks, cuda_graph=True)
        loader = PackedLoader(Dataset(args.data, "train"), seq_len=SEQ, seed=0)
        loss = CrossEntropyConfig(chunk_rows=CHUNK_ROWS).build()
        yield Trainee(student, replica, loader, loss, config)


def ours(args: argparse.Namespace) -> Rows:
    """Whole steps, the optimizer alone, forward and backward replayed and launched, long rows.

    All of it beside the optimizer's state, as in training; then the sampler beside the trainer.
    """
    from vpmoe.data.dataset import Dataset

    with trainee(args) as it:
        for _ in range(args.warm_steps):
            it.step(args.step_tokens, args.step_tokens)
        names = ("train/loss/reasoning", "router/max_load_pct", "router/dead_experts")
        seen = {name: round(float(it.metrics[name]), 3) for name in names}
        print(seen, flush=True)
        warmed = {"optimizer_steps_before": args.warm_steps, **seen, **it.busiest()}
        yield whole_steps(it, args, warmed)
        yield optimizer_row(it, args.step_tokens)
        batches = [it.micro_batches(tokens, tokens)[0] for tokens in sorted(args.tokens)]
        batches.append(long_batch(args, vocab=it.student.config.num_rows))
        it.replica.drop_graphs()  # beside their memory another shape's would not fit
        for batch in batches:
            free()
            kept = activation_bytes(it, batch) / batch.num_tokens / args.layers / 1e3
            more = warmed | {"activation_kb_per_token_and_layer": round(kept, 1)}
            yield pass_row(it, args, batch, more, graphed=False)
            yield pass_row(it, args, batch, warmed, graphed=True)
        it.replica.optimizer = None
        free()
        yield from agreement_on_data(it.student, Dataset(args.data, "valid"))


def pass_row(
    it: Trainee, args: argparse.Namespace, batch: Any, more: dict[str, Any], *, graphed: bool
) -> dict[str, Any]:
    """Forward and backward of one micro-batch, replayed or launched."""
    free()
    run = it.pass_over(batch, graphed=graphed)
    times = launch_times(run, repetitions=args.repetitions, warmup=3)
    tokens, seq = batch.num_tokens, batch.tokens.shape[1]
    if args.layers == 80 and seq == SEQ:
        mfu = FLOP_PER_TOKEN * tokens / times.summary()["ms"] * 1e3 / GEMM_FLOPS
        more = {"mfu_pct": round(100 * mfu, 1), **more}
    long = "" if seq == SEQ else f", rows of {seq:,} with one document"
    how = {"how": "graph" if graphed else "launched", "slots": batch.tokens.numel()}
    return row_of(f"student, forward+backward{long}", tokens, times, **how, **more)


def activation_bytes(it: Trainee, batch: Any) -> int:
    """What a forward pass leaves in memory for its backward pass, all layers and the rest."""
    from vpmoe.train.graph import forward

    here = batch.to("cuda")
    forward(it.student, here, batch.num_documents)
    free()
    before = torch.cuda.memory_allocated()
    output = forward(it.student, here, batch.num_documents)
    kept = torch.cuda.memory_allocated() - before
    del output
    return kept


def optimizer_row(it: Trainee, tokens: int) -> dict[str, Any]:
    """One step of NorMuon and AdamW over all parameters, with the load of the last step."""
    from vpmoe.train.step import sum_gradients

    sum_gradients(it.replica, it.micro_batches(tokens, tokens), it.loss, it.config)
    counts = it.replica.sum_expert_counts()
    free()
    times = launch_times(lambda: it.replica.update(1e-3, counts), repetitions=5)
    size = sum(p.numel() for p in it.student.parameters())
    norms = launch_times(it.replica.gradient_norms, repetitions=5)
    more = {"parameters": size, "gradient_norms_ms": norms.summary()["ms"]}
    return row_of("NorMuon + AdamW step", 0, times, **more, momentum="bfloat16")


def whole_steps(it: Trainee, args: argparse.Namespace, warmed: dict[str, Any]) -> dict[str, Any]:
    """524,288 slots: data, micro-batches, float32 sums, norms, optimizer, router biases."""
    tokens = args.step_tokens
    for slots in (tokens, STEP_TOKENS % tokens):
        if slots:  # every shape is launched twice, then captured
            it.step(slots, 4 * slots)
    values, parts, seen = [], {}, 0
    for _ in range(args.steps):
        seen, parts = it.step(tokens, STEP_TOKENS)
        values.append(1e3 * sum(parts.values()))
    parts = {f"{name}_ms": round(1e3 * s, 1) for name, s in parts.items()}
    more = {"slots": STEP_TOKENS, "micro_batch_slots": tokens, **parts, **warmed, **it.busiest()}
    return row_of("whole step", seen, Times(values), **more)


def long_batch(args: argparse.Namespace, *, vocab: int) -> Any:
    """Rows of 8,192 tokens, one random document each."""
    from vpmoe.batch import Batch

    arrays = packed_batch(max(args.tokens) // 8192, 8192, vocab=vocab, documents=1)
    return Batch(**arrays, span_ids=torch.ones_like(arrays["labels"], dtype=torch.uint8))


def start(args: argparse.Namespace) -> Rows:
    """Seconds of the first pass, with whatever the compilers' caches hold."""
    args.layers = min(args.layers, 8)
    with trainee(args) as it:
        run = it.pass_over(it.micro_batches(min(args.tokens), min(args.tokens))[0], graphed=False)
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    yield {"what": FIRST_PASS, "caches": args.caches, "s": round(seconds, 1), "layers": args.layers}


def peer(args: argparse.Namespace) -> Rows:
    """Qwen3-MoE of equal size in transformers: grouped_mm experts, each layer compiled."""
    model, what = peer_model(args.layers)
    for tokens in args.peer_tokens:
        ids = torch.randint(0, 201_088, (tokens // SEQ, SEQ), device="cuda")

        def run(ids: torch.Tensor = ids) -> None:
            model.zero_grad()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

        try:
            free()
            begin = time.perf_counter()
            run()
            torch.cuda.synchronize()
            first = round(time.perf_counter() - begin, 1)
            times = launch_times(run, repetitions=args.repetitions)
        except torch.OutOfMemoryError:
            model.zero_grad()
            print("out of memory", tokens, flush=True)
            yield {"what": what, "tokens": tokens, "ms": None, "why": "out of memory"}
            continue
        yield row_of(what, tokens, times, first_step_s=first)


def peer_model(layers: int) -> tuple[Any, str]:
    """The peer on the GPU, and what to call it."""
    import transformers

    model = qwen3_moe(layers, use_cache=False)
    for layer in model.model.layers:
        layer.compile(dynamic=False)
    return model, f"transformers {transformers.__version__} Qwen3-MoE, compiled"


PARTS = {"ours": ours, "peer": peer, "start": start}


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="a built dataset, rows of 2,048")
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16_384, 32_768])
    parser.add_argument("--step-tokens", type=int, default=32_768, help="a micro-batch of a step")
    parser.add_argument("--peer-tokens", type=int, nargs="+", default=[8_192, 16_384])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="whole steps to time")
    parser.add_argument("--warm-steps", type=int, default=WARM_STEPS)
    parser.add_argument("--parts", nargs="+", default=["start", "ours", "peer"], choices=PARTS)
    parser.add_argument("--out", type=Path, default=RESULTS / "whole-model.json")
    parser.add_argument("--caches", default="", help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=PARTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def lanes_of(parts: list[str], gpus: list[str]) -> list[tuple[list[str], str]]:
    """Which parts run one after the other, and on which GPU (empty: the only one)."""
    if len(gpus) < 2 or len(parts) < 2:
        return [(parts, gpus[0])]
    return [(parts[:1], gpus[0]), (parts[1:], gpus[1])]


def run_parts(parts: list[str], gpu: str, keep: Callable[[list[dict[str, Any]]], None]) -> None:
    """Parts one after the other on one GPU; `keep` gets the rows of each as it ends."""
    chosen = {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
    for part in parts:
        if part == "start":
            with tempfile.TemporaryDirectory() as empty:
                caches = {"TORCHINDUCTOR_CACHE_DIR": empty, "TRITON_CACHE_DIR": empty}
                for found in ("empty", "full"):
                    keep(run_part(part, f"--caches={found}", **chosen, **caches))
        else:
            keep(run_part(part, **chosen))


def part_of(row: dict[str, Any]) -> str:
    """Which part measured a row."""
    if row.get("failed"):
        return row["what"]
    if row["what"] == FIRST_PASS:
        return "start"
    return "peer" if row["what"].startswith("transformers") else "ours"


def run_part(part: str, *words: str, **environment: str) -> list[dict[str, Any]]:
    """A part in a process of its own: nothing is left of it in the GPU's memory."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        extra = [f"--only={part}", f"--out={out}", *words]
        command = [sys.executable, "-m", "benchmarks.whole_model", *sys.argv[1:], *extra]
        subprocess.run(command, env=os.environ | environment, cwd=REPOSITORY, check=False)
        if not out.exists():
            return [{"what": part, "failed": True}]
        return json.loads(out.read_text())["rows"]


def main() -> None:
    """Run the parts that were asked for; write after each, beside what is kept of the others."""
    args = arguments()
    about, rows = {"layers": args.layers, "seq": SEQ}, list[dict[str, Any]]()
    if args.only:
        for row in PARTS[args.only](args):
            rows.append(row)
            print(row, flush=True)
            write_results(args.out, rows, **about)
        return
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    parts = [p for p in ("ours", "start", "peer") if p in args.parts]
    kept = [row for row in kept_rows(args.out, **about) if part_of(row) not in parts]
    turn = threading.Lock()

    def keep(found: list[dict[str, Any]]) -> None:
        with turn:
            rows.extend(found)
            write_results(args.out, [*kept, *rows], **about, gpus_at_once=len(lanes))

    lanes = lanes_of(parts, gpus)
    with ThreadPoolExecutor(max_workers=len(lanes)) as pool:
        # A second GPU takes the rest while the first trains the student.
        for lane in as_completed([pool.submit(run_parts, *lane, keep) for lane in lanes]):
            lane.result()


if __name__ == "__main__":
    main()
