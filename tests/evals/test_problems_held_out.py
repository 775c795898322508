from vpmoe.config import validate
from vpmoe.data.problems import split_of
from vpmoe.evals.suite import EvalConfig, open_inputs


def test_problems_to_judge_by_are_never_ones_to_train_on():
    tree = {"problems": {"count": 60, "seed": 0}, "render": {"system": False}}
    inputs = open_inputs(validate(EvalConfig, tree, source="test"))
    assert len(inputs.problems) == 60
    assert {split_of(problem.query) for problem in inputs.problems} == {"held-out"}
    assert not any(problem.flawed for problem in inputs.problems)
