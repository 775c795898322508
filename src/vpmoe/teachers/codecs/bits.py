"""Numbers of any width in a row of bytes, highest bit first, on the CPU or a GPU."""

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

MAX_WIDTH = 25  # with up to seven bits before it, a number still fits a window of four bytes


def layout(
    bits: Int64[Tensor, " places"], places: Int64[Tensor, " samples"]
) -> tuple[Int64[Tensor, " places"], Int64[Tensor, " samples"]]:
    """Where the bits of each place begin, and how many bytes each sample takes.

    The places of a sample follow one another bit by bit; a sample begins with a byte of its own.

    Args:
        bits: How many each place takes.
        places: How many places each sample has, in order.

    References:
        own.
    """
    before = torch.nn.functional.pad(torch.cumsum(bits, 0), (1, 0))
    last = torch.cumsum(places, 0)
    used = before[last] - before[last - places]
    sizes = (used + 7) // 8
    shift = 8 * (torch.cumsum(sizes, 0) - sizes) - before[last - places]
    return before[:-1] + torch.repeat_interleave(shift, places, output_size=len(bits)), sizes


def put(
    values: Int64[Tensor, " numbers"],
    starts: Int64[Tensor, " numbers"],
    widths: Int64[Tensor, " numbers"] | int,
    num_bytes: int,
) -> UInt8[Tensor, " bytes"]:
    """Bytes that hold `values` at the bits `starts`; their places must not overlap.

    References:
        own.
    """
    first = starts >> 3
    words = values << (32 - (starts & 7) - widths)
    # Words that begin in the same byte have no bit in common, so that adding them is joining them.
    sums = torch.zeros(num_bytes + 3, dtype=torch.int64, device=values.device)
    sums.scatter_add_(0, first, words)
    out = sums >> 24
    for back in (1, 2, 3):
        out[back:] += (sums[:-back] >> (24 - 8 * back)) & 255
    return out[:num_bytes].to(torch.uint8)


def get(
    data: UInt8[Tensor, " bytes"],
    starts: Int64[Tensor, " numbers"],
    widths: Int64[Tensor, " numbers"] | int,
) -> Int64[Tensor, " numbers"]:
    """The numbers of these widths that begin at the bits `starts`.

    References:
        own.
    """
    wide = torch.nn.functional.pad(data, (0, 4)).long()
    words = (wide[:-3] << 24) | (wide[1:-2] << 16) | (wide[2:-1] << 8) | wide[3:]
    found = words.index_select(0, starts >> 3) >> (32 - (starts & 7) - widths)
    return found & ((1 << torch.as_tensor(widths, device=data.device)) - 1)


def set_bits(data: UInt8[Tensor, " bytes"]) -> Int64[Tensor, " ones"]:
    """Places of the ones, ascending.

    References:
        own.
    """
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=data.device)
    return torch.nonzero(((data[:, None] >> shifts) & 1).reshape(-1)).reshape(-1)
