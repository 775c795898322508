"""Before anything is spent: is a config's teacher what it should be, and asked what it should?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vpmoe.batch import ReasoningEffort
from vpmoe.data.conversation import Conversation, Message
from vpmoe.data.dataset import Dataset, Document
from vpmoe.data.effort import with_effort
from vpmoe.data.harmony import RenderConfig, Renderer
from vpmoe.data.oracle import parse_messages
from vpmoe.data.problems import generate
from vpmoe.errors import ConfigError, DataError, TeacherError
from vpmoe.spans import Span
from vpmoe.stages.on_policy import OnPolicyConfig
from vpmoe.stages.score import ScoreConfig
from vpmoe.stages.server_checks import check_server
from vpmoe.teachers.base import ROLLOUT_LOGPROBS, TARGETS, Teacher
from vpmoe.teachers.checkpoint import read_vocab
from vpmoe.teachers.codecs import fitted
from vpmoe.teachers.doctor import examine
from vpmoe.teachers.examination import Examination, Finding
from vpmoe.teachers.server import ServerTeacher
from vpmoe.vocabulary import COMPLETION_HEADER, END_OF_TEXT, VOCAB_SIZE

MAX_TOKENS = 1_024  # of a conversation that is asked about
_TOP_K = 8  # where the config does not say how many ids it will keep
_EFFORTS: tuple[ReasoningEffort, ...] = ("low", "medium", "high")


@dataclass(frozen=True)
class Subject:
    """What a config says about a teacher, and conversations to ask it about.

    Attributes:
        config: The teacher's.
        documents: Tokens with label-aligned spans, `END_OF_TEXT` last.
        render: How they were rendered.
        effort: That the teacher's system message shall name; None leaves the documents as they are.
        k: How many likeliest ids will be asked for.
    """

    config: Any
    documents: Sequence[Document]
    render: RenderConfig
    effort: ReasoningEffort | None
    k: int


def subject_of(config: Any, *, sequences: int) -> Subject:
    """The teacher of a config of stage 3 or of scoring, or a teacher's own table.

    Args:
        config: A `ScoreConfig`, an `OnPolicyConfig` or a `TeacherConfig`.
        sequences: How many conversations; spread evenly over a dataset, or made up where the
            config names none.

    Raises:
        ConfigError: If the config has no teacher that can be asked.
        DataError: If its dataset cannot be read.
    """
    teacher = getattr(config, "teacher", config)
    if ROLLOUT_LOGPROBS not in getattr(teacher, "provides", ()):
        raise ConfigError(
            [
                (
                    f"a config of kind {config.kind} has no teacher that can be asked",
                    "give a config of vpmoe score or of stage 3, or a teacher's own table",
                )
            ]
        )
    k = _TOP_K if TARGETS in teacher.provides else 0
    path = getattr(teacher, "path", "")
    subset = read_vocab(Path(path)) if path else None
    if isinstance(config, ScoreConfig | OnPolicyConfig):
        dataset = Dataset(Path(config.data), getattr(config, "split", "train"))
        chosen = np.unique(np.linspace(0, len(dataset) - 1, sequences).astype(int))
        effort = None
        if isinstance(config, ScoreConfig):
            num_ids = VOCAB_SIZE if subset is None else len(subset.ids)
            effort, codec = config.reasoning_effort, fitted(config.codec, num_ids).build()
            k = codec.asked if codec.needs == "top" else 0
        documents = [dataset.conversation(int(index)) for index in chosen]
        return Subject(teacher, documents, dataset.render, effort, k)
    render = RenderConfig(system=subset is None)
    return Subject(teacher, made_up(sequences, render), render, None, k)


def made_up(count: int, render: RenderConfig) -> list[Document]:
    """Conversations about generated problems, for a teacher without a dataset."""
    renderer, documents = Renderer(render), []
    for problem in generate(count, seed=7):
        messages = (
            Message("user", None, problem.query),
            Message("assistant", "analysis", problem.reasoning),
            Message("assistant", "final", problem.answer),
        )
        rendered = renderer.render(Conversation(problem.sample_id, messages))
        tokens = np.append(rendered.tokens, END_OF_TEXT)
        ignored = np.full(2, Span.IGNORE, dtype=np.uint8)
        spans = np.concatenate([rendered.span_ids[1:], ignored])  # of labels, not of tokens
        documents.append(Document(problem.sample_id, tokens, spans))
    return documents


def examine_subject(
    subject: Subject,
    *,
    tolerance_nats: float,
    teacher: Teacher | None = None,
    reference: Teacher | None = None,
) -> list[Finding]:
    """Every check of a teacher, and of what it will be asked.

    Args:
        subject: The teacher's config, and conversations.
        tolerance_nats: Mean difference per token between two ways to the same number.
        teacher: Examined in place of the one that the config builds.
        reference: Compared with in place of the config's.

    Raises:
        TeacherError: If the teacher or its reference cannot be built at all.
    """
    before = [
        _checked("rendering", lambda: _rendering(subject)),
        _checked("named effort", lambda: _named_effort(subject)),
    ]
    examined: Teacher = teacher or subject.config.build()
    named = getattr(subject.config, "reference", None)
    reference = reference or (named.build() if named else None)
    findings = [*before, *examine(case_of(subject, examined, reference, tolerance_nats))]
    if isinstance(examined, ServerTeacher):
        longest = max(len(_asked(document.tokens[:-1], subject)) for document in subject.documents)
        findings += check_server(examined, subject.config, longest=longest)
    return findings


def _checked(name: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except (TeacherError, DataError) as error:
        return Finding(name, "failed", error.message)


def case_of(
    subject: Subject, teacher: Teacher, reference: Teacher | None, tolerance_nats: float
) -> Examination:
    """The questions that a teacher is examined with, cut to what it takes.

    Raises:
        DataError: If no conversation is short enough.
    """
    asked, lens, others = [], [], []
    limit = min(MAX_TOKENS, getattr(teacher, "max_len", MAX_TOKENS))
    has_effort = subject.effort is not None or subject.render.system
    for document in subject.documents:
        tokens = document.tokens[:-1]
        prompt_len = _prompt_len(document)
        mine, other = tokens, tokens
        if has_effort:
            now = subject.effort or subject.render.reasoning_effort
            mine = _asked(tokens, subject)
            other = with_effort(
                tokens, next(e for e in _EFFORTS if e != now), render=subject.render
            )
        prompt_len += len(mine) - len(tokens)
        if prompt_len + 8 > limit or len(mine) < prompt_len + 8:
            continue  # nothing of the answer would be asked about
        asked.append(mine[:limit])
        others.append(other[: limit + len(other) - len(mine)])
        lens.append(prompt_len)
    if not asked:
        raise DataError(
            f"no conversation has a prompt and eight tokens of answer within {limit} tokens",
            hint="start the teacher with a longer context",
        )
    return Examination(
        teacher,
        reference,
        asked,
        lens,
        other_effort=others if has_effort else (),
        k=subject.k,
        tolerance_nats=tolerance_nats,
    )


def _prompt_len(document: Document) -> int:
    """Tokens up to where a completion starts: the assistant's header is given, though trained."""
    begin = int(np.argmax(document.span_ids != Span.IGNORE)) + 1  # the label at t is token t + 1
    header = len(COMPLETION_HEADER)
    has_header = tuple(document.tokens[begin : begin + header]) == COMPLETION_HEADER
    return begin + header * has_header


