"""How small a KL can be measured: a student that is its teacher, by every path a loss reads."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from vpmoe.errors import DataError, TeacherError
from vpmoe.evals.noise import NOISE_FILE, NOISE_SCHEMA
from vpmoe.losses import LossInputs, OfflineLossConfig
from vpmoe.losses.distillation import DistillationConfig
from vpmoe.spans import NUM_SPANS, Span
from vpmoe.stages.examine_teacher import Subject, case_of
from vpmoe.storage.atomic import atomic_path, write_error
from vpmoe.storage.manifest import provenance
from vpmoe.teachers.base import TopTeacher, num_known_ids
from vpmoe.teachers.codecs import CodecConfig, fitted
from vpmoe.teachers.codecs.base import Entries, entries_of_top
from vpmoe.teachers.codecs.ranking import Ranking
from vpmoe.teachers.local import LocalTeacher, LocalTeacherConfig

STUDENT_DTYPES = ("float32", "bfloat16")
_CHUNK_ROWS = 64  # 50 MB of logits over the whole vocabulary


@dataclass(frozen=True)
class Floor:
    """What a divergence comes to when there is nothing to find.

    Attributes:
        loss: Its kind; "k1" and "k3" are the estimates from the log-probs of the tokens alone.
        path: How the teacher's opinion got here: its states, a codec's bytes, a server's answer.
        dtype: In which the student computes.
        nats: Mean per token.
        largest: Of all tokens for k1 and k3; of the means of 64 tokens each for divergences.
    """

    loss: str
    path: str
    dtype: str
    nats: float
    largest: float


@dataclass(frozen=True)
class _Student:
    """The teacher's own network as a student: states at the labels, in one dtype."""

    hidden: Tensor  # (rows, D)
    head_weight: Tensor  # (V, D)
    labels: Tensor  # (rows,) rows of the head


def measure_noise(subject: Subject, *, dtypes: Sequence[str] = STUDENT_DTYPES) -> dict[str, Any]:
    """The noise floor of every divergence by every path, ready for JSON.

    The student is the teacher's own checkpoint in this process: the local teacher, or the
    `reference` of a server. All divergences of `OfflineLossConfig` take part, and all
    codecs of `CodecConfig` that keep as many ids as the config asks for. Tails shared by a prior do
    not: how far a rebuilt distribution is from its own teacher is no noise, and `vpmoe targets
    plan` says it.

    Args:
        subject: The teacher's config and conversations.
        dtypes: The student computes in each of them.

    Raises:
        TeacherError: If the config names no checkpoint that can be the student.
    """
    config = subject.config
    if isinstance(config, LocalTeacherConfig):
        twin: LocalTeacherConfig | None = config
    else:
        twin = getattr(config, "reference", None)
    if twin is None:
        raise TeacherError(
            "the noise floor needs the teacher's own weights as a student in this process",
            hint="add a [teacher.reference] table with the path of its checkpoint",
        )
    teacher = config.build()
    case = case_of(subject, teacher, None, tolerance_nats=0.0)
    opinions = _Opinions(teacher, list(case.asked), list(case.prompt_lens), max(subject.k, 2))
    floors: list[Floor] = []
    for dtype in dtypes:
        model = twin.model_copy(update={"dtype": dtype}).build()
        student = _student(model, opinions)
        floors += _token_floors(student, opinions, dtype)
        floors += _divergence_floors(student, model, opinions, dtype)
    return {
        "schema": NOISE_SCHEMA,
        **provenance(),
        "teacher": teacher.identity.as_dict(),
        "sequences": len(case.asked),
        "labels": opinions.num_labels,
        "floors": [asdict(floor) for floor in floors],
    }


def noise_path(config: Any) -> Path:
    """Where reports look for the floors: beside the targets, in the run, or right here."""
    folder = getattr(config, "output", None) or getattr(config, "run", None) or "."
    return Path(folder) / NOISE_FILE


