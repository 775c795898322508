"""Few entries where the teacher is sure, many where it is not."""

from collections.abc import Mapping
from typing import Literal, Self

import torch
from jaxtyping import Float64, Int64, UInt8
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import logsigmoid

from vpmoe.config import Config
from vpmoe.teachers.codecs.base import (
    Codec,
    Column,
    Entries,
    Needs,
    Tail,
    damaged,
    require_size,
)
from vpmoe.teachers.codecs.levels import (
    FINE,
    LEVELS,
    decode_levels,
    encode_levels,
    heights,
    odds_code,
    odds_of_code,
)
from vpmoe.teachers.codecs.ragged import Ragged
from vpmoe.teachers.codecs.ranked_sets import HIGH, LOW, decode_ranks, encode_ranks
from vpmoe.teachers.codecs.ranking import Ranking
from vpmoe.teachers.codecs.worth import departures, kept
from vpmoe.vocabulary import VOCAB_SIZE


class AdaptiveConfig(Config):
    """The likeliest ids as far as each is worth its bytes; frequent ids take fewer."""

    kind: Literal["adaptive"] = "adaptive"
    k: int = Field(default=256, ge=1, le=256)
    """The most ids at a place; a teacher that knows fewer is asked for all that it knows."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Ids are kept until they hold this share of the mass; 1 leaves the choice to their worth."""
    worth_nats: float = Field(default=5e-3, ge=0)
    """An id is kept while naming it lowers the KL by this much at least."""
    vocab: int | None = Field(default=None, ge=2, le=VOCAB_SIZE)
    """Ids that the rest of the teacher's mass is spread over; absent = over all it knows."""
    fine_bits: int | None = Field(default=None, ge=0, le=6)
    """Of each log-prob, beyond the two or three that it takes anyway; each halves its error. Absent
    = none, or two beside a prior, where the least likely name may weigh much."""
    tail: Tail = "even"
    """What the ids without a name share their mass by: evenly, or by how often each is a label.

    `prior` names only what departs from these frequencies, a tenth as many ids, and is read by
    loss.tail = prior alone; an even tail suits every loss."""

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if self.tail == "prior" and self.top_p < 1:
            raise ValueError(
                f"top_p = {self.top_p:g} keeps the likeliest ids, tail = prior those that depart "
                "from their frequency; leave one of them out"
            )
        return self

    def of_teacher(self, num_ids: int) -> Self:
        """The same, its sizes no longer open: for a teacher that knows so many ids."""
        vocab = num_ids if self.vocab is None else self.vocab
        sizes = {"vocab": vocab, "k": min(self.k, num_ids)}
        return self.model_copy(update={**sizes, "fine_bits": self.known_fine_bits})

    @property
    def known_fine_bits(self) -> int:
        """`fine_bits`, or what it is where it is absent."""
        if self.fine_bits is not None:
            return self.fine_bits
        return 2 if self.tail == "prior" else 0

    def build(self) -> "Adaptive":
        """The codec."""
        return Adaptive(self)


class Adaptive(Codec):
    """See `AdaptiveConfig`; each place is a set of its own size.

    Ids come back in the order of their ranks: which is likelier, the values say.

    Args:
        config: When a place has enough ids, how fine the values.
        ranking: Of the ids, by how often they are expected; `ranked_by` gives another one.

    References:
        own; top-p is Holtzman et al., "The Curious Case of Neural Text Degeneration" (ICLR 2020),
        arXiv:1904.09751. Difference: what is cut off stays as the mass of the tail. The set of ids
        is written by `encode_ranks`, the values by `encode_levels`.
    """

    needs: Needs = "top"
    columns = ("counts", "tail", LOW, HIGH, LEVELS, FINE)
    by_rank = True

    def __init__(self, config: AdaptiveConfig, ranking: Ranking | None = None) -> None:
        self._config, self._ranking, self.tail = config, ranking, config.tail
        self._vocab = VOCAB_SIZE if config.vocab is None else config.vocab
        self.asked = self.max_entries = min(config.k, self._vocab)
        # Half a step of the least entries, as much again where all entries together are off by it,
        # and what the byte of the tail rounds.
        self._fine_bits = config.known_fine_bits
        self.rounding_nats = 2.0**-self._fine_bits + 0.15

    def prior(self, device: torch.device) -> Float64[Tensor, " vocab"] | None:
        """Log-probs by which ids without a name share the tail; None where they share evenly."""
        return self.ranking.prior(self._vocab, device) if self.tail == "prior" else None

    def ranked_by(self, ranking: Ranking) -> "Adaptive":
        """The same codec for ids of this ranking."""
        return Adaptive(self._config, ranking)

    @property
    def ranking(self) -> Ranking:
        """Of the ids.

        Raises:
            DataError: If none was given: without it the bytes name other ids.
        """
        if self._ranking is None:
            raise damaged("the ranking of the ids is not there")
        return self._ranking

    def encode(self, entries: Entries, places: Int64[Tensor, " samples"]) -> dict[str, Column]:
        """The entries that `kept` or `departures` says."""
        config, device = self._config, entries.ids.device
        if config.tail == "prior":
            prior = self.ranking.prior(self._vocab, device)
            named, left = departures(entries, worth_nats=config.worth_nats, prior=prior)
            counts = named.sum(dim=1)
            spots = named.reshape(-1).nonzero().squeeze(1)
            shape = Ragged(counts, places)
        else:
            counts, left = kept(
                entries, top_p=config.top_p, worth_nats=config.worth_nats, vocab=self._vocab
            )
            shape = Ragged(counts, places)
            spots = shape.spots(entries.ids.shape[1])
        ranks = self.ranking.ranks(device).index_select(
            0, entries.ids.reshape(-1).index_select(0, spots)
        )
        keys, order = (shape.place * VOCAB_SIZE + ranks).sort()
        height = heights(entries.logprobs.reshape(-1).index_select(0, spots), shape)
        return {
            "counts": Column((counts - 1).to(torch.uint8), places),
            "tail": Column(odds_code(left), places),
            **encode_ranks(keys - shape.place * VOCAB_SIZE, shape),
            **encode_levels(height.index_select(0, order), shape, fine_bits=self._fine_bits),
        }

    def decode(
        self, columns: Mapping[str, UInt8[Tensor, " bytes"]], places: Int64[Tensor, " samples"]
    ) -> Entries:
        """The entries of all places, as wide as the fullest place.

        The entries and the tail add up to one: what the values round has no effect of first order
        on a KL.
        """
        for name in ("counts", "tail"):
            require_size(name, len(columns[name]), int(places.sum()))
        counts = columns["counts"].long() + 1
        width = int(counts.max()) if len(counts) else 0
        if width > self.max_entries:
            raise damaged(f"{width} ids at a place, where {self.max_entries} is the most")
        shape = Ragged(counts, places)
        ranks = decode_ranks(columns[LOW], columns[HIGH], shape)
        height = decode_levels(columns[LEVELS], columns[FINE], shape, fine_bits=self._fine_bits)
        odds = odds_of_code(columns["tail"])
        ids = torch.zeros(len(counts), width, dtype=torch.int64, device=counts.device)
        values = torch.full((len(counts), width), -torch.inf, device=counts.device)
        spots = shape.spots(width)
        ids.view(-1).scatter_(0, spots, self.ranking.ids(counts.device).index_select(0, ranks))
        values.view(-1).scatter_(0, spots, height)
        norm = logsigmoid(-odds) - values.logsumexp(1)
        return Entries(ids, values + norm[:, None], logsigmoid(odds))
