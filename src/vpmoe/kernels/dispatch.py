"""Which rows each expert works on: slots sorted by expert, tables of tiles and of chunks.

A counting sort in three launches: counts of each block of slots, their running sums over blocks,
and places; the tables are made beside the last step. They have a fixed size, so that no launch
depends on the routing and nothing is read back to the host.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Int
from torch import Tensor

ROWS = 64  # rows of a tile; 128 was 20-40 % slower on an H200
BLOCK = 128  # slots that one program sorts
CUTS = 32  # an expert with more than this part of all rows is cut into several chunks
TABLE = 32  # entries that one program writes
MOST_PARTIALS = 2 * CUTS  # chunks of experts that are cut


class DispatchPlan(NamedTuple):
    """Which rows each expert works on; tensors may be longer than what is said here.

    Attributes:
        place: [T·A] int32, row of each slot where every tile has `ROWS` rows of its own.
        order: [T·A] int32, slot (token·A + a) of each row, rows sorted by expert, stable.
        offsets: [E+1] int32, first row of each expert, and the number of rows.
        tile_expert: [tiles] int32, expert of each tile, -1 for the unused end of the table.
        tile_row: [tiles] int32, first row of each tile.
        chunk_expert: [chunks] int32, expert of each chunk, -1 for the unused end. Chunks of experts
            that are cut come first, being the longest; experts without rows have one, too.
        chunk_begin: [chunks] int32, first row of each chunk.
        chunk_end: [chunks] int32, the row after its last.
        first_partial: [E+1] int32, first chunk of each expert that is cut, the next one's for
            others; at the end the number of such chunks.
    """

    place: Tensor
    order: Tensor
    offsets: Tensor
    tile_expert: Tensor
    tile_row: Tensor
    chunk_expert: Tensor
    chunk_begin: Tensor
    chunk_end: Tensor
    first_partial: Tensor

    @property
    def tiles(self) -> tuple[Tensor, ...]:
        """What kernels that work on tiles need."""
        return self[1:5]

    @property
    def chunks(self) -> tuple[Tensor, ...]:
        """What kernels that work on chunks need besides the order."""
        return self[5:]


@triton.jit
def _count_kernel(ids, counts, num_rows, E: tl.constexpr, BLOCK: tl.constexpr):
    """Slots of a block that chose each expert."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < num_rows
    chosen = tl.load(ids + slot, inside, other=0).to(tl.int32)
    found = tl.histogram(chosen, E, mask=inside)
    tl.store(counts + tl.program_id(0) * E + tl.arange(0, E), found)


@triton.jit
def _scan_kernel(
    counts, totals, num_blocks, E: tl.constexpr, EXPERTS: tl.constexpr, STEP: tl.constexpr
):
    """Counts of earlier blocks in place of each block's own, and the sums over all."""
    e = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    total = tl.zeros((EXPERTS,), tl.int32)
    for begin in range(0, num_blocks, STEP):
        block = begin + tl.arange(0, STEP)
        at = counts + block[:, None] * E + e[None, :]
        own = tl.load(at, (block < num_blocks)[:, None], other=0)
        before = tl.cumsum(own, 0) - own + total[None, :]
        tl.store(at, before, (block < num_blocks)[:, None])
        total += tl.sum(own, 0)
    tl.store(totals + e, total)