def write_noise(found: dict[str, Any], path: Path) -> None:
    """Write what `measure_noise` found.

    Raises:
        DataError: If it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(path, error) from error
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


class _Opinions:
    """What a teacher says at the answers' tokens, by every path it offers."""

    def __init__(
        self, teacher: Any, asked: list[np.ndarray], prompt_lens: list[int], k: int
    ) -> None:
        self.teacher, self.asked = teacher, asked
        # Answer t of a sequence speaks of token t + 1.
        self.places = [slice(n - 1, len(s) - 1) for s, n in zip(asked, prompt_lens, strict=True)]
        self.labels = np.concatenate([s[n:] for s, n in zip(asked, prompt_lens, strict=True)])
        self.num_labels = len(self.labels)
        self.logprobs = np.concatenate(self._at_labels(teacher.score(asked)))
        self.k = k
        self.entries: Entries | None = None
        if isinstance(teacher, TopTeacher):
            top = teacher.score_top(asked, k)
            ids = np.concatenate(self._at_labels([one.top_ids for one in top]))
            values = np.concatenate(self._at_labels([one.top_logprobs for one in top]))
            self.entries = entries_of_top(torch.from_numpy(ids), torch.from_numpy(values))

    def _at_labels(self, arrays: Sequence[Any]) -> list[Any]:
        return [array[place] for array, place in zip(arrays, self.places, strict=True)]

    def hidden_of(self, model: LocalTeacher) -> Tensor:
        """Final states of a model at the labels."""
        return torch.cat(self._at_labels(model.hidden(self.asked)))

    def distributions(self) -> Iterator[tuple[str, Entries]]:
        """(path, entries) as the teacher gave them, and as each codec gives them back."""
        if self.entries is None:
            return
        how = "server" if not isinstance(self.teacher, LocalTeacher) else "process"
        yield f"{how}, top {self.k}", self.entries
        places = torch.tensor([self.num_labels])
        for member in get_args(get_args(CodecConfig)[0]):
            if "k" not in member.model_fields:
                continue
            try:
                codec = fitted(member(k=self.k), num_known_ids(self.teacher)).build()
            except ValidationError:
                continue  # it cannot hold so few ids
            if codec.needs != "top" or codec.asked != self.k:
                continue
            codec = codec.ranked_by(Ranking.by_number())
            columns = codec.encode(self.entries, places)
            coded = {name: column.data for name, column in columns.items()}
            yield (
                f"store, {member.model_fields['kind'].default} {self.k}",
                codec.decode(coded, places),
            )


def _student(model: LocalTeacher, opinions: _Opinions) -> _Student:
    hidden = opinions.hidden_of(model)
    return _Student(
        hidden, model.head_weight.to(hidden.dtype), _rows(model, torch.from_numpy(opinions.labels))
    )


def _rows(model: LocalTeacher, ids: Tensor) -> Tensor:
    """Rows of a model's head that stand for o200k ids."""
    if model.subset is None:
        return ids.long()
    return torch.from_numpy(model.subset.row_of)[ids.long()].clamp_min(0)


@torch.no_grad()
def _token_floors(student: _Student, opinions: _Opinions, dtype: str) -> Iterator[Floor]:
    """k1 and k3 of the tokens: what stage 3 and the evaluations look at."""
    mine = torch.cat(
        [
            torch.log_softmax((hidden @ student.head_weight.T).float(), dim=1)
            .gather(1, labels[:, None])
            .squeeze(1)
            for hidden, labels in zip(
                student.hidden.split(_CHUNK_ROWS), student.labels.split(_CHUNK_ROWS), strict=True
            )
        ]
    ).double()
    paths = {
        "log-probs": torch.from_numpy(opinions.logprobs).double(),
        "store, log-probs": torch.from_numpy(opinions.logprobs.astype(np.float16)).double(),
    }
    for path, theirs in paths.items():
        k1 = mine.cpu() - theirs
        k3 = torch.expm1(-k1) + k1
        for name, values in (("k1", k1), ("k3", k3)):
            yield Floor(name, path, dtype, float(values.mean()), float(values.abs().max()))


def _divergence_floors(
    student: _Student, model: LocalTeacher, opinions: _Opinions, dtype: str
) -> Iterator[Floor]:
    for kind in get_args(get_args(OfflineLossConfig)[0]):
        if not issubclass(kind, DistillationConfig):
            continue  # a cross-entropy has no zero to measure from
        for path, entries in opinions.distributions():
            inputs = _inputs(
                student,
                target_ids=_rows(model, entries.ids),
                target_logprobs=entries.logprobs,
                target_tail=entries.tail,
            )
            yield _floor(kind(chunk_rows=_CHUNK_ROWS), inputs, path, dtype)
        if isinstance(opinions.teacher, LocalTeacher):
            inputs = _inputs(
                student,
                teacher_hidden=opinions.hidden_of(opinions.teacher),
                teacher_head=opinions.teacher.head_weight,
            )
            config = kind(against="hidden", chunk_rows=_CHUNK_ROWS)
            yield _floor(config, inputs, "states", dtype)


def _inputs(student: _Student, **opinion: Tensor) -> LossInputs:
    rows = len(student.labels)
    return LossInputs(
        hidden=student.hidden.detach().clone().requires_grad_(),
        head_weight=student.head_weight,
        labels=student.labels,
        span_ids=torch.full((rows,), Span.FINAL, dtype=torch.uint8),
        content_mask=torch.ones(rows, dtype=torch.bool),
        **opinion,
    )


def _floor(config: Any, inputs: LossInputs, path: str, dtype: str) -> Floor:
    loss, scales = config.build(), torch.ones(NUM_SPANS)
    rows = len(inputs.labels)
    parts = [
        loss(inputs.select(slice(begin, begin + _CHUNK_ROWS)), scales).loss_sums.sum()
        for begin in range(0, rows, _CHUNK_ROWS)
    ]
    total = float(torch.stack(parts).sum())
    if not np.isfinite(total):
        raise DataError(f"{config.kind} of a teacher and itself is {total} by {path}, {dtype}")
    sizes = [min(_CHUNK_ROWS, rows - begin) for begin in range(0, rows, _CHUNK_ROWS)]
    means = [float(part) / size for part, size in zip(parts, sizes, strict=True)]
    return Floor(config.kind, path, dtype, total / rows, max(means, key=abs))
