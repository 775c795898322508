"""Requests to several copies of one server: bounded, retried where that can help, in order."""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import httpx

from vpmoe.errors import TeacherError
from vpmoe.teachers.pace import Pace

Result = TypeVar("Result")

_OVERLOADED = {429, 503}
_RETRIED = {*_OVERLOADED, 500, 502, 504}
_FIRST_REST_S, _LONGEST_REST_S = 0.25, 30.0
_START_IN_FLIGHT = 4


@dataclass
class Job(Generic[Result]):
    """One request, and how to read its answer.

    Attributes:
        body: JSON to post.
        num_tokens: Of its prompt, for measuring throughput.
        read: Turns the decoded answer into a result, or refuses it.
        avoid: URL of a server that should not answer this one if there is another.
        result: What was read.
        answered_by: URL of the server that answered.
        failures: Tries that failed.
    """

    body: Mapping[str, Any]
    num_tokens: int
    read: Callable[[Mapping[str, Any]], Result]
    avoid: str = ""
    result: Result | None = None
    answered_by: str = ""
    failures: int = 0


class _RetryableError(Exception):
    """A request failed in a way that may pass."""

    def __init__(self, reason: str, *, overload: bool = False, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.reason, self.overload, self.wait_s = reason, overload, wait_s


@dataclass
class Replica:
    """One server: its pace, and how it has been doing.

    Attributes:
        url: Without a path.
        pace: How many requests it gets at once.
        in_flight: Requests it is working on.
        failures: Rests in a row without an answer between them.
        resting: It failed a moment ago and is left alone.
        gone: Why it is asked no more; empty while it is.
        counts: Answers, and failures by reason, over its life.
    """

    url: str
    pace: Pace
    in_flight: int = 0
    failures: int = 0
    resting: bool = False
    gone: str = ""
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def has_room(self) -> bool:
        """Whether it may get another request now."""
        return not (self.resting or self.gone) and self.in_flight < self.pace.limit


class Client:
    """Sends requests to whichever server has room, until every one is answered.

    Args:
        urls: Of servers that give the same answers.
        max_in_flight: Requests at one server at once, at most.
        timeout_s: For one answer.
        retries: Failures in a row after which a server, or a request, is given up.
        headers: Sent with every request.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        max_in_flight: int,
        timeout_s: float,
        retries: int,
        headers: Mapping[str, str],
    ) -> None:
        self.replicas = [
            Replica(url.rstrip("/"), Pace(start=_START_IN_FLIGHT, ceiling=max_in_flight))
            for url in urls
        ]
        self._max_in_flight = max_in_flight
        self._retries = retries
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=max_in_flight)
        timeout = httpx.Timeout(timeout_s, connect=min(timeout_s, 10.0))
        self._loop = asyncio.new_event_loop()
        # Servers are named by the user; a proxy of the environment is for the world outside.
        self._http = httpx.AsyncClient(
            limits=limits, timeout=timeout, headers=dict(headers), trust_env=False
        )

    def close(self) -> None:
        """Let go of every connection."""
        if not self._loop.is_closed():
            self._loop.run_until_complete(self._http.aclose())
            self._loop.close()

    def ask_once(self, url: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The decoded answer to one small request, without a second try.

        Args:
            url: Of one server.
            path: Begins with a slash.
            body: JSON to post; None gets.

        Raises:
            TeacherError: If there is no answer, or it is a refusal.
        """
        try:
            return self._loop.run_until_complete(self._send(url, path, body))
        except _RetryableError as error:
            raise TeacherError(
                f"no answer from the teacher's server at {url}: {error.reason}",
                hint="start the server, or correct teacher.urls",
            ) from error

    def answer(self, jobs: Sequence[Job[Result]]) -> None:
        """Fill in `result` of every job; the order of answers does not matter.

        Raises:
            TeacherError: If a server refuses a request for good, an answer is not what was asked
                for, or no server is left.
        """
        if jobs:
            self._loop.run_until_complete(self._answer(jobs))

    async def _answer(self, jobs: Sequence[Job[Result]]) -> None:
        now = time.monotonic()
        for replica in self.replicas:
            replica.failures, replica.resting, replica.gone = 0, False, ""
            replica.pace.begin(now)
        work = _Work(jobs, self.replicas)
        count = min(self._max_in_flight, len(jobs))
        tasks = [
            asyncio.create_task(self._worker(replica, work))
            for replica in self.replicas
            for _ in range(count)
        ]
        try:
            # gather would go on waiting for a worker that rests; the first end or error is enough.
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.gather(*(task for task in tasks if task.done()))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for replica in self.replicas:
                replica.in_flight = 0

    async def _worker(self, replica: Replica, work: "_Work") -> None:
        """Take jobs while there are any; the worker that sees the last one answered returns."""
        while True:
            async with work.changed:
                await work.changed.wait_for(lambda: work.left == 0 or work.can_take(replica))
                if work.left == 0:
                    return
                job = work.take(replica)
                replica.in_flight += 1
            failure = None
            try:
                answer = await self._send(replica.url, "/v1/completions", job.body)
                job.result, job.answered_by = job.read(answer), replica.url
            except _RetryableError as error:
                failure = error
            finally:
                replica.in_flight -= 1
            async with work.changed:
                if failure is None:
                    replica.failures = 0
                    replica.counts["answered"] += 1
                    replica.pace.answered(job.num_tokens, time.monotonic())
                    work.left -= 1
                else:
                    work.waiting.appendleft(job)
                work.changed.notify_all()
            if failure is not None:
                await self._rest(replica, job, failure, work)

    async def _rest(
        self, replica: Replica, job: Job[Any], failure: _RetryableError, work: "_Work"
    ) -> None:
        """Leave a server alone for a while that doubles with every failure in a row."""
        replica.counts[failure.reason] += 1
        job.failures += 1
        if replica.resting or replica.gone:
            return  # sent before the rest began; one failure is counted for all of them
        replica.failures += 1
        if failure.overload:
            replica.pace.overloaded(time.monotonic())
        if replica.failures > self._retries:
            replica.gone = failure.reason
        if all(each.gone for each in self.replicas):
            said = "; ".join(f"{each.url}: {each.gone}" for each in self.replicas)
            raise TeacherError(
                f"no teacher server answers any more, {self._retries + 1} tries in a row each: "
                f"{said}",
                hint="start it again, then repeat the command: what is stored is not asked again",
            )
        if job.failures > self._retries * len(self.replicas):
            raise TeacherError(
                f"a request of {job.num_tokens} tokens failed {job.failures} times, at last at "
                f"{replica.url}: {failure.reason}",
                hint="look into the server's log; a longer teacher.timeout_s may help",
            )
        if replica.gone:
            return
        replica.resting = True
        rest = min(_FIRST_REST_S * 2 ** (replica.failures - 1), _LONGEST_REST_S)
        await asyncio.sleep(max(rest, min(failure.wait_s, _LONGEST_REST_S)))
        async with work.changed:
            replica.resting = False
            work.changed.notify_all()

    async def _send(self, url: str, path: str, body: Mapping[str, Any] | None) -> Any:
        try:
            if body is None:
                response = await self._http.get(url + path)
            else:
                response = await self._http.post(url + path, json=body)
        except httpx.TimeoutException as error:
            raise _RetryableError("no answer in time", overload=True) from error
        except httpx.ConnectError as error:
            raise _RetryableError("connection refused") from error
        except httpx.TransportError as error:
            raise _RetryableError("connection lost") from error
        status = response.status_code
        if status in _RETRIED:
            raise _RetryableError(
                f"status {status}",
                overload=status in _OVERLOADED,
                wait_s=_seconds(response.headers.get("retry-after", "")),
            )
        if status != httpx.codes.OK:
            raise TeacherError(
                f"the server at {url} answered {status} to {path}: {_complaint(response)}",
                hint=_hint(status, response.text),
            )
        try:
            return response.json()
        except ValueError as error:
            raise TeacherError(f"the server at {url} answered no JSON to {path}") from error


class _Work:
    """Jobs that wait, and how many are not answered yet."""

    def __init__(self, jobs: Sequence[Job[Any]], replicas: Sequence[Replica]) -> None:
        self.waiting = deque(jobs)
        self.left = len(jobs)
        self.changed = asyncio.Condition()
        self._replicas = replicas

    def can_take(self, replica: Replica) -> bool:
        return replica.has_room and any(self._suits(replica, job) for job in self.waiting)

    def take(self, replica: Replica) -> Job[Any]:
        job = next(job for job in self.waiting if self._suits(replica, job))
        self.waiting.remove(job)
        return job

    def _suits(self, replica: Replica, job: Job[Any]) -> bool:
        others = any(each.url != job.avoid and not each.gone for each in self._replicas)
        return job.avoid != replica.url or not others


def _seconds(text: str) -> float:
    return float(text) if text.isdigit() else 0.0


def _complaint(response: httpx.Response) -> str:
    """The reason in an error's body, on one line."""
    try:
        said = response.json()
    except ValueError:
        said = response.text
    if isinstance(said, dict):
        error = said.get("error", said)
        said = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(said).split())[:300] or "nothing more"


def _hint(status: int, text: str) -> str:
    if status in (401, 403):
        return "name the environment variable that holds the key: teacher.api_key_variable"
    if status == 404:
        return "teacher.model must be a name under which the server serves its model"
    if "logprobs" in text:
        return "start the server with a larger --max-logprobs"
    if "context length" in text or "max_tokens must be" in text:
        return "start the server with a larger --max-model-len, or build shorter conversations"
    if "out of vocabulary" in text:
        return "the served model has another vocabulary than o200k Harmony"
    return "the server's log may say more"
