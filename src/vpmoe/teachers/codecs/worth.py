"""How many of a teacher's likeliest ids are worth their bytes."""

import math

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from vpmoe.teachers.codecs.base import Entries
from vpmoe.teachers.codecs.ragged import Ragged

# Masses are added as whole numbers, so that the sum at a place is the same on every machine and
# whatever stands before it.
_UNITS = 2.0**40
_ROUNDS = 2  # of choosing names; more change the cost by less than a thousandth
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


def departures(
    entries: Entries, *, worth_nats: float, prior: Float64[Tensor, " vocab"]
) -> tuple[Bool[Tensor, "places entries"], Float64[Tensor, " places"]]:
    """Which of a place's entries are not what a prior says of them; and the mass of all others.

    The mass R that is not named goes to the ids in proportion to their prior. Of ids that hold M of
    the prior together, one of probability t and prior q would get R q / M. To name it leaves R - t
    for M - q and lowers the KL by t ln(t M / (R q)) + (R - t) ln((R - t) M / (R (M - q))): never by
    less than nothing, and by nothing where the prior is right. A frequent word that is as likely as
    ever need not be named. Ids that save `worth_nats` beside the names of the round before are
    named; one is named at least.

    References:
        own.
    """
    values, log_q = entries.logprobs.double(), prior.index_select(0, entries.ids.reshape(-1))
    mass, log_q = values.exp(), log_q.reshape(values.shape)
    share = log_q.exp()
    units, prior_units = ((x * _UNITS + 0.5).long() for x in (mass, share))
    least = entries.tail.double().exp().clamp_min(1 / _UNITS)
    named = torch.zeros_like(values, dtype=torch.bool)
    named[:, 0] = True
    for _ in range(_ROUNDS):
        left, held = _left(units, named).maximum(least), _left(prior_units, named)
        before = left[:, None] + torch.where(named, mass, 0.0)
        among = held[:, None] + torch.where(named, share, 0.0)
        after = (before - mass).maximum(least[:, None])
        even = (before / among).log()
        saved = torch.where(mass > 0, mass * (values - log_q - even), 0.0)
        saved += after * ((after / (among - share).clamp_min(1 / _UNITS)).log() - even)
        named = saved >= worth_nats
        named[:, 0] |= ~named.any(dim=1)
    return named, _left(units, named).maximum(least)


def _left(
    units: Int64[Tensor, "places entries"], named: Bool[Tensor, "places entries"]
) -> Float64[Tensor, " places"]:
    """What is missing to one; never nothing."""
    total = torch.where(named, units, 0).sum(dim=1)
    return (1.0 - total.double() / _UNITS).clamp_min(1 / _UNITS)
