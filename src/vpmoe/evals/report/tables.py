"""The page's tables: every run in one line each, where it came from, how its settings differ."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vpmoe.evals.report.charts_training import SPEED_NAMES
from vpmoe.evals.report.runs import RunData
from vpmoe.evals.report.theme import short_number

MAX_DIFFERENCES = 60
ABSENT = "–"
UNTOLD = ("kind", "config", "student", "files", "step", "tokens_seen")  # in other tables already


@dataclass(frozen=True)
class Cell:
    """A table cell: its text, the small print below, and a bar where the number is a share."""

    text: str
    note: str = ""
    share: float | None = None
    low: float | None = None
    high: float | None = None
    best: bool = False


@dataclass(frozen=True)
class Column:
    """A column of the summary: heading, and which way is better (-1, 0 or 1)."""

    title: str
    better: int
    cells: tuple[Cell, ...]


def summary(runs: Sequence[RunData]) -> list[Column]:
    """The columns that at least one run measured, each with one cell per run."""
    columns = [
        _column(runs, "exact match", 1, _share_of("exact_match", "total")),
        _column(runs, "well-formed", 1, _share_of("format", "valid")),
        _column(runs, "held-out loss, reasoning", -1, _heldout_loss("reasoning")),
        _column(runs, "held-out loss, final", -1, _heldout_loss("final")),
        _column(runs, "reverse KL to the teacher", -1, _teacher_gap),
        _column(runs, "noise floor of the loss", 0, _loss_floor),
        _column(runs, "tokens per answer", 0, _length),
        _column(runs, "student tokens", 0, _tokens),
        _column(runs, "tokens / s", 0, _speed),
    ]
    return [column for column in columns if any(cell.text != ABSENT for cell in column.cells)]


def _column(runs: Sequence[RunData], title: str, better: int, measure: Any) -> Column:
    measured = [measure(run) for run in runs]
    values = [value for value, _ in measured if value is not None]
    best = (max(values) if better > 0 else min(values)) if better and len(values) > 1 else None
    cells = []
    for value, cell in measured:
        is_best = best is not None and value == best
        cells.append(Cell(**{**vars(cell), "best": is_best}))
    return Column(title=title, better=better, cells=tuple(cells))


def _share_of(*path: str) -> Any:
    def measure(run: RunData) -> tuple[float | None, Cell]:
        score = run.measured(*path)
        if score is None:
            return None, Cell(ABSENT)
        return score["share"], Cell(
            f"{score['share'] * 100:.1f} %",
            note=f"{score['low'] * 100:.0f}–{score['high'] * 100:.0f} of {score['count']}",
            share=score["share"],
            low=score["low"],
            high=score["high"],
        )

    return measure


def _heldout_loss(span: str) -> Any:
    def measure(run: RunData) -> tuple[float | None, Cell]:
        value = run.measured("heldout", "loss", span)
        unigram = run.measured("heldout", "unigram_loss", span)
        if value is not None:
            return value, Cell(f"{value:.3f}", note=f"unigram {unigram:.2f}" if unigram else "")
        _, stream = run.series(f"valid/loss/{span}")
        if not stream:
            return None, Cell(ABSENT)
        return stream[-1], Cell(f"{stream[-1]:.3f}", note="while training")

    return measure


def _teacher_gap(run: RunData) -> tuple[float | None, Cell]:
    value = run.measured("teacher_gap", "k3", "all")
    if value is None:
        return None, Cell(ABSENT)
    floor = run.noise.of("k3") if run.noise else None
    note = "nats per token" if floor is None else f"nats per token, noise {floor:.1e}"
    return value, Cell(f"{value:.3f}", note=note)


def _loss_floor(run: RunData) -> tuple[float | None, Cell]:
    """What the run's own divergence would be at least, were the student its teacher."""
    kind = str((run.config.get("loss") or {}).get("kind", ""))
    floor = run.noise.of(kind) if run.noise else None
    if floor is None:
        return None, Cell(ABSENT)
    return floor, Cell(f"{floor:.1e}", note=f"nats per token, {kind.replace('_', ' ')}")


def _length(run: RunData) -> tuple[float | None, Cell]:
    length = run.measured("lengths", "completion")
    if not length or not length["count"]:
        return None, Cell(ABSENT)
    cut = run.measured("lengths", "truncated", "share") or 0.0
    note = f"{cut * 100:.0f} % cut" if cut else f"p95 {length['p95']:.0f}"
    return length["mean"], Cell(f"{length['mean']:.0f}", note=note)


def _tokens(run: RunData) -> tuple[float | None, Cell]:
    seen = run.measured("model", "tokens_seen")
    if run.metrics:
        seen = run.metrics[-1].get("tokens_seen", seen)
    if seen is None:
        return None, Cell(ABSENT)
    step = run.metrics[-1].get("step") if run.metrics else run.measured("model", "step")
    return float(seen), Cell(short_number(float(seen)), note=f"step {step}" if step else "")


def _speed(run: RunData) -> tuple[float | None, Cell]:
    _, values = run.series(*SPEED_NAMES)
    if not values:
        return None, Cell(ABSENT)
    median = sorted(values)[len(values) // 2]
    return median, Cell(short_number(median), note="median step")


def provenance(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
    """One row per fact about where a run came from: its name, and each run's value."""
    facts = [_facts(run) for run in runs]
    keys = list(dict.fromkeys(key for fact in facts for key in fact))
    return [(key, [_shown(fact.get(key, ABSENT)) for fact in facts]) for key in keys]


def _facts(run: RunData) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for source in (run.manifest, run.measured("provenance") or {}, run.measured("model") or {}):
        told = {key: value for key, value in source.items() if key not in UNTOLD}
        for key, value in _flat(told):
            facts.setdefault(key.replace("_", " "), value)
    return facts


def differing_settings(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in every run that has a config."""
    flats = [dict(_flat(run.config)) for run in runs]
    present = [flat for flat in flats if flat]
    if len(present) < 2:
        return []
    keys = sorted({key for flat in present for key in flat})
    rows = [
        (key, [_shown(flat.get(key, ABSENT)) if flat else ABSENT for flat in flats])
        for key in keys
        if len({_shown(flat.get(key, ABSENT)) for flat in present}) > 1
    ]
    return rows[:MAX_DIFFERENCES]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif not isinstance(value, list):
            yield f"{prefix}{key}", value


def _shown(value: Any) -> str:
    """A value as the table prints it: hashes shortened, whole numbers with commas."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    is_hash = len(text) >= 32 and all(c in "0123456789abcdef" for c in text)
    return text[:12] if is_hash else text
