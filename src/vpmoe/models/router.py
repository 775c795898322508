"""Which experts a token goes to: pure functions of logits, and the module that owns the weights.

All of it is float32 or wider. Choices do not depend on how a device breaks ties: the lowest index
wins everywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Integer
from pydantic import Field
from torch import Tensor, nn

from vpmoe.config import Config
from vpmoe.models.norm import widened


class _RouterConfig(Config):
    bias: bool = True
    """Whether the logits have a learned bias; it starts at 0."""
    load_balance: float = Field(default=1e-4, ge=0)
    """Coefficient of the sequence auxiliary loss, per document and layer."""
    expert_bias_rate: float = Field(default=1e-3, ge=0)
    """How far a selection bias moves per optimizer step towards even loads; 0 never moves it."""


class DeepseekV3Config(_RouterConfig):
    """Sigmoid scores; whole groups of experts compete first, then the experts of those kept."""

    kind: Literal["deepseek_v3"] = "deepseek_v3"
    num_groups: int = Field(default=8, gt=0)
    """Groups of neighbouring experts."""
    num_groups_kept: int = Field(default=4, gt=0)
    """Groups a token may use."""
    group_score_topk: int = Field(default=2, gt=0)
    """A group is judged by the sum of its this many best scores; 1 is Megatron's rule."""
    scaling: float = Field(default=2.5, gt=0)
    """What a token's expert weights sum to."""


class SoftmaxTopkConfig(_RouterConfig):
    """The best logits win; a softmax over the winners gives the weights."""

    kind: Literal["softmax_topk"] = "softmax_topk"
    load_balance: float = Field(default=0.0, ge=0)
    """Coefficient of the sequence auxiliary loss, per document and layer."""
    expert_bias_rate: float = Field(default=0.0, ge=0)
    """How far a selection bias moves per optimizer step towards even loads; 0 never moves it."""


RouterConfig = Annotated[DeepseekV3Config | SoftmaxTopkConfig, Field(discriminator="kind")]


@dataclass(frozen=True)
class Routing:
    """Where tokens go.

    Attributes:
        scores: Non-negative score of every expert, with grad.
        expert_ids: Experts of each token, best first.
        expert_weights: What multiplies each chosen expert's output, with grad.
    """

    scores: Float[Tensor, "rows experts"]
    expert_ids: Int[Tensor, "rows chosen"]
    expert_weights: Float[Tensor, "rows chosen"]


@dataclass(frozen=True)
class MoeStatistics:
    """What routing a batch through one layer leaves behind.

    Attributes:
        load_balance_sum: Sum over documents of sum_i f_i P_i, with grad.
        tokens_per_expert: Tokens sent to each expert, padding left out, float32.
    """

    load_balance_sum: Float[Tensor, ""]
    tokens_per_expert: Float[Tensor, " experts"]


@dataclass(frozen=True)
class Segments:
    """Documents of a batch, numbered through.

    Attributes:
        ids: Document of each token; `num_documents` for padding.
        lengths: Tokens of each document.
        is_real: False for padding.
        num_documents: How many there are.
    """

    ids: Int[Tensor, " rows"]
    lengths: Float[Tensor, " documents"]
    is_real: Bool[Tensor, " rows"]
    num_documents: int


def segments_of(
    document_ids: Int[Tensor, "batch seq"], *, num_documents: int | None = None
) -> Segments:
    """Documents counted through the rows of a batch, padding set apart.

    Args:
        document_ids: Document of each token in its row; negative for padding.
        num_documents: How many there are, or more: the rest are empty. Counted unless given, which
            waits for the device.

    References:
        own.
    """
    per_row = (document_ids.amax(dim=1) + 1).clamp_min(0)  # (B,)
    if num_documents is None:
        num_documents = int(per_row.sum())
    before = per_row.cumsum(0) - per_row
    is_real = document_ids >= 0
    ids = torch.where(is_real, document_ids + before[:, None], num_documents).flatten()
    lengths = torch.zeros(num_documents + 1, device=document_ids.device)
    lengths.index_add_(0, ids, torch.ones_like(ids, dtype=lengths.dtype))
    return Segments(ids, lengths[:-1], is_real.flatten(), num_documents)


def top_experts(values: Float[Tensor, "rows experts"], *, count: int) -> Int[Tensor, "rows count"]:
    """Indices of the largest values, largest first; the lowest index of equal ones.

    References:
        own: `torch.topk` leaves the order of ties to the device.
    """
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :count]


@torch.no_grad()
def select_in_groups(
    choice: Float[Tensor, "rows experts"], *, config: DeepseekV3Config, count: int
) -> Int[Tensor, "rows count"]:
    """The best experts of the best groups.

    A group's score is the sum of its `group_score_topk` best experts. Experts of other groups are
    out of reach (-inf), not merely set to 0, which would win over negative biased scores.

    References:
        DeepSeek-AI, "DeepSeek-V3 Technical Report" (2024), arXiv:2412.19437. Difference: the number
        of experts that judge a group is a setting.
    """
    groups = choice.unflatten(-1, (config.num_groups, -1))  # (rows, groups, E / groups)
    best = groups.topk(config.group_score_topk, dim=-1).values.sum(dim=-1)
    kept = top_experts(best, count=config.num_groups_kept)
    is_kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, kept, True)
    reachable = groups.masked_fill(~is_kept[..., None], -torch.inf)
    return top_experts(reachable.flatten(1), count=count)


