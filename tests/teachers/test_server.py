"""The server teacher against a stand-in that answers as the real one was recorded to."""

import socket
import time

import numpy as np
import pytest

from tests.teachers.stand_in import golden, invented, own_logprobs, recorded, serve
from vpmoe.config import validate
from vpmoe.errors import ConfigError, DataError, TeacherError
from vpmoe.teachers import client
from vpmoe.teachers.base import ROLLOUT_LOGPROBS, TARGETS, TopTeacher, require_logprobs
from vpmoe.teachers.server import ServerTeacher, ServerTeacherConfig


@pytest.fixture(autouse=True)
def quick_rests(monkeypatch):
    monkeypatch.setattr(client, "_FIRST_REST_S", 0.002)


def config(*urls: str, **changes) -> ServerTeacherConfig:
    tree = {"urls": list(urls), "model": "teacher", "timeout_s": 20, "recheck": 0.0}
    return validate(ServerTeacherConfig, tree | changes, source="test")


def prompts(count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(60_000, 200_000, size=n) for n in rng.integers(2, 40, size=count)]


def closed_port() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{sock.getsockname()[1]}"


def assert_all_scored(teacher, sequences):
    for sequence, logprobs in zip(sequences, teacher.score(sequences), strict=True):
        np.testing.assert_array_equal(logprobs, own_logprobs(sequence))


def test_recorded_answers_become_scores():
    asked = [e["body"]["prompt"] for e in golden()["answers"] if e["body"]["prompt_logprobs"] == 3]
    with serve(recorded) as server:
        teacher = config(server.url).build()
        sequences = [np.array(prompt, dtype=np.int32) for prompt in asked]
        plain, top = teacher.score(sequences), teacher.score_top(sequences, 3)
        require_logprobs(sequences, plain)
        assert isinstance(teacher, TopTeacher)
        assert {TARGETS, ROLLOUT_LOGPROBS} <= teacher.provides
        assert teacher.max_len == 2_047
        for logprobs, scores in zip(plain, top, strict=True):
            np.testing.assert_array_equal(logprobs, scores.logprobs)
            assert (np.exp(scores.top_logprobs).sum(axis=1) < 1).all()
        assert all(body["max_tokens"] == 1 and body["temperature"] == 0 for body in server.bodies)
        teacher.close()


def test_answers_come_back_in_the_order_of_the_questions():
    sequences = [*prompts(50), np.array([7])]
    with serve(invented) as one, serve(invented) as other:
        teacher = config(one.url, other.url).build()
        assert_all_scored(teacher, sequences)
        assert len(one.bodies) + len(other.bodies) == 50  # a lone token needs no question
        assert min(len(one.bodies), len(other.bodies)) > 5
        sizes = [len(body["prompt"]) for body in one.bodies]
        assert sizes[0] > sizes[-1]
        teacher.close()


def test_top_scores_and_their_own_token():
    (sequence,) = prompts(1)
    with serve(invented) as server:
        teacher = config(server.url).build()
        (scores,) = teacher.score_top([sequence], 5)
        np.testing.assert_array_equal(scores.logprobs, own_logprobs(sequence))
        assert scores.top_ids.shape == (len(sequence) - 1, 5)
        assert scores.top_ids.dtype == np.int32
        assert (np.diff(scores.top_logprobs) < 0).all()
        teacher.close()


