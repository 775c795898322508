"""What became of a distilled student: held-out KL and losses, and what these stand beside."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.common import REPOSITORY
from torch import Tensor

ROWS = 256  # places whose whole distributions exist together

Opinion = Callable[[Tensor, Tensor], Callable[[slice], Tensor]]
"""(tokens, which are trained) -> log-probs over the vocabulary of a slice of the trained ones."""


def judge(settings: dict[str, Any], run_dir: Path, *, problems: bool) -> dict[str, Any]:
    """Exact held-out KL to the teacher and losses; exact match if there are problems.

    Args:
        settings: Of the seed, as the training had them.
        run_dir: Of the training. Real rows have large checkpoints: they are gone afterwards.
        problems: Whether the demo's problems are asked.
    """
    from vpmoe.data.dataset import Dataset
    from vpmoe.evals.heldout import documents_of, heldout_loss
    from vpmoe.train.state import load_student

    student, _ = load_student(run_dir, device=torch.device(settings["device"]))
    student.float().eval()  # its weights as trained, everything else in float32
    documents = documents_of(Dataset(settings["data"], "valid"))
    found = held_out_kl(student, teacher_of(settings), documents)
    found["heldout_loss"] = as_plain(heldout_loss(student, documents).loss)
    if problems:
        found["exact_match"] = exact_match(student)
    else:
        shutil.rmtree(run_dir)
    return found


def teacher_of(settings: dict[str, Any]) -> Any:
    """The teacher of a seed's settings, loaded."""
    from vpmoe.config import validate
    from vpmoe.teachers import LocalTeacherConfig

    return validate(LocalTeacherConfig, settings["teacher"], source="teacher").build()


def as_plain(value: Any) -> Any:
    """Plain values, ready for JSON."""
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def held_out_kl(student: Any, teacher: Any, documents: Sequence[Any]) -> dict[str, Any]:
    """KL(teacher || student) over the whole vocabulary, nats, at every trained label."""
    wide = torch.float64 if student.id_of is not None else torch.float32
    device, own = student.embedding.weight.device, student.head_weight.to(wide)
    head = teacher.head_weight.to(device, wide)
    if student.id_of is not None and len(head) != len(own):
        head = head[student.id_of]

    def opinion(tokens: Tensor, trained: Tensor) -> Callable[[slice], Tensor]:
        place = torch.arange(tokens.numel(), device=device)[None]
        output = student(tokens[None], positions=place, document_ids=torch.zeros_like(place))
        hidden = output.hidden[0, :-1][trained].to(wide)
        return lambda rows: (hidden[rows] @ own.T).log_softmax(1)

    return beside_teacher(teacher, documents, head, opinion, id_of=student.id_of)


@torch.no_grad()
def beside_teacher(
    teacher: Any,
    documents: Sequence[Any],
    head: Tensor,
    opinion: Opinion,
    *,
    id_of: Tensor | None = None,
) -> dict[str, Any]:
    """Means over every trained label of the KL from the teacher, its own numbers, and losses.

    Args:
        teacher: Who shows its states.
        documents: What both read.
        head: The teacher's output embedding, in the dtype that everything is computed in.
        opinion: The other one's log-probs.
        id_of: o200k id of each row of `head`; None if row and id are the same.
    """
    totals = dict.fromkeys(
        ("kl_nats", "teacher_entropy_nats", "teacher_top64_mass", "teacher_loss", "loss"), 0.0
    )
    count = 0
    for states, labels, theirs in _read(teacher, documents, head, opinion):
        if id_of is not None:
            labels = torch.searchsorted(id_of, labels)
        for begin in range(0, len(states), ROWS):
            rows = slice(begin, begin + ROWS)
            t, p, label = (states[rows] @ head.T).log_softmax(1), theirs(rows), labels[rows, None]
            mass = t.exp()
            totals["kl_nats"] += float((mass * (t - p)).sum())
            totals["teacher_entropy_nats"] -= float((mass * t).sum())
            totals["teacher_top64_mass"] += float(mass.topk(min(64, mass.shape[1]), 1).values.sum())
            totals["teacher_loss"] -= float(t.gather(1, label).sum())
            totals["loss"] -= float(p.expand_as(t).gather(1, label).sum())
            count += len(t)
    return {name: total / count for name, total in totals.items()} | {"labels": count}


def _read(
    teacher: Any, documents: Sequence[Any], head: Tensor, opinion: Opinion
) -> Iterator[tuple[Tensor, Tensor, Callable[[slice], Tensor]]]:
    """The teacher's states and the labels at trained places of each document, and an opinion."""
    from vpmoe.spans import Span

    for document in documents:
        tokens = torch.from_numpy(document.tokens[:-1].astype("int64")).to(head.device)
        trained = torch.from_numpy((document.span_ids != Span.IGNORE).copy()).to(head.device)
        trained = trained[: tokens.numel() - 1]
        states = teacher.hidden([document.tokens[:-1]])[0].to(head)[trained]
        yield states, tokens[1:][trained], opinion(tokens, trained)


def anchors(settings: dict[str, Any], student: dict[str, Any]) -> dict[str, Any]:
    """What the students' numbers stand beside: no training, and frequencies of labels.

    Args:
        settings: Of a seed.
        student: Config of the students.
    """
    from vpmoe.config import validate
    from vpmoe.data.dataset import Dataset
    from vpmoe.evals.heldout import documents_of, unigram_logprobs
    from vpmoe.models.student import StudentConfig, build_student

    teacher, device = teacher_of(settings), torch.device(settings["device"])
    valid = documents_of(Dataset(settings["data"], "valid"))
    train = documents_of(Dataset(settings["data"], "train"))
    config = validate(StudentConfig, student, source="student")
    fresh = build_student(config, seed=0, device=device).eval()
    head = teacher.head_weight.to(device, torch.float32)
    plain = torch.from_numpy(unigram_logprobs(train, fresh)).to(head)[None]
    seen = beside_teacher(teacher, train[: len(valid)], head, lambda *_: lambda _: plain)
    names = ("teacher_loss", "teacher_entropy_nats", "teacher_top64_mass", "labels")
    return {
        "unigram": beside_teacher(teacher, valid, head, lambda *_: lambda _: plain),
        "untrained": held_out_kl(fresh, teacher, valid),
        "teacher_on_train_text": {name: seen[name] for name in names},
        "state_bytes": 2 * teacher.width,
    }


def exact_match(student: Any) -> dict[str, Any]:
    """Share of 300 held-out problems answered right, greedily."""
    from vpmoe.config import read_tree, validate
    from vpmoe.evals.suite import EvalConfig, evaluate, open_inputs

    tree = dict(read_tree(REPOSITORY / "configs/demo/eval.toml"))
    tree.pop("teacher"), tree.pop("data"), tree.pop("documents")
    config = validate(EvalConfig, tree, source="eval")
    return as_plain(evaluate(student, config, open_inputs(config)).exact_match)
