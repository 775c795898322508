"""The router on one GPU: logits to fp32 grade, sigmoid, groups, choice, weights, loads, balance.

Two kernels forward and one backward. Choices equal `models.router.route_deepseek_v3` for equal
logits, ties included, because scores are computed with the same exponential and the same division,
and because the lowest index wins in every maximum.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int, Integer
from torch import Tensor
from triton.language.extra import libdevice

from vpmoe.kernels.overlap import follow

# Tokens of a program: one warp each, so that no maximum or sum waits for another warp.
CHOOSE_ROWS = 2
ROWS = 4


class GroupChoice(NamedTuple):
    """How experts are chosen.

    Attributes:
        num_groups: Groups of neighboring experts.
        num_kept: Groups a token may use.
        num_judges: Best scores whose sum is a group's score.
        count: Experts per token.
        scaling: What a token's expert weights sum to.
    """

    num_groups: int
    num_kept: int
    num_judges: int
    count: int
    scaling: float


class Documents(NamedTuple):
    """Whose loads are balanced.

    Attributes:
        ids: Document of each token; `num_documents` for padding.
        lengths: Tokens of each document, float32.
        num_documents: How many there are.
    """

    ids: Int[Tensor, " tokens"]
    lengths: Float[Tensor, " documents"]
    num_documents: int


class Routed(NamedTuple):
    """Where tokens go, and what that did to the loads.

    Attributes:
        expert_ids: int32, best expert first.
        expert_weights: float32, with grad.
        load_balance_sum: Sum over documents of sum_i f_i P_i, with grad; 0 without documents.
        tokens_per_expert: Tokens sent to each expert, padding left out; 0 without documents.
    """

    expert_ids: Int[Tensor, "tokens count"]
    expert_weights: Float[Tensor, "tokens count"]
    load_balance_sum: Float[Tensor, ""]
    tokens_per_expert: Float[Tensor, " experts"]


@triton.jit
def _split_kernel(weight, out, numel, BLOCK: tl.constexpr):
    """A float32 matrix as the sum of two bf16 ones, 16 bits of mantissa together."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    value = tl.load(weight + at, inside, other=0.0)
    high = value.to(tl.bfloat16)
    tl.store(out + at, high, inside)
    tl.store(out + numel + at, (value - high.to(tl.float32)).to(tl.bfloat16), inside)


