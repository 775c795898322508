"""How many completions are well-formed Harmony, and what is wrong with the others."""

from collections.abc import Sequence
from dataclasses import dataclass

from vpmoe.batch import Rollout
from vpmoe.data.completion import FAILURES, parse_completion
from vpmoe.evals.shares import Share, share_of


@dataclass(frozen=True)
class FormatReport:
    """Form of a set of completions.

    Attributes:
        num_completions: How many were parsed.
        valid: Those with an answer in the final channel that ends as it should.
        failures: How many fail, by class; a completion has one class, its first.
    """

    num_completions: int
    valid: Share
    failures: dict[str, int]


def format_validity(rollouts: Sequence[Rollout]) -> FormatReport:
    """Shares of well-formed and of broken completions, by the parser that also reads answers."""
    failures: dict[str, int] = dict.fromkeys(FAILURES, 0)
    for rollout in rollouts:
        failure = parse_completion(rollout.completion).failure
        if failure is not None:
            failures[failure] += 1
    valid = len(rollouts) - sum(failures.values())
    return FormatReport(len(rollouts), share_of(valid, len(rollouts)), failures)
