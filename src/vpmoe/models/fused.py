"""The hot paths on one GPU: the kernels room behind the reference's signatures."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch._dynamo
from jaxtyping import Float, Int, Integer
from torch import Tensor, nn

from vpmoe.errors import ConfigError
from vpmoe.kernels import attention
from vpmoe.models.attention.base import Attention, QueriesKeysValues
from vpmoe.models.attention.sink import AttentionScope, attend_reference
from vpmoe.models.config import StudentConfig
from vpmoe.models.decode import Decoder
from vpmoe.models.experts import ExpertWeights
from vpmoe.models.kernels import Kernels
from vpmoe.models.mlp import Activation
from vpmoe.models.norm import RmsNorm
from vpmoe.models.positions import Rotation
from vpmoe.models.router import DeepseekV3Config, MoeStatistics, Router, Segments

MAX_EXPERTS = 256  # one program holds all scores of a token
REGIONS = 64  # kinds of layers, shapes and modes that may be compiled before a run stops


def embed_fused(
    tokens: Int[Tensor, "*batch"], weight: Float[Tensor, "vocab dim"]
) -> Float[Tensor, "*batch dim"]:
    """Rows of the embedding.

    References:
        own; see `kernels.embedding.embed`.
    """
    from vpmoe.kernels.embedding import embed

    return embed(tokens, weight)


def scope_fused(scope: AttentionScope) -> AttentionScope | attention.PackedScope:
    """The ranges of a packed batch; a cached conversation's scope as it is.

    References:
        own.
    """
    if scope.documents is None:
        return scope
    return attention.packed_scope(scope.documents, window_size=scope.window_size)


def add_norm_fused(
    norm: RmsNorm,
    stream: Float[Tensor, "batch seq dim"],
    inputs: Float[Tensor, "batch seq width"] | None = None,
    projection: nn.Linear | None = None,
    *,
    readers: int = 1,
) -> tuple[Tensor, ...]:
    """The stream with an update, and its normed states for each reader, in one pass.

    References:
        own; see `kernels.norms.add_norm`.
    """
    from vpmoe.kernels.norms import add_norm

    update = bias = None
    if inputs is not None and projection is not None:
        update, bias = nn.functional.linear(inputs, projection.weight), projection.bias
    return add_norm(stream, update, bias, norm.gamma, eps=norm.eps, readers=readers)


def heads_fused(
    attention: Attention,
    hidden: Float[Tensor, "batch seq dim"],
    rotation: Rotation | None,
    first_values: Float[Tensor, "batch seq kv_heads dim"] | None,
) -> QueriesKeysValues:
    """Queries, keys and values as attention takes them: one product, then one kernel.

    One wide product reads the states once, and its gradient needs no sum over the projections;
    narrow ones, a few columns for the mixtures, are far slower than their size on a GPU.

    References:
        own; see `kernels.heads.heads`.
    """
    from vpmoe.kernels.heads import HeadShape, Turns, heads

    parts, sizes = attention.projections(), attention.shape
    mixtures = [part.mixture for part in parts if part.mixture is not None]
    weights = [part.vectors.weight for part in parts] + [m.weight for m in mixtures]
    shape = HeadShape(
        sizes.num_heads,
        sizes.num_kv_heads,
        sizes.head_dim,
        parts[0].rank,
        parts[1].rank,
        attention.q_norm is not None,
    )
    unused = shape.row - sum(weight.shape[0] for weight in weights)
    weights.append(hidden.new_zeros(unused, hidden.shape[-1]))
    rows = nn.functional.linear(hidden, torch.cat(weights))
    counts = sizes.num_heads, sizes.num_kv_heads, sizes.num_kv_heads
    small = [
        _or_zeros(part.bias, rows, count * sizes.head_dim)
        for part, count in zip(parts, counts, strict=True)
    ]
    small += [_or_zeros(m.bias, rows, m.out_features) for m in mixtures]
    norms = attention.q_norm, attention.k_norm
    small += [rows.new_ones(sizes.head_dim) if n is None else n.gamma for n in norms]
    turns = residual = None
    if rotation is not None:
        tables = rotation.cosines.detach(), rotation.sines.detach()
        turns = Turns(*tables, rotation.positions, rotation.frequencies)
    if attention.value_lambda is not None and first_values is not None:
        residual = first_values, attention.value_lambda
    return heads(rows, torch.cat(small), turns, residual, shape=shape, eps=sizes.norm_eps)


def _or_zeros(bias: Tensor | None, like: Tensor, size: int) -> Tensor:
    return like.new_zeros(size) if bias is None else bias


def attend_fused(
    queries: Float[Tensor, "batch seq heads dim"],
    keys: Float[Tensor, "batch keys kv_heads dim"],
    values: Float[Tensor, "batch keys kv_heads dim"],
    scope: AttentionScope | attention.PackedScope,
    *,
    sinks: Float[Tensor, " heads"] | None = None,
    slopes: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "batch seq heads dim"]:
    """What each query gathers: by a kernel in packed rows, by the reference from a cache.

    References:
        own; see `kernels.attention.attend`.
    """
    if isinstance(scope, AttentionScope):
        return attend_reference(queries, keys, values, scope, sinks=sinks, slopes=slopes)
    return attention.attend(queries, keys, values, scope, sinks=sinks, slopes=slopes)


def moe_fused(
    hidden: Float[Tensor, "rows dim"],
    expert_ids: Int[Tensor, "rows chosen"],
    expert_weights: Float[Tensor, "rows chosen"],
    experts: ExpertWeights,
    *,
    activation: Activation,
    residual: Float[Tensor, "rows dim"] | None = None,
) -> Float[Tensor, "rows dim"]:
    """Sum of each token's chosen experts, in few kernels.

    References:
        own; see `kernels.experts.routed_experts`.
    """
    from vpmoe.kernels.experts import routed_experts

    assert activation == "relu2"
    assert experts.up_bias is not None and experts.down_bias is not None
    return routed_experts(
        hidden,
        experts.up,
        experts.up_bias,
        experts.down,
        experts.down_bias,
        expert_weights,
        expert_ids,
        residual,
    )


def route_fused(
    router: Router,
    hidden: Float[Tensor, "rows dim"],
    segments: Segments | None,
    given: Integer[Tensor, "rows chosen"] | None = None,
) -> tuple[Int[Tensor, "rows chosen"], Float[Tensor, "rows chosen"], MoeStatistics | None]:
    """Experts and weights of each token, and statistics where documents are given.

    References:
        own; see `kernels.router.route`.
    """
    from vpmoe.kernels.router import Documents, GroupChoice, route

    config = router.config
    assert isinstance(config, DeepseekV3Config)
    choice = GroupChoice(
        num_groups=config.num_groups,
        num_kept=config.num_groups_kept,
        num_judges=config.group_score_topk,
        count=router.num_experts_per_token,
        scaling=config.scaling,
    )
    documents = None
    if segments is not None:
        documents = Documents(segments.ids, segments.lengths, segments.num_documents)
    routed = route(
        hidden,
        router.weight,
        router.bias,
        router.expert_bias,
        choice=choice,
        documents=documents,
        given=given,
    )
    if segments is None:
        return routed.expert_ids, routed.expert_weights, None
    statistics = MoeStatistics(routed.load_balance_sum, routed.tokens_per_expert)
    return routed.expert_ids, routed.expert_weights, statistics


@cache
def compiled_region(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled once per kind of layer and shape, without a graph break.

    More kinds and shapes than `REGIONS` stop the run: they would recompile for ever.

    References:
        own.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, REGIONS)
    return torch.compile(function, dynamic=False, fullgraph=True)


def decoder_fused(
    student: Any, *, slots: int, capacity: int, keeps_experts: bool = False
) -> Decoder:
    """Conversations that a CUDA graph moves on.

    References:
        own; see `decode_fused.FusedDecoder`.
    """
    from vpmoe.models.decode_fused import FusedDecoder

    return FusedDecoder(student, slots=slots, capacity=capacity, keeps_experts=keeps_experts)


def draw_fused(
    logits: Float[Tensor, "batch vocab"],
    streams: Int[Tensor, " batch"],
    places: Int[Tensor, " batch"],
    *,
    temperature: float,
) -> tuple[Int[Tensor, " batch"], Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Rows, their log-probs, and those under the tempered distribution, without sorting.

    References:
        own; see `kernels.draw.draw_rows`.
    """
    from vpmoe.kernels.draw import draw_rows

    return draw_rows(logits, streams, places, temperature=temperature)


