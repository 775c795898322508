"""What only a server can be asked: how it splits text, which ids it knows, what it does to them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vpmoe.data.o200k import decode, encode, spell
from vpmoe.errors import TeacherError
from vpmoe.teachers.examination import Finding
from vpmoe.teachers.server import ServerTeacher, ServerTeacherConfig
from vpmoe.vocabulary import NUM_RANKS, VOCAB_SIZE

_TEXTS = (
    "Hello, world",
    "  two spaces and\ttabs\n\n",
    "naïve café, Straße, 東京, 한국어, 🙂",
    "x = 1234567 + 0.5e-3  # code",
    "<not special> <|unusual",
    "\u00a0\u200b\u3000",
    "e\u0301 \u00e9",
)


def check_server(
    teacher: ServerTeacher, config: ServerTeacherConfig, *, longest: int
) -> list[Finding]:
    """Tokenizer, limits, ids and temperature of every copy of a server.

    Args:
        teacher: Connected to the servers.
        config: Its settings.
        longest: Tokens of the longest conversation that it will be asked about.
    """
    checks: dict[str, Callable[[], Finding]] = {
        "tokenizer": lambda: _tokenizer(teacher, config),
        "limits": lambda: _limits(teacher, longest),
        "ids": lambda: _ids(teacher, config),
        "served temperature": lambda: _served_temperature(teacher, config),
    }
    findings = []
    for name, check in checks.items():
        try:
            findings.append(check())
        except TeacherError as error:
            findings.append(Finding(name, "failed", error.message))
    return findings


def _tokenizer(teacher: ServerTeacher, config: ServerTeacherConfig) -> Finding:
    """The server's tokenizer against o200k, text by text and id by id, on every copy."""
    rng = np.random.default_rng(3)
    ids = np.sort(rng.choice(NUM_RANKS, size=200, replace=False))
    whole = [i for i in ids.tolist() if _is_text(np.array([i]))]
    for url in teacher.urls:
        for text in _TEXTS:
            body = {"model": config.model, "prompt": text, "add_special_tokens": False}
            try:
                theirs = teacher.ask("/tokenize", body, url=url).get("tokens")
            except TeacherError as error:
                return Finding("tokenizer", "skipped", f"it cannot be asked: {error.message}")
            if theirs is None:
                return Finding("tokenizer", "skipped", f"{url} has none")
            if theirs != encode(text).tolist():
                return Finding(
                    "tokenizer",
                    "failed",
                    f"{url} splits {text!r} into {theirs[:8]}, o200k into "
                    f"{encode(text).tolist()[:8]}",
                )
        body = {"model": config.model, "tokens": whole}
        text = str(teacher.ask("/detokenize", body, url=url).get("prompt"))
        if text.encode() != spell(np.array(whole)):
            return Finding("tokenizer", "failed", f"{url} spells ids otherwise than o200k")
    return Finding("tokenizer", "ok", f"{len(_TEXTS)} texts and {len(whole)} ids, byte by byte")


def _is_text(ids: np.ndarray) -> bool:
    return "\ufffd" not in decode(ids)


def _limits(teacher: ServerTeacher, longest: int) -> Finding:
    if longest > teacher.max_len:
        return Finding(
            "limits",
            "failed",
            f"conversations have up to {longest} tokens here, the servers take {teacher.max_len}: "
            "raise --max-model-len",
        )
    return Finding("limits", "ok", f"prompts of up to {teacher.max_len:,} tokens, {longest:,} here")


def _ids(teacher: ServerTeacher, config: ServerTeacherConfig) -> Finding:
    """The last id of the vocabulary must be known, the one after it refused."""
    for url in teacher.urls:
        for token, known in ((VOCAB_SIZE - 1, True), (VOCAB_SIZE, False)):
            body = {"model": config.model, "prompt": [5, token], "max_tokens": 1}
            try:
                teacher.ask("/v1/completions", body, url=url)
                answered = True
            except TeacherError as error:
                if "out of vocabulary" not in error.message:
                    raise
                answered = False
            if answered != known:
                return Finding(
                    "ids",
                    "failed",
                    f"{url} {'takes' if answered else 'refuses'} id {token}; the vocabulary has "
                    f"{VOCAB_SIZE:,} ids: the model is {'padded' if answered else 'another one'}",
                )
    return Finding("ids", "ok", f"ids 0 to {VOCAB_SIZE - 1:,} and no others")


def _served_temperature(teacher: ServerTeacher, config: ServerTeacherConfig) -> Finding:
    """A request's temperature must not touch the prompt's log-probs."""
    tokens = encode(_TEXTS[0]).tolist() * 3
    body = {"model": config.model, "prompt": tokens, "max_tokens": 1, "prompt_logprobs": 0}
    for url in teacher.urls:
        values = [
            _own(teacher.ask("/v1/completions", body | {"temperature": t}, url=url), tokens)
            for t in (0.0, 1.0, 2.0)
        ]
        gap = max(float(np.abs(values[0] - other).mean()) for other in values[1:])
        if gap > config.recheck_tolerance_nats:
            return Finding(
                "served temperature",
                "failed",
                f"{url}: a temperature of 2 moves log-probs by {gap:.4f} nats: serve with "
                "--logprobs-mode raw_logprobs",
            )
    return Finding("served temperature", "ok", "log-probs do not follow a request's temperature")


def _own(answer: Any, tokens: Sequence[int]) -> np.ndarray:
    places = answer["choices"][0]["prompt_logprobs"]
    own = [places[i][str(token)]["logprob"] for i, token in enumerate(tokens) if i]
    return np.array(own, dtype=np.float64)
