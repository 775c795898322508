"""Orthogonalisation of stacks of matrices by odd polynomials of their Gram matrices."""

import torch
from jaxtyping import Float
from torch import Tensor

SAFETY = 1.02  # first matrix is divided by 1.02 x its norm, polynomials keep as much room
EPS = 1e-6

Polynomial = tuple[float, float, float]  # p(x) = a x + b x^3 + c x^5

_OPENING: tuple[Polynomial, ...] = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
)
_FIFTH = (2.300530711627097, -1.6111665557258412, 0.3833374427545278)
_SIXTH = (1.8631210546382557, -1.204216062100266, 0.3421879560523352)
# The last polynomial of each length closes the interval around 1, so a longer table is not a
# shorter one with its last row repeated: each length has its own.
COEFFICIENTS: dict[int, tuple[Polynomial, ...]] = {
    5: (*_OPENING, (2.3465413258596377, -1.7097828382687081, 0.42323551169305323)),
    6: (*_OPENING, _FIFTH, (1.900383475731021, -1.2779237188292993, 0.3778031533636286)),
    7: (*_OPENING, _FIFTH, _SIXTH, (1.8750223595303745, -1.2500248436986314, 0.37500248437892897)),
    8: (
        *_OPENING,
        _FIFTH,
        _SIXTH,
        (1.8382572152258574, -1.1779263289558985, 0.3396513038647577),
        (1.875, -1.25, 0.375),
    ),
}


def polar_express(
    matrices: Float[Tensor, "*stack rows cols"], *, steps: int = 5
) -> Float[Tensor, "*stack rows cols"]:
    """Nearly the orthogonal factor of each matrix: same singular vectors, singular values near 1.

    Each step maps the singular values by an odd quintic chosen for the interval they then lie in.
    Values above a thousandth of the matrix's Frobenius norm end in [.8466, 1.1411] after 5 steps,
    [.9961, 1.0023] after 6, 1 +- 5e-7 after 7. A zero matrix stays zero. Taken in the dtype given.

    Args:
        matrices: Any number of matrices of one shape; each is treated on its own.
        steps: 5 to 8.

    References:
        Amsel et al., "The Polar Express" (2025), arXiv:2505.16932. Difference: safety factor
        1.02, and a table of its own for every number of steps.
    """
    x = matrices.flatten(0, -3) if matrices.ndim > 2 else matrices[None]  # (S, m, n)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT  # so that the Gram matrix is the smaller one
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) * SAFETY + EPS)
    for a, b, c in COEFFICIENTS[steps]:
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    if tall:
        x = x.mT
    return x.reshape(matrices.shape)


def polar_express_folded(
    matrices: Float[Tensor, "stack rows cols"], *, steps: int = 5
) -> Float[Tensor, "stack rows cols"]:
    """The same map in three products per step and nothing else of the matrices' size.

    The linear term goes into the polynomial's diagonal, the norm is the root of the first Gram
    matrix's trace, and dividing by it is left to the first polynomial: no pass over the matrices
    is spent on any of them. Polynomials are taken in float32 or wider and rounded once, because
    their terms nearly cancel.

    Args:
        matrices: Each is treated on its own, from whichever side its Gram matrix is smaller.
        steps: 5 to 8.

    References:
        As `polar_express`, its reference.
    """
    x = matrices
    wide = torch.promote_types(x.dtype, torch.float32)
    tall = x.shape[1] > x.shape[2]
    inverse = None
    for polynomial in COEFFICIENTS[steps]:
        gram = torch.bmm(x.mT, x) if tall else torch.bmm(x, x.mT)
        if inverse is None:
            trace = gram.diagonal(dim1=1, dim2=2).sum(dim=1, dtype=wide)[:, None, None]
            inverse = 1 / (trace.sqrt() * SAFETY + EPS)
            gram = (gram * inverse.square()).to(x.dtype)
            factor = _quintic(gram, inverse, polynomial)
        else:
            factor = _quintic(gram, None, polynomial)
        x = torch.bmm(x, factor) if tall else torch.bmm(factor, x)
    return x


def _quintic(gram: Tensor, scale: Tensor | None, polynomial: Polynomial) -> Tensor:
    """scale (a I + b G + c G^2), rounded once."""
    a, b, c = polynomial
    if gram.dtype == torch.bfloat16 and gram.is_cuda:
        # Triton, which comes with CUDA builds of PyTorch only, is imported from here on.
        from vpmoe.kernels.updates import quintic

        square = torch.bmm(gram, gram, out_dtype=torch.float32)
        return quintic(gram, square, scale, polynomial=polynomial)
    wide = gram.to(torch.promote_types(gram.dtype, torch.float32))
    out = torch.baddbmm(wide, wide, wide, beta=b, alpha=c)
    out.diagonal(dim1=1, dim2=2).add_(a)
    return (out if scale is None else out * scale).to(gram.dtype)


def polar_reference(
    matrices: Float[Tensor, "*stack rows cols"],
) -> Float[Tensor, "*stack rows cols"]:
    """Exactly the orthogonal factor of each matrix, by SVD; for tests.

    References:
        own; the limit of `polar_express` in steps and precision.
    """
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    return left @ right
