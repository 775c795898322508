"""How large a student is and what a token costs, derived from its config without allocating it."""

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from vpmoe.models.attention.tpa import TpaConfig
from vpmoe.models.config import StudentConfig
from vpmoe.models.init import FLOAT32
from vpmoe.models.positions import GrapeAConfig, alibi_slopes, penalty_reach
from vpmoe.models.student import build_student

DEFAULT_SEQ_LEN = 2_048
BACKWARD_OVER_FORWARD = 2  # a backward pass multiplies by weights and by inputs

# Parameter names to items, first match wins.
_ITEMS = (
    ("embedding", ("embedding.weight",)),
    ("head", ("head.weight",)),
    ("tpa mixture biases", ("q_a.bias", "k_a.bias", "v_a.bias")),
    ("attention output", ("o_proj.weight", "o_proj.bias")),
    ("qk norms", ("q_norm.gamma", "k_norm.gamma")),
    ("norms", ("gamma",)),
    ("sinks", ("sinks",)),
    ("value residual", ("value_lambda",)),
    ("position frequencies", ("log_freq",)),
    ("router biases", ("router.bias",)),
    ("routers", ("router.weight",)),
)
ROUTED = "routed experts"
# What our students have beyond the architecture's published budget.
_BEYOND_BUDGET = ("tpa mixture biases",)


@dataclass(frozen=True)
class CountItem:
    """One line of the bill.

    Attributes:
        name: What the parameters are.
        total: How many there are.
        active: How many of them one token uses.
    """

    name: str
    total: int
    active: int


@dataclass(frozen=True)
class CountReport:
    """Size and cost of a student.

    Attributes:
        name: The config's name.
        total: Parameters.
        active: Parameters that one token uses: its experts, and everything that is not an expert.
        active_without_embeddings: The same without embedding and head.
        items: All parameters by what they are; totals add up to `total`.
        additions: Items beyond the architecture's published budget; already part of `total`.
        seq_len: Document length that attention is costed at, tokens.
        forward_flops_per_token: Multiplications and additions of one forward pass, head included.
        training_flops_per_token: Forward and backward.
        weight_bytes: bfloat16 weights, float32 where the student keeps float32.
        master_bytes: float32 copies of bfloat16 weights.
        gradient_bytes: float32 gradients.
        optimizer_bytes: float32 momentum of matrices, two moments of everything else.
        activation_bytes_per_token: Estimate of what a layer stack keeps for the backward pass
            in bfloat16, without recomputation and without the head.
        cache_bytes_per_sequence: bfloat16 keys and values of one conversation of `seq_len` tokens.
        penalty_reach_tokens: For each head of layers with distance penalties, where the penalty is
            10 nats: how far they effectively see. Empty without such layers.
    """

    name: str
    total: int
    active: int
    active_without_embeddings: int
    items: tuple[CountItem, ...]
    additions: dict[str, int]
    seq_len: int
    forward_flops_per_token: float
    training_flops_per_token: float
    weight_bytes: int
    master_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes_per_token: int
    cache_bytes_per_sequence: int
    penalty_reach_tokens: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def count(config: StudentConfig, *, seq_len: int = DEFAULT_SEQ_LEN) -> CountReport:
    """Size and cost of the student that this config describes.

    Args:
        config: The student.
        seq_len: Document length at which attention and cache are costed.

    References:
        own.
    """
    model = build_student(config, seed=0, device="meta")
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    items = _items(sizes, config)
    active = sum(item.active for item in items)
    ends = sum(item.active for item in items if item.name in {"embedding", "head"})
    forward = _matrix_flops(sizes, config) + _attention_flops(config, seq_len)
    wide = sum(size for name, size in sizes.items() if name.endswith(FLOAT32))
    total = sum(sizes.values())
    return CountReport(
        name=config.name,
        total=total,
        active=active,
        active_without_embeddings=active - ends,
        items=items,
        additions={i.name: i.total for i in items if i.name in _BEYOND_BUDGET},
        seq_len=seq_len,
        forward_flops_per_token=forward,
        training_flops_per_token=forward * (1 + BACKWARD_OVER_FORWARD),
        weight_bytes=2 * (total - wide) + 4 * wide,
        master_bytes=4 * (total - wide),
        gradient_bytes=4 * total,
        optimizer_bytes=_optimizer_bytes(model),
        activation_bytes_per_token=_activation_bytes(config),
        cache_bytes_per_sequence=_cache_bytes(config, seq_len),
        penalty_reach_tokens=_reach(config),
    )


