"""Which source a step draws from: by counter, so that shares are exact and resumes are free."""

from fractions import Fraction

from vpmoe.errors import DataError


def uses_anchor(step: int, fraction: float) -> bool:
    """Whether step number `step` is one of the share `fraction` of anchor steps.

    Error diffusion: after n steps exactly floor(n * fraction) were anchors, so that every prefix
    has its share to within one step, and no random state has to be saved. The fraction is taken
    as the decimal it is written as, not as its nearest binary number.

    Args:
        step: Counted from 0.
        fraction: Share of anchor steps, 0 to 1.

    Raises:
        DataError: If the fraction is outside 0..1.

    Example:
        >>> [int(uses_anchor(step, 0.25)) for step in range(8)]
        [0, 0, 0, 1, 0, 0, 0, 1]
    """
    return anchors_before(step + 1, fraction) > anchors_before(step, fraction)


def anchors_before(step: int, fraction: float) -> int:
    """How many anchor steps there are among the first `step` steps.

    What the anchor's own loader has consumed so far, in steps; the other source had the rest.

    Raises:
        DataError: If the fraction is outside 0..1.
    """
    if not 0 <= fraction <= 1:
        raise DataError(f"an anchor share of {fraction} is not a share", hint="give 0 to 1")
    return int(step * Fraction(str(fraction)))
