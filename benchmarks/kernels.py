"""Times of every kernel of the fused path, beside what a user would take instead, in one run.

python -m benchmarks.kernels                    everything, 16,384 tokens
python -m benchmarks.kernels --only experts     one of ceilings, experts, router, attention, head,
                                                optimizer

CUDA-graph replay with the L2 flushed before each repetition, medians; the optimizer is launched
from Python, as it is in training. Shapes are the 80-layer student's.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.common import (
    RESULTS,
    Times,
    forward_backward,
    graph_times,
    launch_times,
    packed_batch,
    write_results,
)

SEQ, DIM, WIDTH, EXPERTS, SLOTS, VOCAB = 2048, 1024, 128, 256, 4, 201_088
ROWS: list[dict[str, Any]] = []


def add(part: str, what: str, times: Times, **more: Any) -> None:
    """One line of the table."""
    ROWS.append({"part": part, "what": what, **times.summary(), **more})
    print(ROWS[-1], flush=True)


def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Random numbers with a gradient."""
    return (torch.randn(*shape, device="cuda") * scale).to(dtype).requires_grad_()


def ceilings(tokens: int) -> None:
    """What the device can do at all."""
    del tokens
    a, b = (draw(8192, 8192).detach() for _ in range(2))
    times = graph_times(lambda: a @ b)
    add("ceilings", "bf16 product 8192^3", times, tflops=2 * 8192**3 / times.summary()["ms"] / 1e9)
    source = torch.empty(2**31, dtype=torch.int16, device="cuda")
    target = torch.empty_like(source)
    times = graph_times(lambda: target.copy_(source))
    add("ceilings", "copy", times, gb_per_s=4 * 2**31 / times.summary()["ms"] / 1e6)


