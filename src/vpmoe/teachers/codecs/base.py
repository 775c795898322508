"""What a codec is: distributions at many places to a few columns of bytes, and back."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from jaxtyping import Float32, Float64, Int64, UInt8
from torch import Tensor

from vpmoe.errors import DataError
from vpmoe.vocabulary import VOCAB_SIZE

if TYPE_CHECKING:
    from vpmoe.teachers.codecs.ranking import Ranking

Needs = Literal["logprobs", "top", "draws"]
Tail = Literal["even", "prior"]

# Half a unit of float32 below one: what is missing to one cannot be known better than this.
LEAST_TAIL = 2.0**-24


@dataclass(frozen=True)
class Entries:
    """The named part of a teacher's distribution at some places.

    Attributes:
        ids: o200k ids, each once in a place; 0 in unused places.
        logprobs: Their log-probs, or the log-weights of drawn ids, nats; -inf in unused places.
        tail: Log of the mass of all other ids; -inf where nothing is left.
    """

    ids: Int64[Tensor, "places entries"]
    logprobs: Float32[Tensor, "places entries"]
    tail: Float32[Tensor, " places"]

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def counts(self) -> Int64[Tensor, " places"]:
        """How many entries each place uses."""
        return (self.logprobs > -torch.inf).sum(1)

    def select(self, rows: Tensor) -> "Entries":
        """The chosen places, by number or by mask."""
        return Entries(self.ids[rows], self.logprobs[rows], self.tail[rows])

    def to(self, device: torch.device | str) -> "Entries":
        """The same on `device`."""
        return Entries(self.ids.to(device), self.logprobs.to(device), self.tail.to(device))

    def ranked(self) -> "Entries":
        """The same with the likeliest entry first; of equal ones the lower id."""
        by_id = torch.argsort(self.ids, dim=1, stable=True)
        values = self.logprobs.gather(1, by_id)
        order = by_id.gather(1, torch.argsort(values, dim=1, descending=True, stable=True))
        return Entries(self.ids.gather(1, order), self.logprobs.gather(1, order), self.tail)


@dataclass(frozen=True)
class Column:
    """One kind of bytes of many samples, one after the other.

    Attributes:
        data: The bytes.
        sizes: How many of them each sample has.
    """

    data: UInt8[Tensor, " bytes"]
    sizes: Int64[Tensor, " samples"]


class Codec(Protocol):
    """Packs what a teacher says of places, and unpacks it on the device where the bytes are.

    Attributes:
        needs: What of a teacher it keeps: nothing but log-probs, the likeliest ids, or drawn ones.
        asked: How many likeliest ids, or draws, it asks a teacher for.
        seed: Decides the draws.
        max_entries: The most entries that a place can have once unpacked.
        columns: Names of its columns of bytes.
        rounding_nats: How far a log-prob that comes back may lie from the teacher's.
        by_rank: Whether the bytes name ids by their rank, so that a store keeps the `Ranking`.
        tail: How the ids without a name share the rest of the mass.
    """

    needs: Needs
    asked: int
    seed: int = 0
    max_entries: int
    columns: tuple[str, ...]
    rounding_nats: float = 0.15
    by_rank: bool = False
    tail: Tail = "even"

    def prior(self, device: torch.device) -> Float64[Tensor, " vocab"] | None:
        """Log-prob of every id by which those without a name share; None where they do evenly."""
        del device
        return None

    def ranked_by(self, ranking: "Ranking") -> "Codec":
        """The same codec for ids of this ranking; itself where the bytes do not depend on one."""
        del ranking
        return self

    def encode(self, entries: Entries, places: Int64[Tensor, " samples"]) -> dict[str, Column]:
        """The bytes of every sample, which do not depend on the samples beside it.

        Args:
            entries: What the teacher said, the likeliest ids first, or drawn ids.
            places: How many of the rows belong to each sample, in order.
        """
        ...

    def decode(
        self, columns: Mapping[str, UInt8[Tensor, " bytes"]], places: Int64[Tensor, " samples"]
    ) -> Entries:
        """What was encoded, up to the codec's own rounding.

        Raises:
            DataError: If the bytes cannot be what `encode` made of that many places.
        """
        ...


def entries_of_top(top_ids: Tensor, top_logprobs: Tensor) -> Entries:
    """Entries of a teacher's K likeliest ids; the rest of the mass is the tail."""
    logprobs = top_logprobs.float()
    return Entries(top_ids.long(), logprobs, tail_of(logprobs))


def tail_of(logprobs: Float32[Tensor, "places entries"]) -> Float32[Tensor, " places"]:
    """Log of what is missing to one; never nothing, as rounding hides less than `LEAST_TAIL`."""
    return (1.0 - logprobs.double().exp().sum(1)).clamp_min(LEAST_TAIL).log().float()


def require_size(name: str, found: int, expected: int) -> None:
    """Refuse a column that has more or fewer bytes than its places need."""
    if found != expected:
        raise damaged(f"{expected} bytes of {name} are needed, {found} are there")


def require_ids(ids: Int64[Tensor, "*shape"]) -> None:
    """Refuse ids that are not of the vocabulary."""
    if ids.numel() and not bool(((ids >= 0) & (ids < VOCAB_SIZE)).all()):
        raise damaged("an id is outside the vocabulary")


def damaged(reason: str) -> DataError:
    """Bytes that no encoder wrote."""
    return DataError(f"target codes are damaged: {reason}", hint="score these samples again")
