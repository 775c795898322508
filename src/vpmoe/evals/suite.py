"""Everything that is measured of a model, in one report that is the same whenever asked again."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from vpmoe.batch import ReasoningEffort, Rollout
from vpmoe.config import Config, fingerprint, resolved
from vpmoe.data.dataset import Dataset
from vpmoe.data.harmony import RenderConfig, Renderer
from vpmoe.data.problem_families import FAMILIES
from vpmoe.data.problems import Alphabet, Problem, generate
from vpmoe.data.split import Split
from vpmoe.errors import ConfigError
from vpmoe.evals.exact_match import ExactMatch, exact_match
from vpmoe.evals.harmony_format import FormatReport, format_validity
from vpmoe.evals.heldout import UNIGRAM_DOCUMENTS, Heldout, documents_of, heldout_loss
from vpmoe.evals.lengths import Lengths, channel_lengths
from vpmoe.evals.router_load import RouterLoad, counting_experts
from vpmoe.evals.sampling import (
    Prompt,
    dataset_prompts,
    problem_prompts,
    sample,
    teacher_answers,
)
from vpmoe.evals.teacher_gap import TeacherGap, teacher_gap
from vpmoe.models.student import Student
from vpmoe.rollouts.scoring import with_teacher
from vpmoe.storage.manifest import provenance, write_manifest
from vpmoe.teachers.local import LocalTeacher, LocalTeacherConfig
from vpmoe.vocabulary import O200K_SHA256

SCHEMA_VERSION = "vpmoe-eval-1"


class ProblemsConfig(Config):
    """Verifiable held-out problems to answer."""

    count: int = Field(default=200, gt=0)
    """How many, the families taking turns."""
    seed: int = 0
    """Which ones."""
    families: tuple[str, ...] = tuple(FAMILIES)
    """Kinds of problems."""
    alphabet: Alphabet = "full"
    """How many numbers and words the questions draw from."""


class SamplingConfig(Config):
    """How completions are written."""

    max_new_tokens: int = Field(default=256, gt=0)
    """Tokens after which a completion is cut."""
    max_batch: int = Field(default=64, gt=0)
    """Completions under way at a time; changes nothing but the speed."""
    reasoning_effort: ReasoningEffort | None = None
    """Named in the system message of problems; absent for `render.reasoning_effort`."""
    seed: int = 0
    """Of the samples that are compared with the teacher; answers are greedy."""


class EvalConfig(Config):
    """What to measure. Each part is left out where what it needs is absent."""

    kind: Literal["eval"] = "eval"
    name: str = Field(default="", pattern=r"^[a-z0-9-]*$")
    """Part of the report's file name: reports of other names on the same checkpoint stay."""
    data: str = ""
    """Dataset to measure the loss on; empty for none."""
    split: Split = "valid"
    """Its split."""
    documents: int = Field(default=0, ge=0)
    """Conversations to read; 0 for the whole split."""
    unigram: bool = True
    """Whether to put a unigram baseline, counted on the train split, beside the loss."""
    problems: ProblemsConfig | None = None
    """Problems to answer; absent for none."""
    prompts: int = Field(default=0, ge=0)
    """Prompts of `data` to answer where there are no problems: for form and lengths."""
    sampling: SamplingConfig = SamplingConfig()
    teacher: LocalTeacherConfig | None = None
    """Whose log-probs the student's samples are compared with; absent for no comparison."""
    teacher_prompts: int = Field(default=64, gt=0)
    """Prompts sampled at temperature 1 for that comparison."""
    render: RenderConfig | None = None
    """What stands before the problems' questions; absent for what the dataset, or the data that a
    checkpoint was trained on, was rendered with."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the student runs."""


