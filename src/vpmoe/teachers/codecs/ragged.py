"""Places with as many entries as each needs, the entries of all of them in one row."""

from functools import cached_property

import torch
from jaxtyping import Bool, Int64, Shaped
from torch import Tensor


class Ragged:
    """Which entry belongs to which place, and which place to which sample.

    Args:
        counts: Entries of each place, one at least.
        places: Places of each sample, in order.
    """

    def __init__(self, counts: Int64[Tensor, " places"], places: Int64[Tensor, " samples"]) -> None:
        self.counts, self.places = counts, places
        ends = torch.cumsum(counts, 0)
        self.first = ends - counts
        self.total = int(ends[-1]) if len(counts) else 0
        begins = torch.zeros(self.total, dtype=torch.int64, device=counts.device)
        begins[self.first[1:]] = 1  # faster on a CPU than repeat_interleave
        self.place = torch.cumsum(begins, 0)

    @cached_property
    def entries(self) -> Int64[Tensor, " samples"]:
        """Entries of each sample."""
        before = torch.nn.functional.pad(torch.cumsum(self.counts, 0), (1, 0))
        last = torch.cumsum(self.places, 0)
        return before[last] - before[last - self.places]

    @cached_property
    def turn(self) -> Int64[Tensor, " entries"]:
        """Number of each entry in its place, from 0."""
        return torch.arange(self.total, device=self.counts.device) - self.of_place(self.first)

    @cached_property
    def last(self) -> Int64[Tensor, " places"]:
        """Where the last entry of each place stands."""
        return self.first + self.counts - 1

    def of_place(self, values: Shaped[Tensor, " places"]) -> Shaped[Tensor, " entries"]:
        """The value of its place, at every entry."""
        return values.index_select(0, self.place)  # faster on a CPU than values[place]

    def spots(self, width: int) -> Int64[Tensor, " entries"]:
        """Where each entry lies in rows of `width`, one row per place."""
        return self.place * width + self.turn

    def steps(self, values: Int64[Tensor, " entries"]) -> Int64[Tensor, " entries"]:
        """Each value less the one before it in its place; the first as it is."""
        out = torch.diff(values, prepend=values[:1] * 0)
        out[self.first] = values[self.first]
        return out

    def sums(self, steps: Int64[Tensor, " entries"]) -> Int64[Tensor, " entries"]:
        """The inverse of `steps`."""
        total = torch.cumsum(steps, 0)
        return total - self.of_place(total[self.first] - steps[self.first])

    def rises(self, values: Int64[Tensor, " entries"]) -> Bool[Tensor, ""]:
        """Whether the values of every place grow."""
        return ((torch.diff(values) > 0) | (torch.diff(self.place) > 0)).all()


def used_entries(counts: Int64[Tensor, " places"], width: int) -> Bool[Tensor, "places entries"]:
    """True at the first `counts` of `width` entries.

    References:
        own.
    """
    return torch.arange(width, device=counts.device) < counts[:, None]
