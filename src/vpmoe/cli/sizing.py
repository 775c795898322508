"""The facts that `vpmoe check` shows: all of them derived, none typed."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpmoe.cli.render import gib, short
from vpmoe.config import Config

if TYPE_CHECKING:
    from vpmoe.models.config import StudentConfig
    from vpmoe.models.count import CountReport

Facts = list[tuple[str, str]]


def facts(config: Config) -> Facts:
    """What a config of any kind comes to."""
    by_kind: dict[str, Callable[[Any], Facts]] = {
        "data": _data_config_facts,
        "eval": _eval_facts,
        "score": _score_facts,
        "demo": _demo_facts,
        "local": lambda teacher: [("teacher", _named(teacher))],
        "server": lambda teacher: [("teacher", _named(teacher))],
        "student": lambda student: [("student", _student_line(student))],
    }
    return by_kind.get(getattr(config, "kind", ""), _stage_facts)(config)


def _named(teacher: Any) -> str:
    """A teacher in a few words: its kind, and where it is."""
    if teacher.kind == "server":
        return f"{teacher.kind} {teacher.name or teacher.model} at {', '.join(teacher.urls)}"
    return f"{teacher.kind} {teacher.path}"


def _demo_facts(config: Any) -> Facts:
    corpus = config.corpus
    stages = {
        "stage 1": config.warm_start,
        "stage 2": config.offline,
        "stage 3": config.on_policy,
        "baseline": config.baseline,
    }
    return [
        ("demo", f"{config.run}/, seed {config.seed}"),
        ("teacher", _named(config.on_policy.teacher)),
        (
            "corpus",
            f"{corpus.traces:,} traces, {corpus.flawed_share:.0%} of them flawed, "
            f"{corpus.prompts:,} prompts",
        ),
        *((name, f"{stage.budget.tokens:,} student tokens") for name, stage in stages.items()),
    ]


def _score_facts(config: Any) -> Facts:
    share = 100 * config.selection.fraction
    return [
        ("score", f"{share:.0f} % of the {config.split} tokens, to {config.output}"),
        ("teacher", _named(config.teacher)),
        ("data", dataset_line(config.data)),
    ]


def _eval_facts(config: Any) -> Facts:
    problems, prompts = config.problems, config.prompts
    facts = []
    if config.data:
        documents = f"{config.documents:,}" if config.documents else "all"
        facts.append(("data", dataset_line(Path(config.data))))
        facts.append(("held out", f"loss of {documents} {config.split} conversations"))
    if problems:
        families = ", ".join(problems.families)
        facts.append(("problems", f"{problems.count:,} of {families}, seed {problems.seed}"))
    elif prompts:
        facts.append(
            ("prompts", f"{prompts:,}, up to {config.sampling.max_new_tokens:,} tokens each")
        )
    if config.teacher:
        facts.append(("teacher", _named(config.teacher)))
    return facts


def _budget(config: Any) -> str:
    """Steps and tokens; packing leaves slots empty, so a token budget may take some steps more."""
    batch, budget = config.batch, config.budget
    if hasattr(config, "rollouts"):  # how long a step's completions get is not known before
        total = f"{budget.steps:,} steps" if budget.steps else f"{short(budget.tokens)} tokens"
        anchor = f"{100 * config.ce_anchor:.0f} % of the steps cross-entropy"
        return f"{total}, {config.rollouts.per_step} completions a step, {anchor}"
    slots = batch.global_batch_size * batch.seq_len
    steps = budget.num_steps(slots)
    return f"{steps:,} steps × {slots:,} tokens = {short(steps * slots)} tokens"


def _stage_facts(config: Any) -> Facts:
    facts = [
        ("stage", f"{config.kind}, {_budget(config)}"),
        ("start", config.init or f"fresh weights, seed {config.seed}"),
    ]
    if config.student is not None:
        facts.append(("student", _student_line(config.student)))
    facts.append(("data", dataset_line(Path(config.data))))
    if hasattr(config, "loss"):
        weights = config.span_weights
        facts.append(
            (
                "loss",
                f"{_loss_line(config.loss)}, span weights reasoning {weights.reasoning}, "
                f"final {weights.final}",
            )
        )
    if getattr(config, "teacher", None) is not None:
        facts.append(("teacher", _named(config.teacher)))
    if hasattr(config, "targets"):
        from vpmoe.stages.offline import store_lines

        facts += [("targets", line) for line in store_lines(config)]
    if config.student is not None:
        facts += _cost_facts(config)
    return facts


def _loss_line(loss: Any) -> str:
    """A loss with what was set otherwise than it is by default."""
    changed = [
        f"{name} {value}"
        for name, value in loss
        if name not in ("kind", "chunk_rows") and value != type(loss).model_fields[name].default
    ]
    return f"{loss.kind} ({', '.join(changed)})" if changed else loss.kind


def _cost_facts(config: Any) -> Facts:
    """Estimates for one process that trains alone; more processes share the optimizer."""
    from vpmoe.train.estimate import estimate

    found = estimate(config, config.student)
    facts = [
        (
            "memory",
            f"{found.total_gib:.1f} GiB on one {config.device} process (weights "
            f"{found.weights_gib:.1f}, gradients {found.gradients_gib:.1f}, optimizer "
            f"{found.optimizer_gib:.1f}, activations {found.activations_gib:.1f})",
        )
    ]
    if found.tokens_per_s and found.step_s:
        speed = f"{short(found.tokens_per_s)} tokens/s, {found.step_s:.2f} s a step, estimated"
        facts.append(("speed", speed))
    return facts


def _data_config_facts(config: Any) -> Facts:
    limit = f"first {config.limit:,} rows" if config.limit else "all rows"
    render = config.render
    system = f"system message with effort {render.reasoning_effort}" if render.system else "none"
    return [
        ("data", f"{limit} of {config.input}"),
        ("output", dataset_line(config.output)),
        ("sequence", f"at most {config.seq_len:,} tokens, {config.valid_fraction:.2%} held out"),
        ("preamble", system),
    ]


def dataset_line(path: Path) -> str:
    """Whether a dataset is there, and what it holds."""
    from vpmoe.data.dataset import load_manifest

    if not (path / "manifest.json").exists():
        return f"{path}  not built yet"
    manifest = load_manifest(path)
    spans = manifest["span_labels"]["train"]
    trained = spans["reasoning"] + spans["final"]
    text = f"{path}  manifest ok, {short(trained)} trained tokens"
    return f"{text} ({_spans(spans)})" if trained else text


def _student_line(config: "StudentConfig") -> str:
    from vpmoe.models.count import count

    size = count(config)
    vocabulary = "o200k-harmony" if config.vocab_subset is None else "a subset of o200k-harmony,"
    return (
        f"{config.name}: {short(size.total)} parameters, {short(size.active)} active, "
        f"{vocabulary} {config.num_rows:,}"
    )


def dataset_facts(manifest: Mapping[str, Any]) -> Facts:
    """What a dataset holds, and what was turned away."""
    facts = []
    for split, rows in manifest["rows"].items():
        spans = manifest["span_labels"][split]
        trained = spans["reasoning"] + spans["final"]
        text = f"{rows:,} conversations, {short(manifest['tokens'][split])} tokens"
        if trained:
            text += f", {short(trained)} trained ({_spans(spans)})"
        facts.append((split, text))
    for name in ("rejects", "cuts"):
        counts = ", ".join(f"{what} {count:,}" for what, count in manifest[name].items())
        facts.append((name, counts or "none"))
    return facts


def _spans(labels: Mapping[str, int]) -> str:
    reasoning, final = labels["reasoning"], labels["final"]
    share = 100 * reasoning / (reasoning + final)
    return f"{share:.0f} % reasoning, {100 - share:.0f} % final"


def student_of(config: Config) -> "StudentConfig | None":
    """The student that a config describes, if any: its own, or its stage's."""
    from vpmoe.models.config import StudentConfig

    found = config if isinstance(config, StudentConfig) else getattr(config, "student", None)
    return found if isinstance(found, StudentConfig) else None


def size_facts(size: "CountReport") -> Facts:
    """What a student weighs and what a token costs."""
    training = size.weight_bytes + size.master_bytes + size.gradient_bytes + size.optimizer_bytes
    extra = ", ".join(f"{name} {number:,}" for name, number in size.additions.items())
    return [
        ("active", f"{size.active:,}; without embeddings {size.active_without_embeddings:,}"),
        ("additions", extra or "none beyond the published budget"),
        (
            "flops/token",
            f"{size.forward_flops_per_token / 1e9:,.3g} G forward, "
            f"{size.training_flops_per_token / 1e9:,.3g} G training, at length {size.seq_len:,}",
        ),
        (
            "memory",
            f"{gib(training)} to train before activations (weights {gib(size.weight_bytes)}, "
            f"masters {gib(size.master_bytes)}, gradients {gib(size.gradient_bytes)}, "
            f"optimizer {gib(size.optimizer_bytes)})",
        ),
        (
            "per token",
            f"{size.activation_bytes_per_token / 2**20:.2f} MiB of activations while training",
        ),
        ("cache", f"{gib(size.cache_bytes_per_sequence)} per conversation of {size.seq_len:,}"),
    ]
