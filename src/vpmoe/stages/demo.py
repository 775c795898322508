"""The whole pipeline, small: a teacher distilled through all stages, beside a plain baseline."""

import os
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.context import SpawnProcess
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from pydantic import Field

from vpmoe.config import Config, difference, fingerprint, resolved, validate
from vpmoe.data.build import DataConfig, build_dataset
from vpmoe.data.problems import Alphabet, Flaws, generate, write_problems
from vpmoe.errors import RunError
from vpmoe.evals.report import write_report
from vpmoe.evals.suite import (
    EvalConfig,
    EvalInputs,
    EvalReport,
    eval_path,
    evaluate,
    evaluate_teacher,
    open_inputs,
    write_eval,
)
from vpmoe.export.hf import export_hf
from vpmoe.stages import offline, on_policy, score, warm_start
from vpmoe.stages.base import SUMMARY_FILE
from vpmoe.stages.offline import OfflineConfig
from vpmoe.stages.on_policy import OnPolicyConfig
from vpmoe.stages.score import ScoreConfig
from vpmoe.stages.warm_start import WarmStartConfig
from vpmoe.storage.atomic import TEMPORARY_SUFFIX
from vpmoe.storage.manifest import provenance, read_manifest, write_manifest
from vpmoe.storage.processes import die_with_parent
from vpmoe.teachers.checkpoint import read_vocab
from vpmoe.train.hooks import Observer
from vpmoe.train.state import load_student

CONFIG_FILE = "demo.json"
RESULT_FILE = "result.json"
Say = Callable[[str], None]

# Config


class CorpusConfig(Config):
    """Problems to learn from: few with traces, part of them wrong, and many that only ask."""

    traces: int = Field(gt=0)
    """Problems with a trace and an answer."""
    prompts: int = Field(gt=0)
    """Problems that the student may be asked on-policy; no answer of theirs is ever read."""
    flawed_share: float = Field(ge=0, le=1)
    """Share of the traces with a wrong step; everything after it builds upon it."""
    flaws: Flaws = "blind-spot"
    """Where the wrong steps are."""
    families: tuple[str, ...]
    """Kinds of problems."""
    alphabet: Alphabet = "small"
    """How many numbers and words the questions draw from."""


class DemoConfig(Config):
    """One teacher, one tiny student, three stages and a baseline, all on one laptop."""

    kind: Literal["demo"] = "demo"
    run: str
    """Folder of everything that the demo makes."""
    seed: int = Field(default=0, ge=0)
    """Of the problems, the weights and the samples."""
    corpus: CorpusConfig
    data: DataConfig
    warm_start: WarmStartConfig
    score: ScoreConfig
    offline: OfflineConfig
    on_policy: OnPolicyConfig
    baseline: WarmStartConfig
    """Cross-entropy alone, with at least as many student tokens as the three stages together."""
    eval: EvalConfig
    """What the teacher, the baseline and the student after each stage are judged by."""


# Build


def placed(config: DemoConfig) -> DemoConfig:
    """The config with every path inside `run`, its seed everywhere, and the teacher's vocabulary.

    The student keeps exactly the ids that its teacher knows, so that every token it may write can
    be scored.

    Raises:
        RunError: If the teacher is not local, or keeps the whole vocabulary.
    """
    run, seed, teacher = Path(config.run), config.seed, config.on_policy.teacher
    if teacher.kind != "local":
        raise RunError("the demo's teacher lives in its process", hint='set kind = "local"')
    subset = read_vocab(Path(teacher.path))
    if subset is None:
        raise RunError(f"the demo's teacher {teacher.path} lists no vocab_ids.json")
    student = config.warm_start.student
    if student is None:
        raise RunError("the demo's first stage has no student", hint="add [warm_start.student]")
    student = student.model_copy(update={"vocab_subset": tuple(subset.ids.tolist())})
    data, targets = str(run / "data"), str(run / "targets")
    shared = {"data": data, "seed": seed}
    fresh = shared | {"student": student}
    rollouts = config.on_policy.rollouts
    changes = {
        "data": {"input": str(run / "traces.parquet"), "output": data},
        "warm_start": fresh | {"run": str(run / "1-warm-start")},
        "score": {"data": Path(data), "output": Path(targets)},
        "offline": shared
        | {
            "run": str(run / "2-offline"),
            "init": str(run / "1-warm-start"),
            "targets": config.offline.targets.model_copy(update={"path": targets}),
        },
        "on_policy": shared
        | {
            "run": str(run / "3-on-policy"),
            "init": str(run / "2-offline"),
            "rollouts": rollouts.model_copy(update={"prompts": str(run / "prompts.parquet")}),
        },
        "baseline": fresh | {"run": str(run / "baseline")},
        "eval": {"data": data},
    }
    parts = {k: getattr(config, k).model_copy(update=update) for k, update in changes.items()}
    whole = resolved(config.model_copy(update=parts))
    return validate(DemoConfig, whole, source="demo")