def compact_dtype(num_experts: int, *, count: int) -> torch.dtype:
    """The smallest type for ids of experts and, with all bits set in all places, of none.

    The experts of a token differ, so that 255 in each of several places is no choice.

    References:
        own.
    """
    if num_experts <= 255 + (count > 1):
        return torch.uint8
    return torch.int16 if num_experts < 1 << 15 else torch.int32


def replayed(
    own: Int[Tensor, "rows chosen"], given: Integer[Tensor, "rows chosen"] | None
) -> Int[Tensor, "rows chosen"]:
    """The experts that were given, as they are, and own ones for tokens that come without.

    Args:
        own: What the router would choose.
        given: What a sampler chose; all bits set in all places of a token where that is not known.

    References:
        Ma et al., "Stabilizing MoE Reinforcement Learning by Aligning Training and Inference
        Routers" (2025), arXiv:2510.11370. Difference: tokens may come without; used to distil.
    """
    if given is None:
        return own
    is_known = (~given != 0).any(dim=-1, keepdim=True)
    return torch.where(is_known, given.to(own.dtype), own)


def route_deepseek_v3(
    router_logits: Float[Tensor, "rows experts"],
    expert_bias: Float[Tensor, " experts"],
    *,
    config: DeepseekV3Config,
    count: int,
    given: Integer[Tensor, "rows chosen"] | None = None,
) -> Routing:
    """Sigmoid routing limited to groups; the bias steers the choice and never the weights.

    Given ids take the choice's place; weights are those of the scores at hand.

    References:
        DeepSeek-AI, "DeepSeek-V3 Technical Report" (2024), arXiv:2412.19437; Wang et al.,
        "Auxiliary-Loss-Free Load Balancing" (2024), arXiv:2408.15664.
    """
    scores = torch.sigmoid(router_logits)
    own = select_in_groups(scores.detach() + expert_bias, config=config, count=count)
    expert_ids = replayed(own, given)
    chosen = scores.gather(1, expert_ids)
    total = chosen.sum(dim=-1, keepdim=True) + 1e-20
    return Routing(scores, expert_ids, config.scaling * chosen / total)


def route_softmax_topk(
    router_logits: Float[Tensor, "rows experts"],
    expert_bias: Float[Tensor, " experts"],
    *,
    count: int,
    given: Integer[Tensor, "rows chosen"] | None = None,
) -> Routing:
    """The largest logits win, unless ids are given, and share a weight of one by their softmax.

    References:
        OpenAI, "gpt-oss model card" (2025), arXiv:2508.10925.
    """
    expert_ids = replayed(top_experts(router_logits.detach() + expert_bias, count=count), given)
    weights = router_logits.gather(1, expert_ids).softmax(dim=-1)
    return Routing(router_logits.softmax(dim=-1), expert_ids, weights)


def load_balance_sum(
    scores: Float[Tensor, "rows experts"], segments: Segments, *, count: int
) -> Float[Tensor, ""]:
    """Sequence auxiliary loss of one layer, summed over documents, without coefficient.

    For each document sum_i f_i P_i, where f_i is expert i's share of plain top-`count` choices
    (no bias, no groups) times the number of experts, and P_i its mean normalised score. Even loads
    give 1. Only P carries grad. Padding counts nowhere.

    References:
        DeepSeek-AI, "DeepSeek-V3 Technical Report" (2024), arXiv:2412.19437. Difference: a sequence
        is a document, not a packed row.
    """
    num_experts = scores.shape[1]
    shares = scores / scores.sum(dim=-1, keepdim=True)
    with torch.no_grad():
        chosen = torch.zeros_like(shares)
        chosen.scatter_(1, top_experts(scores, count=count), 1.0)
        sums = torch.zeros_like(shares[:1]).repeat(segments.num_documents + 1, 1)
        counts = sums.index_add(0, segments.ids, chosen)[:-1]  # (documents, E)
        # f/T of each document, so that every token's shares meet their document's row.
        lengths = segments.lengths.to(scores.dtype).clamp_min(1)[:, None]
        slopes = counts * (num_experts / count) / lengths.square()
        slopes = torch.cat((slopes, slopes.new_zeros(1, num_experts)))  # padding weighs nothing
    return (shares * slopes[segments.ids]).sum()


def shifted_expert_bias(
    expert_bias: Float[Tensor, " experts"], counts: Float[Tensor, " experts"], *, rate: float
) -> Float[Tensor, " experts"]:
    """The selection bias after one step towards even loads: up below the mean, down above it.

    References:
        Wang et al., "Auxiliary-Loss-Free Load Balancing" (2024), arXiv:2408.15664.
    """
    return expert_bias + rate * torch.sign(counts.mean() - counts)


