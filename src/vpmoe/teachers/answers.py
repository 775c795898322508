"""What a vLLM server answers about a prompt, checked token by token before anything believes it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vpmoe.errors import TeacherError
from vpmoe.teachers.base import MAX_LOGPROB_NATS, TopScores
from vpmoe.vocabulary import VOCAB_SIZE

# The server's log-softmax is float32: K + 1 rounded exponentials may end a little above one.
_MAX_MASS = 1 + 1e-3

Entries = Mapping[str, Mapping[str, Any]]  # "<token id>" -> {"logprob", "rank", "decoded_token"}


def request_body(model: str, sequence: np.ndarray, k: int) -> dict[str, Any]:
    """What to post to `/v1/completions` so that it scores `sequence` and names `k` likeliest ids.

    One token is generated and ignored: the server refuses to generate none.
    """
    return {
        "model": model,
        "prompt": sequence.tolist(),
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": k,
        "return_token_ids": True,
    }


def read_answer(answer: Mapping[str, Any], sequence: np.ndarray, k: int) -> TopScores:
    """The scores that an answer of `/v1/completions` holds.

    Entry i of the server's list speaks of prompt token i and is a map from ids to log-probs: the
    `k` likeliest, and the prompt's own token where it is not among them.

    Args:
        answer: The decoded JSON.
        sequence: o200k ids that were sent.
        k: How many likeliest ids were asked for; 0 gives arrays of width 0.

    Raises:
        TeacherError: If the prompt came back changed, or any place is missing, has another number
            of entries, another token, a value that is no log-prob, or more mass than one.
    """
    try:
        (choice,) = answer["choices"]
        echoed, places = choice.get("prompt_token_ids"), choice.get("prompt_logprobs")
        _require_same_prompt(echoed, sequence)
        _require_places(places, len(sequence))
        read = [
            _read_place(places[place], int(sequence[place]), k, place)
            for place in range(1, len(sequence))
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TeacherError(
            f"the server's answer is not of the expected form: {type(error).__name__}: {error}",
            hint="an OpenAI-compatible vLLM server, 0.32 or near it, is expected",
        ) from error
    if not read:
        none = np.empty((0, k))
        return TopScores(np.empty(0, np.float32), none.astype(np.int32), none.astype(np.float32))
    own, ids, logprobs = zip(*read, strict=True)
    return TopScores(
        np.array(own, dtype=np.float32),
        np.stack(ids).astype(np.int32),
        np.stack(logprobs).astype(np.float32),
    )


def _require_same_prompt(echoed: Sequence[int] | None, sequence: np.ndarray) -> None:
    if echoed is None:
        raise TeacherError(
            "the server does not say which prompt it scored",
            hint="use a vLLM that knows return_token_ids, such as 0.32",
        )
    if len(echoed) == len(sequence) and np.array_equal(echoed, sequence):
        return
    shared = min(len(echoed), len(sequence))
    differs = np.flatnonzero(np.asarray(echoed[:shared]) != sequence[:shared])
    place = int(differs[0]) if differs.size else shared
    raise TeacherError(
        f"the server scored another prompt than it was sent: {len(echoed)} and {len(sequence)} "
        f"tokens, different from token {place} on",
        hint="something between here and the model rewrites prompts, or mixes up answers",
    )


def _require_places(places: Sequence[Entries | None] | None, length: int) -> None:
    if places is None:
        raise TeacherError(
            "the server ignored prompt_logprobs", hint="serve the teacher with vLLM's own server"
        )
    if len(places) != length:
        raise TeacherError(
            f"the server answered {len(places)} places for {length} tokens",
            hint="the answer was cut, or speaks of another prompt",
        )
    if places[0] is not None:
        raise TeacherError(
            "the server gave the first token a log-prob: its places are shifted",
            hint="entry 0 of prompt_logprobs must be null",
        )


def _read_place(
    entries: Entries | None, token: int, k: int, place: int
) -> tuple[float, np.ndarray, np.ndarray]:
    """Log-prob of the prompt's own token, and ids and log-probs of the likeliest ones."""
    if not entries or str(token) not in entries:
        raise TeacherError(
            f"the server's entry {place} has no log-prob for token {token}, which stands there",
            hint="its places are shifted, or it speaks of another prompt",
        )
    count = len(entries)
    names = list(entries)
    ids = np.fromiter(map(int, names), dtype=np.int64, count=count)
    found = [entry["logprob"] for entry in entries.values()]
    logprobs = np.fromiter(found, dtype=np.float64, count=count)
    if not np.all(np.isfinite(logprobs) & (logprobs <= MAX_LOGPROB_NATS)):
        worst = found[int(np.argmax(~(np.isfinite(logprobs) & (logprobs <= MAX_LOGPROB_NATS))))]
        raise TeacherError(f"the server's entry {place} holds the log-prob {worst}")
    own = names.index(str(token))
    listed = np.ones(count, dtype=bool)
    if count == k + 1:
        listed[own] = False  # it came in addition to the likeliest
    elif count != k or k == 0:
        raise TeacherError(
            f"the server's entry {place} names {count} ids where {k} were asked for",
            hint="it must give the likeliest ids and the prompt's own token, no fewer",
        )
    _require_ids(ids, place)
    if np.exp(logprobs).sum() > _MAX_MASS:
        raise TeacherError(f"the server's entry {place} has more probability than one")
    rank = entries[names[own]].get("rank")
    if type(rank) is not int or rank < 1 or (rank > k) != (count == k + 1):
        raise TeacherError(
            f"the server's entry {place} gives its own token rank {rank!r} beside {count} ids, "
            f"where {k} were asked for",
            hint="it must give the likeliest ids and the prompt's own token, no fewer",
        )
    above = int((logprobs[listed] > logprobs[own]).sum())
    if above >= rank or (rank > k and above < (logprobs[listed] != logprobs[own]).sum()):
        raise TeacherError(
            f"the server's entry {place} gives its own token rank {rank} with log-prob "
            f"{logprobs[own]:.4f}, and {above} of the {k} likeliest ids are likelier",
            hint="rank and log-prob speak of different places",
        )
    order = np.lexsort((ids[listed], -logprobs[listed]))
    return float(logprobs[own]), ids[listed][order], logprobs[listed][order]


def _require_ids(ids: np.ndarray, place: int) -> None:
    if ids.min() < 0 or ids.max() >= VOCAB_SIZE:
        outside = int(ids.max() if ids.max() >= VOCAB_SIZE else ids.min())
        raise TeacherError(
            f"the server's entry {place} names id {outside}, outside the vocabulary of "
            f"{VOCAB_SIZE:,}",
            hint="the model's vocabulary is padded with rows that take probability: mask them",
        )
