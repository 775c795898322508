"""How many of a teacher's likeliest ids are worth their bytes."""

import math

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from vpmoe.teachers.codecs.base import Entries
from vpmoe.teachers.codecs.ragged import Ragged

# Masses are added as whole numbers, so that the sum at a place is the same on every machine and
# whatever stands before it.
_UNITS = 2.0**40
DEEPEST_NATS = 64.0  # what lies further below the likeliest has no mass that float32 could see


def kept(
    entries: Entries, *, top_p: float, worth_nats: float, vocab: int
) -> tuple[Int64[Tensor, " places"], Float64[Tensor, " places"]]:
    """How many of a place's entries, likeliest first, are worth their bytes; and what they leave.

    A mass r spread over m other ids costs a cross-entropy of r ln(m / r). Naming one of them, of
    probability t, leaves r' = r - t over m' = m - 1 ids and costs t ln(1 / t) itself, so that the
    KL falls by r ln(m / r) - r' ln(m' / r') - t ln(1 / t), which is
    t ln(t m / r) + r' ln(r' m / (r m')). Ids are kept up to the last one for which this reaches
    `worth_nats`; one is kept at least.

    Returns:
        Counts, and the mass of all that is not kept.

    References:
        own.
    """
    width = entries.logprobs.shape[1]
    # Most entries cannot be worth it: the second term is below r' / m', and m / r below the
    # vocabulary where the first is largest.
    least = max(0.0, worth_nats - 1.0 / max(1, vocab - width)) / math.log(vocab)
    floor = math.log(least) - 1e-3 if least > 0 else torch.finfo(torch.float32).min
    deep = (entries.logprobs[:, :1] - DEEPEST_NATS).clamp_min(floor)
    hopeful = (entries.logprobs >= deep).sum(1).clamp_min(1)
    shape = Ragged(hopeful, torch.tensor([len(entries)]))
    values = entries.logprobs.reshape(-1).index_select(0, shape.spots(width)).double()
    mass = values.exp()
    units = (mass * _UNITS + 0.5).long()
    named = shape.sums(units).double() / _UNITS
    after = torch.maximum(1.0 - named, shape.of_place(entries.tail.double().exp()))
    after = after.clamp_min(1e-300)
    before = after + units.double() / _UNITS
    others = (vocab - torch.arange(width + 1, device=values.device)).clamp_min(1).double().log()
    fewer = others[:-1] - others[1:]
    log_m, log_r = others.index_select(0, shape.turn), before.log()
    gain = mass * (values + log_m - log_r)
    gain += after * (after.log() - log_r + fewer.index_select(0, shape.turn))
    counts = torch.ones_like(shape.counts)
    worth = torch.where(gain >= worth_nats, shape.turn + 1, 1)
    counts.scatter_reduce_(0, shape.place, worth, "amax")
    if top_p < 1:
        short = shape.sums((named < top_p).long())[shape.last]
        counts = torch.minimum(counts, short + 1)
    return counts, after[shape.first + counts - 1]