@pytest.mark.parametrize("fault", ["reset", "cut", 429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again(fault):
    with serve(invented) as server:
        teacher = config(server.url).build()
        server.faults = [None, fault, fault, None, fault]
        sequences = prompts(12)
        assert_all_scored(teacher, sequences)
        counts = teacher.traffic[server.url]
        reason = f"status {fault}" if isinstance(fault, int) else "connection lost"
        assert counts[reason] == 3
        assert counts["answered"] == 12
        assert len(server.bodies) == 15
        teacher.close()


def test_a_server_that_hangs_is_not_waited_for_for_ever():
    with serve(invented) as server:
        teacher = config(server.url, timeout_s=0.2).build()
        first = True

        def slow(body):
            nonlocal first
            if first:
                first = False
                time.sleep(0.6)
            return invented(body)

        server.answer = slow
        assert_all_scored(teacher, prompts(3))
        assert teacher.traffic[server.url]["no answer in time"] == 1
        teacher.close()


def test_patience_ends_with_every_server_named():
    with serve(invented) as one, serve(invented) as other:
        teacher = config(one.url, other.url, retries=2).build()
        one.faults, other.faults = [500] * 200, ["reset"] * 200
        with pytest.raises(TeacherError, match="3 tries in a row each") as caught:
            teacher.score(prompts(5))
        assert f"{one.url}: status 500" in caught.value.message
        assert f"{other.url}: connection lost" in caught.value.message
        assert "what is stored is not asked again" in caught.value.hint
        one.faults, other.faults = [], []
        assert_all_scored(teacher, prompts(5))  # a new batch tries them again
        teacher.close()


def test_one_dead_copy_does_not_stop_the_other():
    with serve(invented) as alive, serve(invented) as dying:
        teacher = config(alive.url, dying.url, retries=3).build()
        dying.faults = ["reset"] * 1_000
        sequences = prompts(60)
        assert_all_scored(teacher, sequences)
        assert teacher.traffic[alive.url]["answered"] == 60
        teacher.close()


def test_a_request_that_no_server_survives_is_given_up():
    with serve(invented) as server:
        teacher = config(server.url, retries=3).build()
        poison = prompts(1)[0]

        def answer(body):
            if body["prompt"] == poison.tolist():
                raise OSError("died")  # the connection breaks without an answer
            return invented(body)

        server.answer = answer
        with pytest.raises(TeacherError, match=r"tries in a row|failed 4 times"):
            teacher.score([*prompts(20, seed=1), poison])
        teacher.close()


@pytest.mark.parametrize("name", list(golden()["refusals"]))
def test_recorded_refusals_stop_at_once_in_words(name):
    refusal = golden()["refusals"][name]
    with serve(invented) as server:
        teacher = config(server.url).build()
        server.faults = [refusal]
        with pytest.raises(TeacherError) as caught:
            teacher.score(prompts(1))
        assert f"answered {refusal['status']} to /v1/completions" in caught.value.message
        assert refusal["answer"]["error"]["message"][:40] in caught.value.message
        hints = {
            "too many logprobs": "--max-logprobs",
            "unknown model": "teacher.model",
            "outside the vocabulary": "another vocabulary",
            "too long": "--max-model-len",
            "no room for a token": "--max-model-len",
        }
        assert hints[name] in caught.value.hint
        assert len(server.bodies) == 1
        teacher.close()


def test_a_wrong_answer_is_refused_not_asked_for_again():
    def shifted(answer):
        answer["choices"][0]["prompt_logprobs"].insert(1, None)
        return answer

    with serve(invented) as server:
        teacher = config(server.url).build()
        server.faults = [shifted]
        with pytest.raises(TeacherError, match="places for"):
            teacher.score(prompts(1))
        teacher.close()


def test_sampled_questions_are_asked_again_of_the_other_server():
    def other_weights(body):
        answer = invented(body)
        for place in answer["choices"][0]["prompt_logprobs"][1:]:
            place[next(iter(place))]["logprob"] -= 0.2
        return answer

    sequences = prompts(40)
    with serve(invented) as one, serve(invented) as other:
        teacher = config(one.url, other.url, recheck=0.1).build()
        teacher.score(sequences)
        asked = [tuple(body["prompt"]) for body in one.bodies + other.bodies]
        assert len(asked) == 44 and len(set(asked)) == 40
        both = {tuple(b["prompt"]) for b in one.bodies} & {tuple(b["prompt"]) for b in other.bodies}
        assert len(both) == 4
        other.answer = other_weights
        with pytest.raises(TeacherError, match=r"differ by 0\.2000 nats per token"):
            teacher.score(sequences)
        teacher.close()


def test_an_answer_that_depends_on_what_was_asked_before_is_caught():
    seen = set()

    def cached(body):
        answer = invented(body)
        if tuple(body["prompt"]) in seen:
            for place in answer["choices"][0]["prompt_logprobs"][1:]:
                place[next(iter(place))]["logprob"] -= 0.5
        seen.add(tuple(body["prompt"]))
        return answer

    with serve(cached) as server:
        teacher = config(server.url, recheck=0.05).build()
        with pytest.raises(TeacherError, match="asked twice about the same") as caught:
            teacher.score(prompts(10))
        assert "--no-enable-prefix-caching" in caught.value.hint
        teacher.close()


def test_requests_in_flight_grow_with_the_work_and_stay_below_the_ceiling():
    with serve(invented) as server:
        server.pause = 0.02  # however many at once: more in flight is faster
        teacher = config(server.url, max_in_flight=12).build()
        assert_all_scored(teacher, prompts(150))
        assert 4 < server.most_busy <= 12
        server.faults = [429]
        teacher.score(prompts(1))
        assert teacher.traffic[server.url]["in_flight_limit"] <= 6
        teacher.close()


def test_the_key_comes_from_the_environment_and_only_from_there(monkeypatch):
    with serve(invented) as server:
        settings = config(server.url, api_key_variable="TEACHER_KEY_OF_TEST")
        with pytest.raises(TeacherError, match="TEACHER_KEY_OF_TEST is not set"):
            settings.build()
        monkeypatch.setenv("TEACHER_KEY_OF_TEST", "sesame")
        teacher = settings.build()
        teacher.score(prompts(1))
        assert server.headers[0]["Authorization"] == "Bearer sesame"
        assert "sesame" not in settings.model_dump_json()
        teacher.close()


def test_identity_is_what_the_user_states():
    with serve(invented) as server:
        teacher = config(
            server.url, name="openai/gpt-oss-20b", revision="abc", quantization="mxfp4"
        ).build()
        told = teacher.identity.as_dict()
        assert told["name"] == "openai/gpt-oss-20b"
        assert (told["revision"], told["quantization"]) == ("abc", "mxfp4")
        assert told["dtype"] == "bfloat16"
        teacher.close()


def test_servers_that_are_absent_or_differ_are_refused_before_the_first_question():
    nowhere = closed_port()
    with pytest.raises(TeacherError, match=f"at {nowhere}: connection refused") as caught:
        config(nowhere).build()
    assert "start the server" in caught.value.hint
    with serve(invented) as one, serve(invented) as other:
        with pytest.raises(TeacherError, match="serves teacher, not gpt-oss"):
            config(one.url, model="gpt-oss").build()
        other.models["data"][0]["max_model_len"] = 1_024
        with pytest.raises(TeacherError, match=r"servers differ: .* up to 2048 tokens; .* 1024"):
            config(one.url, other.url).build()


@pytest.mark.parametrize("answer", [[], {"data": None}, {"data": [1]}, {"data": 3}])
def test_a_server_of_another_kind_is_named(answer):
    with serve(invented) as server:
        server.models = answer
        with pytest.raises(TeacherError, match=f"at {server.url} answered no list of models"):
            config(server.url).build()


def test_questions_that_cannot_be_asked_are_refused_here():
    with serve(invented) as server:
        teacher = config(server.url).build()
        with pytest.raises(DataError, match="holds id 201088"):
            teacher.score([np.array([1, 201_088])])
        with pytest.raises(DataError, match=r"has shape \(0,\)"):
            teacher.score([np.array([], dtype=np.int64)])
        with pytest.raises(TeacherError, match="2048 tokens is longer than the 2047"):
            teacher.score([np.zeros(2_048, dtype=np.int64)])
        assert server.bodies == []
        assert teacher.score([]) == []
        teacher.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"urls": []}, "urls"),
        ({"urls": ["127.0.0.1:8000"]}, "is no address"),
        ({"urls": ["http://h:1/v1"]}, "without a path"),
        ({"urls": ["http://key@h:1"]}, "is no address"),
        ({"urls": ["http://h:port"]}, "is no address"),
        ({"urls": ["http://h:99999"]}, "is no address"),
        ({"urls": ["http://h:1", "http://h:1/"]}, "stands twice"),
        ({"api_key": "sesame"}, "api_key is not a setting"),
        ({"retries": -1}, "retries"),
    ],
)
def test_configs_that_cannot_work(changes, message):
    with pytest.raises(ConfigError, match=message):
        config("http://h:1", **changes)


def test_the_teacher_is_one_of_the_union():
    from vpmoe.stages.score import ScoreConfig

    tree = {"data": "d", "output": "o"}
    tree["teacher"] = {"kind": "server", "urls": ["http://h:1"], "model": "m"}
    assert isinstance(validate(ScoreConfig, tree, source="t").teacher, ServerTeacherConfig)
    assert ServerTeacher.provides == ServerTeacherConfig.provides
