import numpy as np
import pytest
import torch

from vpmoe.batch import Rollout
from vpmoe.errors import RunError
from vpmoe.rollouts.collate import completion_spans, pack_rollouts
from vpmoe.vocabulary import (
    ANALYSIS,
    ASSISTANT,
    CHANNEL,
    END,
    END_OF_TEXT,
    FINAL,
    MESSAGE,
    RETURN,
    START,
    USER,
)

PROMPT = np.array([START, USER, MESSAGE, 4827, END, START, ASSISTANT])
COMPLETION = np.array(
    [CHANNEL, ANALYSIS, MESSAGE, 17958, 13, END]  # noqa: RUF005
    + [START, ASSISTANT, CHANNEL, FINAL, MESSAGE, 19, RETURN]
)


def rollout(completion=COMPLETION, name="a"):
    size = len(completion)
    return Rollout(
        sample_id=name,
        prompt=PROMPT,
        completion=completion,
        rollout_logprobs=-np.arange(1, size + 1, dtype=np.float32),
        teacher_logprobs=-0.5 * np.arange(1, size + 1, dtype=np.float32),
        policy_version=0,
        reasoning_effort="low",
        stop_reason="stop",
    )


def test_the_final_message_starts_at_its_start_token():
    assert completion_spans(COMPLETION).tolist() == [1] * 6 + [2] * 7


def test_a_completion_without_a_final_channel_is_reasoning():
    assert completion_spans(COMPLETION[:9]).tolist() == [1] * 9
    assert completion_spans(np.array([CHANNEL])).tolist() == [1]


def test_only_sampled_tokens_are_trained_and_aligned_to_their_labels():
    batch = pack_rollouts([rollout(), rollout(name="b")], seq_len=40)
    assert batch.tokens.shape == (1, 40)
    assert batch.span_counts.tolist() == [40 - 26, 12, 14]
    assert batch.num_documents == 2
    assert batch.num_tokens == 40
    trained = batch.span_ids[0] != 0
    expected = torch.from_numpy(np.concatenate([COMPLETION, COMPLETION]))
    assert torch.equal(batch.labels[0, trained], expected)
    assert batch.rollout_logprobs[0, trained].tolist() == [-float(i) for i in range(1, 14)] * 2
    assert torch.equal(batch.teacher_logprobs, 0.5 * batch.rollout_logprobs)
    assert batch.positions[0, 20:].tolist() == list(range(20))
    # the label behind a document's last token is never the next document's first
    assert batch.labels[0, 19] == END_OF_TEXT
    assert batch.span_ids[0, 19] == 0


def test_rollouts_that_do_not_fit_together_open_a_new_row():
    batch = pack_rollouts([rollout(), rollout(), rollout(COMPLETION[:3])], seq_len=32)
    assert [len(row) for row in batch.sample_ids] == [2, 1]
    assert batch.document_ids[1].max() == 0


def test_a_rollout_longer_than_the_row_is_refused():
    with pytest.raises(RunError, match="20 tokens does not fit seq_len 19"):
        pack_rollouts([rollout()], seq_len=19)


def test_content_mask_leaves_headers_and_ends_out():
    batch = pack_rollouts([rollout()], seq_len=32)
    assert batch.labels[batch.content_mask].tolist() == [17958, 13, 19]


def test_content_mask_is_not_disturbed_by_a_malformed_document():
    cut = rollout(COMPLETION[:8])  # ends inside a header
    batch = pack_rollouts([cut, rollout()], seq_len=40)
    assert batch.labels[batch.content_mask].tolist() == [17958, 13, 17958, 13, 19]
