"""The vocabulary is o200k exactly, and needs neither a network nor a file."""

import subprocess
import sys

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from vpmoe.data import o200k as module
from vpmoe.data.o200k import decode, encode, harmony_encoding, o200k, rank_file, spell, token_bytes
from vpmoe.errors import DataError
from vpmoe.vocabulary import SPECIAL_TOKENS, VOCAB_SIZE

NO_NETWORK = """
import socket
def refuse(*arguments, **options):
    raise AssertionError("a socket was opened")
socket.socket = socket.create_connection = refuse
from vpmoe.data.o200k import o200k
print(o200k().encode_ordinary("Simple sum."))
"""


def test_no_socket_and_no_environment_is_needed(tmp_path):
    answer = subprocess.run(
        [sys.executable, "-c", NO_NETWORK],
        env={"HOME": str(tmp_path), "PATH": "/nowhere"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.strip() == "[17958, 4215, 13]"
    assert list(tmp_path.iterdir()) == []


def test_the_rank_file_is_the_published_one(shared_dir):
    published = (shared_dir / "tokenizer" / "o200k_base.tiktoken").read_bytes()
    assert rank_file(token_bytes()) == published


def test_equal_to_the_reference_on_hard_text():
    texts = [
        "e\u0301 \u200d👩‍🚀 עברית ＡＢＣ",
        "\t\t  x\n\n\r\n  y  ",
        "I'll we'VE 1234567 $x_i$",
        "<|end|>",
    ]
    for text in texts:
        expected = harmony_encoding().encode(text, disallowed_special=())
        assert encode(text).tolist() == expected


@pytest.fixture(scope="module")
def official():
    ranks = {token: i for i, token in enumerate(token_bytes())}
    return tiktoken.Encoding(
        "official", pat_str=module.O200K_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )


letters = st.sampled_from("aZéſßǅʰ漢ا́7२Ⅷ '\u2019sSlLdD!/.\t\r\n\u00a0\u2003\u200d🙂")


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(letters, max_size=40), st.text(max_size=40)))
def test_the_regrouped_pattern_splits_alike(official, text):
    assert encode(text).tolist() == official.encode_ordinary(text)
    assert encode(text).tolist() == harmony_encoding().encode(text, disallowed_special=())


def test_special_names_are_text_in_and_names_out():
    assert SPECIAL_TOKENS["<|end|>"] not in encode("a <|end|> b").tolist()
    assert decode([200006, 173781, 200008]) == "<|start|>assistant<|message|>"
    assert decode([200_013, VOCAB_SIZE - 1]) == "<|reserved_200013|><|reserved_201087|>"


def test_spelling_equals_decoding():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, VOCAB_SIZE, 5_000).astype(np.int32)
    assert spell(ids) == o200k().decode_bytes(ids.tolist())


@pytest.mark.parametrize("token", [-1, VOCAB_SIZE])
def test_ids_outside_the_vocabulary_are_refused(token):
    with pytest.raises(DataError, match=str(token)):
        decode([5, token])


def test_lone_surrogates_are_refused():
    with pytest.raises(DataError, match="not valid Unicode"):
        encode("a\ud800")


def test_both_harmony_packages_at_once_are_refused(monkeypatch):
    monkeypatch.setattr(module, "_installed", lambda package: True)
    with pytest.raises(DataError, match="overwrite each other"):
        module.harmony_encoding.__wrapped__()


def test_another_vocabulary_is_refused(monkeypatch):
    monkeypatch.setattr(module, "O200K_SHA256", "0" * 64)
    with pytest.raises(DataError, match="sha256"):
        module.token_bytes.__wrapped__()
