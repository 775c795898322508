"""How many verifiable problems are answered exactly, in total and per family."""

from collections.abc import Sequence
from dataclasses import dataclass

from vpmoe.batch import Rollout
from vpmoe.data.completion import parse_completion
from vpmoe.data.problems import Problem, is_correct
from vpmoe.evals.shares import Share, share_of


@dataclass(frozen=True)
class ExactMatch:
    """Right final answers, of all problems and of each family."""

    total: Share
    families: dict[str, Share]


def exact_match(problems: Sequence[Problem], rollouts: Sequence[Rollout]) -> ExactMatch:
    """The share of problems whose completion is well-formed and ends in the right answer.

    A completion that does not parse counts as wrong, whatever its text says.

    Args:
        problems: What was asked.
        rollouts: One completion for each problem, in the same order.
    """
    right: dict[str, list[bool]] = {}
    for problem, rollout in zip(problems, rollouts, strict=True):
        parsed = parse_completion(rollout.completion)
        answered = parsed.failure is None and parsed.final is not None
        correct = answered and is_correct(problem, parsed.final or "")
        right.setdefault(problem.family, []).append(correct)
    families = {name: share_of(sum(marks), len(marks)) for name, marks in sorted(right.items())}
    total = share_of(sum(s.correct for s in families.values()), len(problems))
    return ExactMatch(total, families)
