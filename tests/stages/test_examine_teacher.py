"""What a config's teacher is asked, and what a server says about itself."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from tests.teachers.stand_in import invented, serve
from vpmoe.cli import main
from vpmoe.config import validate
from vpmoe.data.conversation import Conversation, Message
from vpmoe.data.harmony import RenderConfig, Renderer
from vpmoe.errors import ConfigError, TeacherError
from vpmoe.stages.examine_teacher import examine_subject, subject_of
from vpmoe.stages.score import ScoreConfig
from vpmoe.stages.server_checks import check_server
from vpmoe.teachers.base import TEACHER_LOGPROBS
from vpmoe.teachers.local import LocalTeacherConfig
from vpmoe.teachers.server import ServerTeacherConfig

DEMO_TEACHER = Path(__file__).resolve().parents[2] / "configs" / "demo" / "teacher"


def demo_teacher(**changes) -> LocalTeacherConfig:
    tree = {"path": str(DEMO_TEACHER), "dtype": "float32"} | changes
    return validate(LocalTeacherConfig, tree, source="test")


def served(url: str, **changes) -> ServerTeacherConfig:
    tree = {"urls": [url], "model": "teacher", "recheck": 0.0, "retries": 0}
    return validate(ServerTeacherConfig, tree | changes, source="test")


@pytest.fixture(scope="module")
def teacher():
    return demo_teacher().build()


class Deaf:
    """Not asked in these tests: what is checked is what it would be asked."""

    provides = frozenset({TEACHER_LOGPROBS})
    identity = None

    def score(self, sequences):
        raise TeacherError("not asked")


def states(subject, **options) -> dict[str, tuple[str, str]]:
    found = examine_subject(subject, tolerance_nats=0.03, teacher=Deaf(), **options)
    return {f.check: (f.state, f.detail) for f in found}


def test_a_scoring_config_is_examined_on_its_own_dataset(problems_dir, teacher):
    tree = {
        "data": str(problems_dir),
        "output": "unused",
        "teacher": demo_teacher().model_dump(),
        "codec": {"kind": "top_k", "k": 4},
    }
    config = validate(ScoreConfig, tree, source="test")
    subject = subject_of(config, sequences=12)
    assert subject.k == 4 and len(subject.documents) == 12
    found = examine_subject(subject, tolerance_nats=0.03, teacher=teacher, reference=teacher)
    assert {f.state for f in found if f.check not in ("named effort", "effort")} == {"ok"}, found


def test_a_teachers_own_table_is_examined_on_problems():
    found = examine_subject(subject_of(demo_teacher(), sequences=8), tolerance_nats=0.03)
    assert {f.state for f in found} == {"ok", "skipped"}, found


def other_render(subject, **changes):
    """The same subject whose prompts were rendered with other settings than it says."""
    renderer = Renderer(RenderConfig(**(subject.render.model_dump() | changes)))
    messages = (
        Message("user", None, "Two and two?"),
        Message("assistant", "analysis", "Easy enough, one two three four."),
        Message("assistant", "final", "Four."),
    )
    rendered = renderer.render(Conversation("x", messages))
    document = dataclasses.replace(
        subject.documents[0],
        tokens=np.append(rendered.tokens, 199_999),
        span_ids=np.append(rendered.span_ids[1:], [0, 0]),
    )
    return dataclasses.replace(subject, documents=[*subject.documents[1:], document])


@pytest.fixture
def whole_subject():
    """Prompts with a system message; nobody is connected to yet."""
    return subject_of(served("http://127.0.0.1:9"), sequences=8)


@pytest.mark.parametrize("effort", [None, "high"])
def test_prompts_as_they_should_be(whole_subject, effort):
    found = states(dataclasses.replace(whole_subject, effort=effort))
    assert found["rendering"] == (
        "ok",
        f"8 prompts are the same for student, sampler and teacher, effort {effort or 'medium'}",
    )
    assert found["named effort"][0] == "ok"


@pytest.mark.parametrize(
    "changes",
    [
        {"knowledge_cutoff": "2020-01"},
        {"conversation_start_date": "2025-01-01"},
        {"model_identity": "You are somebody."},
    ],
)
def test_prompts_of_another_renderer_are_named(whole_subject, changes):
    found = states(other_render(whole_subject, **changes))
    assert found["rendering"][0] == "failed"
    assert "differ from token" in found["rendering"][1]
    assert found["named effort"][0] == "ok"


def test_an_effort_that_the_prompts_do_not_name_is_named(whole_subject):
    found = states(other_render(whole_subject, reasoning_effort="low"))
    assert found["named effort"][0] == "failed"
    assert "does not say 'Reasoning: medium'" in found["named effort"][1]
    assert found["rendering"][0] == "failed"


def test_configs_without_a_teacher_to_ask_are_refused():
    from vpmoe.teachers.recorded import RecordedTeacherConfig

    with pytest.raises(ConfigError, match="no teacher that can be asked"):
        subject_of(RecordedTeacherConfig(path="x"), sequences=8)


def server_states(server, **changes) -> dict[str, tuple[str, str]]:
    config = served(server.url, **changes)
    teacher = config.build()
    found = check_server(teacher, config, longest=100)
    teacher.close()
    return {f.check: (f.state, f.detail) for f in found}


def test_a_server_that_is_as_it_should_be():
    with serve(invented) as server:
        found = server_states(server)
    assert {state for state, _ in found.values()} == {"ok"}, found
    assert list(found) == ["tokenizer", "limits", "ids", "served temperature"]


def test_what_a_server_gets_wrong_is_named(monkeypatch):
    def tempered(body):
        answer = invented(body)
        for place in answer["choices"][0]["prompt_logprobs"][1:]:
            for entry in place.values():
                entry["logprob"] /= 1 + body.get("temperature", 0)
        return answer

    with serve(tempered) as server:
        server.num_ids += 128
        server.models["data"][0]["max_model_len"] = 64
        monkeypatch.setattr("tests.teachers.stand_in.encode", lambda text: np.arange(len(text)))
        monkeypatch.setattr("tests.teachers.stand_in.decode", lambda ids: "x" * len(ids))
        found = server_states(server)
        assert {state for state, _ in found.values()} == {"failed"}
        assert "splits 'Hello, world' into [0, 1, 2" in found["tokenizer"][1]
        assert "the servers take 63: raise --max-model-len" in found["limits"][1]
        assert (
            "takes id 201088; the vocabulary has 201,088 ids: the model is padded"
            in found["ids"][1]
        )
        assert "--logprobs-mode raw_logprobs" in found["served temperature"][1]
        server.num_ids = 200_000
        assert "refuses id 201087" in server_states(server)["ids"][1]


def test_a_server_without_a_tokenizer_is_not_blamed_for_it(monkeypatch):
    monkeypatch.setattr("tests.teachers.stand_in.spelled", lambda path, body: {"error": "none"})
    with serve(invented) as server:
        assert server_states(server)["tokenizer"] == ("skipped", f"{server.url} has none")


def test_the_verb_prints_a_table_or_json_and_its_exit_code_tells(tmp_path, capsys):
    table = tmp_path / "teacher.toml"
    table.write_text(f'kind = "local"\npath = "{DEMO_TEACHER}"\ndtype = "float32"\n')
    assert main.run(["teacher", "doctor", str(table), "--sequences", "8"]) == 0
    said = capsys.readouterr().out
    assert "order and company  ok       0.0000 nats" in said
    with serve(invented) as server:
        server.num_ids += 1
        table.write_text(
            f'kind = "server"\nurls = ["{server.url}"]\nmodel = "teacher"\nrecheck = 0.0\n'
        )
        assert main.run(["teacher", "doctor", str(table), "--sequences", "8", "--json"]) == 3
        out, err = capsys.readouterr()
    findings = {f["check"]: f for f in json.loads(out)["findings"]}
    assert not json.loads(out)["ok"]
    assert findings["ids"]["state"] == "failed"
    assert "checks failed:" in err and "ids" in err
