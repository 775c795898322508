import json

import numpy as np
import pytest

from tests.train.toy import STUDENT
from vpmoe.config import validate
from vpmoe.data.dataset import Dataset
from vpmoe.errors import CheckpointError, ConfigError, RunError
from vpmoe.stages.warm_start import WarmStartConfig, run
from vpmoe.storage.checkpoints import latest_checkpoint, read_checkpoint_manifest
from vpmoe.storage.runs import read_metrics


@pytest.fixture
def make_config(problems_dir, problem_vocab, tmp_path):
    def make(name="run", **changes) -> WarmStartConfig:
        tree = {
            "kind": "warm_start",
            "run": str(tmp_path / name),
            "data": str(problems_dir),
            "threads": 1,
            "student": {**STUDENT, "vocab_subset": problem_vocab, "init_std": 0.1},
            "batch": {"global_batch_size": 4, "micro_batch_size": 2, "seq_len": 256},
            "budget": {"steps": 8},
            "checkpoint": {"every_steps": 4},
            "valid": {"every_steps": 4, "documents": 8, "prompts": 2, "max_new_tokens": 8},
            **changes,
        }
        return validate(WarmStartConfig, tree, source="test")

    return make


def kept(run_dir) -> list[dict]:
    clocks = ("time/", "memory/", "tokens_per_s")
    return [
        {k: v for k, v in row.items() if not k.startswith(clocks)} for row in read_metrics(run_dir)
    ]


def test_the_student_learns_and_the_end_is_judged(make_config, tmp_path, problems_dir):
    summary = run(make_config())
    rows = kept(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[-1]["valid/loss/final"] < 0.97 * rows[3]["valid/loss/final"]
    assert rows[-1]["valid/format_no_end_pct"] + rows[-1]["valid/format_valid_pct"] <= 100
    assert summary["stop"]["plateau"]["holds"] is False
    assert summary["stop"]["format"]["holds"] is False
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    manifest = read_checkpoint_manifest(latest_checkpoint(tmp_path / "run"))
    identity = Dataset(problems_dir, "train").identity
    assert manifest["inputs"] == {"init": None, "data": identity}


def test_resuming_changes_nothing(make_config, tmp_path):
    config = make_config()
    run(config)
    expected = kept(tmp_path / "run")
    last = tmp_path / "run" / "step-000008"
    last.rename(last.with_name(".unfinished-step-000008"))
    run(config, resume=True)
    assert kept(tmp_path / "run") == expected


def test_next_stage_starts_from_a_run(make_config, tmp_path):
    first = make_config(budget={"steps": 2})
    run(first)
    config = make_config("next", init=first.run, student=None, budget={"steps": 1})
    run(config)
    before, after = kept(tmp_path / "run")[-1], kept(tmp_path / "next")[-1]
    assert after["valid/loss/final"] != before["valid/loss/final"]
    manifest = read_checkpoint_manifest(latest_checkpoint(tmp_path / "next"))
    assert manifest["inputs"]["init"]["path"] == first.run
    assert manifest["inputs"]["init"]["step"] == 2
    other = {**STUDENT, "vocab_subset": first.student.vocab_subset, "hidden_size": 32}
    with pytest.raises(CheckpointError, match="another student") as caught:
        run(make_config("third", init=first.run, student=other))
    assert "hidden_size: 16 → 32" in caught.value.message


def test_a_token_budget_counts_documents_not_padding(make_config, tmp_path):
    run(make_config(budget={"tokens": 3000}, valid={"documents": 0}))
    rows = kept(tmp_path / "run")
    seen = np.array([row["tokens_seen"] for row in rows])
    assert seen[-1] >= 0.9 * 3000
    assert seen[-2] < 3000


def test_wrong_settings_are_refused_together(make_config):
    with pytest.raises(ConfigError) as caught:
        make_config(student=None, budget={"tokens": 1, "steps": 1})
    said = [message for message, _ in caught.value.problems]
    assert any("set exactly one of tokens and steps" in message for message in said)
    with pytest.raises(ConfigError, match="there is nothing to train"):
        make_config(student=None)
    with pytest.raises(RunError, match="run is not set"):
        run(make_config().model_copy(update={"run": ""}))
