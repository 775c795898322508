"""Times of every kernel of the fused path, beside what a user would take instead, in one run.

python -m benchmarks.kernels                    everything, 16,384 and 32,768 tokens
python -m benchmarks.kernels --only experts     some of ceilings, experts, router, attention, head,
                                                optimizer; other rows of the file stay

CUDA-graph replay with the L2 flushed before each repetition, medians; the optimizer and the head
are launched from Python, as they are in training. Shapes are the 80-layer student's. A peer that
fails is recorded with its error.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.common import (
    RESULTS,
    Times,
    forward_backward,
    graph_times,
    kept_rows,
    kernel_times,
    launch_times,
    packed_batch,
    write_results,
)
from benchmarks.peers import FLEX_TILES, chunked_cross_entropy, flex_attend, grouped_experts

SEQ, DIM, WIDTH, EXPERTS, SLOTS, VOCAB = 2048, 1024, 128, 256, 4, 201_088
ROWS: list[dict[str, Any]] = []
OURS = "ours"


def add(
    measure: str,
    who: str,
    tokens: int | None,
    function: Callable[[], Any],
    *,
    timer: Callable[..., Times] = graph_times,
    **more: Any,
) -> None:
    """Time one line of the table."""
    row: dict[str, Any] = {"measure": measure, "who": who, "tokens": tokens}
    ROWS[:] = [old for old in ROWS if any(old[key] != row[key] for key in list(row))]
    row["date"] = time.strftime("%Y-%m-%d", time.gmtime())
    try:
        row |= timer(function).summary()
        row |= {name: value() if callable(value) else value for name, value in more.items()}
    except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
        if who == OURS:
            raise
        row["error"] = str(error).splitlines()[0][:200]
    ROWS.append(row)
    print(row, flush=True)


def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Random numbers with a gradient."""
    return (torch.randn(*shape, device="cuda") * scale).to(dtype).requires_grad_()


def ceilings(tokens: int) -> None:
    """What the device can do at all."""
    if tokens != 16_384:
        return
    a, b = (draw(8192, 8192).detach() for _ in range(2))
    add("product 8192^3, bf16", OURS, None, lambda: a @ b, flops=2 * 8192**3)
    source = torch.empty(2**31, dtype=torch.int16, device="cuda")
    target = torch.empty_like(source)
    add("copy", OURS, None, lambda: target.copy_(source), bytes=2**33)


def expert_inputs(tokens: int, *, power: float) -> tuple[list[torch.Tensor], torch.Tensor]:
    """States and weights, and experts drawn evenly (power 0) or by a power law."""
    share = torch.arange(1, EXPERTS + 1, device="cuda").float() ** -power
    share = share[torch.randperm(EXPERTS, device="cuda")]
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
    """Routed experts with their plan, all biases and the residual."""
    from vpmoe.kernels.experts import routed_experts

    for kind, power in (("even routing", 0.0), ("power law 0.7", 0.7), ("power law 1.1", 1.1)):
        leaves, ids = expert_inputs(tokens, power=power)
        residual = draw(tokens, DIM)
        load = torch.bincount(ids.flatten().long(), minlength=EXPERTS)
        busiest = round((load.max() / load.float().mean()).item(), 1)

        def ours(v: Any = leaves, i: Any = ids, r: Any = residual) -> torch.Tensor:
            return routed_experts(*v, i, r)

        measure = f"routed experts, {kind}"
        with torch.no_grad():
            add(f"{measure}, forward", OURS, tokens, ours, busiest_over_mean=busiest)
        run = forward_backward(ours, [*leaves, residual])
        kernels = kernel_times(run) if power != 0.7 else None
        add(measure, OURS, tokens, run, busiest_over_mean=busiest, kernels=kernels)
        for leaf in (leaves[1], leaves[3]):
            leaf.main_grad = torch.zeros(leaf.shape, device="cuda")  # pyright: ignore
        run = forward_backward(ours, [*leaves, residual])
        add(f"{measure}, fp32 sums", OURS, tokens, run, busiest_over_mean=busiest)
        for leaf in (leaves[1], leaves[3]):
            del leaf.main_grad  # pyright: ignore
        compiled = torch.compile(grouped_experts, dynamic=False)
        for who, function in (("eager", grouped_experts), ("compiled", compiled)):
            peer_leaves = [leaves[0], leaves[1], leaves[3], leaves[5]]
            run = forward_backward(lambda f=function, v=peer_leaves, i=ids: f(*v, i), peer_leaves)
            add(measure, f"grouped_mm without biases, {who}", tokens, run)


def router(tokens: int) -> None:
    """The whole router with its statistics, and its choice alone."""
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
        "router's choice alone",
        OURS,
        tokens,
        lambda: choose(logits, None, module.expert_bias, choice=choice, documents=None),
    )
    for who, route in ((OURS, route_fused), ("eager PyTorch, fp32", route_reference)):

        def run(route: Any = route) -> Any:
            _, weights, statistics = route(module, x, segments)
            total = weights.square().sum() + statistics.load_balance_sum
            return torch.autograd.grad(total, [x, module.weight, module.bias])

        add("router with balance", who, tokens, run)


def choice_of(module: Any) -> Any:
    """The router's settings as the kernel takes them."""
    from vpmoe.kernels.router import GroupChoice

    c = module.config
    return GroupChoice(c.num_groups, c.num_groups_kept, c.group_score_topk, SLOTS, c.scaling)


