"""Roles: every parameter of every student has exactly one, decided by its name."""

import re
from pathlib import Path

import pytest
import torch

from vpmoe.config import load
from vpmoe.errors import RunError
from vpmoe.models.config import StudentConfig
from vpmoe.models.student import Student
from vpmoe.optim.groups import group_by_role, role_of

MODELS = sorted((Path(__file__).resolve().parents[2] / "configs" / "models").glob("*.toml"))
NEVER_A_MATRIX = re.compile(r"(bias|gamma|sinks?|lambda|log_freq|A_log|dt_bias|conv)$")


def student_of(path):
    with torch.device("meta"):
        return Student(load(path, StudentConfig))


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_groups_hold_every_parameter_once(path):
    named = dict(student_of(path).named_parameters())
    groups = group_by_role(named.items())
    placed = [name for members in groups.values() for name, _ in members]
    assert sorted(placed) == sorted(named)
    assert not [name for name, _ in groups["matrix"] if NEVER_A_MATRIX.search(name)]
    assert all(param.ndim >= 2 for _, param in groups["matrix"])
    assert [name for name, _ in groups["embed"]] == ["embedding.weight"]


def test_stacks_are_matrices_and_their_biases_are_not():
    """Both are two-dimensional or more: the number of axes says nothing."""
    six = group_by_role(
        student_of(next(p for p in MODELS if p.stem == "vpmoe-6b")).named_parameters()
    )
    roles = {name: role for role, members in six.items() for name, _ in members}
    assert roles["layers.5.mlp.experts.up_weight"] == "matrix"
    assert roles["layers.5.mlp.experts.up_bias"] == "vector"
    assert roles["layers.5.mlp.router.weight"] == "router"
    assert roles["layers.5.attention.value_lambda"] == "value_lambda"
    assert roles["head.weight"] == "head"
    assert len(six["router"]) == 79


def test_wrappers_do_not_change_a_role():
    assert role_of("module.module.layers.0.attention.q_proj.weight", torch.zeros(2, 2)) == "matrix"


@pytest.mark.parametrize("name", ["layers.0.attention.mystery", "q_proj.weights", "weight"])
def test_an_unknown_name_is_an_error(name):
    with pytest.raises(RunError, match=f"parameter {name} .* has no role"):
        role_of(name, torch.zeros(2, 2))


def test_a_vector_named_like_a_matrix_is_an_error():
    with pytest.raises(RunError, match="named like a matrix"):
        role_of("layers.0.attention.q_proj.weight", torch.zeros(4))
