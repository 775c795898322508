"""Replayed passes: refused where they cannot run, and on a GPU equal to launched ones."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.train.toy import ToyPlan, random_batch, student_config, train_config
from vpmoe.batch import Batch
from vpmoe.errors import RunError
from vpmoe.models.config import StudentConfig
from vpmoe.models.student import build_student
from vpmoe.optim import NorMuonConfig
from vpmoe.train import graph
from vpmoe.train.accumulate import SmallGradients
from vpmoe.train.device import world
from vpmoe.train.graph import GraphedStudent, graph_stream
from vpmoe.train.parallel import Replica
from vpmoe.train.step import apply_gradients, sum_gradients

FUSED = {"device": "cuda", "dtype": "bfloat16", "kernels": "fused"}
STUDENT = {
    "num_layers": 5,
    "hidden_size": 128,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
    "dense_hidden": 128,
    "local_attention": {"kind": "tpa", "window_size": 64},
    "moe": {
        "num_experts": 32,
        "num_experts_per_token": 4,
        "expert_hidden": 64,
        "shared_expert_hidden": 128,
    },
}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("changes", [{"device": "cuda"}, {**FUSED, "kernels": "reference"}, {}])
def test_graphs_without_fused_kernels_are_refused(tmp_path, changes):
    with pytest.raises(ValueError, match=re.escape('needs device = "cuda" and kernels = "fused"')):
        train_config(tmp_path / "run", cuda_graph=True, **changes)
    assert train_config(tmp_path / "run", cuda_graph=True, **FUSED).cuda_graph


def test_graphs_of_a_vocabulary_subset_are_refused():
    with pytest.raises(RunError, match="cuda_graph = true with a vocabulary subset"):
        GraphedStudent(build_student(student_config(), seed=0), lambda: None)


def test_each_kind_of_batch_is_captured_once_and_again_for_more_documents(monkeypatch):
    """What is replayed is decided without a GPU: by shape, by experts that come along, by room."""
    student = SimpleNamespace(row_of=None, embedding=SimpleNamespace(weight=torch.zeros(1)))
    captures = []

    def capture(self, batch, num_documents):
        names = ["tokens"] + ["expert_ids"] * (batch.expert_ids is not None)
        inputs = {name: getattr(batch, name).clone() for name in names}
        captures.append((batch.tokens.shape, batch.expert_ids is not None))
        return SimpleNamespace(inputs=inputs, room=4, number=len(captures))

    monkeypatch.setattr(graph, "forward", lambda student, batch, documents: "launched")
    monkeypatch.setattr(GraphedStudent, "_capture", capture)
    replayed = SimpleNamespace(apply=lambda anchor, captured: (captured, None))
    monkeypatch.setattr(graph, "_Replay", replayed)
    monkeypatch.setattr(graph, "StudentOutput", lambda hidden, balance, documents: hidden)
    replay = GraphedStudent(student, lambda: None)

    def batch(rows, *, ids=None):
        tokens = torch.full((rows, 8), rows)
        zeros = torch.zeros_like(tokens)
        held = None if ids is None else torch.full((rows, 8, 2, 3), ids, dtype=torch.uint8)
        return Batch(tokens, tokens, zeros.to(torch.uint8), zeros, zeros, expert_ids=held)

    kinds = [batch(2), batch(2, ids=1), batch(3)]
    for kind in kinds:
        for _ in range(graph.WARM_UP):
            assert replay(kind, 3) == "launched"
    assert captures == []
    first = [replay(kind, 3) for kind in kinds]
    assert [one.number for one in first] == [1, 2, 3]
    assert captures == [(torch.Size([2, 8]), False), (torch.Size([2, 8]), True),
                        (torch.Size([3, 8]), False)]  # fmt: skip
    again = replay(batch(2, ids=7), 4)
    assert again is first[1] and bool((again.inputs["expert_ids"] == 7).all())
    assert "expert_ids" not in replay(batch(2), 4).inputs
    assert replay(batch(2), 5).number == 4  # more documents than there was room for
    assert len(captures) == 4


def test_small_gradients_wait_and_are_added_once():
    """A float32 sum gets the gradient of every pass; other parameters keep what autograd found."""
    summed, plain = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    summed.main_grad = torch.zeros(3)
    plain.main_grad = torch.zeros(3, dtype=torch.float64)
    small = SmallGradients([summed, plain])
    for passes in (1, 2):
        (2 * summed + 2 * plain).sum().backward()
        assert summed.grad is None and summed.main_grad.tolist() == [2 * passes - 2] * 3
        small.add()
        small.add()  # nothing waits any more
        assert summed.main_grad.tolist() == [2 * passes] * 3
        assert plain.grad is not None and plain.grad.tolist() == [2 * passes] * 3
        assert not plain.main_grad.any()


def some_experts(step, tokens):
    """Experts of every token in four mixture layers."""
    generator = torch.Generator().manual_seed(step)
    scores = torch.rand(*tokens.shape, 4, 32, generator=generator)
    return scores.argsort(dim=3)[..., :4].to(torch.uint8)


def steps(config, *, graphed, sums=None, is_replayed=False):
    """Metrics of a few steps; `sums` takes the first step's gradients."""
    rows = []
    with world("cuda") as ranks, graph_stream(ranks.device):
        student = build_student(
            StudentConfig.model_validate(STUDENT),
            seed=0,
            device="cuda",
            dtype=torch.bfloat16,
            kernels="fused",
        )
        student.train()
        replica = Replica(student, config.optimizer, ranks, cuda_graph=graphed)
        _, loss = ToyPlan(config).micro_batches(0)
        size = config.batch.micro_batch_size
        for step in range(config.budget.steps):
            whole = random_batch(step, range(9), seq_len=config.batch.seq_len)
            whole = replace(whole, tokens=whole.tokens % 512, labels=whole.labels % 512)
            if is_replayed and step % 2 == 0:  # batches of one shape, with experts and without
                whole = replace(whole, expert_ids=some_experts(step, whole.tokens))
            batches = [whole.rows(i, min(i + size, 9)) for i in range(0, 9, size)]  # 2, 2, 2, 2, 1
            summed = sum_gradients(replica, batches, loss, config)
            if sums is not None and step == 0:
                sums.update({n: p.main_grad.clone() for n, p in replica.parameters.items()})
            row = summed.metrics() | apply_gradients(replica, config, step=step, num_steps=4)
            rows.append(row)
    return rows


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("is_replayed", [False, True])
def test_replayed_steps_equal_launched_ones(tmp_path, is_replayed):
    """The first step's gradients to rounding; later losses to what rounding grows into."""
    config = train_config(
        tmp_path / "run",
        **FUSED,
        batch={"global_batch_size": 9, "micro_batch_size": 2, "seq_len": 128},
        budget={"steps": 4},
        optimizer=NorMuonConfig(lr=0.005),
    )
    launched, replayed = {}, {}
    rows = (
        steps(config, graphed=False, sums=launched, is_replayed=is_replayed),
        steps(config, graphed=True, sums=replayed, is_replayed=is_replayed),
    )
    for name, expected in launched.items():
        difference = (replayed[name] - expected).norm() / expected.norm().clamp_min(1e-12)
        assert difference < 1e-3, (name, float(difference))
    for one, other in zip(*rows, strict=True):
        assert one["train/tokens"] == other["train/tokens"]
        for name in ("train/loss/reasoning", "train/loss/final", "grad_norm/all"):
            assert other[name] == pytest.approx(one[name], rel=2e-2), name
        assert other["router/dead_experts"] == pytest.approx(one["router/dead_experts"], abs=3)
