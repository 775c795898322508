"""The small teacher that codecs are measured on: documents apart, whole distributions kept."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GptOssForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks import codec_teacher, recorded

from vpmoe.batch import Batch
from vpmoe.teachers.frontier import kl

VOCAB = 600


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    settings = codec_teacher.config(64, 2)
    settings.vocab_size = VOCAB
    return GptOssForCausalLM(settings).eval()


def test_documents_of_a_row_do_not_see_one_another(model):
    lengths = (150, 21)  # the first one is longer than the window
    tokens = torch.randint(VOCAB, (1, sum(lengths)))
    places = torch.cat([torch.arange(n) for n in lengths])[None]
    documents = torch.repeat_interleave(torch.arange(2), torch.tensor(lengths))[None]
    spans = torch.ones_like(tokens, dtype=torch.uint8)
    with torch.no_grad():
        together = codec_teacher.states(model, Batch(tokens, tokens, spans, documents, places))[0]
        for number in range(2):
            mine = documents[0] == number
            alone = model.model(input_ids=tokens[:, mine], use_cache=False).last_hidden_state[0]
            torch.testing.assert_close(together[mine], alone, rtol=1e-4, atol=1e-4)


def test_recorded_distributions_are_whole_and_come_back_from_their_file(tmp_path):
    torch.manual_seed(0)
    hidden, head = torch.randn(40, 16), torch.randn(VOCAB, 16)
    made = recorded.recorded(hidden, head)
    recorded.save(tmp_path / "read.npz", made)
    kept = {name: torch.from_numpy(value) for name, value in np.load(tmp_path / "read.npz").items()}
    logprobs = (hidden @ head.T).double().log_softmax(1)
    assert made.vocab == VOCAB and made.exact
    assert torch.equal(kept["entropy"], made.entropy) and torch.equal(kept["squares"], made.squares)
    assert torch.equal(kept["top_ids"].long(), logprobs.argsort(1, descending=True))
    assert torch.equal(kept["top_logprobs"], logprobs.sort(1, descending=True).values.float())
    drawn = logprobs.gather(1, kept["drawn_ids"].long())
    assert torch.equal(kept["drawn_logprobs"], drawn.float())
    again = replace(made, logprobs=kept["top_logprobs"].double())
    assert float(kl(again, again.top(VOCAB)).abs().max()) < 1e-5
