"""Weights for labels of the reasoning, by what chunks of it look like: a small heuristic.

Long traces hold much that says little: announcements, restatements, doubts. Here a chunk of tokens
counts more where many of them are digits, operators or code, and less where most are the words in
which one talks about thinking. It is no measure of quality; it looks at spelling alone.
"""

import re
from dataclasses import replace
from functools import cache
from typing import Self

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from pydantic import Field, model_validator

from vpmoe.batch import Batch
from vpmoe.config import Config
from vpmoe.data.o200k import token_bytes
from vpmoe.spans import Span
from vpmoe.vocabulary import VOCAB_SIZE

# A digit, an operator, a bracket or mark that prose has no use for. Arrows, bullets, asterisks and
# parentheses are left out: traces are full of them whatever they speak of.
_FORMULA = re.compile(r"[0-9=+^<>{}\[\]\\_|~≤≥≠≈±×÷√∑∏∫∂∞∈∉⊂∀∃π]|\(\)|//|::|&&|->")
# How a trace speaks of itself, in English; other languages have no boilerplate here.
_BOILERPLATE = frozenset(
    re.findall(
        r"\S+",
        """okay ok so well hmm wait let me lets let's i i'm i'll we need should must think thinking
        thought first now then next start starting check checking double consider looking look see
        user asks asking asked question query request want wants answer respond response provide
        going maybe perhaps probably actually alright also just remember make sure re interpretation
        given problem expected""",
    )
)
_NEITHER, _IS_FORMULA, _IS_BOILERPLATE = 0, 1, 2


class AnalysisWeightsConfig(Config):
    """How much chunks of the reasoning count; the final answer always counts 1."""

    chunk_tokens: int = Field(default=32, ge=1)
    """Labels of the reasoning that are judged together, from the document's first one on."""
    formula_share: float = Field(default=0.15, gt=0, le=1)
    """A chunk with at least this share of digits, operators and code has formula_weight."""
    formula_weight: float = Field(default=1.5, gt=0)
    """Of such a chunk."""
    boilerplate_share: float = Field(default=0.12, gt=0, le=1)
    """Of the others, one with at least this share of talk about thinking is boilerplate."""
    boilerplate_weight: float = Field(default=0.5, gt=0)
    """Of such a chunk."""

    @model_validator(mode="after")
    def _up_and_down(self) -> Self:
        if not self.boilerplate_weight <= 1 <= self.formula_weight:
            raise ValueError(
                f"formula_weight {self.formula_weight} should be 1 or more, and "
                f"boilerplate_weight {self.boilerplate_weight} 1 or less"
            )
        return self


@cache
def token_classes() -> UInt8[np.ndarray, " vocab"]:
    """What each id is spelled like: formula, boilerplate or neither."""
    classes = np.full(VOCAB_SIZE, _NEITHER, dtype=np.uint8)
    for token, spelled in enumerate(token_bytes()):
        text = spelled.decode(errors="replace")
        if _FORMULA.search(text):
            classes[token] = _IS_FORMULA
        elif text.strip().lower() in _BOILERPLATE:
            classes[token] = _IS_BOILERPLATE
    return classes


def analysis_weights(
    labels: Int64[np.ndarray, " tokens"],
    span_ids: UInt8[np.ndarray, " tokens"],
    config: AnalysisWeightsConfig,
) -> Float32[np.ndarray, " tokens"]:
    """Weight of each label of one document; those of its reasoning have mean 1.

    So a document of formulas alone weighs what any other does: the weights move attention inside a
    trace, not between traces. Labels outside the reasoning weigh 1.

    Args:
        labels: o200k ids.
        span_ids: `Span` of each label.
        config: Chunks, shares and weights.

    References:
        own; "Analysis weights" in docs/losses.md.
    """
    weights = np.ones(len(labels), dtype=np.float32)
    places = np.flatnonzero(span_ids == Span.REASONING)
    if not places.size:
        return weights
    classes = token_classes()[labels[places]]
    chunk = np.arange(places.size) // config.chunk_tokens
    sizes = np.bincount(chunk)
    formula = np.bincount(chunk, weights=classes == _IS_FORMULA) / sizes
    boilerplate = np.bincount(chunk, weights=classes == _IS_BOILERPLATE) / sizes
    is_formula = formula >= config.formula_share
    is_boilerplate = ~is_formula & (boilerplate >= config.boilerplate_share)
    of_chunk = np.where(is_formula, config.formula_weight, 1.0)
    of_chunk = np.where(is_boilerplate, config.boilerplate_weight, of_chunk)
    found = of_chunk[chunk]
    weights[places] = found / found.mean()
    return weights


def weighted(batch: Batch, config: AnalysisWeightsConfig) -> Batch:
    """The batch with a weight for every label, each document judged by itself."""
    labels, spans = batch.labels.cpu().numpy(), batch.span_ids.cpu().numpy()
    documents = batch.document_ids.cpu().numpy()
    weights = np.ones(labels.shape, dtype=np.float32)
    for row, ids in enumerate(documents):
        for document in range(int(ids.max()) + 1):
            at = ids == document
            weights[row, at] = analysis_weights(labels[row, at], spans[row, at], config)
    return replace(batch, row_weights=torch.from_numpy(weights).to(batch.tokens.device))