def expert_inputs(tokens: int, *, skewed: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Weights and states, and experts drawn evenly or by a power law."""
    share = torch.arange(1, EXPERTS + 1, device="cuda").float() ** (-0.7 if skewed else 0.0)
    noise = -(-torch.rand(tokens, EXPERTS, device="cuda").log()).log()
    ids = (share.log() + noise).topk(SLOTS).indices.int()
    leaves = [
        draw(tokens, DIM),
        draw(EXPERTS, WIDTH, DIM, scale=0.03),
        draw(EXPERTS, WIDTH, scale=0.1),
        draw(EXPERTS, DIM, WIDTH, scale=0.03),
        draw(EXPERTS, DIM, scale=0.1),
        torch.rand(tokens, SLOTS, device="cuda").requires_grad_(),
    ]
    return leaves, ids


def experts(tokens: int) -> None:
    """Routed experts, forward and backward, with everything around them."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    from vpmoe.kernels.experts import routed_experts

    for skewed in (False, True):
        leaves, ids = expert_inputs(tokens, skewed=skewed)
        kind = "power-law routing" if skewed else "even routing"
        with torch.no_grad():
            add("experts", f"fused, {kind}, forward", graph_times(run_of(leaves, ids)))
        run = forward_backward(lambda v=leaves, i=ids: routed_experts(*v, i), leaves)
        add("experts", f"fused, {kind}, forward+backward", graph_times(run))
    leaves, ids = expert_inputs(tokens, skewed=False)
    config = Qwen3MoeConfig(
        hidden_size=DIM, num_experts=EXPERTS, num_experts_per_tok=SLOTS, moe_intermediate_size=88
    )
    config._experts_implementation = "grouped_mm"
    peer = Qwen3MoeExperts(config).to("cuda", torch.bfloat16)
    for parameter in peer.parameters():
        torch.nn.init.normal_(parameter, std=0.03)
    x, weights = leaves[0], leaves[5].detach().bfloat16().requires_grad_()
    run = forward_backward(lambda: peer(x, ids.long(), weights), [x, weights, *peer.parameters()])
    add("experts", "transformers grouped_mm, gated 88, forward+backward", launch_times(run))


def run_of(leaves: list[torch.Tensor], ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The experts' forward alone."""
    from vpmoe.kernels.experts import routed_experts

    return lambda: routed_experts(*leaves, ids)


def router(tokens: int) -> None:
    """The whole router, and its choice alone."""
    from vpmoe.kernels.router import choose
    from vpmoe.models.fused import route_fused
    from vpmoe.models.router import DeepseekV3Config, Router, route_reference, segments_of

    module = Router(
        DeepseekV3Config(), hidden_size=DIM, num_experts=EXPERTS, num_experts_per_token=SLOTS
    ).cuda()
    torch.nn.init.normal_(module.weight, std=0.03)
    segments = segments_of(packed_batch(tokens // SEQ, SEQ, vocab=VOCAB)["document_ids"])
    x = draw(tokens, DIM)
    choice = choice_of(module)
    logits = torch.randn(tokens, EXPERTS, device="cuda")
    add(
        "router",
        "group-limited choice and weights alone",
        graph_times(
            lambda: choose(logits, None, module.expert_bias, choice=choice, documents=None)
        ),
    )
    for what, route in (("fused", route_fused), ("eager PyTorch, fp32", route_reference)):

        def run(route: Any = route) -> Any:
            _, weights, statistics = route(module, x, segments)
            total = weights.square().sum() + statistics.load_balance_sum
            return torch.autograd.grad(total, [x, module.weight, module.bias])

        add("router", f"{what}, forward+backward with balance", graph_times(run))


def choice_of(module: Any) -> Any:
    """The router's settings as the kernel takes them."""
    from vpmoe.kernels.router import GroupChoice

    c = module.config
    return GroupChoice(c.num_groups, c.num_groups_kept, c.group_score_topk, SLOTS, c.scaling)


def attention(tokens: int) -> None:
    """Local and global attention over packed rows with sinks."""
    from vpmoe.kernels.attention import TILES, attend, block_scope
    from vpmoe.models.positions import alibi_slopes

    batch = tokens // SEQ
    documents = packed_batch(batch, SEQ, vocab=VOCAB)["document_ids"]
    leaves = [draw(batch, SEQ, heads, 128) for heads in (8, 2, 2)]
    sinks = torch.zeros(8, device="cuda").requires_grad_()
    tuned = dict(TILES)
    for kind, window, slopes in (("local", 128, None), ("global", None, alibi_slopes(8).cuda())):
        scope = block_scope(documents, window_size=window)
        for what, tiles in (("flex, tuned", tuned), ("flex, default tiles", {})):
            torch._dynamo.reset()
            TILES.clear()
            TILES.update(tiles)
            compiled = torch.compile(attend, dynamic=False, fullgraph=True)

            def forward(c: Any = compiled, s: Any = scope, p: Any = slopes) -> torch.Tensor:
                return c(*leaves, s, sinks=sinks, slopes=p)

            run = forward_backward(forward, [*leaves, sinks])
            add("attention", f"{kind}, {what}, forward+backward", graph_times(run))
    TILES.clear()
    TILES.update(tuned)
    run = forward_backward(
        lambda: torch.nn.functional.scaled_dot_product_attention(
            *(leaf.transpose(1, 2) for leaf in leaves), is_causal=True, enable_gqa=True
        ),
        leaves,
    )
    add("attention", "SDPA, causal over whole rows, no sink", graph_times(run))


def head(tokens: int) -> None:
    """Head and cross-entropy, gradients of both."""
    from vpmoe.losses.base import LossInputs
    from vpmoe.losses.chunked import chunked_loss, label_row_function

    hidden, weight = draw(tokens, DIM), draw(VOCAB, DIM, scale=0.03)
    labels = torch.randint(0, VOCAB, (tokens,), device="cuda")
    ones = torch.ones(tokens, device="cuda")
    inputs = LossInputs(hidden, weight, labels, ones.byte(), ones.bool())

    def ours() -> Any:
        function = label_row_function(inputs, lambda logprobs, _: -logprobs)
        total = chunked_loss(hidden, weight, ones, function, chunk_rows=4096).total
        return torch.autograd.grad(total, [hidden, weight])

    def naive() -> Any:
        loss = torch.nn.functional.cross_entropy((hidden @ weight.T).float(), labels)
        return torch.autograd.grad(loss, [hidden, weight])

    def part(rows: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
        logits = (rows @ weight.T).float()
        return torch.nn.functional.cross_entropy(logits, of, reduction="sum")

    compiled = torch.compile(part, dynamic=False)

    def checkpointed() -> Any:
        parts = zip(hidden.split(4096), labels.split(4096), strict=True)
        run = torch.utils.checkpoint.checkpoint
        loss = sum(run(compiled, rows, of, use_reentrant=False) for rows, of in parts)
        return torch.autograd.grad(loss, [hidden, weight])

    for what, run in (("ours", ours), ("compiled checkpoint", checkpointed), ("naive", naive)):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30
        add("head", f"{what}, forward+backward", launch_times(run), peak_gib=round(peak, 2))


def optimizer(tokens: int) -> None:
    """One layer's stacks of experts: NorMuon, and PyTorch's fused AdamW."""
    from vpmoe.optim.config import NorMuonConfig
    from vpmoe.optim.optimizer import NorMuonAdamW

    del tokens
    shapes = {
        "experts.up_weight": (EXPERTS, WIDTH, DIM),
        "experts.down_weight": (EXPERTS, DIM, WIDTH),
    }
    params = {name: draw(*shape) for name, shape in shapes.items()}
    for param in params.values():
        param.grad = torch.randn_like(param)
    active = {name: torch.ones(EXPERTS, dtype=torch.bool, device="cuda") for name in params}
    ours = NorMuonAdamW(params.items(), NorMuonConfig())
    add("optimizer", "NorMuon, one layer", launch_times(lambda: ours.step(0.1, active)))
    wide = [param.detach().float().requires_grad_() for param in params.values()]
    for param in wide:
        param.grad = torch.randn_like(param)
    peer = torch.optim.AdamW(wide, fused=True)
    add("optimizer", "PyTorch AdamW fused, fp32, one layer", launch_times(peer.step))


PARTS = {f.__name__: f for f in (ceilings, experts, router, attention, head, optimizer)}


def main() -> None:
    """Run the parts that were asked for; write what was measured after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=RESULTS / "kernels.json")
    args = parser.parse_args()
    for name in args.only:
        PARTS[name](args.tokens)
        torch.cuda.empty_cache()
        write_results(args.out, ROWS, tokens=args.tokens)


if __name__ == "__main__":
    main()
