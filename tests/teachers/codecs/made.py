"""Distributions for tests, and the KL divergence that a codec's rounding costs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vpmoe.teachers.codecs import Codec, Entries
from vpmoe.teachers.codecs.base import entries_of_top
from vpmoe.vocabulary import VOCAB_SIZE


@dataclass(frozen=True)
class Made:
    """Full distributions, float64 log-probs over o200k."""

    logprobs: Tensor

    def top(self, k: int) -> Entries:
        values, ids = self.logprobs.topk(k, dim=1)
        return entries_of_top(ids, values.float())

    def kl(self, entries: Entries) -> Tensor:
        """KL(teacher || entries with the tail spread evenly over all other ids), float64."""
        rebuilt = torch.empty_like(self.logprobs)
        left = VOCAB_SIZE - entries.counts
        rebuilt[:] = (entries.tail.double() - left.log())[:, None]
        used = entries.logprobs > -torch.inf
        row = torch.arange(len(rebuilt))[:, None].expand_as(used)
        rebuilt[row[used], entries.ids[used]] = entries.logprobs.double()[used]
        return (self.logprobs.exp() * (self.logprobs - rebuilt)).sum(1)


def distributions(places: int, seed: int = 0) -> Made:
    """From certain to undecided: power laws of many exponents over shuffled ids."""
    rng = torch.Generator().manual_seed(seed)
    rank = torch.arange(1, VOCAB_SIZE + 1, dtype=torch.float64)
    rows = []
    for exponent in torch.linspace(0.9, 4.0, places):
        logits = -exponent * rank.log()
        logits[0] += 3 * torch.rand(1, generator=rng).item()
        rows.append(logits[torch.randperm(VOCAB_SIZE, generator=rng)])
    return Made(torch.stack(rows).log_softmax(1))


def through(codec: Codec, entries: Entries, places: list[int] | None = None) -> Entries:
    """The entries after a round trip."""
    split = torch.tensor([len(entries)] if places is None else places)
    columns = codec.encode(entries, split)
    assert set(columns) == set(codec.columns)
    for column in columns.values():
        assert column.data.dtype == torch.uint8 and int(column.sizes.sum()) == len(column.data)
    return codec.decode({name: column.data for name, column in columns.items()}, split)


def size(codec: Codec, entries: Entries) -> float:
    """Bytes a place, the token's own log-prob of two bytes included."""
    columns = codec.encode(entries, torch.tensor([len(entries)]))
    return 2 + sum(len(column.data) for column in columns.values()) / len(entries)
