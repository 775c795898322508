"""Nothing but the log-prob of the token itself, which every codec's store holds anyway."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from vpmoe.config import Config
from vpmoe.teachers.codecs.base import Codec, Column, Entries, Needs


class LogprobConfig(Config):
    """The teacher's log-prob of each trained token: 2 bytes."""

    kind: Literal["logprob"] = "logprob"

    def build(self) -> "Logprob":
        """The codec."""
        return Logprob()


class Logprob(Codec):
    """No entries at all; see `LogprobConfig`."""

    needs: Needs = "logprobs"
    asked = 0
    max_entries = 0
    columns: tuple[str, ...] = ()

    def encode(self, entries: Entries, places: Tensor) -> dict[str, Column]:
        """No columns."""
        del entries, places
        return {}

    def decode(self, columns: Mapping[str, Tensor], places: Tensor) -> Entries:
        """As many empty places."""
        del columns
        count = int(places.sum())
        nothing = torch.zeros(count, 0, device=places.device)
        tail = torch.full((count,), -torch.inf, device=places.device)
        return Entries(nothing.long(), nothing, tail)
