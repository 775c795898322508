"""What a codec keeps of a teacher for how many bytes: measured on whole distributions."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from vpmoe.teachers.codecs import CodecConfig, Entries, fitted
from vpmoe.teachers.codecs.adaptive import AdaptiveConfig
from vpmoe.teachers.codecs.base import tail_of
from vpmoe.teachers.codecs.distillkit import DistillKitConfig
from vpmoe.teachers.codecs.ranking import Ranking
from vpmoe.teachers.codecs.sampled import SampledConfig
from vpmoe.teachers.codecs.set_coded import SetCodedConfig
from vpmoe.teachers.codecs.top_k import TopKConfig

LOGPROB_BYTES = 2  # of the token itself, beside every codec
KEPT = 512  # likeliest ids of each place that are held; every codec's ids are among them
REST_DRAWS = 200  # of the others, which say what a prior does there
RECOMMENDED = "DistillKit"  # the name of its recommended setting
_RECOMMENDED: dict[str, Any] = {"monotone": False}  # as DistillKit itself reads
_BUDGET = {**_RECOMMENDED, "k": 50, "exact_k": 1, "polynomial_terms": (0, 1, "sqrt")}

GRID: tuple[tuple[str, str, Any], ...] = (
    *(("plain top-K", f"top-{k}", TopKConfig(k=k)) for k in (8, 16, 32, 64, 128)),
    *(("set-coded", f"set-{k}", SetCodedConfig(k=k)) for k in (8, 16, 32, 64, 128, 256)),
    *(
        ("adaptive", f"adaptive {worth:g}", AdaptiveConfig(worth_nats=worth))
        for worth in (0.1, 0.03, 0.01, 0.005, 0.003, 0.001, 0.0003)
    ),
    *(
        ("adaptive, prior", f"prior {worth:g}", AdaptiveConfig(worth_nats=worth, tail="prior"))
        for worth in (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
    ),
    *(
        ("DistillKit", name, DistillKitConfig.model_validate(settings))
        for name, settings in (
            (RECOMMENDED, _RECOMMENDED),
            ("DistillKit, normalized", {**_RECOMMENDED, "normalize_t": True}),
            ("DistillKit budget", _BUDGET),
            ("budget, normalized", {**_BUDGET, "normalize_t": True}),
        )
    ),
    ("sampled", "sampled, 50 draws", SampledConfig()),
)


@dataclass(frozen=True)
class Reference:
    """A teacher's distributions at some places, as far as a measurement needs them.

    Attributes:
        entropy: Of the whole distribution, nats.
        squares: Sum of the squared probabilities of all ids.
        ids: The likeliest, likeliest first.
        logprobs: Theirs.
        drawn_ids: Drawn with replacement; one row of ids per place.
        drawn_logprobs: Theirs.
        vocab: How many ids the teacher knows.
        rest_ids: Drawn from the teacher among all ids but the likeliest; None where only those
            were known, and the rest was taken for uniform.
    """

    entropy: Float64[Tensor, " places"]
    squares: Float64[Tensor, " places"]
    ids: Int64[Tensor, "places kept"]
    logprobs: Float64[Tensor, "places kept"]
    drawn_ids: Int64[Tensor, "places draws"]
    drawn_logprobs: Float64[Tensor, "places draws"]
    vocab: int
    rest_ids: Int64[Tensor, "places rest"] | None

    def __len__(self) -> int:
        return len(self.entropy)

    @property
    def exact(self) -> bool:
        """Whether whole distributions were known."""
        return self.rest_ids is not None

    def top(self, k: int) -> Entries:
        """What a teacher answers that is asked for K ids."""
        logprobs = self.logprobs[:, :k].float()
        return Entries(self.ids[:, :k], logprobs, tail_of(logprobs))

    def drawn(self, draws: int) -> Entries:
        """What a teacher answers that draws."""
        ids = self.drawn_ids[:, :draws].sort(1).values
        first = torch.ones_like(ids, dtype=torch.bool)
        first[:, 1:] = ids[:, 1:] != ids[:, :-1]
        times = (ids[:, :, None] == ids[:, None, :]).sum(2)
        weights = (times / draws).log().float().where(first, -torch.inf)
        order = (~first).long().argsort(dim=1, stable=True)
        nothing = torch.full(ids.shape[:1], -torch.inf)
        return Entries((ids * first).gather(1, order), weights.gather(1, order), nothing)


def reference_of(
    logprobs: Float[Tensor, "places vocab"],
    ids: Int64[Tensor, " vocab"],
    *,
    draws: int = 50,
    kept: int = KEPT,
) -> Reference:
    """All that is needed of whole distributions.

    Args:
        logprobs: Normalised, float64 for exact sums.
        ids: o200k id of each column, ascending.
        draws: How often to draw at each place.
        kept: How many likeliest ids to hold.
    """
    wide = logprobs.double()
    mass = wide.exp()
    values, columns = wide.topk(min(kept, wide.shape[1]), dim=1)
    drawn = torch.multinomial(mass, draws, replacement=True)
    rest = mass.scatter(1, columns, 0.0)
    rest[rest.sum(1) <= 0] = 1.0  # whatever is drawn there has no weight
    others = torch.multinomial(rest, REST_DRAWS, replacement=True)
    return Reference(
        entropy=-(mass * wide.clamp_min(-1e9)).sum(1),
        squares=mass.square().sum(1),
        ids=ids[columns],
        logprobs=values,
        drawn_ids=ids[drawn],
        drawn_logprobs=wide.gather(1, drawn),
        vocab=wide.shape[1],
        rest_ids=ids[others],
    )


def joined(parts: Sequence[Reference]) -> Reference:
    """References of one teacher as one."""
    names = ("entropy", "squares", "ids", "logprobs", "drawn_ids", "drawn_logprobs")
    tensors = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    rest = [part.rest_ids for part in parts if part.rest_ids is not None]
    return Reference(
        **tensors,
        vocab=parts[0].vocab,
        rest_ids=torch.cat(rest) if len(rest) == len(parts) else None,
    )


@dataclass(frozen=True)
class Point:
    """One codec on the frontier.

    Attributes:
        family: Codecs that differ in one setting share it.
        name: The setting.
        codec: All settings.
        bytes_per_token: The token's own log-prob included.
        kl_nats: Mean KL(teacher || rebuilt), what is not named spread over all other ids as the
            codec says; None for drawn ids, which leave nothing for them.
        gradient_error: Root of the mean squared error that a cross-entropy's gradient at the
            logits gets from the rebuilt distribution.
        unbiased: Whether that error is zero on average over draws.
        entries: Mean ids a place.
        packed_per_s: Places encoded a second, on the machine that measured.
    """

    family: str
    name: str
    codec: dict[str, Any]
    bytes_per_token: float
    kl_nats: float | None
    gradient_error: float
    unbiased: bool
    entries: float
    packed_per_s: float


def measure(
    reference: Reference,
    grid: Iterable[tuple[str, str, Any]] = GRID,
    *,
    ranking: Ranking | None = None,
) -> list[Point]:
    """Every codec of a grid that the teacher's vocabulary has ids enough for.

    Args:
        reference: The teacher's distributions.
        grid: Family, name and settings of each codec.
        ranking: Of the ids, for codecs that name them by rank; by their numbers if absent. Its own
            bytes, kept once in each file, are not counted.
    """
    ranking = Ranking.by_number() if ranking is None else ranking
    fitting = [one for one in grid if _fits(reference, one[2])]
    return [_measured(reference, ranking, *one) for one in fitting]


def _fits(reference: Reference, config: CodecConfig) -> bool:
    if config.kind == "adaptive" and config.tail == "prior" and not reference.exact:
        return False  # nothing is known of the tail, and all would depend on what is assumed
    seen = reference.drawn_ids if config.kind == "sampled" else reference.ids
    return config.kind == "adaptive" or config.build().asked <= seen.shape[1]


def _measured(
    reference: Reference, ranking: Ranking, family: str, name: str, config: CodecConfig
) -> Point:
    config = fitted(config, reference.vocab)
    codec = config.build().ranked_by(ranking)
    drawn = codec.needs == "draws"
    entries = reference.drawn(codec.asked) if drawn else reference.top(codec.asked)  # or fewer
    places = torch.tensor([len(reference)])
    codec.encode(entries, places)
    begin = time.perf_counter()
    columns = codec.encode(entries, places)
    seconds = time.perf_counter() - begin
    rebuilt = codec.decode({key: column.data for key, column in columns.items()}, places)
    prior = codec.prior(rebuilt.ids.device)
    return Point(
        family=family,
        name=name,
        codec=config.model_dump(mode="json"),
        bytes_per_token=LOGPROB_BYTES
        + sum(len(column.data) for column in columns.values()) / len(reference),
        kl_nats=None if drawn else float(kl(reference, rebuilt, prior).mean()),
        gradient_error=float(squared_error(reference, rebuilt, prior).mean().sqrt()),
        unbiased=drawn,
        entries=float(rebuilt.counts.float().mean()),
        packed_per_s=len(reference) / seconds,
    )


class TailShares:
    """How a rebuilt distribution shares its tail, against what the teacher has there.

    Args:
        reference: The teacher.
        rebuilt: Of its places.
        prior: Log-prob of every id by which those without a name share; None = evenly.

    Attributes:
        log_scale: Log of what one unit of the prior gets.
        teacher_log_prior: The teacher's mean of the prior's logarithm over these ids.
        teacher_prior: The same of the prior.
        prior_squares: Sum of the prior's squares over them.
    """

    def __init__(self, reference: Reference, rebuilt: Entries, prior: Tensor | None) -> None:
        true, used = _true_logprobs(reference, rebuilt)
        mass = true.exp().where(used, 0.0)
        others = (reference.vocab - used.sum(1)).clamp_min(1)
        if prior is None:
            left = (1.0 - mass.sum(1)).clamp_min(0.0)
            self.log_scale = rebuilt.tail.double() - others.log()
            self.teacher_log_prior, self.teacher_prior = 0.0 * left, left
            self.prior_squares = others.double()
        else:
            own = prior[rebuilt.ids].where(used, -torch.inf)
            self.log_scale = rebuilt.tail.double() - (-torch.expm1(own.logsumexp(1))).log()
            named = (mass * own.where(used, 0.0)).sum(1), (mass * own.exp()).sum(1)
            self.teacher_log_prior = _mean_of(reference, prior) - named[0]
            self.teacher_prior = _mean_of(reference, prior.exp()) - named[1]
            self.prior_squares = prior.exp().square().sum() - own.exp().square().sum(1)


def _mean_of(reference: Reference, values: Float64[Tensor, " vocab"]) -> Float64[Tensor, " places"]:
    """The teacher's mean of a function of the id: its likeliest ids exactly, the rest as drawn."""
    assert reference.rest_ids is not None, "a prior is measured against whole distributions"
    mass = reference.logprobs.exp()
    left = (1.0 - mass.sum(1)).clamp_min(0.0)
    return (mass * values[reference.ids]).sum(1) + left * values[reference.rest_ids].mean(1)


