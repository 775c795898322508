import json
import math
import random
import resource
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from tests.train.toy import ToyPlan, run, run_on_ranks, start, student_config, train_config
from vpmoe.errors import CheckpointError, RunError
from vpmoe.models.student import build_student
from vpmoe.storage.checkpoints import latest_checkpoint, list_checkpoints
from vpmoe.storage.runs import RunDir, read_metrics
from vpmoe.train.device import world
from vpmoe.train.parallel import Replica
from vpmoe.train.plan import tokens_before
from vpmoe.train.state import load_student
from vpmoe.train.step import apply_gradients, sum_gradients

CLOCKS = ("time/", "memory/", "tokens_per_s")


def numbers(run_dir: Path) -> list[dict]:
    """The lines without clocks: what must repeat bit for bit."""
    return [
        {name: value for name, value in row.items() if not name.startswith(CLOCKS)}
        for row in read_metrics(run_dir)
    ]


def test_loss_falls_and_every_step_is_logged(tmp_path):
    steps = 25
    config = train_config(tmp_path / "run", budget={"steps": steps}, checkpoint={})
    run(config)
    rows = numbers(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert rows[-1]["tokens_seen"] == sum(row["train/tokens"] for row in rows)
    means = [row["train/loss/reasoning"] + row["train/loss/final"] for row in rows]
    assert sum(means[-5:]) < 0.97 * sum(means[:5])
    assert [p.name for p in list_checkpoints(tmp_path / "run")] == [f"step-{steps:06d}"]


def test_logged_loss_is_the_mean_over_the_global_batch(tmp_path):
    config = train_config(tmp_path / "run", budget={"steps": 1})
    run(config)
    student = build_student(student_config(), seed=0)
    batch = ToyPlan(config).micro_batches(0)[0]
    nll, count = torch.zeros(3, dtype=torch.float64), torch.zeros(3)
    with torch.no_grad():
        for part in batch:
            out = student(part.tokens, positions=part.positions, document_ids=part.document_ids)
            labels = torch.where(part.span_ids > 0, part.labels, part.tokens)
            logprobs = student.logits(out.hidden).double().log_softmax(-1)
            chosen = logprobs.gather(-1, student.rows_of(labels)[..., None])[..., 0]
            nll.index_add_(0, part.span_ids.flatten().long(), -chosen.flatten())
            count += part.span_counts
    row = numbers(tmp_path / "run")[0]
    assert row["train/loss/reasoning"] == pytest.approx(float(nll[1] / count[1]), rel=1e-6)
    assert row["train/loss/final"] == pytest.approx(float(nll[2] / count[2]), rel=1e-6)
    assert row["train/scale/final"] == pytest.approx(float(1 / count[2]))


def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(train_config(whole, budget={"steps": 6}))

    class StoppedError(Exception):
        pass

    class Plan(ToyPlan):
        def micro_batches(self, step):
            if step == 5:
                raise StoppedError
            return super().micro_batches(step)

    config = train_config(cut, budget={"steps": 6})
    with pytest.raises(StoppedError):
        run(config, plan=Plan(config))
    assert [row["step"] for row in numbers(cut)] == [1, 2, 3, 4, 5]
    student = run(config, resume=True)
    assert numbers(cut) == numbers(whole)
    expected, _ = load_student(whole)
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name


def kill_and_resume(tmp_path: Path, steps: int, delays: list[float]) -> None:
    """Start, kill after each delay, resume; the last run is left to end."""
    often = {"budget": {"steps": steps}, "checkpoint": {"every_steps": 1, "keep": 2}}
    cut, whole = (train_config(tmp_path / name, **often) for name in ("cut", "whole"))
    for restarts, delay in enumerate(delays):
        process = start(cut, resume=restarts > 0)
        wait_for_a_checkpoint(Path(cut.run), process)
        time.sleep(delay)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    run_on_ranks(cut, num_ranks=1, resume=True)
    run_on_ranks(whole, num_ranks=1)
    assert numbers(Path(cut.run)) == numbers(Path(whole.run))


def wait_for_a_checkpoint(run_dir: Path, process: BaseProcess) -> None:
    """Until the process has written one: what came before is not its work."""
    deadline = time.monotonic() + 120
    before = latest_checkpoint(run_dir)
    while latest_checkpoint(run_dir) == before and process.is_alive():
        assert time.monotonic() < deadline, "no checkpoint in two minutes"
        time.sleep(0.002)


def test_killed_once_and_resumed(tmp_path):
    kill_and_resume(tmp_path, steps=30, delays=[0.03])


def test_killed_inside_a_save_and_resumed(tmp_path):
    often = {"budget": {"steps": 12}, "checkpoint": {"every_steps": 1, "keep": 2}}
    cut, whole = (train_config(tmp_path / name, **often) for name in ("cut", "whole"))
    process = start(cut)
    wait_for_a_checkpoint(Path(cut.run), process)
    while process.is_alive() and not list(Path(cut.run).glob(".unfinished-*/*")):
        pass
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    run_on_ranks(cut, num_ranks=1, resume=True)
    assert not list(Path(cut.run).glob(".unfinished-*"))
    run_on_ranks(whole, num_ranks=1)
    assert numbers(Path(cut.run)) == numbers(Path(whole.run))


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed(tmp_path):
    draw = random.Random(0)
    kill_and_resume(tmp_path, steps=200, delays=[draw.uniform(0, 0.3) for _ in range(20)])


def test_another_config_is_refused_with_a_diff(tmp_path):
    run(train_config(tmp_path / "run"))
    changed = train_config(tmp_path / "run", seed=1, clip_grad_norm=2.0)
    with pytest.raises(RunError, match="was started with another config") as caught:
        run(changed, resume=True)
    assert "  clip_grad_norm: 1.0 → 2.0\n  seed: 0 → 1" in caught.value.message
    assert "absent" not in caught.value.hint
    config_file = tmp_path / "run" / "config.json"
    settings = json.loads(config_file.read_text())
    del settings["cuda_graph"]  # as a version would have left it that did not know of it
    config_file.write_text(json.dumps(settings))
    with pytest.raises(RunError, match="cuda_graph: absent → False") as caught:
        run(train_config(tmp_path / "run"), resume=True)
    assert "another version of vpmoe" in caught.value.hint


def test_what_learns_nothing_may_change(tmp_path):
    run(train_config(tmp_path / "run"))
    (tmp_path / "run").rename(tmp_path / "moved")
    config = train_config(tmp_path / "moved", log_every=5, checkpoint={"every_steps": 1})
    run(config, resume=True)  # already at its end: nothing left to do


def test_a_folder_with_a_run_is_not_started_again(tmp_path):
    run(train_config(tmp_path / "run"))
    with pytest.raises(RunError, match="already holds a run"):
        run(train_config(tmp_path / "run"))
    with pytest.raises(RunError, match="there is no run at"):
        run(train_config(tmp_path / "other"), resume=True)


def test_a_run_in_use_is_refused(tmp_path):
    with RunDir(tmp_path / "run"), pytest.raises(RunError, match="in use by process"):
        run(train_config(tmp_path / "run"))


def test_half_a_checkpoint_is_passed_over(tmp_path):
    config = train_config(tmp_path / "run", checkpoint={"every_steps": 2, "keep": 0})
    run(config)
    expected = numbers(tmp_path / "run")
    last = tmp_path / "run" / "step-000004"
    last.rename(last.with_name(".unfinished-step-000004"))
    run(config, resume=True)
    assert numbers(tmp_path / "run") == expected
    assert not list((tmp_path / "run").glob(".unfinished-*"))


def test_a_loss_that_is_not_a_number_stops_before_the_update(tmp_path):
    class Plan(ToyPlan):
        def micro_batches(self, step):
            if step == 3:
                with torch.no_grad():
                    self.student.embedding.weight[5] = float("nan")
            return super().micro_batches(step)

    config = train_config(tmp_path / "run")
    plan = Plan(config)

    class Catch:
        every_steps = 1

        def __call__(self, student, position):
            plan.student = student
            return {}

    with pytest.raises(RunError, match="loss is nan: training has diverged"):
        run(config, plan=plan, hooks=[Catch()])
    assert [row["step"] for row in numbers(tmp_path / "run")] == [1, 2, 3]
    assert latest_checkpoint(tmp_path / "run") == tmp_path / "run" / "step-000002"


def test_student_and_provenance_come_back(tmp_path):
    trained = run(train_config(tmp_path / "run"))
    student, manifest = load_student(tmp_path / "run")
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, student.state_dict()[name]), name
    assert student.config == trained.config
    assert manifest["step"] == 4
    assert manifest["inputs"] == {"dataset": "toy"}
    assert manifest["parent"] == "step-000002"
    assert manifest["config"]["batch"]["seq_len"] == 24
    assert len(manifest["tokenizer_sha256"]) == 64
    assert {"vpmoe_version", "git_sha", "fingerprint", "tokens_seen"} <= manifest.keys()
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        load_student(tmp_path)


