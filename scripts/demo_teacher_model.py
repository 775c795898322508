"""The demo teacher's sizes and its model: transformers' GPT-OSS, arranged for fast training."""

import types
from dataclasses import dataclass

import torch
from transformers import GptOssConfig, GptOssForCausalLM


@dataclass(frozen=True)
class Variant:
    """One size of teacher and how it is trained."""

    hidden: int = 64
    layers: int = 4
    experts: int = 4
    intermediate: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    window: int = 32
    lr: float = 4e-3
    warmup: float = 0.02  # share of the run
    weight_decay: float = 0.05
    label_smoothing: float = 0.01
    balance: float = 0.01
    batch: int = 512
    steps: int = 0  # 0: as many as the command allows
    seed: int = 0


VARIANTS = {
    "tiny": Variant(hidden=48, layers=3, intermediate=48),
    "small": Variant(),
    "small-sharp": Variant(label_smoothing=0.0),
    "small-3l": Variant(layers=3),
    "medium": Variant(hidden=80, intermediate=80),
    "wide": Variant(hidden=96, layers=4, intermediate=64, heads=6, kv_heads=2, lr=3e-3),
    # Not teachers: how much a small model learns from few tokens, i.e. how hard the problems are.
    "probe-2m": Variant(batch=32, steps=1_000, label_smoothing=0.0),
    "probe-8m": Variant(batch=64, steps=2_000, label_smoothing=0.0),
}


def build_model(variant: Variant, table, device):
    """A fresh GPT-OSS model over the table's vocabulary, its experts computed all at once."""
    config = GptOssConfig(
        vocab_size=len(table.vocab_ids),
        hidden_size=variant.hidden,
        num_hidden_layers=variant.layers,
        num_local_experts=variant.experts,
        num_experts_per_tok=2,
        intermediate_size=variant.intermediate,
        num_attention_heads=variant.heads,
        num_key_value_heads=variant.kv_heads,
        head_dim=variant.head_dim,
        sliding_window=variant.window,
        max_position_embeddings=512,
        initializer_range=0.08,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        pad_token_id=table.pad_row,
        eos_token_id=table.stop_row,
        use_cache=False,
        attn_implementation="eager",
    )
    torch.manual_seed(variant.seed)
    model = GptOssForCausalLM(config).to(device)
    for layer in model.model.layers:
        layer.mlp.experts.forward = types.MethodType(all_experts, layer.mlp.experts)
    return model


def all_experts(experts, hidden, indices, weights):
    """Every expert on every token, weighted: far faster than a loop while experts are few."""
    shape = (hidden.shape[0], experts.num_experts)
    shares = torch.zeros(shape, dtype=hidden.dtype, device=hidden.device)
    shares = shares.scatter(1, indices, weights)  # (B·T, E)
    experts.mean_shares = shares.mean(dim=0)
    inner = torch.einsum("td,edf->etf", hidden, experts.gate_up_proj)
    inner = inner + experts.gate_up_proj_bias[:, None]
    gate, up = inner[..., ::2], inner[..., 1::2]
    gate = gate.clamp(max=experts.limit)
    up = up.clamp(min=-experts.limit, max=experts.limit)
    inner = (up + 1) * gate * torch.sigmoid(gate * experts.alpha)
    out = torch.einsum("etf,efd->etd", inner, experts.down_proj) + experts.down_proj_bias[:, None]
    return torch.einsum("etd,te->td", out, shares)


class Masks:
    """Causal masks of one width; rows are padded on the right, so that is all they need."""

    def __init__(self, width: int, window: int, device) -> None:
        place = torch.arange(width, device=device)
        distance = place[:, None] - place[None, :]
        refuse = torch.finfo(torch.float32).min
        full = torch.where(distance >= 0, 0.0, refuse)
        near = torch.where((distance >= 0) & (distance < window), 0.0, refuse)
        self.mapping = {
            "full_attention": full[None, None],
            "sliding_attention": near[None, None],
        }
        self.positions = place[None]


def logits_of(model, tokens, masks: Masks):
    out = model.model(
        input_ids=tokens,
        attention_mask=masks.mapping,
        position_ids=masks.positions,
        use_cache=False,
    )
    return model.lm_head(out.last_hidden_state)
