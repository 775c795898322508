import numpy as np
import pytest
import torch

from vpmoe.data.dataset import Dataset
from vpmoe.evals.by_span import tally
from vpmoe.evals.heldout import (
    HeldoutHook,
    document_logprobs,
    documents_of,
    heldout_loss,
    trained_labels,
    unigram_logprobs,
)
from vpmoe.spans import Span
from vpmoe.vocabulary import END, RETURN


@pytest.fixture
def documents(data_dir):
    return documents_of(Dataset(data_dir, "valid"))


def test_loss_equals_one_plain_forward_per_document(student, documents):
    sums, counts = {1: 0.0, 2: 0.0}, {1: 0, 2: 0}
    student.eval()
    for document in documents:
        tokens = torch.from_numpy(document.tokens.astype(np.int64))[None]
        with torch.no_grad():
            hidden = student(
                tokens,
                positions=torch.arange(tokens.shape[1])[None],
                document_ids=torch.zeros_like(tokens),
            ).hidden
            logprobs = student.logits(hidden).double().log_softmax(-1)[0]
        for t in range(tokens.shape[1] - 1):
            span = int(document.span_ids[t])
            if span:
                row = int(student.rows_of(tokens[0, t + 1]))
                sums[span] -= float(logprobs[t, row])
                counts[span] += 1
    found = heldout_loss(student, documents)
    assert found.token_counts == {
        "reasoning": counts[1],
        "final": counts[2],
        "all": sum(counts.values()),
    }
    assert found.loss.reasoning == pytest.approx(sums[1] / counts[1], rel=1e-5)
    assert found.loss.final == pytest.approx(sums[2] / counts[2], rel=1e-5)
    assert found.loss.all == pytest.approx(sum(sums.values()) / sum(counts.values()), rel=1e-5)


def test_batching_changes_nothing_and_twice_is_the_same(student, documents):
    alone = document_logprobs(student, documents, batch_tokens=1)
    together = document_logprobs(student, documents, batch_tokens=4_096)
    np.testing.assert_allclose(together, alone, atol=2e-5)
    assert np.array_equal(together, document_logprobs(student, documents, batch_tokens=4_096))


def test_student_is_left_as_it_was(student, documents):
    student.train()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    state = torch.get_rng_state()
    heldout_loss(student, documents)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


def test_content_leaves_out_headers_and_ends(documents):
    labels = trained_labels(documents)
    assert set(labels.span_ids.tolist()) == {Span.REASONING, Span.FINAL}
    assert not labels.is_content[np.isin(labels.ids, [END, RETURN])].any()
    # Header of five tokens and one end, for each of a document's two messages.
    assert (~labels.is_content).sum() == 12 * len(documents)


def test_unigram_is_add_one_frequency_over_the_students_vocabulary(student, data_dir, vocab):
    documents = documents_of(Dataset(data_dir, "train"), limit=3)
    table = unigram_logprobs(documents, student)
    labels = trained_labels(documents).ids
    for token in (int(labels[0]), vocab[0]):
        expected = (np.sum(labels == token) + 1) / (len(labels) + len(vocab))
        assert table[token] == pytest.approx(np.log(expected))
    assert np.exp(table).sum() == pytest.approx(1)
    assert np.isneginf(np.delete(table, list(vocab))).all()


def test_unigram_loss_beside_the_students(student, data_dir, documents):
    train = documents_of(Dataset(data_dir, "train"))
    found = heldout_loss(student, documents, train_documents=train)
    labels = trained_labels(documents)
    table = unigram_logprobs(train, student)
    expected = -table[labels.ids][labels.span_ids == Span.FINAL].mean()
    assert found.unigram_loss.final == pytest.approx(expected)
    assert found.loss.all > found.unigram_loss.all  # an untrained student is worse than counting


def test_hook_names_its_numbers(student, documents):
    rows = HeldoutHook(documents[:4], every_steps=5)(student, None)
    assert set(rows) == {
        "valid/loss/reasoning",
        "valid/loss/final",
        "valid/content_loss/reasoning",
        "valid/content_loss/final",
    }


def test_means_add_up_from_sums_and_counts():
    values, spans = np.array([1.0, 3.0, 5.0]), np.array([1, 1, 2], dtype=np.uint8)
    means = tally(values, spans).means()
    assert (means.reasoning, means.final, means.all) == (2.0, 5.0, 3.0)
    none = tally(values[:2], spans[:2]).means()
    assert none.final is None and none.all == 2.0