def test_cuda_that_is_not_there_is_refused(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(RunError, match='device "cuda" was asked for'):
        run(train_config(tmp_path / "run", device="cuda"))


def test_bfloat16_keeps_float32_masters_and_resumes(tmp_path):
    config = train_config(
        tmp_path / "run", dtype="bfloat16", checkpoint={"every_steps": 2, "keep": 0}
    )
    run(config, dtype=torch.bfloat16)
    expected = numbers(tmp_path / "run")
    (tmp_path / "run" / "step-000004").rename(tmp_path / "gone")
    run(config, dtype=torch.bfloat16, resume=True)
    assert numbers(tmp_path / "run") == expected
    student, _ = load_student(tmp_path / "run")
    assert student.embedding.weight.dtype == torch.bfloat16


def test_a_disk_that_fills_up_in_a_save_leaves_the_older_checkpoint(tmp_path):
    """The limit on file size stands for a full disk; freed, the run goes on to the same end."""
    config = train_config(tmp_path / "run", checkpoint={"every_steps": 2, "keep": 0})
    limit = 60_000
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    class FillUp:
        every_steps = 3

        def __call__(self, student, position):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            return {}

    try:
        with pytest.raises(CheckpointError, match="cannot write checkpoint"):
            run(config, hooks=[FillUp()])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in list_checkpoints(tmp_path / "run")] == ["step-000002"]
    run(config, resume=True)
    run(train_config(tmp_path / "whole"))
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")


