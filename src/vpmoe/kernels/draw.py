"""Tokens drawn from logits on one GPU, two reads of the logits and no sorting.

The first kernel leaves a few numbers per block of a row; the second finds the block, then the row,
at which the cumulative distribution passes a number that is a hash of the request and the place.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 4096  # logits of a row that a program looks at together


@triton.jit
def _scrambled(word):
    """The finishing function of SplitMix64."""
    word += 0x9E3779B97F4A7C15
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB
    return word ^ (word >> 31)


@triton.jit
def _peaks_kernel(
    logits, peaks, winners, sums, tempered, vocab, temperature,
    BLOCK: tl.constexpr, GREEDY: tl.constexpr,
):  # fmt: skip
    """Largest logit of a block, where it is, and sums of exponentials relative to it."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(logits + row * vocab + at, at < vocab, other=float("-inf")).to(tl.float32)
    peak, where = tl.max(z, 0, return_indices=True, return_indices_tie_break_left=True)
    out = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(peaks + out, peak)
    tl.store(winners + out, tl.program_id(1) * BLOCK + where)
    tl.store(sums + out, tl.sum(tl.exp(z - peak), 0))
    if not GREEDY:
        tl.store(tempered + out, tl.sum(tl.exp((z - peak) / temperature), 0))


@triton.jit
def _draw_kernel(
    logits, peaks, winners, sums, tempered, streams, written, rows_out, logprobs, behavior,
    vocab, num_blocks, temperature,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr, GREEDY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    inside = block < num_blocks
    begin = row * num_blocks
    peak = tl.load(peaks + begin + block, inside, other=float("-inf"))
    top, first = tl.max(peak, 0, return_indices=True, return_indices_tie_break_left=True)
    total = tl.sum(tl.load(sums + begin + block, inside, other=0.0) * tl.exp(peak - top), 0)
    norm = top + tl.log(total)
    if GREEDY:
        chosen = tl.load(winners + begin + first).to(tl.int64)
        tl.store(behavior + row, 0.0)
    else:
        word = tl.load(streams + row).to(tl.uint64) ^ tl.load(written + row).to(tl.uint64)
        uniform = (_scrambled(word) >> 11).to(tl.float64) * 1.1102230246251565e-16
        parts = tl.load(tempered + begin + block, inside, other=0.0)
        parts = (parts * tl.exp((peak - top) / temperature)).to(tl.float64)
        heights = tl.cumsum(parts, 0)
        mass = tl.sum(parts, 0)
        target = uniform * mass
        passed = (heights <= target) & (block < num_blocks - 1)
        where = tl.sum(passed.to(tl.int32), 0)
        before = tl.sum(tl.where(block < where, parts, 0.0), 0)
        at = where * BLOCK + tl.arange(0, BLOCK)
        z = tl.load(logits + row * vocab + at, at < vocab, other=float("-inf")).to(tl.float32)
        inner = before + tl.cumsum(tl.exp((z - top) / temperature).to(tl.float64), 0)
        chosen = where * BLOCK + tl.sum((inner <= target).to(tl.int32), 0)
        # Sums in another order may end a hair below the target: then the block's last row.
        chosen = tl.minimum(chosen, tl.minimum(where * BLOCK + BLOCK, vocab) - 1).to(tl.int64)
    z = tl.load(logits + row * vocab + chosen).to(tl.float32)
    tl.store(rows_out + row, chosen)
    tl.store(logprobs + row, z - norm)
    if not GREEDY:
        tl.store(behavior + row, (z - top) / temperature - tl.log(mass.to(tl.float32)))


def draw_rows(
    logits: Float[Tensor, "batch vocab"],
    streams: Int[Tensor, " batch"],
    written: Int[Tensor, " batch"],
    *,
    temperature: float,
) -> tuple[Int[Tensor, " batch"], Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Rows chosen, their log-probs under the model, and under what they were drawn from.

    Args:
        logits: bf16 or float32.
        streams: Hash of each request.
        written: Place of the token in its completion.
        temperature: What logits are divided by; 0 takes the likeliest.

    References:
        own; `rollouts.draw.choose` and `rollouts.draw.uniforms` are the reference.
    """
    batch, vocab = logits.shape
    blocks = triton.cdiv(vocab, BLOCK)
    peaks, sums, tempered = (
        torch.empty(batch, blocks, dtype=torch.float32, device=logits.device) for _ in range(3)
    )
    winners = torch.empty(batch, blocks, dtype=torch.int32, device=logits.device)
    rows = torch.empty(batch, dtype=torch.int64, device=logits.device)
    own, behavior = (
        torch.empty(batch, dtype=torch.float32, device=logits.device) for _ in range(2)
    )
    greedy = temperature == 0
    _peaks_kernel[(batch, blocks)](
        logits, peaks, winners, sums, tempered, vocab, float(temperature),
        BLOCK=BLOCK, GREEDY=greedy, num_warps=8,
    )  # fmt: skip
    _draw_kernel[(batch,)](
        logits, peaks, winners, sums, tempered, streams, written, rows, own, behavior,
        vocab, blocks, float(temperature),
        BLOCKS=triton.next_power_of_2(blocks), BLOCK=BLOCK, GREEDY=greedy, num_warps=8,
    )  # fmt: skip
    return rows, own, behavior