def router_health(
    counts: Float[Tensor, " experts"], expert_bias: Float[Tensor, " experts"]
) -> dict[str, float]:
    """How evenly one layer's experts are used, from the token counts of one step.

    Names: cv_pct (standard deviation over mean of loads), entropy (nats), max_load_pct (share of
    the busiest expert), dead (experts without tokens), experts_active, bias_range.

    References:
        own; definitions as in the routing statistics of public MoE trainers.
    """
    loads = counts.double() / counts.double().sum().clamp_min(1)
    floor = loads.clamp_min(1e-12)
    return {
        "cv_pct": float(100 * loads.std(correction=0) / loads.mean().clamp_min(1e-12)),
        "entropy": float(-(floor * floor.log()).sum()),
        "max_load_pct": float(100 * loads.max()),
        "dead": float((loads <= 0).sum()),
        "experts_active": float((loads > 0).sum()),
        "bias_range": float(expert_bias.max() - expert_bias.min()),
    }


def aggregate_health(layers: Sequence[dict[str, float]]) -> dict[str, float]:
    """One line for all layers: mean and spread of cv, mean and minimum of entropy, sum of dead.

    References:
        own.
    """
    column = {name: torch.tensor([layer[name] for layer in layers]).double() for name in layers[0]}
    return {
        "cv_pct_mean": float(column["cv_pct"].mean()),
        "cv_pct_std": float(column["cv_pct"].std(correction=0)),
        "entropy_mean": float(column["entropy"].mean()),
        "entropy_min": float(column["entropy"].min()),
        "max_load_pct": float(column["max_load_pct"].max()),
        "dead": float(column["dead"].sum()),
        "experts_active_mean": float(column["experts_active"].mean()),
        "bias_range": float(column["bias_range"].max()),
    }


class Router(nn.Module):
    """Weights of the choice, and the two tallies that balance it.

    Attributes:
        expert_bias: Added to scores when experts are chosen; moved by `update_expert_bias` only.
        local_tokens_per_expert: Tokens sent to each expert in training passes since the last reset,
            on this rank.
    """

    expert_bias: Tensor
    local_tokens_per_expert: Tensor

    def __init__(
        self,
        config: DeepseekV3Config | SoftmaxTopkConfig,
        *,
        hidden_size: int,
        num_experts: int,
        num_experts_per_token: int,
    ) -> None:
        super().__init__()
        self.config = config
        self.num_experts_per_token = num_experts_per_token
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.bias = nn.Parameter(torch.zeros(num_experts)) if config.bias else None
        self.register_buffer("expert_bias", torch.zeros(num_experts))
        self.register_buffer("local_tokens_per_expert", torch.zeros(num_experts))

    def forward(
        self,
        hidden: Float[Tensor, "rows dim"],
        given: Integer[Tensor, "rows chosen"] | None = None,
    ) -> Routing:
        """Experts and weights of each token; the experts are those given, where they are."""
        wide = widened(hidden)
        bias = None if self.bias is None else self.bias.to(wide.dtype)
        logits = F.linear(wide, self.weight.to(wide.dtype), bias)
        count = self.num_experts_per_token
        if isinstance(self.config, DeepseekV3Config):
            return route_deepseek_v3(
                logits, self.expert_bias, config=self.config, count=count, given=given
            )
        return route_softmax_topk(logits, self.expert_bias, count=count, given=given)

    @torch.no_grad()
    def update_expert_bias(self, counts: Float[Tensor, " experts"]) -> None:
        """Move the selection bias by one step, given token counts over the whole global batch."""
        rate = self.config.expert_bias_rate
        self.expert_bias.copy_(shifted_expert_bias(self.expert_bias, counts, rate=rate))


def route_reference(
    router: Router,
    hidden: Float[Tensor, "rows dim"],
    segments: Segments | None,
    given: Integer[Tensor, "rows chosen"] | None = None,
) -> tuple[Int[Tensor, "rows chosen"], Float[Tensor, "rows chosen"], MoeStatistics | None]:
    """Experts and weights of each token, and statistics where documents are given.

    Given experts take the place of the choice, see `replayed`; the loads count them.

    What a fused router has to equal, in values and in gradients.

    References:
        own; see the functions it calls.
    """
    routing = router(hidden, given)
    if segments is None:
        return routing.expert_ids, routing.expert_weights, None
    counts = torch.zeros_like(router.local_tokens_per_expert)
    real = segments.is_real.to(counts.dtype)[:, None].expand_as(routing.expert_ids)
    counts.scatter_add_(0, routing.expert_ids.flatten(), real.flatten())
    balance = load_balance_sum(routing.scores, segments, count=router.num_experts_per_token)
    return routing.expert_ids, routing.expert_weights, MoeStatistics(balance, counts)
