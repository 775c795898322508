import json

import pytest

from tests.train.toy import STUDENT
from vpmoe.config import validate
from vpmoe.stages.profile import ProfileSettings, run
from vpmoe.stages.warm_start import WarmStartConfig
from vpmoe.train.regions import REGIONS


@pytest.fixture(scope="module")
def summary(problems_dir, problem_vocab, tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    tree = {
        "kind": "warm_start",
        "run": str(folder / "run"),
        "data": str(problems_dir),
        "threads": 1,
        "peak_tflops": 0.1,
        "student": {**STUDENT, "vocab_subset": problem_vocab},
        "batch": {"global_batch_size": 4, "micro_batch_size": 2, "seq_len": 256},
        "budget": {"steps": 2},
    }
    config = validate(WarmStartConfig, tree, source="test")
    told = []
    settings = ProfileSettings(folder / "perf", warmup=1, steps=2, with_trace=True)
    found = run(config, settings, progress=lambda done, total: told.append((done, total)))
    return found, folder, told


def test_a_stage_is_profiled_on_its_own_steps(summary):
    found, folder, told = summary
    assert told == [(n, 5) for n in range(1, 6)]
    assert json.loads((folder / "perf" / "summary.json").read_text()) == json.loads(
        json.dumps(found)
    )
    assert found["tokens_per_step"] <= found["slots_per_step"] == 4 * 256
    speed = 1e3 * found["tokens_per_step"] / found["step_ms"]
    assert found["tokens_per_s"] == pytest.approx(speed)
    flops = speed * found["flops_per_token"]
    assert found["mfu_pct"] == pytest.approx(100 * flops / 0.1e12)
    assert set(found["regions_ms"]) == set(REGIONS)
    assert all(found["regions_ms"][name] > 0 for name in ("experts", "head + loss", "optimizer"))
    assert found["kernels"][0]["ms"] >= found["kernels"][-1]["ms"]


def test_memory_is_sampled_at_every_layer_both_ways(summary):
    found, _, _ = summary
    layers, micro_batches = STUDENT["num_layers"], 2
    assert len(found["memory"]["timeline"]) == 2 + 2 * layers * micro_batches
    times = [ms for ms, _ in found["memory"]["timeline"]]
    assert times == sorted(times)


def test_picture_and_trace_are_left_and_the_run_folder_is_not(summary):
    _, folder, _ = summary
    assert (folder / "perf" / "profile.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "perf" / "trace.json.gz").stat().st_size > 1_000
    assert not (folder / "run").exists()