@triton.jit
def _place(
    ids, before, first, padding, place_out, order, block, num_rows,
    E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write a block's slots to their rows: expert, then block, then place in the block."""
    place = tl.arange(0, BLOCK)
    slot = block * BLOCK + place
    inside = slot < num_rows
    chosen = tl.load(ids + slot, inside, other=0).to(tl.int32)
    begin = first + tl.load(before + block * E + tl.arange(0, E))
    # The same numbers along the other axis: read again, which needs no exchange between warps.
    other = tl.load(ids + block * BLOCK + place, inside, other=0).to(tl.int32)
    earlier = (chosen[:, None] == other[None, :]) & (place[None, :] < place[:, None])
    row = tl.gather(begin, chosen, 0) + tl.sum(earlier.to(tl.int32), 1)
    tl.store(order + row, slot, inside)
    tl.store(place_out + slot, row + tl.gather(padding, chosen, 0), inside)


@triton.jit
def _of_expert(entry, counts, E: tl.constexpr):
    """Expert of each entry of a table with `counts` entries per expert, and its number there."""
    last = tl.cumsum(counts, 0)
    expert = tl.sum((last[None, :] <= entry[:, None]).to(tl.int32), 1)
    return expert, entry - _pick(last - counts, expert, E)


@triton.jit
def _pick(values, index, E: tl.constexpr):
    """values[index], 0 beyond the end."""
    return tl.sum(tl.where(tl.arange(0, E)[None, :] == index[:, None], values[None, :], 0), 1)


@triton.jit
def _plan_kernel(
    ids, before, totals, place, order, offsets, tile_expert, tile_row,
    chunk_expert, chunk_begin, chunk_end, first_partial,
    num_rows, num_blocks, num_tiles, num_chunks, chunk_rows,
    E: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """Some programs sort a block each; others write a part of a table each."""
    e = tl.arange(0, E)
    rows = tl.load(totals + e)
    first = tl.cumsum(rows, 0) - rows
    program = tl.program_id(0)
    tile_programs = (num_tiles + TABLE - 1) // TABLE
    if program < num_blocks:
        tiles = (rows + ROWS - 1) // ROWS
        padding = (tl.cumsum(tiles, 0) - tiles) * ROWS - first
        _place(ids, before, first, padding, place, order, program, num_rows, E, BLOCK)
    elif program < num_blocks + tile_programs:
        entry = (program - num_blocks) * TABLE + tl.arange(0, TABLE)
        expert, number = _of_expert(entry, (rows + ROWS - 1) // ROWS, E)
        begin = _pick(first, expert, E) + number * ROWS
        tl.store(tile_expert + entry, tl.where(expert < E, expert, -1), entry < num_tiles)
        tl.store(tile_row + entry, begin, entry < num_tiles)
        if program == num_blocks:
            tl.store(offsets + e, first)
            tl.store(offsets + E + e, num_rows, e == 0)
    else:
        entry = (program - num_blocks - tile_programs) * TABLE + tl.arange(0, TABLE)
        chunks = (rows + chunk_rows - 1) // chunk_rows
        cut = tl.where(chunks > 1, chunks, 0)
        num_cut = tl.sum(cut, 0)
        of_cut, number = _of_expert(entry, cut, E)
        of_whole, _ = _of_expert(entry - num_cut, tl.where(chunks > 1, 0, 1), E)
        is_cut = entry < num_cut
        expert = tl.where(is_cut, of_cut, of_whole)
        begin = _pick(first, expert, E)
        end = begin + _pick(rows, expert, E)
        begin += tl.where(is_cut, number * chunk_rows, 0)
        used = entry < num_chunks
        tl.store(chunk_expert + entry, tl.where(expert < E, expert, -1), used)
        tl.store(chunk_begin + entry, begin, used)
        tl.store(chunk_end + entry, tl.minimum(begin + chunk_rows, end), used)
        if program == num_blocks + tile_programs:
            tl.store(first_partial + e, tl.cumsum(cut, 0) - cut)
            tl.store(first_partial + E + e, num_cut, e == 0)


def plan_dispatch(expert_ids: Int[Tensor, "tokens slots"], *, num_experts: int) -> DispatchPlan:
    """The sorted rows and the tables of one routing decision.

    Nothing is read back to the host.

    References:
        own; a counting sort whose places within a block come from comparing all pairs.
    """
    ids = expert_ids.contiguous()
    rows = ids.numel()
    blocks = triton.cdiv(rows, BLOCK)
    tiles = _whole(triton.cdiv(rows, ROWS) + num_experts)
    chunk_rows = triton.cdiv(triton.cdiv(rows, CUTS), ROWS) * ROWS
    chunks = num_experts + CUTS
    edges = _whole(num_experts + 1)
    sizes = (
        _whole(rows), _whole(rows), edges, tiles, tiles, chunks, chunks, chunks, edges,
        blocks * num_experts, num_experts,
    )  # fmt: skip
    table = torch.empty(sum(sizes), dtype=torch.int32, device=ids.device)  # one allocation
    *fields, counts, totals = table.split(sizes)
    plan = DispatchPlan(*fields)
    _count_kernel[(blocks,)](ids, counts, rows, E=num_experts, BLOCK=BLOCK)
    _scan_kernel[(num_experts // 8,)](
        counts, totals, blocks, E=num_experts, EXPERTS=8, STEP=min(512, _power(blocks))
    )
    _plan_kernel[(blocks + triton.cdiv(tiles, TABLE) + triton.cdiv(chunks, TABLE),)](
        ids, counts, totals, *plan, rows, blocks, tiles, chunks, chunk_rows,
        E=num_experts, BLOCK=BLOCK, ROWS=ROWS, TABLE=TABLE,
    )  # fmt: skip
    return plan


def _whole(number: int) -> int:
    """So many numbers that what follows them stays aligned."""
    return triton.cdiv(number, 16) * 16


def _power(number: int) -> int:
    return max(16, triton.next_power_of_2(number))
