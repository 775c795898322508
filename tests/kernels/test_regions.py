"""A layer's dense part compiles without a break, once per kind of layer, to the same numbers."""

import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch._dynamo.utils

from tests.kernels import plain as plain_operators
from tests.kernels.common import relative_error
from vpmoe.kernels.attention import attend_backward_op, attend_op
from vpmoe.models import student as students
from vpmoe.models.fused import FUSED
from vpmoe.models.kernels import REFERENCE
from vpmoe.models.moe import MoeConfig
from vpmoe.models.student import StudentConfig, build_student

REPOSITORY = Path(__file__).resolve().parents[2]


@cache
def traced(function):
    """The compiler's front half: tracing and automatic differentiation, no code for a GPU."""
    return torch.compile(function, backend="aot_eager", dynamic=False, fullgraph=True)


def gradients(student, start):
    documents = torch.zeros(2, 48, dtype=torch.int64)
    documents[:, start:] = 1
    documents[1, 40:] = -1
    tokens = torch.randint(0, 40, (2, 48), generator=torch.Generator().manual_seed(start))
    positions = torch.arange(48).expand(2, -1)
    student.zero_grad()
    output = student(tokens, positions=positions, document_ids=documents)
    (output.hidden.square().sum() + output.load_balance_sum).backward()
    return {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}


@pytest.mark.slow
def test_dense_parts_compile_once_per_kind_of_layer():
    # In a process of its own: a compiler cannot read the shape checks that tests put on functions.
    program = "from tests.kernels.test_regions import check; check()"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def plain_weights(queries, keys, first, sinks, slopes):
    """Keys of every query head, attention weights, log-sum-exp."""
    groups = queries.shape[2] // keys.shape[2]
    keys = keys.repeat_interleave(groups, dim=2).transpose(1, 2)
    scores = queries.transpose(1, 2) @ keys.transpose(2, 3) * queries.shape[-1] ** -0.5
    place = torch.arange(queries.shape[1])
    if slopes is not None:
        scores = scores - slopes[:, None, None] * (place[:, None] - place)
    seen = (place >= first[:, None, :, None]) & (place <= place[:, None])
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = torch.logaddexp(scores.logsumexp(dim=-1), sinks[:, None])
    return keys, (scores - lse[..., None]).exp(), lse


def plain_forward(queries, keys, values, first, last, sinks, slopes):
    """What the kernels compute, for a CPU: they have nothing there."""
    del last
    _, weights, lse = plain_weights(queries, keys, first, sinks, slopes)
    values = values.repeat_interleave(weights.shape[1] // values.shape[2], dim=2)
    return (weights @ values.transpose(1, 2)).transpose(1, 2).contiguous(), lse


def plain_backward(queries, keys, values, first, last, sinks, slopes, *rest):
    del last
    out, _, d_out = rest
    wide_keys, weights, lse = plain_weights(queries, keys, first, sinks, slopes)
    groups = weights.shape[1] // keys.shape[2]
    values = values.repeat_interleave(groups, dim=2).transpose(1, 2)
    mean = (d_out * out).sum(dim=-1).transpose(1, 2)  # (B, N, T)
    d_out = d_out.transpose(1, 2)
    d_scores = weights * (d_out @ values.transpose(2, 3) - mean[..., None])
    d_scores = d_scores * queries.shape[-1] ** -0.5
    dq = (d_scores @ wide_keys).transpose(1, 2).contiguous()
    of_keys = (d_scores.transpose(2, 3) @ queries.transpose(1, 2), weights.transpose(2, 3) @ d_out)
    dk, dv = (x.unflatten(1, (-1, groups)).sum(dim=2).transpose(1, 2).contiguous() for x in of_keys)
    d_sinks = -((sinks[:, None] - lse).exp() * mean).sum(dim=(0, 2))
    return dq, dk, dv, d_sinks


def check():
    attend_op.register_kernel("cpu")(plain_forward)
    attend_backward_op.register_kernel("cpu")(plain_backward)
    config = StudentConfig(
        num_layers=6,
        hidden_size=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=40,
        global_every=3,
        dense_hidden=16,
        local_attention={"kind": "tpa", "window_size": 20},
        moe=MoeConfig(num_experts=16, num_experts_per_token=2, expert_hidden=16),
    )
    plain = build_student(config, seed=0)
    plain_operators.register()
    inside = {name: getattr(FUSED, name) for name in ("add_norm", "heads", "attend", "scope")}
    regions = replace(REFERENCE, **inside, region=traced)
    students.kernels_named = lambda _: regions
    compiled = build_student(config, seed=0)
    torch._dynamo.utils.counters.clear()
    for start in (11, 30):
        expected, found = gradients(plain, start), gradients(compiled, start)
        assert found.keys() == expected.keys()
        errors = {n: relative_error(found[n], g) for n, g in expected.items() if g.norm() > 1e-4}
        assert max(errors.values()) < 1e-3, errors
    # The dense first layer, local layers, global layers; not again for each layer or batch.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
