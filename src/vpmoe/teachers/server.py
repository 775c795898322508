"""A teacher behind HTTP: one or more vLLM servers that score prompts."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

import numpy as np
from pydantic import Field, field_validator

from vpmoe.config import Config
from vpmoe.errors import DataError, TeacherError
from vpmoe.teachers.answers import read_answer, request_body
from vpmoe.teachers.base import (
    ROLLOUT_LOGPROBS,
    TARGETS,
    TEACHER_LOGPROBS,
    TeacherIdentity,
    TopScores,
)
from vpmoe.teachers.client import Client, Job
from vpmoe.teachers.local import LocalTeacherConfig
from vpmoe.vocabulary import O200K_SHA256, VOCAB_SIZE


class ServerTeacherConfig(Config):
    """A model that vLLM serves (`/v1/completions` with `prompt_logprobs`), o200k Harmony ids.

    What the server cannot tell about itself (weights, precision) is stated here, and recorded.
    """

    kind: Literal["server"] = "server"
    urls: tuple[str, ...] = Field(min_length=1)
    """One address for each copy of the server, such as "http://127.0.0.1:8000"."""
    model: str
    """Name under which it serves the model."""
    name: str = ""
    """What the model is, for manifests, such as "openai/gpt-oss-20b"; empty takes `model`."""
    revision: str = ""
    """Commit of its weights; recorded."""
    weights_sha256: str = ""
    """Hash of its weights, where one is known; recorded."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """What the server computes in; recorded."""
    quantization: str = "none"
    """How it holds the weights, such as "mxfp4" or "fp8"; recorded."""
    api_key_variable: str = Field(default="", pattern=r"^[A-Za-z_]?\w*$")
    """Environment variable that holds the server's key; empty sends none."""
    max_in_flight: int = Field(default=64, ge=1, le=4096)
    """Requests at one server at once, at most; how many are best is found out."""
    timeout_s: float = Field(default=600.0, gt=0)
    """For one answer, waiting in the server's queue included."""
    retries: int = Field(default=8, ge=0)
    """Failures in a row after which a server is given up."""
    recheck: float = Field(default=0.02, ge=0, le=1)
    """Share of sequences that are asked for twice, elsewhere and in other company."""
    recheck_tolerance_nats: float = Field(default=0.05, gt=0)
    """Mean difference per token that the two answers may have."""
    reference: LocalTeacherConfig | None = None
    """The same model in this process, for `vpmoe teacher doctor` to compare with."""

    provides: ClassVar[frozenset[str]] = frozenset({TEACHER_LOGPROBS, ROLLOUT_LOGPROBS, TARGETS})

    @field_validator("urls")
    @classmethod
    def _are_addresses(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            if not (re.fullmatch(r"https?://[^\s/?#@]+/?", url) and _has_port(url)):
                raise ValueError(f"{url!r} is no address; give http://host:port without a path")
        if len({url.rstrip("/") for url in urls}) < len(urls):
            raise ValueError("an address stands twice")
        return urls

    def build(self) -> "ServerTeacher":
        """The teacher, after every server has said that it serves the model.

        Raises:
            TeacherError: If a server does not answer, serves another model than the others, or
                the key is not in the environment.
        """
        return ServerTeacher(self)


class ServerTeacher:
    """Servers that score, seen as one teacher.

    Args:
        config: Where they are and what they serve.
    """

    provides: ClassVar[frozenset[str]] = ServerTeacherConfig.provides
    call_tokens: ClassVar[int] = 2**18  # what `vpmoe score` asks for at once, to keep servers busy

    def __init__(self, config: ServerTeacherConfig) -> None:
        self._config = config
        self._client = Client(
            config.urls,
            max_in_flight=config.max_in_flight,
            timeout_s=config.timeout_s,
            retries=config.retries,
            headers=_headers(config.api_key_variable),
        )
        self._calls = 0
        self.identity = TeacherIdentity(
            name=config.name or config.model,
            revision=config.revision,
            weights_sha256=config.weights_sha256,
            dtype=config.dtype,
            quantization=config.quantization,
            vocab_sha256=O200K_SHA256,
        )
        self.max_len = self._meet()

    def _meet(self) -> int:
        """The longest prompt that every server takes; they must serve the same."""
        model, seen = self._config.model, []
        for replica in self._client.replicas:
            listed = _models(self._client.ask_once(replica.url, "/v1/models"), replica.url)
            names = [str(entry.get("id")) for entry in listed]
            if model not in names:
                raise TeacherError(
                    f"the server at {replica.url} serves {', '.join(names) or 'nothing'}, not "
                    f"{model}",
                    hint="set teacher.model, or start the server with --served-model-name",
                )
            entry = listed[names.index(model)]
            length = entry.get("max_model_len")
            seen.append((str(entry.get("root")), int(length) if length else 2**31))
        if len(set(seen)) > 1:
            said = "; ".join(
                f"{replica.url} serves {root} up to {length} tokens"
                for replica, (root, length) in zip(self._client.replicas, seen, strict=True)
            )
            raise TeacherError(
                f"the teacher's servers differ: {said}",
                hint="start every copy with the same --model and --max-model-len",
            )
        return seen[0][1] - 1  # one token is generated behind the prompt

    @property
    def urls(self) -> tuple[str, ...]:
        """Addresses of the servers."""
        return tuple(replica.url for replica in self._client.replicas)

    @property
    def traffic(self) -> dict[str, dict[str, int]]:
        """For each server: answers, failures by reason, and the limit it works at now."""
        return {
            replica.url: {**replica.counts, "in_flight_limit": replica.pace.limit}
            for replica in self._client.replicas
        }

    def score(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log-probabilities of every token after the first, given the tokens before it.

        Args:
            sequences: o200k ids, one conversation each.

        Returns:
            Per sequence a float32 array one shorter than it, in nats; see `Teacher.score`.

        Raises:
            DataError: If a sequence is empty or holds ids outside the vocabulary.
            TeacherError: If a sequence is too long for the servers, an answer is not about what
                was asked, an answer changes when it is asked for again, or no server is left.
        """
        return [scores.logprobs for scores in self.score_top(sequences, 0)]

    def score_top(self, sequences: Sequence[np.ndarray], k: int) -> list[TopScores]:
        """As `score`, with the K likeliest ids at every place; of equal ones the lower id first.

        Raises:
            DataError: As `score`.
            TeacherError: As `score`; also if the servers do not tell that many ids.
        """
        prompts = [self._prompt(sequence) for sequence in sequences]
        jobs = [self._job(prompt, k) for prompt in prompts]
        # The longest first: at the end, short ones fill what room is left.
        asked = sorted(
            (i for i, prompt in enumerate(prompts) if len(prompt) > 1),
            key=lambda i: -len(prompts[i]),
        )
        self._client.answer([jobs[i] for i in asked])
        self._recheck(asked, prompts, jobs, k)
        return [
            _nothing(k) if job.result is None else job.result  # a lone token has no log-prob
            for job in jobs
        ]

    def ask(self, path: str, body: Mapping[str, Any], *, url: str = "") -> Any:
        """The decoded answer of one server (the first unless named) to one small request.

        Raises:
            TeacherError: If there is none, or it is a refusal.
        """
        return self._client.ask_once(url or self.urls[0], path, body)

    def close(self) -> None:
        """Let go of every connection."""
        self._client.close()

    def _job(self, prompt: np.ndarray, k: int, avoid: str = "") -> Job[TopScores]:
        return Job(
            body=request_body(self._config.model, prompt, k),
            num_tokens=len(prompt),
            read=_reader(prompt, k),
            avoid=avoid,
        )

    def _prompt(self, sequence: np.ndarray) -> np.ndarray:
        ids = np.asarray(sequence, dtype=np.int64)
        if ids.ndim != 1 or ids.size == 0:
            raise DataError(
                f"a sequence to score has shape {ids.shape}", hint="give 1-d, not empty"
            )
        if ids.min() < 0 or ids.max() >= VOCAB_SIZE:
            outside = int(ids.max() if ids.max() >= VOCAB_SIZE else ids.min())
            raise DataError(f"a sequence to score holds id {outside}, outside the vocabulary")
        if ids.size > self.max_len:
            raise TeacherError(
                f"a sequence of {ids.size} tokens is longer than the {self.max_len} that the "
                "teacher's servers take",
                hint="start them with a larger --max-model-len, or build a smaller seq_len",
            )
        return ids

    def _recheck(
        self,
        asked: Sequence[int],
        prompts: Sequence[np.ndarray],
        jobs: Sequence[Job[TopScores]],
        k: int,
    ) -> None:
        """Ask for a few sequences again, last ones first, of another server where there is one.

        Raises:
            TeacherError: If an answer depends on order, on company or on the server.
        """
        self._calls += 1
        count = min(len(asked), round(self._config.recheck * len(asked) + 0.49))
        if not count:
            return
        rng = np.random.default_rng((self._calls, len(asked)))
        chosen = [asked[i] for i in sorted(rng.choice(len(asked), count, replace=False))[::-1]]
        again = [self._job(prompts[i], k, avoid=jobs[i].answered_by) for i in chosen]
        self._client.answer(again)
        for index, job in zip(chosen, again, strict=True):
            first, second = jobs[index].result, job.result
            assert first is not None and second is not None  # `answer` fills in every job
            gaps = np.abs(first.logprobs.astype(np.float64) - second.logprobs)
            if gaps.mean() > self._config.recheck_tolerance_nats:
                raise TeacherError(
                    f"asked twice about the same {len(prompts[index])} tokens, "
                    f"{jobs[index].answered_by} and {job.answered_by} differ by "
                    f"{gaps.mean():.4f} nats per token, most at token {int(gaps.argmax()) + 1}",
                    hint="start vLLM with --no-enable-prefix-caching and serve the same weights "
                    "everywhere; vpmoe teacher doctor finds out more",
                )


def _has_port(url: str) -> bool:
    """Whether the port is a number that there is, or left out."""
    try:
        return urlsplit(url).port != 0
    except ValueError:
        return False


def _models(answer: Any, url: str) -> list[dict[str, Any]]:
    """Entries of a server's list of models."""
    listed = answer.get("data", []) if isinstance(answer, dict) else None
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise TeacherError(
            f"the server at {url} answered no list of models to /v1/models",
            hint="teacher.urls must be OpenAI-compatible servers, such as vLLM's own",
        )
    return listed


def _reader(prompt: np.ndarray, k: int) -> Callable[[Mapping[str, Any]], TopScores]:
    return lambda answer: read_answer(answer, prompt, k)


def _nothing(k: int) -> TopScores:
    empty = np.empty((0, k), dtype=np.float32)
    return TopScores(np.empty(0, dtype=np.float32), empty.astype(np.int32), empty)


def _headers(variable: str) -> dict[str, str]:
    if not variable:
        return {}
    key = os.environ.get(variable, "")
    if not key:
        raise TeacherError(
            f"the environment variable {variable} is not set",
            hint="it holds the key of the teacher's server; keys stay out of config files",
        )
    return {"Authorization": f"Bearer {key}"}
