"""The same loop on GPUs: NCCL, bfloat16, checkpoints that move between devices' ranks."""

import pytest
import torch

from tests.train.test_loop import numbers
from tests.train.toy import run, run_on_ranks, train_config
from vpmoe.storage.runs import read_metrics
from vpmoe.train.state import load_student

NAMES = ("train/loss/reasoning", "train/loss/final", "train/tokens")


def curve(run_dir) -> torch.Tensor:
    return torch.tensor([[row[name] for name in NAMES] for row in read_metrics(run_dir)])


@pytest.mark.gpu
def test_one_gpu_follows_the_cpu_in_float32(tmp_path):
    """Six steps: float32 sums in another order, amplified by a few updates."""
    steps = {"budget": {"steps": 6}}
    run(train_config(tmp_path / "cpu", **steps))
    run(train_config(tmp_path / "gpu", device="cuda", **steps))
    torch.testing.assert_close(
        curve(tmp_path / "gpu"), curve(tmp_path / "cpu"), rtol=2e-3, atol=2e-3
    )
    row = next(iter(read_metrics(tmp_path / "gpu")))
    assert row["memory/gpu_peak_gib"] > 0
    assert 0 < row["memory/gpu_headroom_pct"] < 100


@pytest.mark.gpu
def test_bfloat16_run_on_a_gpu_resumes(tmp_path):
    config = train_config(
        tmp_path / "run", device="cuda", dtype="bfloat16", checkpoint={"every_steps": 2, "keep": 0}
    )
    run(config, dtype=torch.bfloat16)
    before = curve(tmp_path / "run")
    (tmp_path / "run" / "step-000004").rename(tmp_path / "gone")
    run(config, dtype=torch.bfloat16, resume=True)
    torch.testing.assert_close(curve(tmp_path / "run"), before, rtol=1e-2, atol=1e-2)
    student, _ = load_student(tmp_path / "run")
    assert student.embedding.weight.device.type == "cpu"
    assert [row["step"] for row in numbers(tmp_path / "run")] == [1, 2, 3, 4]


@pytest.mark.multi_gpu
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_two_gpus_follow_one_and_checkpoints_move(tmp_path, first, then):
    run_on_ranks(train_config(tmp_path / "one", device="cuda"), num_ranks=1)
    config = train_config(tmp_path / "run", device="cuda", checkpoint={"every_steps": 2, "keep": 0})
    run_on_ranks(config, num_ranks=first)
    (tmp_path / "run" / "step-000004").rename(tmp_path / "gone")
    run_on_ranks(config, num_ranks=then, resume=True)
    torch.testing.assert_close(
        curve(tmp_path / "run"), curve(tmp_path / "one"), rtol=2e-3, atol=2e-3
    )
