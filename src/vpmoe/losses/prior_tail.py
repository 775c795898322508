"""Forward KL where the ids without an entry share the tail by their prior: a whole distribution."""

from dataclasses import replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vpmoe.losses.base import LossInputs
from vpmoe.losses.chunked import Direction, RowFunction
from vpmoe.losses.distillation import StoredDistillation
from vpmoe.losses.tails import log1mexp, stored_tail
from vpmoe.losses.targets import TARGET_NEEDS, StudentScores, target_row_function

_NOTHING = -30.0  # log of what rounding may leave of a prior whose every id has an entry


class PriorDistillation(StoredDistillation):
    r"""KL of the rebuilt distribution and the student over the whole vocabulary.

    With q the prior, N the entries and :math:`s = r / (1 - \sum_N q)`, the teacher's probability
    is t at an entry and s q elsewhere, so that

    .. math:: -\sum_v \hat t_v \ln p_v = -\sum_N (t_i - s q_i) \ln p_i - s \sum_v q_v \ln p_v .

    The last sum is the same for all rows but for one number, the product of the row's logits with
    q, which `Direction` finds without them. The gradient by the logits is p minus the rebuilt
    distribution, everywhere.

    Args:
        config: The divergence, forward KL, and what is mixed into it.

    References:
        own; "A tail by its prior" in docs/losses.md.
    """

    needs = TARGET_NEEDS | {"target_prior"}

    def row_function(self, rows: LossInputs) -> RowFunction:
        """What is done with a chunk of logits."""
        return self.parts(rows)[0]

    def parts(self, rows: LossInputs) -> tuple[RowFunction, Direction]:
        """The row function, and the prior as a direction."""
        assert rows.target_ids is not None and rows.target_logprobs is not None
        assert rows.target_prior is not None  # `needs` was checked
        # What an entry changes is a difference, so that numbers of entries are float64 throughout.
        power, prior = 1 / self.config.temperature, rows.target_prior.double()
        cool = power * prior
        whole = cool.logsumexp(dim=0)
        entries, tail = tempered_by_prior(
            rows.target_ids,
            rows.target_logprobs.double(),
            stored_tail(rows.target_logprobs, rows.target_tail).double(),
            prior,
            power=power,
        )
        direction = Direction.of((cool - whole).exp(), rows.head_weight)
        ready = replace(rows, target_logprobs=entries, target_tail=tail, target_prior=cool - whole)
        function = target_row_function(
            ready, self.row_losses, temperature=self.temperature, direction=direction
        )
        return function, direction

    def divergences(self, student: StudentScores, rows: LossInputs) -> Float[Tensor, " rows"]:
        """KL of each row, all of it at the loss's temperature."""
        teacher, tail, prior = rows.target_logprobs, rows.target_tail, rows.target_prior
        assert teacher is not None and tail is not None and prior is not None
        assert rows.target_ids is not None and student.along is not None
        used = teacher > -torch.inf
        own = prior[rows.target_ids].masked_fill(~used, -torch.inf)
        log_scale = _log_scale(tail, own)
        scale = log_scale.exp()
        negentropy = (prior.exp() * prior).sum() - _x_log_x(own).sum(dim=1)
        known = _x_log_x(teacher).sum(dim=1) + scale * negentropy
        known = known + torch.where(scale > 0, tail.exp() * log_scale, 0.0)
        signed = (teacher.exp() - scale[:, None] * own.exp()).to(student.entries.dtype)
        named = (signed * student.entries.masked_fill(~used, 0.0)).sum(dim=1)
        return known.to(named) - named - scale.to(named) * student.along


def tempered_by_prior(
    ids: Int64[Tensor, "rows entries"],
    logprobs: Float[Tensor, "rows entries"],
    tail: Float[Tensor, " rows"],
    prior: Float[Tensor, " vocab"],
    *,
    power: float,
) -> tuple[Float[Tensor, "rows entries"], Float[Tensor, " rows"]]:
    """The rebuilt distribution to a power: log-probs of its entries and of its tail.

    Args:
        ids: Of the entries.
        logprobs: Theirs; -inf in unused places.
        tail: Log of the mass elsewhere.
        prior: Log-probs by which that is shared.
        power: One over the temperature.

    References:
        own; the definition, with the sum over the tail's ids taken from that over all.
    """
    used = logprobs > -torch.inf
    own = prior[ids].masked_fill(~used, -torch.inf)
    log_scale = _log_scale(tail, own)
    cool = power * prior
    whole = cool.logsumexp(dim=0)
    outside = log1mexp((power * own).logsumexp(dim=1) - whole)
    entries, tail = power * logprobs, power * log_scale + whole + outside
    norm = torch.cat([entries, tail[:, None]], dim=1).logsumexp(dim=1)
    return entries - norm[:, None], tail - norm


def _log_scale(
    tail: Float[Tensor, " rows"], own: Float[Tensor, "rows entries"]
) -> Float[Tensor, " rows"]:
    """ln s; -inf where there is no tail, or no id without an entry that it could go to."""
    outside = log1mexp(own.logsumexp(dim=1))
    return (tail - outside).masked_fill((tail == -torch.inf) | (outside < _NOTHING), -torch.inf)


def _x_log_x(logs: Float[Tensor, "rows entries"]) -> Float[Tensor, "rows entries"]:
    return torch.where(logs > -torch.inf, logs.exp() * logs, 0.0)
