"""Few entries where the teacher is sure, many where it is not."""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Int64, UInt8
from pydantic import Field
from torch import Tensor

from vpmoe.config import Config
from vpmoe.teachers.codecs.base import Codec, Column, Entries, Needs, damaged, require_size
from vpmoe.teachers.codecs.set_coded import COLUMNS, pack, unpack
from vpmoe.vocabulary import VOCAB_SIZE


class AdaptiveConfig(Config):
    """The likeliest ids up to a share of the mass, as far as each is worth its bytes."""

    kind: Literal["adaptive"] = "adaptive"
    k: int = Field(default=256, ge=1, le=256)
    """The most ids at a place."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Ids are kept until they hold this share of the mass; 1 leaves the choice to their worth."""
    worth_nats: float = Field(default=1e-3, ge=0)
    """An id is kept while naming it lowers the KL by this much at least."""
    vocab: int = Field(default=VOCAB_SIZE, ge=2, le=VOCAB_SIZE)
    """How many ids the teacher knows: the mass of the others is spread over them."""
    value_bits: int = Field(default=6, ge=3, le=12)
    """Of each log-prob."""

    def build(self) -> "Adaptive":
        """The codec."""
        return Adaptive(self)


class Adaptive(Codec):
    """See `AdaptiveConfig`; each place is a set-coded one of its own size.

    Args:
        config: When a place has enough ids, how fine the values.

    References:
        own; top-p is Holtzman et al., "The Curious Case of Neural Text Degeneration" (ICLR 2020),
        arXiv:1904.09751. Difference: what is cut off stays as the mass of the tail.
    """

    needs: Needs = "top"
    columns = ("counts", *COLUMNS)

    def __init__(self, config: AdaptiveConfig) -> None:
        self.asked = self.max_entries = config.k
        self._config = config

    def encode(self, entries: Entries, places: Int64[Tensor, " samples"]) -> dict[str, Column]:
        """As many of the entries as `kept` says."""
        config = self._config
        counts = kept(entries, top_p=config.top_p, worth_nats=config.worth_nats, vocab=config.vocab)
        return {
            "counts": Column((counts - 1).to(torch.uint8), places),
            **pack(entries, counts, places, bits=self._config.value_bits),
        }

    def decode(
        self, columns: Mapping[str, UInt8[Tensor, " bytes"]], places: Int64[Tensor, " samples"]
    ) -> Entries:
        """The entries of all places, ids ascending, as wide as the fullest place."""
        require_size("counts", len(columns["counts"]), int(places.sum()))
        counts = columns["counts"].long() + 1
        width = int(counts.max()) if len(counts) else 0
        if width > self.max_entries:
            raise damaged(f"{width} ids at a place, where {self.max_entries} is the most")
        return unpack(columns, counts, places, bits=self._config.value_bits, width=width)


def kept(
    entries: Entries, *, top_p: float, worth_nats: float, vocab: int = VOCAB_SIZE
) -> Int64[Tensor, " places"]:
    """How many of a place's entries, likeliest first, are worth their bytes; one at least.

    A mass r spread over m other ids costs a cross-entropy of r ln(m / r). Naming one of them, of
    probability t, leaves r' = r - t over m' = m - 1 ids and costs t ln(1 / t) itself, so that the
    KL falls by r ln(m / r) - r' ln(m' / r') - t ln(1 / t). Ids are kept up to the last one for
    which this reaches `worth_nats`.

    References:
        own.
    """
    used = entries.logprobs > -torch.inf
    mass = entries.logprobs.double().exp().where(used, 0.0)
    # What is left after n entries, summed from the small end: nothing is lost near zero.
    after = entries.tail.double().exp()[:, None] + mass.flip(1).cumsum(1).flip(1)
    left = torch.cat([after, entries.tail.double().exp()[:, None]], dim=1)
    others = (vocab - torch.arange(left.shape[1], device=left.device)).clamp_min(1)
    spread = left * (others / left.clamp_min(1e-300)).log()
    gain = spread[:, :-1] - spread[:, 1:] + mass * entries.logprobs.double().where(used, 0.0)
    place = torch.arange(1, mass.shape[1] + 1, device=mass.device)
    worth = (place * (used & (gain >= worth_nats))).amax(1)
    enough = (1.0 - left[:, 1:] < top_p).sum(1) + 1
    return torch.minimum(worth, enough).clamp(1, mass.shape[1])
