"""The GPT-OSS-shaped student against transformers' own GPT-OSS, from its weights."""

import pytest
import torch

from vpmoe.models.student import StudentConfig, build_student

LAYERS, HEADS, KV_HEADS, DIM, EXPERTS = 4, 4, 2, 8, 6
POSITION = {"kind": "rope", "base": 150_000, "yarn": {"factor": 32, "original_length": 4_096}}


@pytest.fixture(scope="module")
def theirs():
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        num_hidden_layers=LAYERS,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        vocab_size=101,
        hidden_size=32,
        intermediate_size=24,
        head_dim=DIM,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        sliding_window=6,
        max_position_embeddings=131_072,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 150_000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4_096,
        },
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = GptOssForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def ours(theirs):
    attention = {"kind": "gqa", "position": POSITION}
    config = StudentConfig.model_validate(
        {
            "num_layers": LAYERS,
            "hidden_size": 32,
            "num_heads": HEADS,
            "num_kv_heads": KV_HEADS,
            "head_dim": DIM,
            "vocab_size": 101,
            "global_every": 2,
            "local_attention": {**attention, "window_size": 6},
            "global_attention": attention,
            "qk_norm": False,
            "value_residual": False,
            "activation": "clamped_swiglu",
            "dense_layers": 0,
            "norm_eps": 1e-5,
            "moe": {
                "num_experts": EXPERTS,
                "num_experts_per_token": 2,
                "expert_hidden": 24,
                "shared_expert_hidden": 0,
                "router": {"kind": "softmax_topk"},
            },
        }
    )
    student = build_student(config, seed=0)
    missing = student.load_state_dict(converted(theirs.state_dict()), strict=False)
    assert not missing.unexpected_keys
    assert {name.rsplit(".", 1)[-1] for name in missing.missing_keys} == {
        "expert_bias",
        "local_tokens_per_expert",
    }
    return student


def converted(state):
    """Their names and layouts to ours: experts transposed, gate and up columns apart."""
    out = {
        "embedding.weight": state["model.embed_tokens.weight"],
        "final_norm.gamma": state["model.norm.weight"],
        "head.weight": state["lm_head.weight"],
    }
    for n in range(LAYERS):
        old, new = f"model.layers.{n}.", f"layers.{n}."
        out[new + "attention_norm.gamma"] = state[old + "input_layernorm.weight"]
        out[new + "mlp_norm.gamma"] = state[old + "post_attention_layernorm.weight"]
        out[new + "attention.sinks"] = state[old + "self_attn.sinks"]
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            for kind in ("weight", "bias"):
                out[f"{new}attention.{part}.{kind}"] = state[f"{old}self_attn.{part}.{kind}"]
        for kind in ("weight", "bias"):
            out[f"{new}mlp.router.{kind}"] = state[f"{old}mlp.router.{kind}"]
        fused = state[old + "mlp.experts.gate_up_proj"].transpose(1, 2)
        bias = state[old + "mlp.experts.gate_up_proj_bias"]
        out[new + "mlp.experts.gate_weight"] = fused[:, ::2]
        out[new + "mlp.experts.up_weight"] = fused[:, 1::2]
        out[new + "mlp.experts.gate_bias"] = bias[:, ::2]
        out[new + "mlp.experts.up_bias"] = bias[:, 1::2]
        down = state[old + "mlp.experts.down_proj"].transpose(1, 2)
        out[new + "mlp.experts.down_weight"] = down
        out[new + "mlp.experts.down_bias"] = state[old + "mlp.experts.down_proj_bias"]
    return out


def our_logits(student, tokens):
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    output = student(tokens, positions=positions, document_ids=torch.zeros_like(tokens))
    return student.logits(output.hidden)


@torch.no_grad()
def test_logits_equal(theirs, ours):
    tokens = torch.randint(0, 101, (2, 40), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        our_logits(ours, tokens).log_softmax(-1),
        theirs(tokens).logits.log_softmax(-1),
        atol=1e-5,
        rtol=1e-5,
    )


def test_gradients_equal(theirs, ours):
    tokens = torch.randint(0, 101, (1, 30), generator=torch.Generator().manual_seed(2))
    for model, logits in ((theirs, theirs(tokens).logits), (ours, our_logits(ours, tokens))):
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:]).backward()
    expected = converted({n: p.grad for n, p in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        scale = expected[name].abs().max().clamp_min(1e-3)
        gap = (parameter.grad - expected[name]).abs().max() / scale
        assert gap < 1e-4, f"{name}: {gap}"
