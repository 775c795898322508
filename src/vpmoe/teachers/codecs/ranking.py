"""All ids by how often they are expected: frequent ones have small numbers and known chances."""

import hashlib
from functools import cached_property, lru_cache

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from vpmoe.teachers.codecs.base import damaged
from vpmoe.teachers.codecs.bits import get, put
from vpmoe.vocabulary import VOCAB_SIZE

ID_BITS = (VOCAB_SIZE - 1).bit_length()
# The order of rarer ids is hardly worth its bytes.
MOST = 2**16
_STEPS = 8  # of a count's natural logarithm
_LEVELS = 256  # a count up to e^32
_UNSEEN = 0.1  # the count that stands for none
# Share of a prior that all ids have alike: a teacher may be smoother than any text, and what a
# prior calls impossible costs many nats.
_EVEN = 0.1


class Ranking:
    """An order of all ids; rank 0 is the most frequent.

    Args:
        first: The most frequent ids, most frequent first; all others follow by number.
        levels: How often each of them was seen, as eight times the logarithm of the count; if
            absent, once.

    Raises:
        DataError: If an id is none, or comes twice.
    """

    def __init__(
        self, first: Int64[Tensor, " ids"], levels: Int64[Tensor, " ids"] | None = None
    ) -> None:
        known = bool(((first >= 0) & (first < VOCAB_SIZE)).all()) if len(first) else True
        if not known or len(first.unique()) != len(first):
            raise damaged("a ranking names an id twice, or one outside the vocabulary")
        self._first = first.cpu().long()
        self._levels = torch.zeros_like(self._first) if levels is None else levels.cpu().long()
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._priors: dict[tuple[int, torch.device], Tensor] = {}

    @classmethod
    def by_number(cls) -> "Ranking":
        """Without any counts: o200k gave frequent pieces the lower numbers."""
        return _by_number()

    @classmethod
    def of_counts(cls, counts: Int64[Tensor, " vocab"]) -> "Ranking":
        """By how often each id was seen; of equal ones the lower id first."""
        order = torch.argsort(counts, descending=True, stable=True)
        first = order[: min(MOST, int((counts > 0).sum()))]
        levels = (_STEPS * counts[first].double().log()).round().long()
        return cls(first, levels.clamp_max(_LEVELS - 1))

    @classmethod
    def from_bytes(cls, data: bytes) -> "Ranking":
        """What `to_bytes` wrote.

        Raises:
            DataError: If it did not write that.
        """
        return _from_bytes(data)

    def __len__(self) -> int:
        """How many ids are not in the order of their numbers."""
        return len(self._first)

    def to_bytes(self) -> bytes:
        """18 bits for each of the most frequent ids, then a byte for how often each was seen."""
        starts = torch.arange(len(self._first)) * ID_BITS
        ids = put(self._first, starts, ID_BITS, _id_bytes(len(self._first)))
        return torch.cat([ids, self._levels.to(torch.uint8)]).numpy().tobytes()

    @cached_property
    def sha256(self) -> str:
        """Hash of `to_bytes` and of the rules that make a prior of them: stores rely on both."""
        rules = f"{_STEPS} {_UNSEEN} {_EVEN} ".encode()
        return hashlib.sha256(rules + self.to_bytes()).hexdigest()

    def ids(self, device: torch.device) -> Int64[Tensor, " vocab"]:
        """The id of each rank."""
        return self._on(device)[0]

    def ranks(self, device: torch.device) -> Int64[Tensor, " vocab"]:
        """The rank of each id."""
        return self._on(device)[1]

    def prior(self, vocab: int, device: torch.device) -> Float64[Tensor, " vocab"]:
        """Log-probability of every id of o200k by how often it was seen.

        Nine tenths go by the counts, one tenth evenly to all ids that can come.

        Args:
            vocab: How many ids can come at all. Which of the unseen they are is not known: what
                these would share goes to all unseen ones.
            device: Where it is wanted.

        References:
            own; a fixed count for what was never seen is Lidstone's (1920).
        """
        key = vocab, device
        if key not in self._priors:
            unseen = max(1, VOCAB_SIZE - len(self._first))
            others = max(0, vocab - len(self._first))
            counts = torch.full((VOCAB_SIZE,), _UNSEEN * max(1, others) / unseen).double()
            counts[self._first] = (self._levels.double() / _STEPS).exp()
            even = torch.full((VOCAB_SIZE,), others / unseen).double()
            even[self._first] = 1.0
            mixed = (1 - _EVEN) * counts / counts.sum() + _EVEN * even / even.sum()
            self._priors[key] = mixed.log().to(device)
        return self._priors[key]

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._tables:
            rest = torch.ones(VOCAB_SIZE, dtype=torch.bool)
            rest[self._first] = False
            ids = torch.cat([self._first, torch.arange(VOCAB_SIZE)[rest]])
            ranks = torch.empty_like(ids)
            ranks[ids] = torch.arange(VOCAB_SIZE)
            self._tables[device] = ids.to(device), ranks.to(device)
        return self._tables[device]


@lru_cache(maxsize=1)
def _by_number() -> Ranking:
    return Ranking(torch.arange(0))


@lru_cache(maxsize=8)  # all shards of a store share one
def _from_bytes(data: bytes) -> Ranking:
    held = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0).byte()
    count = 8 * len(data) // (ID_BITS + 8)
    if _id_bytes(count) + count != len(data):
        raise damaged(f"{len(data)} bytes are no ranking of ids")
    ids = get(held[: len(data) - count], torch.arange(count) * ID_BITS, ID_BITS)
    ranking = Ranking(ids, held[len(data) - count :].long())
    if ranking.to_bytes() != data:
        raise damaged("a ranking has bits beyond its last id")
    return ranking


def _id_bytes(count: int) -> int:
    return -(-count * ID_BITS // 8)
