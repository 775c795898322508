"""Training speed of the whole student on one GPU, beside the best peer in the same run.

python -m benchmarks.whole_model                   the 80 layers, the optimizer, the peer
python -m benchmarks.whole_model --layers 8        a quick look

Random weights and tokens, but real routing: experts are chosen by the router, nothing is balanced
by hand. Rows of 2,048 tokens hold four documents of random lengths. The peer is transformers'
Qwen3-MoE of equal size, every layer compiled, which attends over whole rows and knows no documents.
"""

import argparse
import gc
import time
from pathlib import Path
from typing import Any

import torch
from benchmarks.common import (
    RESULTS,
    config_of,
    launch_times,
    loss_of,
    packed_batch,
    write_results,
)

SEQ = 2048
CHUNK_ROWS = 4096
FLOP_PER_TOKEN = 3.79e9  # the 80-layer student's, forward and backward, attention at half
GEMM_FLOPS = 796e12  # measured ceiling of a bf16 product on an H200
STEP_TOKENS = 524_288


def free() -> None:
    """Give memory back between measurements."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def row_of(what: str, tokens: int, times: Any, **more: Any) -> dict[str, Any]:
    """One line of the table."""
    summary = times.summary()
    speed = tokens / summary["ms"] * 1e3
    peak = torch.cuda.max_memory_allocated() / 2**30
    row = {"what": what, "tokens": tokens, **summary, "tokens_per_s": round(speed)}
    row |= {"peak_gib": round(peak, 1), **more}
    print(row, flush=True)
    return row


def ours(layers: int, token_counts: list[int], repetitions: int) -> list[dict[str, Any]]:
    """The student's forward and backward, and the whole optimizer step."""
    from vpmoe.models.student import build_student

    config = config_of("vpmoe-6b", num_layers=layers)
    student = build_student(config, seed=0, device="cuda", dtype=torch.bfloat16, kernels="fused")
    rows = []
    for tokens in token_counts:
        batch = packed_batch(tokens // SEQ, SEQ, vocab=config.num_rows)
        first = time.perf_counter()
        step(student, batch)
        torch.cuda.synchronize()
        first = time.perf_counter() - first
        free()
        times = launch_times(lambda b=batch: step(student, b), repetitions=repetitions)
        mfu = FLOP_PER_TOKEN * tokens / times.summary()["ms"] * 1e3 / GEMM_FLOPS
        mfu = {"mfu_pct": round(100 * mfu, 1)} if layers == 80 else {}
        rows.append(
            row_of("student, forward+backward", tokens, times, first_step_s=round(first, 1), **mfu)
        )
        busiest = max(float(r.local_tokens_per_expert.max()) for r in student.routers())
        mean = float(student.routers()[0].local_tokens_per_expert.mean())
        rows[-1]["busiest_expert_over_mean"] = round(busiest / mean, 2)
        for router in student.routers():
            router.local_tokens_per_expert.zero_()
        student.zero_grad()
        free()
    rows.append(optimizer_row(student, packed_batch(8, SEQ, vocab=config.num_rows)))
    return rows


def step(student: Any, batch: dict[str, torch.Tensor]) -> None:
    """Forward and backward of one micro-batch into fresh gradients."""
    for parameter in student.parameters():
        parameter.grad = None
    loss_of(student, batch, chunk_rows=CHUNK_ROWS).backward()


def optimizer_row(student: Any, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """One step of NorMuon and AdamW over all parameters, with the real load of the experts."""
    from vpmoe.optim.config import NorMuonConfig
    from vpmoe.optim.optimizer import NorMuonAdamW

    step(student, batch)
    routers = {name: m for name, m in student.named_modules() if name.endswith("router")}
    active = {
        name: routers[name.split(".experts.")[0] + ".router"].local_tokens_per_expert > 0
        for name, _ in student.named_parameters()
        if ".experts." in name
    }
    optimizer = NorMuonAdamW(student.named_parameters(), NorMuonConfig())
    free()
    times = launch_times(lambda: optimizer.step(0.01, active), repetitions=5)
    size = sum(p.numel() for p in student.parameters())
    return row_of("NorMuon + AdamW step", 0, times, parameters=size)


def whole_step(layers: int, tokens: int) -> list[dict[str, Any]]:
    """524,288 tokens: micro-batches, float32 sums of gradients, optimizer with bf16 momentum."""
    from vpmoe.models.student import build_student
    from vpmoe.optim.config import NorMuonConfig
    from vpmoe.optim.optimizer import NorMuonAdamW

    config = config_of("vpmoe-6b", num_layers=layers)
    student = build_student(config, seed=0, device="cuda", dtype=torch.bfloat16, kernels="fused")
    batch = packed_batch(tokens // SEQ, SEQ, vocab=config.num_rows)
    for parameter in student.parameters():
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
        parameter.register_post_accumulate_grad_hook(add_to_main)
    optimizer = NorMuonAdamW(student.named_parameters(), NorMuonConfig(momentum_dtype="bfloat16"))

    def run() -> None:
        for _ in range(STEP_TOKENS // tokens):
            loss_of(student, batch, chunk_rows=CHUNK_ROWS).backward()
        optimizer.step(1e-4)
        torch._foreach_zero_([p.main_grad for p in student.parameters()])

    times = launch_times(run, repetitions=2, warmup=1)
    return [row_of(f"whole step, micro-batches of {tokens}", STEP_TOKENS, times)]


def add_to_main(parameter: torch.Tensor) -> None:
    """What a distributed wrapper does with a gradient."""
    parameter.main_grad.add_(parameter.grad)
    parameter.grad = None


def peer(layers: int, token_counts: list[int], repetitions: int) -> list[dict[str, Any]]:
    """Qwen3-MoE of equal size in transformers: grouped_mm experts, each layer compiled."""
    import transformers

    settings = {"hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2}
    config = transformers.Qwen3MoeConfig(
        vocab_size=201_088,
        num_hidden_layers=layers,
        head_dim=128,
        num_experts=256,
        num_experts_per_tok=4,
        moe_intermediate_size=88,  # 85 would be equal; grouped_mm wants multiples of 8
        norm_topk_prob=True,
        tie_word_embeddings=False,
        use_cache=False,
        **settings,
    )
    config._attn_implementation = "sdpa"
    config._experts_implementation = "grouped_mm"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = transformers.Qwen3MoeForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    for layer in model.model.layers:
        layer.compile(dynamic=False)
    rows = []
    for tokens in token_counts:
        ids = torch.randint(0, 201_088, (tokens // SEQ, SEQ), device="cuda")

        def run(ids: torch.Tensor = ids) -> None:
            model.zero_grad()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

        try:
            first = time.perf_counter()
            run()
            torch.cuda.synchronize()
            first = round(time.perf_counter() - first, 1)
            free()
            times = launch_times(run, repetitions=repetitions)
        except torch.OutOfMemoryError:
            rows.append({"what": "transformers Qwen3-MoE, compiled", "tokens": tokens, "ms": None})
            print(rows[-1], flush=True)
            break
        what = f"transformers {transformers.__version__} Qwen3-MoE, compiled"
        rows.append(row_of(what, tokens, times, first_step_s=first))
        free()
    return rows


def main() -> None:
    """Run the parts that were asked for; write what was measured after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16_384, 32_768])
    parser.add_argument("--peer-tokens", type=int, nargs="+", default=[16_384])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--parts", nargs="+", default=["ours", "peer", "step"])
    parser.add_argument("--out", type=Path, default=RESULTS / "whole-model.json")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for part in args.parts:
        free()
        if part == "ours":
            rows += ours(args.layers, args.tokens, args.repetitions)
        elif part == "peer":
            rows += peer(args.layers, args.peer_tokens, args.repetitions)
        else:
            rows += whole_step(args.layers, max(args.tokens))
        write_results(args.out, rows, layers=args.layers, seq=SEQ)


if __name__ == "__main__":
    main()