def test_schedules_inside_the_student_go_on_from_stage_to_stage(tmp_path):
    """The student that samples and trains knows its tokens of all runs before this one."""
    told = []

    class Plan(ToyPlan):
        def micro_batches(self, step):
            told.append(("batches", step))
            return super().micro_batches(step)

    class Watched:
        every_steps = 1

        def __call__(self, student, position):
            student.set_progress = lambda tokens: told.append(("tokens", tokens))
            return {}

    config = train_config(tmp_path / "run", budget={"steps": 3})
    plan = Plan(config)
    first = {"init": None, "data": "toy"}
    second = {"init": {"tokens_seen": 1_000, "inputs": first}}
    plan.inputs = {"init": {"tokens_seen": 500, "inputs": second}}
    assert tokens_before(plan.inputs) == 1_500
    run(config, plan=plan, hooks=[Watched()])
    seen = [row["tokens_seen"] for row in numbers(tmp_path / "run")]
    assert told == [
        ("batches", 0),
        ("tokens", 1_500 + seen[0]),
        ("batches", 1),
        ("tokens", 1_500 + seen[1]),
        ("batches", 2),
    ]


@pytest.mark.parametrize(("clip", "expected"), [(1e-3, 1e-3), (0.0, None)])
def test_gradients_are_scaled_down_to_the_clip_before_the_update(tmp_path, clip, expected):
    """What the optimizer takes, and not the norm that is logged, obeys the limit."""
    config = train_config(tmp_path / "run", clip_grad_norm=clip, budget={"steps": 1})
    with world("cpu", threads=1) as ranks:
        replica = Replica(build_student(student_config(), seed=0), config.optimizer, ranks)
        batches, loss = ToyPlan(config).micro_batches(0)
        sum_gradients(replica, batches, loss, config)
        before = math.hypot(*replica.gradient_norms().values())
        momenta = {name: state.get("momentum") for name, state in replica.optimizer.state().items()}
        logged = apply_gradients(replica, config, step=0, num_steps=1)["grad_norm/all"]
        rate = 1 - config.optimizer.momentum
        name, momentum = next((n, m) for n, m in momenta.items() if m is not None)
        scale = (momentum.norm() / rate / replica.parameters[name].main_grad.norm()).item()
    assert logged == pytest.approx(before)
    assert before * scale == pytest.approx(expected or before, rel=1e-5)
