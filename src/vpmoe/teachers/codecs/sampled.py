"""Ids drawn from the teacher's distribution, and how often: about a dozen ids, without a bias."""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Int64, UInt8
from pydantic import Field
from torch import Tensor

from vpmoe.config import Config
from vpmoe.teachers.codecs.base import Codec, Column, Entries, Needs, damaged, require_size
from vpmoe.teachers.codecs.bits import get, put
from vpmoe.teachers.codecs.ragged import used_entries
from vpmoe.teachers.codecs.set_coded import number_starts
from vpmoe.teachers.codecs.sets import HIGH, LOW, decode_sets, encode_sets
from vpmoe.vocabulary import VOCAB_SIZE


class SampledConfig(Config):
    """Drawn ids with their frequencies, whose expectation is the teacher's distribution."""

    kind: Literal["sampled"] = "sampled"
    draws: int = Field(default=50, ge=2, le=256)
    """How often is drawn at each place; likely ids come up again and again."""
    seed: int = 0
    """Of the draws."""

    def build(self) -> "Sampled":
        """The codec."""
        return Sampled(self)


class Sampled(Codec):
    """See `SampledConfig`. Nothing is left for other ids: the weights add up to one.

    Args:
        config: How many draws.

    References:
        Anshumann et al., "Sparse Logit Sampling" (ACL 2025), arXiv:2503.16870. Difference: ids
        are a set, and frequencies whole numbers of draws.
    """

    needs: Needs = "draws"
    columns = ("counts", "times", LOW, HIGH)

    def __init__(self, config: SampledConfig) -> None:
        self.asked = self.max_entries = config.draws
        self.seed = config.seed
        self._bits = (config.draws - 1).bit_length()

    def encode(self, entries: Entries, places: Int64[Tensor, " samples"]) -> dict[str, Column]:
        """Frequencies as whole numbers of draws.

        Raises:
            DataError: If the weights are not such numbers.
        """
        used = entries.logprobs > -torch.inf
        counts = used.sum(1)
        ids, order = entries.ids.where(used, VOCAB_SIZE).sort(1)
        exact = self.asked * entries.logprobs.double().exp().gather(1, order)
        times = exact.round().long()
        if not bool((times.sum(1) == self.asked).all()) or bool(((times < 1) & used).any()):
            raise damaged(f"weights that are not frequencies among {self.asked} draws")
        mask = used_entries(counts, ids.shape[1])
        starts, sizes = number_starts(counts, places, self._bits, int(counts.sum()))
        packed = put(times[mask] - 1, starts, self._bits, int(sizes.sum()))
        return {
            "counts": Column((counts - 1).to(torch.uint8), places),
            "times": Column(packed, sizes),
            **encode_sets(ids[mask], counts, places),
        }

    def decode(
        self, columns: Mapping[str, UInt8[Tensor, " bytes"]], places: Int64[Tensor, " samples"]
    ) -> Entries:
        """Log-frequencies of the drawn ids, ids ascending, as wide as the fullest place."""
        require_size("counts", len(columns["counts"]), int(places.sum()))
        counts = columns["counts"].long() + 1
        width = int(counts.max()) if len(counts) else 0
        starts, sizes = number_starts(counts, places, self._bits, int(counts.sum()))
        require_size("times", len(columns["times"]), int(sizes.sum()))
        mask = used_entries(counts, width)
        times, ids = torch.zeros_like(mask, dtype=torch.int64), torch.zeros_like(mask).long()
        times[mask] = get(columns["times"], starts, self._bits) + 1
        ids[mask] = decode_sets(columns[LOW], columns[HIGH], counts, places)
        if not bool((times.sum(1) == self.asked).all()):
            raise damaged(f"frequencies that do not add up to {self.asked} draws")
        tail = torch.full(counts.shape, -torch.inf, device=counts.device)
        return Entries(ids, (times.float() / self.asked).log(), tail)