def attention(tokens: int) -> None:
    """Local and global attention over packed rows of four documents, with sinks."""
    from vpmoe.models.positions import alibi_slopes

    for kind, window, slopes in (("local", 128, None), ("global", None, alibi_slopes(8).cuda())):
        for seq in (SEQ, 4 * SEQ):
            attention_of(f"{kind} attention, rows of {seq:,}", tokens, seq, window, slopes)


def attention_of(
    measure: str, tokens: int, seq: int, window: int | None, slopes: torch.Tensor | None
) -> None:
    """One kind of layer."""
    from vpmoe.kernels.attention import attend, packed_scope

    documents = packed_batch(tokens // seq, seq, vocab=VOCAB)["document_ids"]
    leaves = [draw(tokens // seq, seq, heads, 128) for heads in (8, 2, 2)]
    sinks = torch.zeros(8, device="cuda").requires_grad_()
    scope = packed_scope(documents, window_size=window)

    def ours() -> torch.Tensor:
        return attend(*leaves, scope, sinks=sinks, slopes=slopes)

    with torch.no_grad():
        add(f"{measure}, forward", OURS, tokens, ours)
    run = forward_backward(ours, [*leaves, sinks])
    kernels = kernel_times(run) if seq == SEQ else None
    add(measure, OURS, tokens, run, kernels=kernels)
    for who, tiles in (("tuned", FLEX_TILES), ("default tiles", {})):
        torch._dynamo.reset()
        flex = flex_attend(documents, window_size=window, slopes=slopes, tiles=tiles)
        with torch.no_grad():
            add(
                f"{measure}, forward",
                f"FlexAttention, {who}",
                tokens,
                lambda f=flex: f(*leaves, sinks),
            )
        run = forward_backward(lambda f=flex: f(*leaves, sinks), [*leaves, sinks])
        add(measure, f"FlexAttention, {who}", tokens, run)


def head(tokens: int) -> None:
    """Head and cross-entropy, gradients of both."""
    from vpmoe.losses.base import LossInputs
    from vpmoe.losses.chunked import chunked_loss, label_row_function

    hidden, weight = draw(tokens, DIM), draw(VOCAB, DIM, scale=0.03)
    labels = torch.randint(0, VOCAB, (tokens,), device="cuda")
    coefficients = torch.full((tokens,), 1 / tokens, device="cuda")
    ones = torch.ones(tokens, device="cuda")
    inputs = LossInputs(hidden, weight, labels, ones.byte(), ones.bool())

    def ours() -> Any:
        function = label_row_function(inputs, lambda logprobs, _: -logprobs)
        total = chunked_loss(hidden, weight, coefficients, function, chunk_rows=4096).total
        return torch.autograd.grad(total, [hidden, weight])

    def checkpointed() -> Any:
        loss = chunked_cross_entropy(hidden, weight, labels, chunk_rows=4096)
        return torch.autograd.grad(loss, [hidden, weight])

    def naive() -> Any:
        loss = torch.nn.functional.cross_entropy((hidden @ weight.T).float(), labels)
        return torch.autograd.grad(loss, [hidden, weight])

    for who, run in (
        (OURS, ours),
        ("compiled chunks, recomputed", checkpointed),
        ("PyTorch, whole fp32 logits", naive),
    ):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        peak = lambda b=before: round((torch.cuda.max_memory_allocated() - b) / 2**30, 2)  # noqa: E731
        add("head + cross-entropy", who, tokens, run, timer=launch_times, peak_gib=peak)


def optimizer(tokens: int) -> None:
    """One layer's stacks of experts: NorMuon, and PyTorch's fused AdamW."""
    from vpmoe.optim.config import NorMuonConfig
    from vpmoe.optim.optimizer import NorMuonAdamW

    if tokens != 16_384:
        return
    shapes = {
        "experts.up_weight": (EXPERTS, WIDTH, DIM),
        "experts.down_weight": (EXPERTS, DIM, WIDTH),
    }
    params = {name: draw(*shape) for name, shape in shapes.items()}
    for param in params.values():
        param.grad = torch.randn_like(param)
    active = {name: torch.ones(EXPERTS, dtype=torch.bool, device="cuda") for name in params}
    ours = NorMuonAdamW(params.items(), NorMuonConfig())
    measure = "optimizer, one layer's experts"
    add(measure, OURS, None, lambda: ours.step(0.1, active), timer=launch_times)
    wide = [param.detach().float().requires_grad_() for param in params.values()]
    for param in wide:
        param.grad = torch.randn_like(param)
    peer = torch.optim.AdamW(wide, fused=True)
    add(measure, "PyTorch AdamW fused, fp32", None, peer.step, timer=launch_times)


PARTS = {f.__name__: f for f in (ceilings, experts, router, attention, head, optimizer)}


def main() -> None:
    """Run the parts that were asked for; write what was measured after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16_384, 32_768])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=RESULTS / "kernels.json")
    args = parser.parse_args()
    ROWS.extend(kept_rows(args.out))
    for name in args.only:
        for tokens in args.tokens:
            torch.manual_seed(0)
            PARTS[name](tokens)
            torch.cuda.empty_cache()
            write_results(args.out, ROWS, command="python -m benchmarks.kernels")


if __name__ == "__main__":
    main()