def kl(
    reference: Reference, rebuilt: Entries, prior: Float64[Tensor, " vocab"] | None = None
) -> Float64[Tensor, " places"]:
    """KL(teacher || rebuilt) of each place, ids without a name by their prior, or evenly.

    References:
        own; J.4 of docs/losses.md has the tail.
    """
    true, used = _true_logprobs(reference, rebuilt)
    mass = true.exp().where(used, 0.0)
    named = (mass * rebuilt.logprobs.double().where(used, 0.0)).sum(1)
    left = (1.0 - mass.sum(1)).clamp_min(0.0)
    tail = TailShares(reference, rebuilt, prior)
    rest = left * tail.log_scale.clamp_min(-1e4) + tail.teacher_log_prior
    return -reference.entropy - named - rest


def squared_error(
    reference: Reference, rebuilt: Entries, prior: Float64[Tensor, " vocab"] | None = None
) -> Float64[Tensor, " places"]:
    """Squared distance of the rebuilt distribution from the teacher's.

    A cross-entropy's gradient at the logits is student minus target, so that this is the squared
    error of the gradient too, whatever the student.

    References:
        own.
    """
    true, used = _true_logprobs(reference, rebuilt)
    mass = true.exp().where(used, 0.0)
    named = (mass - rebuilt.logprobs.double().exp()).square().where(used, 0.0).sum(1)
    rest = (reference.squares - mass.square().sum(1)).clamp_min(0.0)
    tail = TailShares(reference, rebuilt, prior)
    scale = tail.log_scale.exp()
    return named + rest - 2 * scale * tail.teacher_prior + scale.square() * tail.prior_squares


def _true_logprobs(reference: Reference, rebuilt: Entries) -> tuple[Tensor, Tensor]:
    """The teacher's own log-probs of the rebuilt ids, and which of these are in use."""
    used = rebuilt.logprobs > -torch.inf
    known = torch.cat([reference.ids, reference.drawn_ids], dim=1)
    values = torch.cat([reference.logprobs, reference.drawn_logprobs], dim=1)
    known, order = known.sort(1)
    values = values.gather(1, order)
    place = torch.searchsorted(known, rebuilt.ids.contiguous()).clamp_max(known.shape[1] - 1)
    if not bool((known.gather(1, place) == rebuilt.ids)[used].all()):
        raise ValueError("a codec named an id that the teacher did not")
    return values.gather(1, place), used
