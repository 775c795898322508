"""Stages 2 and 3 on the demo's own teacher, through the real loop."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest

from tests.train.toy import STUDENT
from vpmoe.config import validate
from vpmoe.data.build import DataConfig, build_dataset
from vpmoe.data.dataset import Dataset
from vpmoe.data.harmony import RenderConfig
from vpmoe.data.mixture import uses_anchor
from vpmoe.data.problems import generate, write_problems
from vpmoe.errors import ConfigError, DataError, RunError
from vpmoe.rollouts.collate import pack_rollouts
from vpmoe.rollouts.source import LocalRollouts
from vpmoe.stages import offline, on_policy, score, warm_start
from vpmoe.stages.base import rank_batches
from vpmoe.stages.offline import OfflineConfig
from vpmoe.stages.on_policy import OnPolicyConfig
from vpmoe.stages.score import ScoreConfig
from vpmoe.stages.warm_start import WarmStartConfig
from vpmoe.storage.runs import read_metrics
from vpmoe.train.hooks import Observer

REPOSITORY = Path(__file__).resolve().parents[2]
TEACHER = {
    "kind": "local",
    "path": str(REPOSITORY / "configs" / "demo" / "teacher"),
    "dtype": "float32",
}
VOCAB = json.loads((REPOSITORY / "configs" / "demo" / "teacher" / "vocab_ids.json").read_text())
OPEN_GATES = {"max_cut_share": 1.0, "max_invalid_share": 1.0, "max_repetition_share": 1.0}


@pytest.fixture(scope="session")
def started(tmp_path_factory):
    """A folder with data, target store, prompts and a student after a few steps of stage 1."""
    folder = tmp_path_factory.mktemp("distillation")
    write_problems(folder / "rows.parquet", generate(80, seed=1, flawed_share=0.5))
    write_problems(folder / "prompts.parquet", generate(300, seed=2))
    for name, render in (("data", {"system": False}), ("other", {"system": True})):
        build_dataset(
            DataConfig(
                input=str(folder / "rows.parquet"),
                output=str(folder / name),
                seq_len=256,
                valid_fraction=0.2,
                render=RenderConfig(**render),
            )
        )
    warm_start.run(validate(WarmStartConfig, common(folder, "1"), source="test"))
    chosen = {"data": str(folder / "data"), "output": str(folder / "targets"), "teacher": TEACHER}
    score.run(validate(ScoreConfig, {**chosen, "selection": {"fraction": 0.5}}, source="test"))
    return folder


def common(folder, name, **changes):
    return {
        "run": str(folder / name),
        "data": str(folder / "data"),
        "threads": 1,
        "student": {**STUDENT, "vocab_subset": VOCAB, "init_std": 0.1},
        "batch": {"global_batch_size": 2, "micro_batch_size": 1, "seq_len": 256},
        "budget": {"steps": 3},
        "valid": {"documents": 0},
        **changes,
    }


def stage_two(folder, name, **changes) -> OfflineConfig:
    targets = {"path": str(folder / "targets"), "share": 0.75}
    start = {"init": str(folder / "1"), "student": None, "targets": targets}
    return validate(OfflineConfig, common(folder, name) | start | changes, source="test")


def stage_three(folder, name, **changes) -> OnPolicyConfig:
    rollouts = {
        "per_step": 4,
        "steps_per_round": 3,
        "max_staleness_steps": 3,
        "max_new_tokens": {"low": 12, "medium": 12, "high": 12},
        "prompts": str(folder / "prompts.parquet"),
        **changes.pop("rollouts", {}),
    }
    start = {
        "init": str(folder / "1"),
        "student": None,
        "teacher": TEACHER,
        "rollouts": rollouts,
        "gates": OPEN_GATES,
        "loss": {"importance": "truncated"},
        "ce_anchor": 0.25,
    }
    return validate(OnPolicyConfig, common(folder, name) | start | changes, source="test")


def kept(run_dir) -> list[dict]:
    clocks = ("time/", "memory/", "tokens_per_s")
    return [
        {k: v for k, v in row.items() if not k.startswith(clocks)} for row in read_metrics(run_dir)
    ]


def times(run_dir) -> list[dict]:
    return [
        {k: v for k, v in row.items() if k.startswith("time/")} for row in read_metrics(run_dir)
    ]


class Killer(Observer):
    """Stands in for a crash: the process is gone after the line of step `at` was written."""

    def __init__(self, at: int) -> None:
        self.at = at

    def start(self, run_dir, config, *, step, num_steps):
        pass

    def row(self, step, values):
        if step == self.at:
            raise KeyboardInterrupt

    def close(self):
        pass


def test_scored_and_plain_batches_take_turns_by_count(started):
    offline.run(stage_two(started, "2-turns", budget={"steps": 8}))
    rows = kept(started / "2-turns")
    scored = ["train/weight/reasoning" in row for row in rows]
    assert scored == [uses_anchor(step, 0.75) for step in range(8)]
    assert sum(scored) == 6


def test_the_centers_of_the_weights_survive_a_crash(started):
    changes = {"budget": {"steps": 6}, "checkpoint": {"every_steps": 2}}
    offline.run(stage_two(started, "2-whole", **changes))
    broken = stage_two(started, "2-broken", **changes)
    with pytest.raises(KeyboardInterrupt):
        offline.run(broken, observers=[Killer(5)])
    offline.run(broken, resume=True)
    assert kept(started / "2-broken") == kept(started / "2-whole")


def test_targets_of_another_dataset_are_refused(started):
    config = stage_two(started, "2-other", data=str(started / "other"))
    with pytest.raises(DataError, match="was made with dataset_sha256"):
        offline.run(config)


def test_on_policy_steps_train_on_completions_and_anchors_on_the_dataset(started):
    summary = on_policy.run(stage_three(started, "3-turns", budget={"steps": 8}))
    rows = kept(started / "3-turns")
    anchors = ["rollout/staleness_steps" not in row for row in rows]
    assert anchors == [uses_anchor(step, 0.25) for step in range(8)]
    own = [row for row in rows if "rollout/staleness_steps" in row]
    # rounds of three steps: fresh, one step old, two, and the anchors in between age them too
    assert [row["rollout/staleness_steps"] for row in own] == [0, 1, 2, 0, 1, 2]
    efforts = ("low", "medium", "high")
    assert all(sum(row[f"rollout/count_{effort}"] for effort in efforts) == 4 for row in own)
    assert own[0]["train/importance_ratio/reasoning"] == pytest.approx(1.0, abs=1e-4)
    assert [row["rollout/buffer_depth"] for row in own] == [8, 4, 0, 8, 4, 0]
    assert all(row["rollout/dropped"] == 0 for row in own)
    assert all(row["rollout/format_valid_pct"] == 100 - row["rollout/invalid_pct"] for row in own)
    # What the sampling student made of its own tokens is what the trainer makes of them at once.
    gaps = [row["train/reverse_kl/reasoning"] for row in own]
    assert own[0]["rollout/teacher_minus_student_nats"] == pytest.approx(-gaps[0], rel=1e-3)
    sampled = [
        "time/sampling_s" in row and "time/scoring_s" in row for row in times(started / "3-turns")
    ]
    fresh = [row.get("rollout/staleness_steps") == 0 for row in rows]
    assert sampled == fresh
    assert summary["doctor"]["sampler_trainer_gap_nats"] < 1e-4


def test_a_crash_with_a_half_spent_buffer_changes_nothing(started):
    changes = {"budget": {"steps": 7}, "checkpoint": {"every_steps": 2}}
    on_policy.run(stage_three(started, "3-whole", **changes))
    broken = stage_three(started, "3-broken", **changes)
    with pytest.raises(KeyboardInterrupt):
        on_policy.run(broken, observers=[Killer(5)])
    on_policy.run(broken, resume=True)
    assert kept(started / "3-broken") == kept(started / "3-whole")


@pytest.mark.parametrize("replays", [True, False])
def test_completions_bring_the_sampler_s_experts_if_asked_to(started, monkeypatch, replays):
    packed = []

    def watched(rollouts, *, seq_len):
        packed.append(pack_rollouts(rollouts, seq_len=seq_len))
        return packed[-1]

    monkeypatch.setattr(on_policy, "pack_rollouts", watched)
    changes = {"rollouts": {"replay_routing": replays}, "budget": {"steps": 2}, "ce_anchor": 0}
    on_policy.run(stage_three(started, f"3-replay-{replays}", **changes))
    assert len(packed) == 2
    assert all((batch.expert_ids is not None) == replays for batch in packed)


def test_a_crash_does_not_set_the_curriculum_back(started):
    phases = [{"until": 0.2, "low": 1.0}, {"until": 1.0, "high": 1.0}]
    changes = {
        "budget": {"tokens": 1200},
        "curriculum": {"phases": phases},
        "rollouts": {"steps_per_round": 1, "max_staleness_steps": 0},
        "checkpoint": {"every_steps": 2},
        "ce_anchor": 0,
    }
    on_policy.run(stage_three(started, "3-phases", **copy.deepcopy(changes)))
    broken = stage_three(started, "3-phases-broken", **changes)
    with pytest.raises(KeyboardInterrupt):
        on_policy.run(broken, observers=[Killer(5)])
    on_policy.run(broken, resume=True)
    rows = kept(started / "3-phases")
    assert (rows[0]["rollout/count_low"], rows[4]["rollout/count_high"]) == (4, 4)
    assert kept(started / "3-phases-broken") == rows


def test_each_stream_goes_on_where_it_stopped(started, monkeypatch):
    """Neither repeats rows nor leaves some out while the other has its turn."""
    taken = {}

    def watched(loader, start, batch, ranks):
        taken.setdefault(id(loader), []).append(start)
        return rank_batches(loader, start, batch, ranks)

    monkeypatch.setattr(offline, "rank_batches", watched)
    offline.run(stage_two(started, "2-streams", budget={"steps": 8}))
    assert sorted(taken.values(), key=len) == [[0, 2], [0, 2, 4, 6, 8, 10]]
    taken.clear()
    monkeypatch.setattr(on_policy, "rank_batches", watched)
    on_policy.run(stage_three(started, "3-stream", budget={"steps": 8}))
    assert list(taken.values()) == [[0, 2]]


def test_a_student_gone_astray_pauses_the_run_and_says_why(started):
    config = stage_three(started, "3-gates", gates={"max_cut_share": 0.0})
    with pytest.raises(RunError, match="paused at step 0: completions cut at the length cap"):
        on_policy.run(config)


def test_ratios_that_leave_no_sample_pause_the_run_at_the_next_step(started):
    loud = {"kind": "adamw", "lr": 1.0}
    changes = {"optimizer": loud, "schedule": {"kind": "constant", "warmup": 0}, "ce_anchor": 0}
    gates = {**OPEN_GATES, "max_reverse_kl_nats": 1e9, "min_sample_share": 0.9}
    config = stage_three(started, "3-ratios", gates=gates, budget={"steps": 4}, **changes)
    with pytest.raises(RunError, match="paused at step 2: effective sample size"):
        on_policy.run(config)
    seen = [row["train/importance_ratio/reasoning"] for row in kept(started / "3-ratios")]
    assert seen[0] == pytest.approx(1.0, abs=1e-4)
    assert len(seen) == 2


def test_rollouts_that_age_over_an_anchor_are_dropped_and_counted(started):
    two = {"steps_per_round": 2, "max_staleness_steps": 1}
    on_policy.run(stage_three(started, "3-drop", rollouts=two, ce_anchor=0.4, budget={"steps": 5}))
    rows = kept(started / "3-drop")
    # own, own, anchor, own, anchor: nothing is split; the round of step 3 is never finished
    assert [row.get("rollout/staleness_steps") for row in rows] == [0, 1, None, 0, None]
    on_policy.run(stage_three(started, "3-drop2", rollouts=two, ce_anchor=0.5, budget={"steps": 3}))
    rows = kept(started / "3-drop2")
    assert [row.get("rollout/staleness_steps") for row in rows] == [0, None, 0]
    assert [row.get("rollout/dropped") for row in rows] == [0, None, 4]


def test_the_curriculum_goes_by_the_tokens_spent_on_completions(started):
    phases = [{"until": 0.2, "low": 1.0}, {"until": 1.0, "high": 1.0, "rollouts_per_prompt": 2}]
    rollouts = {"steps_per_round": 1, "max_staleness_steps": 0}
    config = stage_three(
        started,
        "3-curriculum",
        curriculum={"phases": phases},
        rollouts=rollouts,
        ce_anchor=0.25,
        budget={"tokens": 1200},
    )
    on_policy.run(config)
    spent = 0
    for row in kept(started / "3-curriculum"):
        if "rollout/staleness_steps" in row:
            effort = "low" if spent < 0.2 * 1200 * 0.75 else "high"
            assert row[f"rollout/count_{effort}"] == 4
            spent += row["train/tokens"]
    assert spent > 0.2 * 1200 * 0.75


def test_prompts_rendered_otherwise_than_in_training_are_refused(started):
    config = stage_three(started, "3-render", data=str(started / "other"))
    with pytest.raises(RunError, match="prompts differ from token 1"):
        on_policy.run(config)


def test_a_round_longer_than_the_staleness_limit_is_refused_before_it_runs(started):
    with pytest.raises(ConfigError, match="would drop rollouts of a round of 3 steps"):
        stage_three(started, "3-stale", rollouts={"max_staleness_steps": 1})


def test_the_dataset_itself_can_ask_the_questions(started):
    on_policy.run(stage_three(started, "3-pool", rollouts={"prompts": ""}, budget={"steps": 1}))
    known = set(Dataset(started / "data", "train").sample_ids)
    assert known
    assert np.isfinite(kept(started / "3-pool")[0]["train/loss/reasoning"])


def test_every_round_asks_new_questions(started, monkeypatch):
    asked = []
    write = LocalRollouts.round

    def watched(self, request):
        asked.append(request.first_prompt)
        return write(self, request)

    monkeypatch.setattr(LocalRollouts, "round", watched)
    on_policy.run(stage_three(started, "3-asked", budget={"steps": 8}))
    # the doctor's round, then twelve completions a round: one for each question at first, then two
    assert asked == [0, 0, 12]
