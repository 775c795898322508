"""RMSNorm with the residual stream around it: values and all gradients against float64."""

import pytest
import torch

from tests.kernels.common import BF16, assert_close, needs_gpu
from vpmoe.kernels.norms import add_norm
from vpmoe.models.norm import rms_norm

pytestmark = needs_gpu


def reference(stream, update, bias, gain, *, eps, readers):
    for part in (update, bias):
        stream = stream if part is None else stream + part
    return stream, *[rms_norm(stream, gain, eps=eps)] * readers


def results(make, leaves, pulls):
    found = make(*leaves.values(), eps=1e-6, readers=len(pulls) - 1)
    # Results that share memory get gradients of their own.
    total = sum((out * pull.to(out.dtype)).sum() for out, pull in zip(found, pulls, strict=True))
    given = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    grads = torch.autograd.grad(total, list(given.values()))
    return {"out": found[0], "normed": found[-1]} | dict(zip(given, grads, strict=True))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("rows", "dim", "readers", "given"),
    [
        (4096, 1024, 3, "update bias"),
        (4097, 1024, 2, "update"),
        (333, 192, 1, "update bias"),
        (1001, 256, 1, ""),
    ],
)
def test_norms_equal_float64(rows, dim, readers, given, compiled):
    torch.manual_seed(0)
    shapes = {"stream": (3, rows, dim), "update": (3, rows, dim), "bias": (dim,), "gain": (dim,)}
    leaves = {
        name: torch.randn(shape, device="cuda").bfloat16().requires_grad_()
        if name in ("stream", "gain", *given.split())
        else None
        for name, shape in shapes.items()
    }
    pulls = [torch.randn(3, rows, dim, device="cuda").bfloat16() for _ in range(1 + readers)]
    wide = {
        name: leaf if leaf is None else leaf.detach().double().requires_grad_()
        for name, leaf in leaves.items()
    }
    expected = results(reference, wide, pulls)
    make = torch.compile(add_norm, dynamic=False, fullgraph=True) if compiled else add_norm
    found = results(make, leaves, pulls)
    assert_close({name: (found[name], expected[name]) for name in expected}, BF16)
    again = results(make, leaves, pulls)
    assert [name for name in found if not torch.equal(found[name], again[name])] == []
