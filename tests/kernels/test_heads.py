"""Queries, keys and values by one kernel: values and all gradients against float64."""

import copy

import pytest
import torch

from tests.kernels.common import BF16, assert_close, needs_gpu
from vpmoe.models.attention.base import AttentionShape, heads_reference
from vpmoe.models.attention.gqa import Gqa
from vpmoe.models.attention.tpa import Tpa
from vpmoe.models.fused import heads_fused
from vpmoe.models.positions import grape_frequencies, rope_log_frequencies, rotation_of

pytestmark = needs_gpu
HEADS, KV_HEADS, HIDDEN = 8, 2, 256
CASES = {
    # seq, head_dim, ranks of queries and of keys, what is switched on
    "local": (1024, 128, (4, 2), "norm bias turn mix"),
    "first": (1000, 128, (4, 2), "norm bias turn"),
    "global": (333, 128, None, "norm bias mix"),
    "plain": (40, 64, None, ""),
    "turned, not normed": (77, 32, (3, 1), "turn bias mix"),
    "mixed, not biased": (500, 128, (8, 2), "norm mix"),
}


def layer_of(case):
    seq, head_dim, ranks, switches = CASES[case]
    shape = AttentionShape(
        hidden_size=HIDDEN,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=head_dim,
        bias="bias" in switches,
        has_sinks=False,
        has_qk_norm="norm" in switches,
        is_mixed="mix" in switches,
        norm_eps=1e-6,
    )
    layer = Gqa(shape) if ranks is None else Tpa(shape, q_rank=ranks[0], rank=ranks[1])
    for name, parameter in layer.named_parameters():
        torch.nn.init.normal_(parameter, std=0.06 if parameter.ndim == 2 else 0.5)
        if not name.startswith("value_lambda"):
            parameter.data = parameter.data.bfloat16()
    return seq, layer.cuda()


def gradients(make, layer, leaves, positions, outs):
    rotation = None
    if leaves["log_freq"] is not None:
        omega = grape_frequencies(leaves["log_freq"], log_freq_scale=16.0)
        rotation = rotation_of(positions, omega)
    found = make(layer, leaves["hidden"], rotation, leaves["first"])
    given = {n: leaf for n, leaf in leaves.items() if leaf is not None}
    named = {n: p for n, p in layer.named_parameters() if not n.startswith("o_proj")}
    # Attention gives its gradients with heads before tokens.
    outs = [d.to(o.dtype).transpose(1, 2) for d, o in zip(outs, found, strict=True)]
    wanted = named | given
    grads = torch.autograd.grad(found, list(wanted.values()), outs)
    grads = dict(zip(wanted, grads, strict=True))
    return dict(zip("qkv", found, strict=True)) | grads


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_heads_equal_float64(case, compiled):
    torch.manual_seed(0)
    seq, layer = layer_of(case)
    _, head_dim, _, switches = CASES[case]
    hidden = torch.randn(3, seq, HIDDEN, device="cuda").bfloat16().requires_grad_()
    first = log_freq = None
    if "mix" in switches:
        first = torch.randn(3, seq, KV_HEADS, head_dim, device="cuda").bfloat16().requires_grad_()
    if "turn" in switches:
        log_freq = (16 * rope_log_frequencies(head_dim, base=1e4)).float().cuda().requires_grad_()
    positions = torch.arange(seq, device="cuda").expand(3, -1) % 300
    outs = [
        torch.randn(3, n, seq, head_dim, device="cuda").bfloat16()
        for n in (HEADS, KV_HEADS, KV_HEADS)
    ]
    leaves = {"hidden": hidden, "first": first, "log_freq": log_freq}
    wide = {
        n: leaf if leaf is None else leaf.detach().double().requires_grad_()
        for n, leaf in leaves.items()
    }
    expected = gradients(heads_reference, copy.deepcopy(layer).double(), wide, positions, outs)
    make = torch.compile(heads_fused, dynamic=False, fullgraph=True) if compiled else heads_fused
    found = gradients(make, layer, leaves, positions, outs)
    assert found.keys() == expected.keys()
    again = gradients(make, layer, leaves, positions, outs)
    assert all(torch.equal(found[name], again[name]) for name in found)
    # Norms take a scale out of a rank-one mixture: what is left of its gradient is rounding.
    pairs = {n: (found[n], g) for n, g in expected.items() if g.norm() > 1e-3 * g.numel() ** 0.5}
    assert_close({n: pair for n, pair in pairs.items() if n != "value_lambda"}, 2 * BF16)
    # One sum over all tokens, whose terms cancel.
    assert_close({n: pair for n, pair in pairs.items() if n == "value_lambda"}, 10 * BF16)
