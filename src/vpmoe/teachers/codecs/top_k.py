"""The K likeliest ids as they are: float16 log-probs and 18-bit ids."""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Int64
from pydantic import Field
from torch import Tensor

from vpmoe.config import Config
from vpmoe.teachers.codecs.base import (
    Codec,
    Column,
    Entries,
    Needs,
    require_ids,
    require_size,
    tail_of,
)
from vpmoe.teachers.codecs.bits import get, put
from vpmoe.teachers.codecs.values import from_bytes, to_bytes
from vpmoe.vocabulary import VOCAB_SIZE

ID_BITS = (VOCAB_SIZE - 1).bit_length()


class TopKConfig(Config):
    """The K likeliest ids, each with its log-prob: 4.25 K bytes, the plain way."""

    kind: Literal["top_k"] = "top_k"
    k: int = Field(default=64, ge=1, le=1_024)
    """How many ids."""

    def build(self) -> "TopK":
        """The codec."""
        return TopK(self)


class TopK(Codec):
    """See `TopKConfig`. The mass of all other ids is what is missing to one.

    Args:
        config: How many ids.

    References:
        own; the reference that the smaller codecs are measured against.
    """

    needs: Needs = "top"
    columns = ("values", "ids")

    def __init__(self, config: TopKConfig) -> None:
        self.asked = self.max_entries = config.k
        self._id_bytes = -(-config.k * ID_BITS // 8)

    def encode(self, entries: Entries, places: Int64[Tensor, " samples"]) -> dict[str, Column]:
        """Rows of values, and rows of ids that begin with a byte of their own."""
        size = self._id_bytes
        ids = put(entries.ids.reshape(-1), self._starts(entries.ids), ID_BITS, len(entries) * size)
        return {
            "values": Column(to_bytes(entries.logprobs), places * 2 * self.max_entries),
            "ids": Column(ids, places * size),
        }

    def decode(self, columns: Mapping[str, Tensor], places: Int64[Tensor, " samples"]) -> Entries:
        """The entries in the order they were given; rounding may not lift their mass above one."""
        k, count = self.max_entries, int(places.sum())
        require_size("values", len(columns["values"]), 2 * k * count)
        require_size("ids", len(columns["ids"]), self._id_bytes * count)
        logprobs = from_bytes(columns["values"]).reshape(count, k)
        ids = torch.empty(count, k, dtype=torch.int64, device=logprobs.device)
        ids = get(columns["ids"], self._starts(ids), ID_BITS).reshape(count, k)
        require_ids(ids)
        mass = logprobs.logsumexp(1, keepdim=True)
        logprobs = logprobs - mass.clamp_min(0.0)
        return Entries(ids, logprobs, tail_of(logprobs))

    def _starts(self, ids: Tensor) -> Tensor:
        rows = torch.arange(ids.shape[0], device=ids.device) * (8 * self._id_bytes)
        return (rows[:, None] + torch.arange(ids.shape[1], device=ids.device) * ID_BITS).reshape(-1)