@dataclass(frozen=True)
class EvalReport:
    """What was measured; a part that was not is None.

    Attributes:
        model: Name, step and tokens of what was evaluated.
        heldout: Loss per span, and the unigram baseline.
        format: How many completions are Harmony.
        exact_match: How many problems were answered right.
        lengths: Tokens per channel.
        teacher_gap: Reverse KL to the teacher on the student's own samples.
        router: Tokens per expert on the held-out documents.
        provenance: Code, settings and inputs that the numbers come from.
    """

    model: dict[str, Any]
    heldout: Heldout | None = None
    format: FormatReport | None = None
    exact_match: ExactMatch | None = None
    lengths: Lengths | None = None
    teacher_gap: TeacherGap | None = None
    router: RouterLoad | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain JSON, unmeasured parts left out."""
        parts = {key: value for key, value in asdict(self).items() if value is not None}
        return {"kind": "eval", "schema_version": SCHEMA_VERSION, **parts}

    def as_json(self) -> str:
        """The same as text; equal reports give equal text."""
        return json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class EvalInputs:
    """What a config names, opened: so that several students are judged by the same things."""

    dataset: Dataset | None
    train: Dataset | None
    problems: tuple[Problem, ...]
    teacher: LocalTeacher | None


def open_inputs(config: EvalConfig) -> EvalInputs:
    """The datasets, problems and teacher that a config names.

    Raises:
        ConfigError: If there is nothing to measure.
        DataError: If a dataset cannot be opened.
        TeacherError: If the teacher cannot be loaded.
    """
    if not config.data and config.problems is None:
        hint = "set data = FOLDER, or add a [problems] table"
        raise ConfigError([("neither data nor problems is set: nothing to measure", hint)])
    dataset = Dataset(config.data, config.split) if config.data else None
    train = None
    if dataset and config.unigram and dataset.manifest["splits"]["train"]:
        train = Dataset(config.data, "train")
    wanted = config.problems
    problems: tuple[Problem, ...] = ()
    if wanted:
        problems = tuple(
            generate(
                wanted.count,
                seed=wanted.seed,
                split="held-out",
                families=wanted.families,
                alphabet=wanted.alphabet,
            )
        )
    teacher = config.teacher.build() if config.teacher else None
    return EvalInputs(dataset, train, problems, teacher)


def evaluate(
    student: Student,
    config: EvalConfig,
    inputs: EvalInputs | None = None,
    *,
    model: dict[str, Any] | None = None,
) -> EvalReport:
    """Every measurement that the config asks for; twice the same call, twice the same report.

    Args:
        student: Left as it was, in the mode it was in.
        config: What to measure.
        inputs: `open_inputs(config)`, if it is at hand already.
        model: Name, step and tokens of the student, for the report.
    """
    inputs = inputs or open_inputs(config)
    heldout, load = None, None
    if inputs.dataset:
        heldout, load = _measure_loss(student, config, inputs)
    rollouts: list[Rollout] = []
    prompts = _prompts(config, inputs)
    settings = config.sampling
    if prompts:
        rollouts = sample(
            student,
            prompts,
            max_new_tokens=settings.max_new_tokens,
            temperature=0.0,
            seed=settings.seed,
            max_batch=settings.max_batch,
        )
    gap = None
    if inputs.teacher and prompts:
        own = sample(
            student,
            prompts[: config.teacher_prompts],
            max_new_tokens=settings.max_new_tokens,
            temperature=1.0,
            seed=settings.seed,
            max_batch=settings.max_batch,
        )
        gap = teacher_gap(with_teacher(own, inputs.teacher))
    return EvalReport(
        model=dict(model or {"name": student.config.name}),
        heldout=heldout,
        **_judge(rollouts, inputs.problems),
        teacher_gap=gap,
        router=load,
        provenance=_provenance(config, inputs),
    )


def evaluate_teacher(
    teacher: LocalTeacher, config: EvalConfig, inputs: EvalInputs | None = None
) -> EvalReport:
    """What of the suite a teacher can be judged by: its greedy answers."""
    inputs = inputs or open_inputs(config)
    prompts = _prompts(config, inputs)
    rollouts = teacher_answers(teacher, prompts, max_new_tokens=config.sampling.max_new_tokens)
    return EvalReport(
        model={"name": teacher.identity.name},
        **_judge(rollouts, inputs.problems),
        provenance=_provenance(config, inputs),
    )


def _measure_loss(
    student: Student, config: EvalConfig, inputs: EvalInputs
) -> tuple[Heldout, RouterLoad | None]:
    assert inputs.dataset is not None
    train = documents_of(inputs.train, limit=UNIGRAM_DOCUMENTS) if inputs.train else ()
    documents = documents_of(inputs.dataset, limit=config.documents)
    with counting_experts(student) as load:
        heldout = heldout_loss(student, documents, train_documents=train)
    return heldout, load if load.layers else None


def _prompts(config: EvalConfig, inputs: EvalInputs) -> list[Prompt]:
    if inputs.problems:
        effort = config.sampling.reasoning_effort
        return problem_prompts(inputs.problems, Renderer(_render(config, inputs)), effort=effort)
    if inputs.dataset and config.prompts:
        return dataset_prompts(inputs.dataset, limit=config.prompts)
    return []


def _render(config: EvalConfig, inputs: EvalInputs) -> RenderConfig:
    if config.render:
        return config.render
    if inputs.dataset:
        return inputs.dataset.render
    hint = "set data = FOLDER, or add the [render] table of the training data"
    raise ConfigError([("problems are asked for, but not how to render them", hint)])


def _judge(rollouts: Sequence[Rollout], problems: Sequence[Problem]) -> dict[str, Any]:
    if not rollouts:
        return {}
    return {
        "format": format_validity(rollouts),
        "exact_match": exact_match(problems, rollouts) if problems else None,
        "lengths": channel_lengths(rollouts),
    }


def _provenance(config: EvalConfig, inputs: EvalInputs) -> dict[str, Any]:
    facts: dict[str, Any] = {
        **provenance(),
        "tokenizer_sha256": O200K_SHA256,
        "eval_fingerprint": fingerprint(resolved(config)),
    }
    if inputs.dataset:
        facts["dataset_fingerprint"] = inputs.dataset.manifest["fingerprint"]
    if inputs.teacher:
        facts["teacher"] = inputs.teacher.identity.name
        facts["teacher_weights_sha256"] = inputs.teacher.identity.weights_sha256
    return facts


def eval_path(run_dir: Path, step: int, name: str = "") -> Path:
    """Where the report on a run's checkpoint lies: `vpmoe report` looks there."""
    suffix = f"-{name}" if name else ""
    return Path(run_dir) / f"eval-step-{step:06d}{suffix}.json"


def write_eval(path: Path, report: EvalReport) -> None:
    """Write a report, whole or not at all."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_manifest(Path(path), report.as_dict())
