"""The small teacher that codecs are measured on: documents apart, whole distributions kept."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import GptOssForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks import codec_teacher, recorded

from vpmoe.batch import Batch
from vpmoe.teachers.frontier import kl, measure

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


def test_recorded_distributions_come_back_from_their_file(tmp_path):
    torch.manual_seed(0)
    hidden, head = torch.randn(40, 16), torch.randn(VOCAB, 16)
    made = recorded.recorded(hidden, head)
    recorded.save(tmp_path / "positions.npz", {"read": made, "held out": made})
    found = recorded.load(tmp_path / "positions.npz")
    assert list(found) == ["read", "held out"]
    again = found["held out"]
    logprobs = (hidden @ head.T).double().log_softmax(1)
    assert torch.equal(again.entropy, made.entropy) and again.vocab == VOCAB and again.exact
    assert torch.equal(again.ids, logprobs.argsort(1, descending=True))
    torch.testing.assert_close(again.logprobs, logprobs.gather(1, again.ids), rtol=1e-6, atol=1e-6)
    assert float(kl(again, again.top(VOCAB)).abs().max()) < 1e-5
    for before, after in zip(measure(made), measure(again), strict=True):
        assert after.bytes_per_token == pytest.approx(before.bytes_per_token)
        assert after.gradient_error == pytest.approx(before.gradient_error, abs=1e-5)