@triton.jit
def _best_groups(
    groups,
    E: tl.constexpr, G: tl.constexpr, KEPT: tl.constexpr, JUDGES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """1 for groups that a token may use: the best by the sum of their best."""
    member, g = tl.arange(0, E // G), tl.arange(0, G)
    judged = tl.zeros((ROWS, G), tl.float32)
    rest = groups
    for _ in tl.static_range(JUDGES):
        best, where = tl.max(rest, 2, return_indices=True, return_indices_tie_break_left=True)
        judged += best
        rest = tl.where(member[None, None, :] == where[:, :, None], float("-inf"), rest)
    kept = tl.zeros((ROWS, G), tl.int32)
    for _ in tl.static_range(KEPT):
        best, where = tl.max(judged, 1, return_indices=True, return_indices_tie_break_left=True)
        hit = g[None, :] == where[:, None]
        kept = tl.where(hit, 1, kept)
        judged = tl.where(hit, float("-inf"), judged)
    return kept


@triton.jit
def _replay(
    given, used, own, s,
    E: tl.constexpr, A: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, NONE: tl.constexpr,
):  # fmt: skip
    """Ids that are given, and their scores; a token's own ids if NONE stands in all places."""
    e, slot = tl.arange(0, E), tl.arange(0, SLOTS)
    told = tl.load(given, used, other=NONE).to(tl.int32)
    is_known = tl.max((told != NONE).to(tl.int32), 1) > 0
    ids = tl.where(is_known[:, None], told, own)
    picked = tl.zeros((ROWS, SLOTS), tl.float32)
    for a in tl.static_range(A):
        where = tl.sum(tl.where(slot[None, :] == a, ids, 0), 1)
        score = tl.sum(tl.where(e[None, :] == where[:, None], s, 0.0), 1)
        picked = tl.where(slot[None, :] == a, score[:, None], picked)
    return ids, picked


@triton.jit
def _count_plain(counts, real, s, E: tl.constexpr, A: tl.constexpr):
    """Count the best scores, without bias and groups, for each token's document."""
    e = tl.arange(0, E)
    rest = s
    for _ in tl.static_range(A):
        _, where = tl.max(rest, 1, return_indices=True, return_indices_tie_break_left=True)
        tl.atomic_add(counts + where, 1.0, real, sem="relaxed")
        rest = tl.where(e[None, :] == where[:, None], float("-inf"), rest)


# `given` and `record` are one layer's columns: not all layers' begin at a multiple of 16 bytes.
@triton.jit(do_not_specialize=["num_documents"], do_not_specialize_on_alignment=["given", "record"])
def _choose_kernel(
    logits, bias, expert_bias, documents, given, places, scores_out, ids_out, weights_out,
    record, plain_counts, loads,
    num_rows, num_documents, scaling, given_stride, record_stride, place_stride,
    E: tl.constexpr, G: tl.constexpr, KEPT: tl.constexpr, JUDGES: tl.constexpr, A: tl.constexpr,
    SLOTS: tl.constexpr, HALVES: tl.constexpr, BIAS: tl.constexpr, STATISTICS: tl.constexpr,
    GIVEN: tl.constexpr, NONE: tl.constexpr, RECORD: tl.constexpr,
    ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    e = tl.arange(0, E)
    lift = tl.load(expert_bias + e)[None, :]  # beside the kernel before, as all parameters
    if BIAS:
        shift = tl.load(bias + e)[None, :]
    follow(PDL)
    at = row[:, None].to(tl.int64) * (HALVES * E) + e[None, :]
    z = tl.load(logits + at, inside[:, None], other=0.0)
    if HALVES == 2:
        z += tl.load(logits + at + E, inside[:, None], other=0.0)
    if BIAS:
        z += shift
    one = tl.full((ROWS, E), 1.0, tl.float32)
    s = tl.div_rn(one, one + libdevice.exp(-z))
    tl.store(scores_out + row[:, None].to(tl.int64) * E + e[None, :], s, inside[:, None])
    groups = tl.reshape(s + lift, (ROWS, G, E // G))
    kept = _best_groups(groups, E, G, KEPT, JUDGES, ROWS)
    reachable = tl.where((kept > 0)[:, :, None], groups, float("-inf"))
    reachable = tl.reshape(reachable, (ROWS, E))
    slot = tl.arange(0, SLOTS)
    picked = tl.zeros((ROWS, SLOTS), tl.float32)
    ids = tl.zeros((ROWS, SLOTS), tl.int32)
    for a in tl.static_range(A):
        _, where = tl.max(reachable, 1, return_indices=True, return_indices_tie_break_left=True)
        hit = e[None, :] == where[:, None]
        score = tl.sum(tl.where(hit, s, 0.0), 1)
        reachable = tl.where(hit, float("-inf"), reachable)
        picked = tl.where(slot[None, :] == a, score[:, None], picked)
        ids = tl.where(slot[None, :] == a, where[:, None], ids)
    used = inside[:, None] & (slot < A)[None, :]
    if GIVEN:
        at = row[:, None].to(tl.int64) * given_stride + slot[None, :]
        ids, picked = _replay(given + at, used, ids, s, E, A, SLOTS, ROWS, NONE)
    weights = picked * scaling / (tl.sum(picked, 1)[:, None] + 1e-20)
    out = row[:, None] * A + slot[None, :]
    tl.store(ids_out + out, ids, used)
    if RECORD:
        place = tl.load(places + row, inside, other=0).to(tl.int64)
        at = row.to(tl.int64) * record_stride + place * place_stride
        tl.store(record + at[:, None] + slot[None, :], ids.to(record.dtype.element_ty), used)
    tl.store(weights_out + out, weights, used)
    if STATISTICS:
        document = tl.load(documents + row, inside, other=num_documents)
        real = document < num_documents
        tl.atomic_add(loads + ids, 1.0, used & real[:, None], sem="relaxed")
        _count_plain(plain_counts + document * E, real, s, E, A)


@triton.jit(do_not_specialize=["num_documents"])
def _balance_kernel(
    scores, documents, lengths, plain_counts, out, num_rows, num_documents,
    E: tl.constexpr, A: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Each token's part of sum_i f_i P_i of its document."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    e = tl.arange(0, E)
    document = tl.load(documents + row, inside, other=num_documents)
    real = document < num_documents
    s = tl.load(scores + row[:, None].to(tl.int64) * E + e[None, :], inside[:, None], other=1.0)
    counts = tl.load(plain_counts + document[:, None] * E + e[None, :], real[:, None], other=0.0)
    length = tl.load(lengths + document, real, other=1.0)
    shares = tl.sum(s * counts, 1) / tl.sum(s, 1)
    tl.store(out + row, shares * (E / A) / (length * length), inside)


@triton.jit(do_not_specialize=["num_documents"])
def _backward_kernel(
    scores, ids, d_weights, documents, lengths, plain_counts, balance, d_balance,
    d_logits, d_bias, num_rows, num_documents, scaling,
    E: tl.constexpr, A: tl.constexpr, SLOTS: tl.constexpr, STATISTICS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    e = tl.arange(0, E)
    slot = tl.arange(0, SLOTS)
    begin = row[:, None].to(tl.int64) * E
    s = tl.load(scores + begin + e[None, :], inside[:, None], other=0.5)
    used = inside[:, None] & (slot < A)[None, :]
    at = row[:, None] * A + slot[None, :]
    chosen = tl.load(ids + at, used, other=0)
    g = tl.load(d_weights + at, used, other=0.0)
    picked = tl.load(scores + begin + chosen, used, other=0.0)
    total = tl.sum(picked, 1) + 1e-20
    mean = tl.sum(picked * g, 1) / total
    d_picked = (g - mean[:, None]) * (scaling / total)[:, None]
    ds = tl.zeros((ROWS, E), tl.float32)
    for a in tl.static_range(A):
        mine = slot[None, :] == a
        where = tl.sum(tl.where(mine, chosen, 0), 1)
        value = tl.sum(tl.where(mine, d_picked, 0.0), 1)
        ds = tl.where(e[None, :] == where[:, None], value[:, None], ds)
    if STATISTICS:
        document = tl.load(documents + row, inside, other=num_documents)
        real = document < num_documents
        at = document[:, None] * E + e[None, :]
        counts = tl.load(plain_counts + at, real[:, None], other=0.0)
        length = tl.load(lengths + document, real, other=1.0)
        slopes = counts * ((E / A) / (length * length))[:, None]
        here = tl.load(balance + row, inside, other=0.0)
        pull = tl.load(d_balance) / tl.sum(s, 1)
        ds += tl.where(real[:, None], (slopes - here[:, None]) * pull[:, None], 0.0)
    dz = tl.where(inside[:, None], ds * s * (1.0 - s), 0.0)
    tl.store(d_logits + begin + e[None, :], dz.to(tl.bfloat16), inside[:, None])
    tl.store(d_bias + tl.program_id(0) * E + e, tl.sum(dz, 0))


def split_weight(
    weight: Float[Tensor, "experts dim"], *, out: Float[Tensor, "twice_experts dim"] | None = None
) -> Float[Tensor, "twice_experts dim"]:
    """A float32 matrix as two bf16 ones below each other, whose sum is off by 2^-17 at most.

    References:
        own.
    """
    if out is None:
        out = weight.new_empty(2 * len(weight), weight.shape[1], dtype=torch.bfloat16)
    _split_kernel[(triton.cdiv(weight.numel(), 1024),)](weight, out, weight.numel(), BLOCK=1024)
    return out


class _Choice(NamedTuple):
    """What `choose` leaves: the choice, and what the backward pass needs."""

    scores: Tensor
    expert_ids: Tensor
    expert_weights: Tensor
    plain_counts: Tensor
    tokens_per_expert: Tensor
    balance: Tensor


def choose(
    logits: Float[Tensor, "tokens terms"],
    bias: Float[Tensor, " experts"] | None,
    expert_bias: Float[Tensor, " experts"],
    *,
    choice: GroupChoice,
    documents: Documents | None,
    given: Integer[Tensor, "tokens count"] | None = None,
) -> _Choice:
    """Experts and weights of each token from logits, float32, in one term or two to be added.

    Ids that are given take the place of the choice, but for tokens with all their bits set.

    References:
        DeepSeek-AI, "DeepSeek-V3 Technical Report" (2024), arXiv:2412.19437.
    """
    (tokens, terms), experts = logits.shape, expert_bias.shape[0]
    new = logits.new_empty
    num_documents = 0 if documents is None else documents.num_documents
    scores, weights = new(tokens, experts), new(tokens, choice.count)
    ids = torch.empty(tokens, choice.count, dtype=torch.int32, device=logits.device)
    tallies = logits.new_zeros(num_documents + 1, experts)
    counts, loads = tallies[:-1], tallies[-1]
    balance = new(tokens if documents is not None else 0)
    of_token, lengths, _ = documents or (None, None, 0)
    _choose_kernel[(triton.cdiv(tokens, CHOOSE_ROWS),)](
        logits, bias, expert_bias, of_token, given, None, scores, ids, weights,
        None, counts, loads,
        tokens, num_documents, choice.scaling, 0 if given is None else given.stride(0), 0, 0,
        E=experts, G=choice.num_groups, KEPT=choice.num_kept, JUDGES=choice.num_judges,
        A=choice.count, SLOTS=triton.next_power_of_2(choice.count), HALVES=terms // experts,
        BIAS=bias is not None, STATISTICS=documents is not None,
        GIVEN=given is not None, NONE=_none_of(given), RECORD=False, ROWS=CHOOSE_ROWS, PDL=False,
        num_warps=1,
    )  # fmt: skip
    if documents is not None:
        _balance_kernel[(triton.cdiv(tokens, ROWS),)](
            scores, of_token, lengths, counts, balance, tokens, num_documents,
            E=experts, A=choice.count, ROWS=ROWS, num_warps=1,
        )  # fmt: skip
    return _Choice(scores, ids, weights, counts, loads, balance)


def _none_of(given: Tensor | None) -> int:
    """An id with all bits set."""
    return 255 if given is not None and given.dtype == torch.uint8 else -1


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, expert_bias, choice, documents, given):
        halves = split_weight(weight)
        logits = torch.mm(x, halves.T, out_dtype=torch.float32)
        made = choose(logits, bias, expert_bias, choice=choice, documents=documents, given=given)
        ctx.choice, ctx.documents, ctx.has_bias = choice, documents, bias is not None
        ctx.save_for_backward(
            x, halves, made.scores, made.expert_ids, made.plain_counts, made.balance
        )
        ctx.mark_non_differentiable(made.expert_ids, made.tokens_per_expert)
        total = made.balance.sum()
        return made.expert_ids, made.expert_weights, total, made.tokens_per_expert

    @staticmethod
    def backward(ctx: Any, _ids, d_weights, d_balance, _loads):
        x, halves, scores, ids, counts, balance = ctx.saved_tensors
        tokens, experts = scores.shape
        count = ctx.choice.count
        of_token, lengths, num_documents = ctx.documents or (None, None, 0)
        programs = triton.cdiv(tokens, ROWS)
        d_logits = torch.empty(tokens, experts, dtype=torch.bfloat16, device=x.device)
        d_bias = scores.new_empty(programs, experts)
        _backward_kernel[(programs,)](
            scores, ids, d_weights.contiguous(), of_token, lengths, counts, balance, d_balance,
            d_logits, d_bias, tokens, num_documents, ctx.choice.scaling,
            E=experts, A=count, SLOTS=triton.next_power_of_2(count),
            STATISTICS=ctx.documents is not None, ROWS=ROWS, num_warps=1,
        )  # fmt: skip
        dx = d_logits @ halves[:experts]
        dw = torch.mm(d_logits.T, x, out_dtype=torch.float32)
        return dx, dw, d_bias.sum(0) if ctx.has_bias else None, None, None, None, None


def route(
    x: Float[Tensor, "tokens dim"],
    weight: Float[Tensor, "experts dim"],
    bias: Float[Tensor, " experts"] | None,
    expert_bias: Float[Tensor, " experts"],
    *,
    choice: GroupChoice,
    documents: Documents | None,
    given: Integer[Tensor, "tokens count"] | None = None,
) -> Routed:
    """Sigmoid routing limited to groups, with load statistics where documents are given.

    The logits are products with the weight's two bf16 halves, summed in float32: as exact as a
    float32 product for bf16 states. Gradients of the logits are rounded to bf16.

    Args:
        x: Normed states, bf16.
        weight: Router matrix, float32.
        bias: Its bias, float32.
        expert_bias: Added to scores when experts are chosen, never to weights.
        choice: How they are chosen.
        documents: Whose loads are balanced; None when decoding.
        given: Experts to be taken instead of chosen, one row per token and neighboring ids in it;
            all bits set in all places of a token that is to choose.

    References:
        DeepSeek-AI, "DeepSeek-V3 Technical Report" (2024), arXiv:2412.19437; Wang et al.,
        "Auxiliary-Loss-Free Load Balancing" (2024), arXiv:2408.15664. Difference: a sequence of
        the auxiliary loss is a document.
    """
    return Routed(*_Route.apply(x, weight, bias, expert_bias, choice, documents, given))
