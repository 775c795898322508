"""A run trained for two steps: evaluated, exported and opened again."""

import json

import numpy as np
import pytest
import torch

from vpmoe.data.build import DataConfig, build_dataset
from vpmoe.data.dataset import Dataset
from vpmoe.data.harmony import RenderConfig, Renderer
from vpmoe.data.problems import generate, write_problems
from vpmoe.errors import CheckpointError, DataError
from vpmoe.evals.checkpoint import evaluate_checkpoint
from vpmoe.evals.suite import EvalConfig, ProblemsConfig, SamplingConfig
from vpmoe.export.hf import export_hf
from vpmoe.export.load import open_model
from vpmoe.stages.warm_start import WarmStartConfig, run
from vpmoe.train.config import BatchConfig, BudgetConfig
from vpmoe.vocabulary import STOP_TOKENS

RENDER = RenderConfig(system=False)


@pytest.fixture(scope="module")
def run_dir(tiny_student, tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    write_problems(root / "rows.parquet", generate(60, seed=1))
    data = DataConfig(
        input=str(root / "rows.parquet"), output=str(root / "data"),
        seq_len=128, valid_fraction=0.2, render=RENDER,
    )  # fmt: skip
    build_dataset(data)
    splits = [Dataset(root / "data", split) for split in ("train", "valid")]
    used = [np.unique(split.tokens(i)) for split in splits for i in range(len(split))]
    asked = [Renderer(RENDER).prompt(p.query) for p in generate(6, seed=0, split="held-out")]
    subset = tuple(np.unique(np.concatenate([*used, *asked, STOP_TOKENS])).tolist())
    student = tiny_student.config.model_copy(update={"vocab_subset": subset})
    config = WarmStartConfig(
        run=str(root / "run"),
        data=str(root / "data"),
        student=student,
        batch=BatchConfig(global_batch_size=2, micro_batch_size=2, seq_len=128),
        budget=BudgetConfig(steps=2),
    )
    run(config)
    return root / "run"


def test_evaluation_of_a_run_lies_beside_it_and_repeats(run_dir):
    config = EvalConfig(
        problems=ProblemsConfig(count=6), sampling=SamplingConfig(max_new_tokens=8), name="small"
    )
    report, path = evaluate_checkpoint(run_dir, config)
    assert path == run_dir / "eval-step-000002-small.json"
    assert json.loads(path.read_text()) == report.as_dict()
    assert report.model["step"] == 2
    again, same = evaluate_checkpoint(run_dir / "step-000002", config)
    assert (again.as_json(), same) == (report.as_json(), path)


def test_export_of_a_run_opens_with_the_same_logits_and_rendering(run_dir, tmp_path):
    result = export_hf(run_dir, tmp_path / "export")
    assert result.parity.is_exact
    trained, exported = open_model(run_dir), open_model(tmp_path / "export")
    assert trained.render == exported.render == RENDER
    assert exported.manifest["step"] == 2
    for name, tensor in trained.student.named_parameters():
        assert torch.equal(tensor, exported.student.get_parameter(name)), name


def test_what_is_no_checkpoint_is_refused(run_dir, tmp_path):
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        export_hf(tmp_path, tmp_path / "export")
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        evaluate_checkpoint(run_dir / "step-000001", EvalConfig())
    with pytest.raises(DataError, match="already there"):
        export_hf(run_dir, run_dir)
