"""The model card: what a reader of an exported folder needs to know, from the manifest alone."""

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

import jinja2

from vpmoe.data.o200k import encode
from vpmoe.data.problems import generate
from vpmoe.models.count import count
from vpmoe.models.student import Student

CARD_FILE = "card.md.jinja"
MEASURES = ("exact_match", "format", "heldout", "teacher_gap")


def model_card(student: Student, manifest: Mapping[str, Any], evals: Mapping[str, Any]) -> str:
    """The README of an export, as Markdown.

    Args:
        student: What is exported; its sizes are counted, not copied.
        manifest: The export's own manifest.
        evals: The newest evaluation report of the run, or an empty dict.
    """
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, autoescape=False
    )
    environment.filters["percent"] = lambda share: f"{100 * share:.1f} %"
    text = (resources.files("vpmoe.export") / CARD_FILE).read_text(encoding="utf-8")
    config = student.config
    return environment.from_string(text).render(
        config=config,
        sizes=count(config).as_dict(),
        manifest=manifest,
        evals={**dict.fromkeys(MEASURES), **evals} if evals else {},
        effort=manifest["render"]["reasoning_effort"] if manifest["render"]["system"] else "",
        question=example_question(student),
        origin=json.dumps(manifest["inputs"], indent=2, ensure_ascii=False),
    )


def example_question(student: Student) -> str:
    """A question whose every token the student knows; three dots if none of ours is."""
    problem = next(generate(1, seed=0, split="held-out"))
    for question in ("What is 2 + 2?", problem.query):
        subset = student.config.vocab_subset
        if subset is None or set(encode(question).tolist()) <= set(subset):
            return question
    return "..."
