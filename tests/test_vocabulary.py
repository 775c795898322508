import numpy as np
import pytest

from vpmoe import vocabulary
from vpmoe.errors import ConfigError, DataError
from vpmoe.vocabulary import VOCAB_SIZE, VocabSubset


def test_special_ids_are_harmonys():
    from openai_harmony import load_harmony_encoding

    encoding = load_harmony_encoding("HarmonyGptOss")
    for text, token_id in vocabulary.SPECIAL_TOKENS.items():
        assert encoding.encode(text, allowed_special="all") == [token_id]
    assert sorted(encoding.stop_tokens_for_assistant_actions()) == sorted(vocabulary.STOP_TOKENS)
    words = {
        "system": vocabulary.SYSTEM,
        "developer": vocabulary.DEVELOPER,
        "user": vocabulary.USER,
        "assistant": vocabulary.ASSISTANT,
        "analysis": vocabulary.ANALYSIS,
        "final": vocabulary.FINAL,
    }
    for word, token_id in words.items():
        assert encoding.encode(word) == [token_id]


def test_a_subset_is_a_bijection_on_its_ids():
    subset = VocabSubset([3, 17, VOCAB_SIZE - 1])
    assert len(subset) == 3
    assert subset.row_of[subset.ids].tolist() == [0, 1, 2]
    assert (subset.row_of >= 0).sum() == 3


@pytest.mark.parametrize("ids", [[], [2, 1], [1, 1], [-1, 2], [1, VOCAB_SIZE]])
def test_ids_that_are_no_subset_are_refused(ids):
    with pytest.raises(ConfigError):
        VocabSubset(ids)


def test_a_token_outside_is_named():
    subset = VocabSubset([3, 17])
    subset.require(np.array([3, 17, 3]), what="the dataset")
    with pytest.raises(DataError, match=r"the dataset uses 2 token ids .* first 4"):
        subset.require(np.array([5, 4, 3]), what="the dataset")
