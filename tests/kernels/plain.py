"""The dense part's operators in plain tensors, for machines whose compiler has no kernels."""

from concurrent.futures import ThreadPoolExecutor

import torch

from vpmoe.kernels.heads import HeadShape, heads_backward_op, heads_op
from vpmoe.kernels.norms import add_norm_backward_op, add_norm_op
from vpmoe.models.norm import rms_norm
from vpmoe.models.positions import Rotation, rotate


def apart(function, *tensors):
    """Gradients are switched off inside an operator, but not in a thread of its own."""
    leaves = [t if t is None else t.detach().clone().requires_grad_() for t in tensors]
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function, leaves).result()


def plain_heads(rows, small, cosines, sines, first, mixing, shape, eps):
    outs = []
    for role, (n, rank, vectors, mixture, bias, mixture_bias, gain) in enumerate(shape.roles):
        width = (rank or n) * shape.dim
        heads = rows[..., vectors : vectors + width].unflatten(-1, (-1, shape.dim))
        if rank:
            weights = rows[..., mixture : mixture + n * rank]
            weights = weights + small[mixture_bias : mixture_bias + n * rank]
            heads = weights.unflatten(-1, (n, rank)) @ heads / rank
        heads = heads + small[bias : bias + n * shape.dim].view(n, -1)
        if role < 2:
            if shape.has_norm:
                heads = rms_norm(heads, small[gain : gain + shape.dim], eps=eps)
            if cosines is not None:
                heads = rotate(heads, Rotation(cosines, sines, small, small))
        elif first is not None:
            heads = mixing * heads + (1 - mixing) * first
        outs.append(heads.contiguous())
    return tuple(outs)


def heads_forward(rows, small, cosines, sines, positions, frequencies, first, mixing, shape, eps):
    del positions, frequencies
    return plain_heads(rows, small, cosines, sines, first, mixing, HeadShape(*shape), eps)


def heads_backward(dq, dk, dv, rows, small, cosines, sines, positions, first, mixing, shape, eps):
    sizes = HeadShape(*shape)

    def differentiate(leaves):
        outs = plain_heads(*leaves, sizes, eps)
        given = [leaf for leaf in leaves if leaf is not None]
        found = iter(torch.autograd.grad(outs, given, (dq, dk, dv)))
        return [leaf if leaf is None else next(found) for leaf in leaves]

    d_rows, d_small, d_cosines, d_sines, d_first, d_mixing = apart(
        differentiate, rows, small, cosines, sines, first, mixing
    )
    wide = torch.zeros(sizes.dim // 2 + 1)
    if cosines is not None:
        angles = d_sines * cosines - d_cosines * sines
        wide[:-1] = (angles * positions[..., None]).sum((0, 1))
    if first is not None:
        wide[-1:] = d_mixing
    return d_rows, d_small, wide, rows.new_empty(0) if first is None else d_first


def norm_forward(stream, update, bias, gain, eps):
    out = stream.new_empty(0)
    if update is not None:
        stream = out = stream + update + (0 if bias is None else bias)
    return out, rms_norm(stream, gain, eps=eps)


def norm_backward(stream, gain, d_stream, d_normed, has_bias, eps):
    total = sum(d.view_as(stream) for d in d_normed)

    def differentiate(leaves):
        return torch.autograd.grad(rms_norm(*leaves, eps=eps), leaves, total)

    d_out, d_gain = apart(differentiate, stream, gain)
    d_out = d_out + d_stream
    return d_out, torch.cat([d_gain, d_out.flatten(0, -2).sum(0)[: gain.numel() * has_bias]])


def register():
    heads_op.register_kernel("cpu")(heads_forward)
    heads_backward_op.register_kernel("cpu")(heads_backward)
    add_norm_op.register_kernel("cpu")(norm_forward)
    add_norm_backward_op.register_kernel("cpu")(norm_backward)