def make_corpus(config: DemoConfig) -> None:
    """The two files of problems: with traces for training, without answers for prompts."""
    run, corpus = Path(config.run), config.corpus
    settings: dict[str, Any] = {"families": corpus.families, "alphabet": corpus.alphabet}
    flaws: dict[str, Any] = {"flawed_share": corpus.flawed_share, "flaws": corpus.flaws}
    traces = generate(corpus.traces, seed=config.seed, **settings, **flaws)
    write_problems(run / "traces.parquet", traces)
    write_problems(run / "prompts.parquet", generate(corpus.prompts, seed=config.seed, **settings))


# Step


@dataclass(frozen=True)
class Step:
    """One run of training inside the demo."""

    name: str
    config: WarmStartConfig | OfflineConfig | OnPolicyConfig

    def run(self, observers: Sequence[Observer] = ()) -> dict[str, Any]:
        """What it came to; one that ended before is not run again, an interrupted one goes on."""
        folder = self.config.run_dir
        if (folder / SUMMARY_FILE).exists():
            return read_manifest(folder / SUMMARY_FILE)
        resume = (folder / "config.json").exists()
        match self.config:
            case OfflineConfig():
                return offline.run(self.config, resume=resume, observers=observers)
            case OnPolicyConfig():
                return on_policy.run(self.config, resume=resume, observers=observers)
            case _:
                return warm_start.run(self.config, resume=resume, observers=observers)


def _run_baseline(tree: dict[str, Any]) -> None:
    """The baseline, in a process of its own."""
    die_with_parent()
    Step("baseline", validate(WarmStartConfig, tree, source="baseline")).run()


@contextmanager
def _beside(config: WarmStartConfig) -> Iterator[SpawnProcess]:
    """The baseline's process, which ends with the block however that is left."""
    process = get_context("spawn").Process(target=_run_baseline, args=(resolved(config),))
    process.start()
    try:
        yield process
    finally:
        process.terminate()
        process.join()


# Run


def run(
    config: DemoConfig,
    *,
    overwrite: bool = False,
    say: Say = lambda _: None,
    observers: Callable[[], Sequence[Observer]] = tuple,
) -> dict[str, Any]:
    """The table of what each stage bought, whether that beat the baseline, and where things are.

    Whatever an earlier call finished is kept, so an interrupted demo goes on where it stopped.

    Args:
        config: As read from its file; paths and seed are put in place here.
        overwrite: Start anew.
        say: Told in a line what comes next.
        observers: Makes the readers of a stage's metrics stream, e.g. a progress bar.
    """
    begin = perf_counter()
    config = placed(config)
    folder = Path(config.run)
    _open_folder(folder, config, overwrite=overwrite)
    say("problems, clean and flawed, to Harmony shards")
    if not (folder / "data" / "manifest.json").exists():
        make_corpus(config)
        build_dataset(config.data)
    stages = [
        Step("1-warm-start", config.warm_start),
        Step("2-offline", config.offline),
        Step("3-on-policy", config.on_policy),
    ]
    say("baseline: cross-entropy alone, beside everything else")
    with _beside(config.baseline) as baseline:
        inputs = open_inputs(config.eval)
        reports = {"teacher": _judge_teacher(folder, config.eval, inputs)}
        for step in stages:
            if step.name == "2-offline":
                say("score: the teacher reads the training traces")
                score.run(config.score)
            say(f"stage {step.name}")
            step.run(observers())
            reports[step.name] = _judge(step.config.run_dir, config.eval, inputs)
        say("waiting for the baseline")
        _finish_baseline(baseline, config)
    reports["baseline"] = _judge(config.baseline.run_dir, config.eval, inputs)
    say("export and report")
    if not (folder / "export").exists():
        export_hf(stages[-1].config.run_dir, folder / "export")
    order = ["teacher", "baseline", *(step.name for step in stages)]
    page = write_report([folder / n for n in order], folder / "report", title="vpMoE demo")
    result = _result(config, {name: reports[name] for name in order})
    result |= {"report": str(page.page), "export": str(folder / "export")}
    result["machine"] = _machine() | {"seconds": perf_counter() - begin}
    write_manifest(folder / RESULT_FILE, result)
    return result


