"""Sampling speed of the whole student on one GPU, beside the best peer in the same run.

python -m benchmarks.sampling                   the 80 layers, the peer
python -m benchmarks.sampling --layers 8        a quick look
python -m benchmarks.sampling --parts agreement --run runs/demo/3-on-policy --out FILE

Random weights and tokens. The peer is transformers' Qwen3-MoE of equal size with a static cache,
which compiles itself. Tokens per second count written tokens over the whole call, prompts included.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.agreement import agreement, agreement_of_run
from benchmarks.common import (
    RESULTS,
    config_of,
    describe_device,
    free,
    graph_times,
    qwen3_moe,
    write_results,
)

PROMPT = 128
NEW = 128
BATCHES = (1, 8, 64, 256)


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


def random_prompts(count: int, length: int, *, seed: int = 0) -> list[np.ndarray]:
    """Prompts of one length."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 199_000, length) for _ in range(count)]


def student_of(layers: int) -> Any:
    """The student with random weights."""
    from vpmoe.models.student import build_student

    config = config_of("vpmoe-6b", num_layers=layers)
    return build_student(config, seed=0, device="cuda", dtype=torch.bfloat16, kernels="fused")


@torch.no_grad()
def balanced_step(student: Any, batch: int, *, rounds: int = 200) -> dict[str, Any]:
    """One step alone, once the selection biases have spread the tokens over the experts.

    The deep layers of a random student send all tokens to the same few experts, which makes
    sampling look cheap: it is the weights in use that are read. Training moves the biases so.
    """
    from vpmoe.kernels import decode_experts
    from vpmoe.models.router import shifted_expert_bias
    from vpmoe.rollouts.draw import Draw
    from vpmoe.rollouts.slots import Slots

    slots = Slots(student, Draw(1.0, 1.0, 1), (), slots=batch, capacity=PROMPT + NEW)
    slots._places += PROMPT
    slots._streams += torch.arange(batch, device="cuda") << 32
    for layer in slots.decoder.cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
    choose = decode_experts.choose_experts
    in_use: list[int] = []

    def balancing(*arguments: Any) -> None:
        choose(*arguments)
        bias, ids = arguments[2], arguments[5]
        loads = ids.flatten().long().bincount(minlength=len(bias)).float()
        bias.copy_(shifted_expert_bias(bias, loads, rate=rate))
        in_use.append(int((loads > 0).sum()))

    decode_experts.choose_experts = balancing
    for number in range(rounds):
        rate = 0.02 * (1 - number / rounds) ** 2
        in_use.clear()
        slots._written += 1  # other draws
        slots._written %= NEW
        slots._step()
    decode_experts.choose_experts = choose
    times = graph_times(slots._step).summary()
    for router in student.routers():
        router.expert_bias.zero_()
    row = {
        "what": "step with balanced experts",
        "batch": batch,
        "step_ms": times["ms"],
        "step_spread_ms": times["spread_ms"],
        "steps_alone_tokens_per_s": round(batch / times["ms"] * 1e3),
        "experts_in_use": round(sum(in_use) / len(in_use), 1),
    }
    print(row, flush=True)
    return row


@torch.no_grad()
def speed(student: Any, batch: int) -> dict[str, Any]:
    """A batch of equal prompts and lengths: whole calls, and one step and one prompt pass alone."""
    from vpmoe.rollouts.draw import Draw
    from vpmoe.rollouts.sampler import Sampler
    from vpmoe.rollouts.slots import Slots

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
    slots = Slots(student, Draw(1.0, 1.0, 1), (), slots=batch, capacity=PROMPT + NEW)
    every = range(batch)
    reading = seconds(lambda: slots.admit(every, prompts, every, [NEW] * batch))
    slots.advance(NEW // 2)
    step = graph_times(slots._step).summary()
    row = {
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
    }
    print(row, flush=True)
    return row


@torch.no_grad()
def continuous(student: Any, *, prompts: int, slots: int) -> list[dict[str, Any]]:
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

    rows = []
    for what, function in (("continuous", flowing), ("batch after batch", waiting)):
        took = seconds(function, repetitions=1)
        speed = round(sum(limits) / took)
        rows.append(
            {
                "what": what,
                "slots": slots,
                "prompts": prompts,
                "tokens": sum(limits),
                "longest": max(limits),
                "seconds": round(took, 2),
                "tokens_per_s": speed,
            }
        )
        print(rows[-1], flush=True)
    return rows


def memory_after(student: Any) -> dict[str, Any]:
    """Memory that a round of sampling leaves behind."""
    from vpmoe.rollouts.sampler import Sampler

    free()
    before = torch.cuda.memory_reserved()
    sampler = Sampler(student, max_batch=64)
    sampler.generate(random_prompts(64, PROMPT), max_new_tokens=32)
    during = torch.cuda.max_memory_reserved()
    sampler.release()
    row = {
        "what": "memory",
        "before_gib": round(before / 2**30, 2),
        "during_gib": round(during / 2**30, 2),
        "after_gib": round(torch.cuda.memory_reserved() / 2**30, 2),
    }
    print(row, flush=True)
    return row


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
    row = {
        "what": f"transformers {transformers.__version__} Qwen3-MoE, static cache, greedy",
        "batch": batch,
        "tokens_per_s": round(batch * NEW / took),
        "seconds": round(took, 3),
        "first_call_s": round(first, 1),
    }
    print(row, flush=True)
    return row


def main() -> None:
    """Run the parts that were asked for; write what was measured after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument(
        "--parts",
        nargs="+",
        default=["balanced", "agreement", "speed", "continuous", "memory", "peer"],
    )
    parser.add_argument("--run", type=Path, help="a trained student, for agreement")
    parser.add_argument("--out", type=Path, default=RESULTS / "sampling.json")
    args = parser.parse_args()
    print(describe_device())
    rows: list[dict[str, Any]] = []

    def note(*found: dict[str, Any]) -> None:
        rows.extend(found)
        write_results(args.out, rows, layers=args.layers, prompt=PROMPT, new=NEW)
        free()

    if set(args.parts) - {"peer"}:
        student = student_of(args.layers)
        if "balanced" in args.parts:
            for batch in args.batches:
                note(balanced_step(student, batch))
        if "agreement" in args.parts:
            note(*agreement(student))
        if "speed" in args.parts:
            for batch in args.batches:
                note(speed(student, batch))
        if "continuous" in args.parts:
            note(*continuous(student, prompts=512, slots=64))
        if "memory" in args.parts:
            note(memory_after(student))
        del student
        free()
    if "agreement" in args.parts and args.run:
        note(*agreement_of_run(args.run))
    if "peer" in args.parts:
        note(peer(args.layers, batch=64))  # alone, so that the student's memory is free


if __name__ == "__main__":
    main()
