"""A global batch gives the same gradients and updates however it is cut into ranks and steps."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests.train.toy import ToyPlan, run, run_on_ranks, student_config, train_config
from vpmoe.models.student import build_student
from vpmoe.storage.checkpoints import latest_checkpoint, list_checkpoints, load_model_tensors
from vpmoe.storage.runs import read_metrics
from vpmoe.train.parallel import _messages, share_out

BATCH = {"global_batch_size": 4, "micro_batch_size": 2, "seq_len": 24}


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    path = latest_checkpoint(run_dir)
    assert path is not None
    student = build_student(student_config(), seed=99, dtype=torch.float64)
    state = student.state_dict()
    load_model_tensors(path, state)
    return state


def losses(run_dir: Path) -> list[list[float]]:
    names = ("train/loss/reasoning", "train/loss/final", "grad_norm/all", "train/tokens")
    return [[row[name] for name in names] for row in read_metrics(run_dir)]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("one") / "run"
    run(train_config(run_dir), dtype=torch.float64)
    return run_dir


@pytest.mark.parametrize("micro_batch_size", [1, 3, 4])
def test_micro_batches_do_not_change_a_run(tmp_path, one_rank, micro_batch_size):
    batch = {**BATCH, "micro_batch_size": micro_batch_size}
    run(train_config(tmp_path / "run", batch=batch), dtype=torch.float64)
    torch.testing.assert_close(
        torch.tensor(losses(tmp_path / "run")), torch.tensor(losses(one_rank)), rtol=1e-9, atol=1e-9
    )
    assert_same_weights(tmp_path / "run", weights(one_rank))


def assert_same_weights(run_dir: Path, expected: dict[str, torch.Tensor]) -> None:
    """Float64 all the way: what is left is the order of sums."""
    for name, tensor in weights(run_dir).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-9, msg=name)


def test_two_ranks_with_two_ragged_sequences_equal_one_with_four(tmp_path, one_rank):
    run_on_ranks(train_config(tmp_path / "two"), num_ranks=2, dtype=torch.float64)
    torch.testing.assert_close(
        torch.tensor(losses(tmp_path / "two")), torch.tensor(losses(one_rank)), rtol=1e-9, atol=1e-9
    )
    assert_same_weights(tmp_path / "two", weights(one_rank))


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path, one_rank, first, then):
    path = tmp_path / "run"
    config = train_config(path, checkpoint={"every_steps": 2, "keep": 0})
    run_on_ranks(config, num_ranks=first, dtype=torch.float64)
    (path / "step-000004").rename(tmp_path / "gone")  # as if killed before the last checkpoint
    run_on_ranks(config, num_ranks=then, dtype=torch.float64, resume=True)
    assert_same_weights(path, weights(one_rank))


def test_every_parameter_has_one_owner_and_loads_are_even():
    student = build_student(student_config(), seed=0)
    parameters = dict(student.named_parameters())
    for num_ranks in (1, 2, 3):
        owners = share_out(parameters, num_ranks)
        assert owners.keys() == parameters.keys()
        assert set(owners.values()) == set(range(num_ranks))
        sent = [p for _, message in _messages(parameters, owners) for p in message]
        assert sorted(map(id, sent)) == sorted(map(id, parameters.values()))
    assert set(share_out(parameters, 1).values()) == {0}


def test_experts_without_tokens_rest(tmp_path):
    """An expert that no token of the global batch reached keeps its weights to the last bit."""
    config = train_config(
        tmp_path / "run",
        batch={"global_batch_size": 1, "micro_batch_size": 1, "seq_len": 4},
        budget={"steps": 1},
        schedule={"kind": "constant", "warmup": 0},
    )
    before = build_student(student_config(), seed=0).state_dict()
    after = run(config, plan=ToyPlan(config)).state_dict()
    row = next(iter(read_metrics(tmp_path / "run")))
    assert row["router/dead_experts"] > 0
    name = "layers.1.mlp.experts.up_weight"
    rested = (before[name] == after[name]).flatten(1).all(dim=1)
    assert int(rested.sum()) == row["router/dead_experts/layer_02"]


def test_biases_of_experts_without_tokens_rest_too(tmp_path):
    """AdamW's momentum would move them on after a step in which they had tokens."""
    config = train_config(
        tmp_path / "run",
        batch={"global_batch_size": 1, "micro_batch_size": 1, "seq_len": 4},
        budget={"steps": 4},
        schedule={"kind": "constant", "warmup": 0},
        checkpoint={"every_steps": 1, "keep": 0},
    )
    run(config)
    biases = []
    for path in list_checkpoints(tmp_path / "run"):
        state = build_student(student_config(), seed=99).state_dict()
        load_model_tensors(path, state)
        biases.append(state["layers.1.mlp.experts.down_bias"])
    rows = list(read_metrics(tmp_path / "run"))[1:]
    rested = [int((before == after).all(dim=1).sum()) for before, after in pairwise(biases)]
    assert rested == [row["router/dead_experts/layer_02"] for row in rows]
    assert any(rested)
    assert biases[-1].any()