def _machine() -> dict[str, Any]:
    """What the times of this result must be read with."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _open_folder(folder: Path, config: DemoConfig, *, overwrite: bool) -> None:
    """Make the folder, or see to it that what lies there is this demo's."""
    doomed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    unfinished = CONFIG_FILE + TEMPORARY_SUFFIX
    if folder.exists() and not (folder / CONFIG_FILE).exists():
        if any(path.name != unfinished for path in folder.iterdir()):
            raise RunError(
                f"{folder} holds something else than a demo", hint="choose another run=FOLDER"
            )
    elif overwrite and folder.exists():
        # The name goes first: half a demo must never be taken for the beginning of the next.
        shutil.rmtree(folder.rename(doomed))
    tree = resolved(config)
    if (folder / CONFIG_FILE).exists():
        changed = difference(read_manifest(folder / CONFIG_FILE)["config"], tree)
        if changed:
            lines = "\n".join(f"  {line}" for line in changed)
            raise RunError(
                f"{folder} holds a demo with other settings\n{lines}",
                hint="start anew with --overwrite, or choose another run=FOLDER",
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_manifest(folder / CONFIG_FILE, {"config": tree, "fingerprint": fingerprint(tree)})


def _finish_baseline(baseline: SpawnProcess, config: DemoConfig) -> None:
    """Wait for it, and make sure that the comparison is fair."""
    baseline.join()
    summary = config.baseline.run_dir / SUMMARY_FILE
    if baseline.exitcode or not summary.exists():
        raise RunError(f"the baseline ended with exit code {baseline.exitcode}, see above")
    tokens, ours = read_manifest(summary)["tokens_seen"], _student_tokens(config)
    if tokens < ours:
        raise RunError(
            f"the baseline saw {tokens:,} tokens, the three stages {ours:,}",
            hint="raise baseline.budget.tokens and start with --overwrite",
        )


def _student_tokens(config: DemoConfig) -> int:
    """Tokens that the three stages trained on."""
    folders = (config.warm_start, config.offline, config.on_policy)
    return sum(read_manifest(c.run_dir / SUMMARY_FILE)["tokens_seen"] for c in folders)


def _judge(run_dir: Path, config: EvalConfig, inputs: EvalInputs) -> dict[str, Any]:
    """The evaluation of a run's last checkpoint, measured once."""
    summary = read_manifest(run_dir / SUMMARY_FILE)
    out = eval_path(run_dir, summary["step"])
    if not out.exists():
        student, manifest = load_student(run_dir)
        model = {
            "name": student.config.name,
            "run": run_dir.name,
            "step": summary["step"],
            "tokens_seen": summary["tokens_seen"],
            "config_fingerprint": manifest["fingerprint"],
        }
        write_eval(out, evaluate(student, config, inputs, model=model))
    return read_manifest(out)


def _judge_teacher(folder: Path, config: EvalConfig, inputs: EvalInputs) -> dict[str, Any]:
    out = eval_path(folder / "teacher", 0)
    if not out.exists():
        if inputs.teacher is None:
            raise RunError("the demo's eval names no teacher", hint="add [eval.teacher]")
        report: EvalReport = evaluate_teacher(inputs.teacher, config, inputs)
        write_eval(out, report)
    return read_manifest(out)


COLUMNS = ("model", "exact match (95 %)", "Harmony", "KL, nats", "tokens")


def _result(config: DemoConfig, reports: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Rows of the table in reading order, and the verdict."""
    rows, seen = [], 0
    for name, report in reports.items():
        match, gap = report["exact_match"]["total"], report.get("teacher_gap")
        tokens = report["model"].get("tokens_seen")
        if name[0].isdigit():
            seen += tokens
            tokens = seen  # the stages build upon one another
        rows.append(
            {
                "model": name,
                "exact_match": match,
                "valid_harmony": report["format"]["valid"]["share"],
                "reverse_kl_nats": gap["k1"]["all"] if gap else None,
                "tokens": tokens,
            }
        )
    ours, plain = rows[-1]["exact_match"], reports["baseline"]["exact_match"]["total"]
    return {
        "seed": config.seed,
        "columns": list(COLUMNS),
        "rows": rows,
        "beats_baseline": ours["share"] > plain["share"],
        "intervals_apart": ours["low"] > plain["high"],
        "verdict": _verdict(ours, plain),
        **provenance(),
    }


def _verdict(ours: dict[str, float], plain: dict[str, float]) -> str:
    """One honest sentence."""
    shares = f"{ours['share']:.1%} of the held-out problems against {plain['share']:.1%}"
    if ours["low"] > plain["high"]:
        return f"The pipeline beat the baseline at no more tokens: {shares}; intervals apart."
    if ours["share"] > plain["share"]:
        return f"The pipeline was ahead of the baseline: {shares}; but the intervals overlap."
    return f"The pipeline did not beat the baseline: {shares}."