def _asked(tokens: np.ndarray, subject: Subject) -> np.ndarray:
    if subject.effort is None:
        return tokens
    return with_effort(tokens, subject.effort, render=subject.render)


def _rendering(subject: Subject) -> Finding:
    """The prompt a student is trained on, the one it is sampled with, the teacher's: all the same.

    The teacher's may name another effort. The reference library has the last word.
    """
    effort = subject.effort or (subject.render.reasoning_effort if subject.render.system else None)
    student = Renderer(subject.render)
    settings = subject.render.model_dump()
    if subject.effort:
        settings |= {"reasoning_effort": subject.effort, "system": True}
    teacher = Renderer(RenderConfig(**settings))
    compared = 0
    for document in subject.documents:
        spoken = [m for m in parse_messages(document.tokens[:-1]) if m[0] == "user"]
        own_preamble = _preamble_of(document, subject.render)
        if len(spoken) != 1 or own_preamble:
            continue
        compared += 1
        query = spoken[0][2]
        prompt = document.tokens[: _prompt_len(document)]
        wanted = {
            "sampled with": student.prompt(query),
            "rendered by Harmony": _oracle(student, query),
        }
        for how, tokens in wanted.items():
            if (difference := _differs(prompt, tokens)) is not None:
                return Finding(
                    "rendering",
                    "failed",
                    f"sample {document.sample_id}: the prompt in the dataset and the one {how} "
                    f"differ from token {difference} on; build it with the same [render]",
                )
        asked = _asked(document.tokens[:-1], subject)
        asked = asked[: len(asked) - (len(document.tokens) - 1 - len(prompt))]
        if (difference := _differs(asked, teacher.prompt(query))) is not None:
            return Finding(
                "rendering",
                "failed",
                f"sample {document.sample_id}: the teacher's prompt differs from Harmony's from "
                f"token {difference} on",
            )
    if not compared:
        return Finding("rendering", "skipped", "every conversation has a preamble of its own")
    return Finding(
        "rendering",
        "ok",
        f"{compared} prompts are the same for student, sampler and teacher"
        + (f", effort {effort}" if effort else ""),
    )


def _preamble_of(document: Document, render: RenderConfig) -> bool:
    """Whether the row brought a system or developer message of its own."""
    roles = [role for role, _, _ in parse_messages(document.tokens[:-1])]
    expected = ["system"] * render.system + ["developer"] * (
        render.developer_instructions is not None
    )
    return roles[: len(roles) - roles[::-1].index("user") - 1] != expected


def _oracle(renderer: Renderer, query: str) -> np.ndarray:
    """The prompt as the reference library renders it."""
    conversation = Conversation(
        "probe", (Message("user", None, query), Message("assistant", "final", "."))
    )
    tokens = renderer.oracle_tokens(conversation)
    starts = np.flatnonzero(tokens == COMPLETION_HEADER[0])
    return tokens[: int(starts[-1]) + len(COMPLETION_HEADER)]


def _differs(first: np.ndarray, second: np.ndarray) -> int | None:
    if np.array_equal(first, second):
        return None
    size = min(len(first), len(second))
    places = np.flatnonzero(first[:size] != second[:size])
    return int(places[0]) if places.size else size


def _named_effort(subject: Subject) -> Finding:
    effort = subject.effort or (subject.render.reasoning_effort if subject.render.system else None)
    if effort is None:
        return Finding("named effort", "skipped", "the prompts have no system message")
    line = f"Reasoning: {effort}"
    for document in subject.documents:
        asked = _asked(document.tokens[:-1], subject)
        (_, _, text), *_ = parse_messages(asked)
        if line not in text.splitlines():
            return Finding(
                "named effort",
                "failed",
                f"sample {document.sample_id}: its system message does not say {line!r}; set "
                "reasoning_effort",
            )
    return Finding("named effort", "ok", f"every system message says {line!r}")