def require_fused(config: StudentConfig, *, device: torch.device | str, dtype: torch.dtype) -> None:
    """Refuse what the kernels do not compute.

    Raises:
        ConfigError: Naming everything that is in the way.

    References:
        own.
    """
    problems = []
    if torch.device(device).type != "cuda":
        problems.append((f"kernels 'fused' on device {str(device)!r}", 'set device = "cuda"'))
    if dtype != torch.bfloat16:
        problems.append((f"kernels 'fused' with {dtype} weights", 'set dtype = "bfloat16"'))
    size, head = config.hidden_size, config.head_dim
    problems += _not_power("head_dim", head, low=16, high=256)
    if size % 64:
        problems.append((f"kernels 'fused' with hidden_size {size}", "a multiple of 64 fits"))
    moe = config.moe
    if moe is not None:
        problems += _not_power("moe.num_experts", moe.num_experts, low=16, high=MAX_EXPERTS)
        problems += _not_power("moe.expert_hidden", moe.expert_hidden, low=16, high=128)
        if not isinstance(moe.router, DeepseekV3Config):
            problems.append(
                (f"kernels 'fused' with moe.router {moe.router.kind!r}", "use deepseek_v3")
            )
        else:
            problems += _not_power("moe.router.num_groups", moe.router.num_groups, low=1, high=256)
        if config.activation != "relu2" or not config.mlp_bias:
            bias = "with" if config.mlp_bias else "without"
            problems.append(
                (
                    f"kernels 'fused' for {config.activation} experts {bias} biases",
                    "they compute relu2 with biases",
                )
            )
    if problems:
        raise ConfigError(
            [(what, f'{hint}, or set kernels = "reference"') for what, hint in problems]
        )


def _not_power(name: str, value: int, *, low: int, high: int) -> list[tuple[str, str]]:
    if value & (value - 1) == 0 and low <= value <= high:
        return []
    return [(f"kernels 'fused' with {name} {value}", f"a power of two in {low}..{high} fits")]


FUSED = Kernels(
    add_norm=add_norm_fused,
    heads=heads_fused,
    attend=attend_fused,
    moe=moe_fused,
    route=route_fused,
    embed=embed_fused,
    scope=scope_fused,
    region=compiled_region,
    decoder=decoder_fused,
    draw=draw_fused,
    require=require_fused,
)
