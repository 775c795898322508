"""Before a capture: what each codec keeps of the configured teacher, and what it will cost."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vpmoe.data.dataset import Dataset, Document
from vpmoe.data.effort import with_effort
from vpmoe.errors import TeacherError
from vpmoe.evals.report.charts_targets import draw_frontiers
from vpmoe.spans import Span
from vpmoe.stages.label_ranking import label_ranking
from vpmoe.stages.score import ScoreConfig, pool_of
from vpmoe.storage.atomic import atomic_path
from vpmoe.teachers.base import HiddenTeacher, Teacher, TopScores, TopTeacher, known_ids
from vpmoe.teachers.frontier import Point, Reference, joined, measure, reference_of
from vpmoe.teachers.selection import select
from vpmoe.vocabulary import VOCAB_SIZE

PICTURE, NUMBERS = "target-plan.png", "target-plan.json"
_PER_DOCUMENT = 32  # places of one conversation: those of one are alike
_ROWS_AT_ONCE = 32  # whole float64 distributions at a time: 50 MB of them
_NARROW = (128, 64, 20, 8)  # what a teacher that shows no states may still be asked for
_SEED = 0


@dataclass(frozen=True)
class Plan:
    """What a capture would keep and cost.

    Attributes:
        teacher: Its name.
        places: Labels measured.
        exact: Whether whole distributions were seen; otherwise the likeliest `kept` ids, the rest
            taken for uniform.
        kept: Ids of each place that were seen.
        trained_share: Of the tokens that the teacher reads, how many become targets.
        tokens_per_s: Of the teacher, on the conversations just scored.
        entropy_nats: Mean over the places.
        ranking_bytes: Of the ids' ranking, which `adaptive` keeps in each file.
        shard_tokens: Tokens in one file.
        points: One for each codec.
    """

    teacher: str
    places: int
    exact: bool
    kept: int
    trained_share: float
    tokens_per_s: float
    entropy_nats: float
    ranking_bytes: int
    shard_tokens: int
    points: list[Point]

    def costs(self, point: Point, num_tokens: float) -> tuple[float, float]:
        """Terabytes, and hours of the teacher, for that many tokens read."""
        terabytes = num_tokens * self.trained_share * point.bytes_per_token / 1e12
        return terabytes, num_tokens / self.tokens_per_s / 3600

    @property
    def ranking_bytes_per_token(self) -> float:
        """What the ranking adds to a target of `adaptive`, in files that are full."""
        return self.ranking_bytes / (self.shard_tokens * self.trained_share)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain JSON."""
        return asdict(self)


def plan_targets(config: ScoreConfig, *, places: int = 1_000) -> Plan:
    """What each codec keeps of the configured teacher on real labels of the configured dataset.

    Args:
        config: Of the capture that is planned; its codec and output play no part.
        places: About how many labels to measure.

    Raises:
        DataError: If the dataset is broken.
        TeacherError: If the teacher can show neither its states nor its likeliest ids.
    """
    dataset = Dataset(config.data, config.split)
    teacher = config.teacher.build()
    assert isinstance(teacher, Teacher)  # the config's validator saw to it
    rng = np.random.default_rng(_SEED)
    documents = _documents(dataset, config, places, rng)
    asked = [document.tokens[:-1] for document in documents]
    if config.reasoning_effort is not None:
        effort, render = config.reasoning_effort, dataset.render
        asked = [with_effort(tokens, effort, render=render) for tokens in asked]
    chosen = []
    for document, sequence in zip(documents, asked, strict=True):
        trained = np.flatnonzero(document.span_ids != Span.IGNORE)
        trained = trained + len(sequence) - (len(document.tokens) - 1)
        chosen.append(rng.choice(trained, min(_PER_DOCUMENT, len(trained)), replace=False))
    reference = _reference(teacher, asked, chosen)
    ranking = label_ranking(dataset, known_ids(teacher))
    trained = sum(int((d.span_ids != Span.IGNORE).sum()) for d in documents)
    return Plan(
        teacher=teacher.identity.name,
        places=len(reference),
        exact=reference.exact,
        kept=reference.ids.shape[1],
        trained_share=trained / sum(len(sequence) for sequence in asked),
        tokens_per_s=_speed(teacher, asked),
        entropy_nats=float(reference.entropy.mean()),
        ranking_bytes=len(ranking.to_bytes()),
        shard_tokens=config.shard_tokens,
        points=measure(reference, ranking=ranking),
    )


