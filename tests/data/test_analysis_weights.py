"""The heuristic on chosen chunks and on real SYNTH rows."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from vpmoe.batch import Batch
from vpmoe.config import validate
from vpmoe.data.analysis_weights import (
    AnalysisWeightsConfig,
    analysis_weights,
    token_classes,
    weighted,
)
from vpmoe.data.o200k import encode
from vpmoe.errors import ConfigError

SYNTH = Path(__file__).resolve().parents[3] / "shared" / "data" / "synth" / "synth_sample.parquet"
FORMULA = "x^2 + 3*x - 10 = 0, (x+5)*(x-2) = 0, x = 2; for i in range(10): a[i] = b[i] + 1"
TALK = "Okay, so let me think. First, I need to check what the user wants. Let me start. So, now"
PROSE = "Monsoon winds cross a warm sea and bring heavy snow to coastal mountain villages in winter"
PLAIN = AnalysisWeightsConfig(chunk_tokens=16)


def weights_of(*texts, config=PLAIN, final=0):
    """Weight of each text's first chunk, and of `final` labels after the reasoning."""
    ids = [encode(text)[:16] for text in texts]
    assert all(len(part) == 16 for part in ids)
    labels = np.concatenate([*ids, np.zeros(final, dtype=np.int64)])
    spans = np.repeat([1, 2], [16 * len(texts), final]).astype(np.uint8)
    return analysis_weights(labels, spans, config)


def test_formulas_up_talk_down_prose_between():
    weights = weights_of(FORMULA, TALK, PROSE, final=5)
    mean = (1.5 + 0.5 + 1.0) / 3
    assert weights[:48].tolist() == pytest.approx(
        np.repeat([1.5 / mean, 0.5 / mean, 1 / mean], 16).tolist()
    )
    assert weights[48:].tolist() == [1] * 5


def test_the_reasoning_of_a_document_weighs_what_it_did():
    for texts in ([FORMULA], [FORMULA, FORMULA, PROSE], [TALK] * 4, [PROSE]):
        weights = weights_of(*texts, final=3)
        assert weights[:-3].mean() == pytest.approx(1, abs=1e-6)
    assert weights_of(FORMULA).tolist() == [1] * 16  # nothing else to take weight from


def test_labels_outside_the_reasoning_weigh_one():
    labels = encode(FORMULA)
    for span in (0, 2):
        spans = np.full(len(labels), span, dtype=np.uint8)
        assert analysis_weights(labels, spans, PLAIN).tolist() == [1] * len(labels)


def test_documents_of_a_row_are_judged_apart():
    one, two = encode(FORMULA)[:16], encode(TALK)[:16]
    labels = torch.tensor(np.concatenate([one, two, one, np.zeros(4, dtype=np.int64)])[None])
    document_ids = torch.tensor([[0] * 32 + [1] * 16 + [-1] * 4])
    batch = Batch(
        tokens=labels,
        labels=labels,
        span_ids=(document_ids >= 0).to(torch.uint8),
        document_ids=document_ids,
        positions=torch.zeros_like(labels),
    )
    weights = weighted(batch, PLAIN).row_weights[0]
    assert weights.tolist() == pytest.approx([1.5] * 16 + [0.5] * 16 + [1] * 20)


@pytest.mark.skipif(not SYNTH.exists(), reason="needs the SYNTH sample")
def test_on_real_traces_few_chunks_move_and_those_are_what_they_should_be():
    traces = pq.read_table(SYNTH)["synthetic_reasoning"].to_pylist()[:300]
    config = AnalysisWeightsConfig()
    up, down, total, digits = 0, 0, 0, {True: [], False: []}
    classes = token_classes()
    for trace in traces:
        ids = encode(trace)
        weights = analysis_weights(ids, np.ones(len(ids), dtype=np.uint8), config)
        assert weights.mean() == pytest.approx(1, abs=1e-5)
        for begin in range(0, len(ids) - config.chunk_tokens, config.chunk_tokens):
            chunk = slice(begin, begin + config.chunk_tokens)
            assert len(set(weights[chunk].tolist())) == 1
            # Against the trace's own ordinary chunks: the mean has moved them all alike.
            higher = weights[begin] > 1.2 * np.median(weights)
            up, down = up + higher, down + (weights[begin] < 0.8 * np.median(weights))
            total += 1
            digits[bool(higher)].append((classes[ids[chunk]] == 1).mean())
    assert 0.01 < up / total < 0.2
    assert 0 < down / total < 0.1
    assert np.mean(digits[True]) > 4 * np.mean(digits[False])


def test_weights_the_wrong_way_round_are_refused():
    with pytest.raises(ConfigError, match="should be 1 or more"):
        validate(AnalysisWeightsConfig, {"formula_weight": 0.5}, source="test")
