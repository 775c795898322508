import json
from dataclasses import replace

import numpy as np
import pytest

from vpmoe.data.conversation import Conversation, Message
from vpmoe.data.dataset import Dataset
from vpmoe.data.harmony import Renderer, decode
from vpmoe.data.problems import solve
from vpmoe.errors import ConfigError
from vpmoe.evals.report.runs import read_runs
from vpmoe.evals.router_load import counting_experts
from vpmoe.evals.sampling import dataset_prompts, problem_prompts, sample
from vpmoe.evals.suite import (
    EvalConfig,
    ProblemsConfig,
    SamplingConfig,
    eval_path,
    evaluate,
    evaluate_teacher,
    open_inputs,
    write_eval,
)
from vpmoe.teachers.base import TeacherIdentity

from .conftest import RENDER


@pytest.fixture
def config(data_dir):
    return EvalConfig(
        data=str(data_dir),
        problems=ProblemsConfig(count=8, seed=4),
        sampling=SamplingConfig(max_new_tokens=12),
        render=RENDER,
    )


def test_same_json_twice_whatever_the_batch(student, config):
    first = evaluate(student, config).as_json()
    assert evaluate(student, config, open_inputs(config)).as_json() == first
    sampling = config.sampling.model_copy(update={"max_batch": 3})
    smaller = evaluate(student, config.model_copy(update={"sampling": sampling})).as_dict()
    whole = json.loads(first)
    for part in ("exact_match", "format", "lengths", "heldout", "router"):
        assert smaller[part] == whole[part]


def test_report_round_trips_through_a_run_folder(student, config, tmp_path):
    report = evaluate(student, config, model={"name": "tiny", "step": 7, "tokens_seen": 900})
    write_eval(eval_path(tmp_path, 7), report)
    (run,) = read_runs([tmp_path])
    assert run.latest_eval == json.loads(report.as_json())
    assert run.measured("heldout", "loss", "final") == report.heldout.loss.final


def test_every_held_out_token_is_routed_to_its_experts(student, config, data_dir):
    report = evaluate(student, config)
    tokens = int(Dataset(data_dir, "valid").lengths.sum())
    assert report.router.layers == [2, 3]
    assert [sum(row) for row in report.router.expert_counts] == [2 * tokens, 2 * tokens]


def test_counting_leaves_no_hook_behind(student):
    with counting_experts(student):
        pass
    assert not any(layer._forward_hooks for layer in student.layers)


def test_dataset_prompts_equal_the_renderers(data_dir):
    dataset = Dataset(data_dir, "valid")
    renderer = Renderer(RENDER)
    for prompt in dataset_prompts(dataset, limit=5):
        query = decode(prompt.tokens).split("<|message|>")[1].split("<|end|>")[0]
        assert solve(query) is not None
        assert prompt.tokens.tolist() == renderer.prompt(query).tolist()


def test_prompts_of_data_are_answered_where_there_are_no_problems(student, config):
    report = evaluate(student, config.model_copy(update={"problems": None, "prompts": 5}))
    assert report.exact_match is None
    assert report.format.num_completions == 5
    assert "exact_match" not in report.as_dict()


class KnowsAll:
    """Answers every problem rightly, and finds every token as likely as the next of three."""

    identity = TeacherIdentity("sage", "", "0" * 64, "float32", "none", "0" * 64)

    def complete(self, prompts, *, max_new_tokens):
        solved = []
        for prompt in prompts:
            problem = solve(decode(prompt).split("<|message|>")[1].split("<|end|>")[0])
            message = (Message("user", None, problem.query),)
            thought = Message("assistant", "analysis", problem.reasoning)
            answer = Message("assistant", "final", problem.solution)
            whole = Renderer(RENDER).render(Conversation("x", (*message, thought, answer)))
            solved.append(whole.tokens[len(prompt) :].astype(np.int64))
        return solved

    def score(self, sequences):
        return [np.full(len(s) - 1, -np.log(3), dtype=np.float32) for s in sequences]


def test_teacher_is_judged_by_the_same_problems(config):
    report = evaluate_teacher(KnowsAll(), config)
    assert report.exact_match.total.share == report.format.valid.share == 1.0
    assert report.model == {"name": "sage"}
    assert report.heldout is None


def test_gap_to_a_uniform_teacher_is_the_entropy_gap(student, config):
    inputs = replace(open_inputs(config), teacher=KnowsAll())
    report = evaluate(student, config, inputs)
    own = sample(
        student, problem_prompts(inputs.problems, Renderer(RENDER)),
        max_new_tokens=12, temperature=1.0, seed=0,
    )  # fmt: skip
    logprobs = np.concatenate([r.rollout_logprobs for r in own]).astype(np.float64)
    assert report.teacher_gap.k1.all == pytest.approx(logprobs.mean() + np.log(3), abs=1e-6)
    assert report.teacher_gap.token_counts["all"] == logprobs.size
    assert report.provenance["teacher"] == "sage"


def test_nothing_to_measure_is_an_error():
    with pytest.raises(ConfigError, match="nothing to measure"):
        open_inputs(EvalConfig())


def test_untrained_students_are_near_uniform(student, config, vocab):
    report = evaluate(student, config.model_copy(update={"problems": None}))
    assert report.heldout.loss.all == pytest.approx(np.log(len(vocab)), rel=0.6)