def _documents(
    dataset: Dataset, config: ScoreConfig, places: int, rng: np.random.Generator
) -> list[Document]:
    """Random conversations among those that the capture would score."""
    chosen = rng.permutation(select(pool_of(dataset), config.selection))
    found, have = [], 0
    for index in chosen:
        document = dataset.conversation(int(index))
        found.append(document)
        have += min(_PER_DOCUMENT, int((document.span_ids != Span.IGNORE).sum()))
        if have >= places:
            break
    return found


def _reference(
    teacher: Teacher, sequences: Sequence[np.ndarray], chosen: Sequence[np.ndarray]
) -> Reference:
    if isinstance(teacher, HiddenTeacher):
        return _whole(teacher, sequences, chosen)
    if isinstance(teacher, TopTeacher):
        return _narrow(teacher, sequences, chosen)
    raise TeacherError(
        f"teacher {teacher.identity.name} gives log-probs alone: there is nothing to plan",
        hint="codec.kind = logprob takes 2 bytes a token",
    )


@torch.no_grad()
def _whole(
    teacher: HiddenTeacher, sequences: Sequence[np.ndarray], chosen: Sequence[np.ndarray]
) -> Reference:
    """Whole distributions from final states, a few places at a time."""
    weight = teacher.head_weight.float()
    known = known_ids(teacher)
    ids = torch.arange(VOCAB_SIZE) if known is None else torch.from_numpy(known)
    states = torch.cat(
        [
            found[torch.from_numpy(rows).to(found.device)]
            for found, rows in zip(teacher.hidden(sequences), chosen, strict=True)
        ]
    )
    torch.manual_seed(_SEED)  # of the draws
    parts = [
        reference_of((part.float() @ weight.T).double().log_softmax(1).cpu(), ids)
        for part in states.split(_ROWS_AT_ONCE)
    ]
    return joined(parts)


def _narrow(
    teacher: TopTeacher, sequences: Sequence[np.ndarray], chosen: Sequence[np.ndarray]
) -> Reference:
    """The likeliest ids that the teacher will name; the others are taken for equally likely."""
    answers = _widest(teacher, sequences)
    rows = [(a.top_ids[r], a.top_logprobs[r]) for a, r in zip(answers, chosen, strict=True)]
    ids = torch.from_numpy(np.concatenate([i for i, _ in rows])).long()
    logprobs = torch.from_numpy(np.concatenate([v for _, v in rows])).double()
    mass = logprobs.exp()
    left = (1 - mass.sum(1)).clamp_min(2.0**-24)
    spread = (left / (VOCAB_SIZE - ids.shape[1])).log()
    nobody = torch.zeros(len(ids), 0)
    return Reference(
        entropy=-(mass * logprobs).sum(1) - left * spread,
        squares=mass.square().sum(1) + left * spread.exp(),
        ids=ids,
        logprobs=logprobs,
        drawn_ids=nobody.long(),
        drawn_logprobs=nobody.double(),
        vocab=VOCAB_SIZE,
        rest_ids=None,
    )


def _widest(teacher: TopTeacher, sequences: Sequence[np.ndarray]) -> list[TopScores]:
    for k in _NARROW[:-1]:
        try:
            return teacher.score_top(sequences, k)
        except TeacherError:  # such as a server whose max_logprobs is smaller
            continue
    return teacher.score_top(sequences, _NARROW[-1])


def _speed(teacher: Teacher, sequences: Sequence[np.ndarray]) -> float:
    """Tokens a second with all sequences at once, after one has warmed it up."""
    teacher.score(sequences[:1])
    begin = time.perf_counter()
    teacher.score(sequences)
    return sum(len(sequence) for sequence in sequences) / (time.perf_counter() - begin)


def write_plan(plan: Plan, folder: Path) -> tuple[Path, Path]:
    """The frontier as a picture, and all numbers as JSON; their paths.

    Raises:
        DataError: If the folder cannot be written.
    """
    numbers = folder / NUMBERS
    seen = "whole distributions" if plan.exact else f"top-{plan.kept} only"
    title = f"{plan.teacher}: {plan.places:,} labels, {seen}"
    picture = draw_frontiers({title: plan.points}, folder / PICTURE)
    with atomic_path(numbers) as temporary:
        temporary.write_text(json.dumps(plan.as_dict(), indent=2) + "\n", encoding="utf-8")
    return picture, numbers
