"""A share of successes with the interval that its count allows."""

from dataclasses import dataclass
from math import sqrt

Z_95 = 1.959963984540054  # two-sided 95 % of a normal distribution


@dataclass(frozen=True)
class Share:
    """`correct` successes of `count`, with the 95 % Wilson interval of the share.

    The interval says how far the share may lie from that of infinitely many such samples; it
    knows nothing of other seeds, prompts or decoding settings.
    """

    correct: int
    count: int
    share: float
    low: float
    high: float


def share_of(correct: int, count: int) -> Share:
    """`correct / count` with its interval; nothing counted is a share of 0 between 0 and 1.

    References:
        Wilson, "Probable inference, the law of succession, and statistical inference" (1927).
    """
    if count == 0:
        return Share(correct=0, count=0, share=0.0, low=0.0, high=1.0)
    share = correct / count
    scale = 1 + Z_95**2 / count
    center = (share + Z_95**2 / (2 * count)) / scale
    half = Z_95 / scale * sqrt(share * (1 - share) / count + Z_95**2 / (4 * count**2))
    # Rounding must not push the interval off its own share at 0 and 1.
    low = 0.0 if correct == 0 else center - half
    high = 1.0 if correct == count else center + half
    return Share(correct=correct, count=count, share=share, low=low, high=high)
