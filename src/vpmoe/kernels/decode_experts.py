"""The experts of a few tokens on one GPU: every weight in use is read once, nothing is sorted."""

from typing import NamedTuple

import triton
import triton.language as tl
from jaxtyping import Float, Int, Integer
from torch import Tensor

from vpmoe.kernels.decode import ROWS, depth_of
from vpmoe.kernels.overlap import fetch_early, follow, overlap
from vpmoe.kernels.router import GroupChoice, _choose_kernel

MAX_PIECE = 128  # units of a network that one program computes
WARPS = 8
STAGES = 3  # tiles of weights under way
DEPTH = 128  # of a tile of weights
GUESSED = 256  # columns of every expert's first matrix that are asked for while the router chooses
TEAMS = 4  # programs among which an expert's tiles are dealt out; more beyond 128 tokens


@triton.jit
def _network(
    x, token, inside, weight, up, up_bias, down, down_bias, out, has_bias,
    D: tl.constexpr, WIDTH: tl.constexpr, F: tl.constexpr, ROWS: tl.constexpr,
    BK: tl.constexpr, BN: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Some tokens through F units of a network; a part of what it adds to the stream."""
    f, n0 = tl.arange(0, F), tl.arange(0, BN)
    z = tl.zeros((ROWS, F), tl.float32)
    if BIAS:  # read here and a tile ahead, so that no product waits for memory
        z += tl.load(up_bias + f)[None, :].to(tl.float32)
        ahead = tl.load(down_bias + n0)
    for k in range(0, D, BK):
        ks = k + tl.arange(0, BK)
        a = tl.load(x + token[:, None] * D + ks[None, :], inside[:, None], other=0.0)
        b = tl.load(up + f[None, :] * D + ks[:, None])
        z = tl.dot(a, b, z)
    r = tl.maximum(z, 0.0)
    units = (r * r * weight[:, None]).to(tl.bfloat16)
    for n in range(0, D, BN):
        ns = n + n0
        b = tl.load(down + ns[None, :] * WIDTH + f[:, None])
        if BIAS:
            bias = ahead.to(tl.float32)
            ahead = tl.load(down_bias + tl.minimum(n + BN, D - BN) + n0)
        y = tl.dot(units, b)
        if BIAS:
            y += bias[None, :] * (weight * has_bias)[:, None]
        tl.store(out[:, None] + ns[None, :], y.to(tl.bfloat16), inside[:, None])


@triton.jit
def _experts_kernel(
    x, ids, weights, up, up_bias, down, down_bias, s_up, s_up_bias, s_down, s_down_bias,
    shared_weight, parts, rows,
    D: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr, A: tl.constexpr, P: tl.constexpr,
    SHARED: tl.constexpr, F: tl.constexpr, SLOTS: tl.constexpr, GROUPS: tl.constexpr,
    TEAMS: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, BIAS: tl.constexpr,
    SCALED: tl.constexpr, GUESSED: tl.constexpr, LINES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Programs of the shared expert, then of each expert, F units each; parts per token."""
    program = tl.program_id(0)
    own: tl.constexpr = SHARED // F
    pieces: tl.constexpr = WIDTH // F if E > 0 else 1
    which = program - own * GROUPS
    expert = which // pieces % max(E, 1)  # teams outermost: later ones are mostly idle
    piece = which % pieces
    team = which // (pieces * max(E, 1))
    if GUESSED > 0 and which >= 0 and team == 0:
        unit = expert.to(tl.int64) * WIDTH + piece * F + tl.arange(0, F)
        line = tl.arange(0, (GUESSED + 63) // 64) * 64  # of 128 bytes
        fetch_early(up + unit[:, None] * D + line[None, :], PDL)
    follow(PDL)
    row = tl.arange(0, ROWS)
    if which < 0:
        piece = program // GROUPS
        token = (program % GROUPS) * ROWS + row
        inside = token < rows
        weight = tl.full((ROWS,), 1.0, tl.float32)
        if SCALED:
            weight *= tl.load(shared_weight).to(tl.float32)
        _network(
            x, token, inside, weight, s_up + piece * F * D, s_up_bias + piece * F,
            s_down + piece * F, s_down_bias, parts + (token * P + P - own + piece) * D,
            (piece == 0).to(tl.float32), D, SHARED, F, ROWS, BK, BN, BIAS,
        )  # fmt: skip
    elif E > 0:
        slot = tl.arange(0, SLOTS)
        mine = tl.load(ids + slot, slot < rows * A, other=-1) == expert
        count = tl.sum(mine.to(tl.int32), 0)
        if count > team * ROWS:
            e = expert.to(tl.int64)
            if BIAS:
                line = tl.minimum(tl.arange(0, LINES) * 64, D - 1)
                fetch_early(down_bias + e * D + line, PDL)
            rank = tl.cumsum(mine.to(tl.int32), 0) - 1
            for begin in range(team * ROWS, count, TEAMS * ROWS):
                wanted = begin + row
                hit = mine[None, :] & (rank[None, :] == wanted[:, None])
                place = tl.sum(tl.where(hit, slot[None, :], 0), 1)
                here = wanted < count
                share = tl.load(weights + place, here, other=0.0)
                at = parts + ((place // A) * P + (place % A) * pieces + piece) * D
                _network(
                    x, place // A, here, share, up + (e * WIDTH + piece * F) * D,
                    up_bias + e * WIDTH + piece * F, down + e * D * WIDTH + piece * F,
                    down_bias + e * D, at, (piece == 0).to(tl.float32),
                    D, WIDTH, F, ROWS, BK, BN, BIAS,
                )  # fmt: skip


class Record(NamedTuple):
    """Where the ids of chosen experts are written a second time, to be kept.

    Attributes:
        expert_ids: A row per place of a conversation, uint8 or wider.
        places: Place of each token in its conversation.
    """

    expert_ids: Integer[Tensor, "tokens places count"]
    places: Int[Tensor, " tokens"]


def choose_experts(
    logits: Float[Tensor, "rows terms"],
    bias: Float[Tensor, " experts"] | None,
    expert_bias: Float[Tensor, " experts"],
    choice: GroupChoice,
    scores: Float[Tensor, "rows experts"],
    ids: Int[Tensor, "rows chosen"],
    weights: Float[Tensor, "rows chosen"],
    record: Record | None,
) -> None:
    """Experts and weights of each token, a token per program; ids go to the record as well.

    References:
        own; see `kernels.router.choose`.
    """
    rows, experts = scores.shape
    kept, places = record or (None, None)
    strides = (0, 0) if kept is None else kept.stride()[:2]
    _choose_kernel[(rows,)](
        logits, bias, expert_bias, None, None, places, scores, ids, weights, kept, None, None,
        rows, 0, choice.scaling, 0, *strides,
        E=experts, G=choice.num_groups, KEPT=choice.num_kept, JUDGES=choice.num_judges,
        A=choice.count, SLOTS=triton.next_power_of_2(choice.count),
        HALVES=logits.shape[1] // experts, BIAS=bias is not None, STATISTICS=False,
        GIVEN=False, NONE=-1, RECORD=kept is not None, ROWS=1, num_warps=1, **overlap(),
    )  # fmt: skip


class Network(NamedTuple):
    """Up and down projections with their biases, of one network or of a stack."""

    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


def piece_of(*widths: int) -> int:
    """Units that one program computes: the largest power of two that divides all widths.

    References:
        own.
    """
    return min([MAX_PIECE, *(width & -width for width in widths if width)])


def num_parts(routed_width: int, shared_width: int, *, chosen: int) -> int:
    """Parts per token that `run_experts` writes.

    References:
        own.
    """
    piece = piece_of(routed_width, shared_width)
    return (chosen * routed_width + shared_width) // piece


def run_experts(
    x: Float[Tensor, "rows dim"],
    ids: Int[Tensor, "rows chosen"] | None,
    weights: Float[Tensor, "rows chosen"] | None,
    routed: Network | None,
    shared: Network | None,
    shared_weight: Float[Tensor, ""] | None,
    parts: Float[Tensor, "rows parts dim"],
) -> None:
    """What the shared and the routed experts add to each token, in parts that are to be summed.

    Programs find their tokens by themselves: 64 tokens need no sorting.

    References:
        own; `models.experts.moe_reference` is the reference.
    """
    rows, dim = x.shape
    given = routed or shared
    assert given is not None
    chosen, experts, width, wide = 1, 0, 0, 0
    if routed is not None and ids is not None:
        chosen, (experts, width) = ids.shape[1], routed.up.shape[:2]
    if shared is not None:
        wide = shared.up.shape[0]
    piece = piece_of(width, wide)
    groups = triton.cdiv(rows, ROWS)
    block = depth_of(dim, DEPTH)
    teams = min(groups, max(TEAMS, rows // 32))
    guessed = min(GUESSED, 1 << dim.bit_length() - 1)  # a power of two
    _experts_kernel[(wide // piece * groups + teams * experts * (width // piece),)](
        x, ids, weights, *_pointers(routed or given), *_pointers(shared or given),
        shared_weight, parts, rows,
        D=dim, E=experts, WIDTH=width, A=chosen, P=parts.shape[1], SHARED=wide, F=piece,
        SLOTS=triton.next_power_of_2(rows * chosen), GROUPS=groups, TEAMS=teams, ROWS=ROWS,
        BK=block, BN=block,
        BIAS=given.up_bias is not None, SCALED=shared_weight is not None,
        GUESSED=guessed if 2 * rows * chosen >= experts else 0,  # few tokens: most are not read
        LINES=triton.next_power_of_2(triton.cdiv(dim, 64)),
        num_warps=WARPS, num_stages=STAGES, **overlap(),
    )  # fmt: skip


def _pointers(network: Network) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A network's tensors; what is absent is given an address that is never read."""
    up, up_bias, down, down_bias = network
    return up, up if up_bias is None else up_bias, down, down if down_bias is None else down_bias