def _items(sizes: dict[str, int], config: StudentConfig) -> tuple[CountItem, ...]:
    totals: defaultdict[str, int] = defaultdict(int)
    for name, size in sizes.items():
        totals[_item_of(name, config)] += size
    return tuple(
        CountItem(item, size, _active_share(size, config) if item == ROUTED else size)
        for item, size in totals.items()
    )


def _active_share(size: int, config: StudentConfig) -> int:
    assert config.moe is not None
    return size * config.moe.num_experts_per_token // config.moe.num_experts


def _item_of(name: str, config: StudentConfig) -> str:
    for item, endings in _ITEMS:
        if name.endswith(endings):
            return item
    layer = int(name.split(".")[1]) + 1
    if ".attention." in name:
        side = "global" if config.is_global(layer) else "local"
        return f"{side} attention ({config.attention_of(layer).kind})"
    if ".experts." in name:
        return ROUTED
    return "shared experts" if ".shared." in name else "dense feed-forward"


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    others = ("embedding.weight", "head.weight", "router.weight", "bias")
    return parameter.ndim > 1 and not name.endswith(others)


def _optimizer_bytes(model: nn.Module) -> int:
    """Matrices keep a momentum and one number per row; all others two moments each."""
    total = 0
    for name, parameter in model.named_parameters():
        size = parameter.numel()
        if _is_matrix(name, parameter):
            total += 4 * (size + size // parameter.shape[-1])
        else:
            total += 8 * size
    return total


def _matrix_flops(sizes: dict[str, int], config: StudentConfig) -> float:
    """Two per weight that a token is multiplied by; an embedding row is looked up."""
    flops = 0.0
    for name, size in sizes.items():
        if ".experts." in name:
            size = _active_share(size, config)
        is_read = name == "embedding.weight" and not config.tie_embeddings
        if name.endswith("weight") and not is_read:
            flops += 2.0 * size
    return flops


def visible_pairs(seq_len: int, window_size: int | None) -> int:
    """Pairs of query and key in one document: all at or before, or the last `window_size`.

    References:
        own.
    """
    window = seq_len if window_size is None else min(window_size, seq_len)
    return window * (window + 1) // 2 + (seq_len - window) * window


def _attention_flops(config: StudentConfig, seq_len: int) -> float:
    """Scores and weighted values, two operations each per pair and channel, and TPA's products."""
    width = config.num_heads * config.head_dim
    kv_width = config.num_kv_heads * config.head_dim
    flops = 0.0
    for layer in range(1, config.num_layers + 1):
        attention = config.attention_of(layer)
        flops += 4.0 * width * visible_pairs(seq_len, attention.window_size) / seq_len
        if isinstance(attention, TpaConfig):
            flops += 2.0 * (width * attention.q_rank + 2 * kv_width * attention.rank)
    return flops


def _activation_bytes(config: StudentConfig) -> int:
    """What the fused kernels keep: streams, projections, attention's inputs and output, units."""
    width = config.num_heads * config.head_dim
    kv_width = config.num_kv_heads * config.head_dim
    numbers = 0
    for layer in range(1, config.num_layers + 1):
        attention = config.attention_of(layer)
        projected = width + 2 * kv_width
        if isinstance(attention, TpaConfig):
            mixtures = config.num_heads * attention.q_rank
            mixtures += 2 * config.num_kv_heads * attention.rank
            projected = mixtures + (attention.q_rank + 2 * attention.rank) * config.head_dim
        numbers += 3 * config.hidden_size + projected + 2 * width + 2 * kv_width
        if config.is_moe(layer) and config.moe is not None:
            chosen = config.moe.num_experts_per_token
            numbers += chosen * config.moe.expert_hidden + 2 * config.moe.shared_expert_hidden
            numbers += 2 * config.moe.num_experts  # float32 scores
        else:
            numbers += 2 * config.dense_hidden
    return 2 * numbers


def _reach(config: StudentConfig) -> tuple[float, ...]:
    positions = [attention.position for attention in config.attention_kinds.values()]
    if not any(isinstance(position, GrapeAConfig) for position in positions):
        return ()
    return penalty_reach(alibi_slopes(config.num_heads))


def _cache_bytes(config: StudentConfig, seq_len: int) -> int:
    per_place = 2 * config.num_kv_heads * config.head_dim * 2
    windows = [config.attention_of(n).window_size for n in range(1, config.num_layers + 1)]
    return sum(per_place * (seq_len if w is None else min(w, seq_len)) for w in windows)
