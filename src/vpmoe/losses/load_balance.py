"""The router's sequence auxiliary loss: a small pull towards experts used evenly."""

from jaxtyping import Float
from torch import Tensor


def load_balance_loss(
    load_balance_sum: Float[Tensor, ""], *, coefficient: float, num_documents: int
) -> Float[Tensor, ""]:
    r"""Auxiliary loss of one micro-batch, to be added to its `LossOutput.total`.

    The student sums :math:`\sum_i f_i P_i` over its MoE layers and over the micro-batch's
    documents; this scales that sum by coefficient / documents. The number of documents is the
    global batch's, so that micro-batches and ranks add up to the mean over documents, whatever
    the token weights of the main loss. Even use of the experts gives exactly `coefficient` per
    layer.

    Args:
        load_balance_sum: Sum over layers and documents, with grad to the routers.
        coefficient: Strength; 0 turns it off.
        num_documents: Documents in the whole global batch; 0 gives a loss of 0.

    References:
        DeepSeek-AI, "DeepSeek-V3 Technical Report" (2024), arXiv:2412.19437, section 2.1.2.
        Difference: the sequence is the document, not the packed row.
    """
    return load_balance_sum * (coefficient / max(num_documents, 1))
