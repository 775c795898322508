"""Sampling speed of the whole student on one GPU, beside the best peer in the same run.

python -m benchmarks.sampling                   the 80 layers, the peer
python -m benchmarks.sampling --layers 8        a quick look
python -m benchmarks.sampling --parts variants  a step under other settings
python -m benchmarks.sampling --parts agreement --run runs/demo/3-on-policy --out FILE

Random weights and tokens. The peer is transformers' Qwen3-MoE of equal size with a static cache,
which compiles itself. Tokens per second count written tokens over the whole call, prompts included.
With `even` routing selection biases spread the tokens over the experts, as in training, whatever
routers as they are drawn do. Parts that are not asked for keep their rows.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.agreement import agreement, agreement_of_run
from benchmarks.common import (
    RESULTS,
    Record,
    config_of,
    describe_device,
    free,
    graph_times,
    qwen3_moe,
)
from benchmarks.sampling_steps import (
    NEW,
    PROMPT,
    bare,
    conversations,
    even_routing,
    experts_in_use,
    kernels,
    random_prompts,
    variants,
)

BATCHES = (1, 8, 64, 256)
SLOTS = 64
USUAL = ("speed", "continuous", "agreement", "memory", "steps", "peer")
PARTS = (*USUAL, "variants")


def seconds(function: Callable[[], Any], *, repetitions: int = 3) -> float:
    """Median wall time, after one call that is not counted."""
    times = []
    for _ in range(repetitions + 1):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def student_of(layers: int) -> Any:
    """The student with random weights."""
    from vpmoe.models.student import build_student

    config = config_of("vpmoe-6b", num_layers=layers)
    return build_student(config, seed=0, device="cuda", dtype=torch.bfloat16, kernels="fused")


@torch.no_grad()
def speed(student: Any, batch: int) -> dict[str, Any]:
    """A batch of equal prompts and lengths: whole calls, and one step and one prompt pass alone."""
    from vpmoe.rollouts.sampler import Sampler

    prompts = random_prompts(batch, PROMPT)
    sampler = Sampler(student, max_batch=batch)

    def write() -> None:
        sampler.generate(prompts, max_new_tokens=NEW, seed=1, stop_tokens=())

    first = time.perf_counter()
    write()
    first = time.perf_counter() - first
    free()
    whole = seconds(write)
    peak = torch.cuda.max_memory_allocated() / 2**30
    sampler.release()
    slots, every = conversations(student, batch), range(batch)
    reading = seconds(lambda: slots.admit(every, prompts, every, [NEW] * batch))
    slots.advance(NEW // 2)
    step = graph_times(slots._step).summary()
    return {
        "what": "student",
        "batch": batch,
        "tokens_per_s": round(batch * NEW / whole),
        "seconds": round(whole, 3),
        "step_ms": step["ms"],
        "step_spread_ms": step["spread_ms"],
        "steps_alone_tokens_per_s": round(batch / step["ms"] * 1e3),
        "prompts_ms": round(reading * 1e3, 1),
        "first_call_s": round(first, 1),
        "peak_gib": round(peak, 1),
        "experts_in_use": experts_in_use(slots._step),
    }


@torch.no_grad()
def continuous(student: Any, *, prompts: int, slots: int) -> Iterator[dict[str, Any]]:
    """Completions of geometric lengths: slots that fill up again, and batches that wait."""
    from vpmoe.rollouts.sampler import Sampler

    rng = np.random.default_rng(0)
    limits = np.clip(rng.geometric(1 / NEW, prompts), 1, 4 * NEW).tolist()
    questions = random_prompts(prompts, PROMPT)
    sampler = Sampler(student, max_batch=slots)

    def flowing() -> None:
        sampler.generate(questions, max_new_tokens=limits, seed=1, stop_tokens=())

    def waiting() -> None:
        for begin in range(0, prompts, slots):
            part = slice(begin, begin + slots)
            sampler.generate(questions[part], max_new_tokens=limits[part], seed=1, stop_tokens=())

    for what, function in (("continuous", flowing), ("batch after batch", waiting)):
        took = seconds(function, repetitions=1)
        yield {
            "what": what,
            "slots": slots,
            "prompts": prompts,
            "tokens": sum(limits),
            "longest": max(limits),
            "seconds": round(took, 2),
            "tokens_per_s": round(sum(limits) / took),
        }


def memory_after(student: Any) -> dict[str, Any]:
    """Memory that a round of sampling leaves behind."""
    from vpmoe.rollouts.sampler import Sampler

    free()
    before = torch.cuda.memory_reserved()
    sampler = Sampler(student, max_batch=64)
    sampler.generate(random_prompts(64, PROMPT), max_new_tokens=32)
    during = torch.cuda.max_memory_reserved()
    sampler.release()
    return {
        "what": "memory",
        "before_gib": round(before / 2**30, 2),
        "during_gib": round(during / 2**30, 2),
        "after_gib": round(torch.cuda.memory_reserved() / 2**30, 2),
    }


@torch.no_grad()
def peer(layers: int, *, batch: int) -> dict[str, Any]:
    """Qwen3-MoE of equal size in transformers, static cache, which it compiles."""
    import transformers

    model = qwen3_moe(layers).eval()
    ids = torch.from_numpy(np.stack(random_prompts(batch, PROMPT))).cuda()

    def write() -> None:
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            cache_implementation="static",
            pad_token_id=0,
        )

    first = time.perf_counter()
    write()
    first = time.perf_counter() - first
    took = seconds(write, repetitions=2)
    return {
        "what": f"transformers {transformers.__version__} Qwen3-MoE, static cache, greedy",
        "batch": batch,
        "tokens_per_s": round(batch * NEW / took),
        "seconds": round(took, 3),
        "first_call_s": round(first, 1),
    }


Rows = Iterator[dict[str, Any]]


def of_student(args: argparse.Namespace) -> Rows:
    """What is measured of the student, with the part that it belongs to."""
    student, parts = student_of(args.layers), args.parts
    yield from measured(student, args, routing="random")
    if "agreement" in parts:
        yield from named("agreement", agreement(student))
    if "memory" in parts:
        yield from named("memory", [memory_after(student)])
    if set(parts) & {"speed", "continuous", "steps", "variants"}:
        with even_routing(student, SLOTS):
            yield from measured(student, args, routing="even")
            if "steps" in parts:
                steps = (bare(student, batch) for batch in args.batches)
                yield from named("steps", steps, routing="even")
                yield from named("steps", kernels(student, SLOTS), routing="even")
            if "variants" in parts:
                yield from named("variants", variants(student, SLOTS), routing="even")


def measured(student: Any, args: argparse.Namespace, *, routing: str) -> Rows:
    """What is measured with either routing."""
    if "speed" in args.parts:
        rows = (speed(student, batch) for batch in args.batches)
        yield from named("speed", rows, routing=routing)
    if "continuous" in args.parts:
        rows = continuous(student, prompts=512, slots=SLOTS)
        yield from named("continuous", rows, routing=routing)


def named(part: str, rows: Iterable[dict[str, Any]], **more: Any) -> Rows:
    """Rows with the part that they belong to."""
    for row in rows:
        yield {"part": part, **row, **more}
        free()


def main() -> None:
    """Run the parts that were asked for; write after each row, beside what is kept of others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(USUAL))
    parser.add_argument("--run", type=Path, help="a trained student, for agreement")
    parser.add_argument("--out", type=Path, default=RESULTS / "sampling.json")
    args = parser.parse_args()
    record = Record(args.out, layers=args.layers, prompt=PROMPT, new=NEW)
    print(describe_device())
    for row in measured_all(args):
        record.add(row)


def measured_all(args: argparse.Namespace) -> Rows:
    """Everything that was asked for."""
    if set(args.parts) - {"peer"}:
        yield from of_student(args)
        free()  # the peer is alone, so that the student's memory is free
    if "agreement" in args.parts and args.run:
        yield from named("agreement", agreement_of_run(args.run))
    if "peer" in args.parts:
        yield from named("peer", [peer(args.layers, batch=SLOTS)])


if __name__ == "__main__":
    main()
