"""A student that is its teacher: every KL must be next to nothing, by every path."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from tests.teachers.stand_in import invented, serve
from vpmoe.cli import main
from vpmoe.config import validate
from vpmoe.errors import TeacherError
from vpmoe.evals.noise import NoiseFloors, read_noise
from vpmoe.losses import OfflineLossConfig
from vpmoe.losses.distillation import DistillationConfig
from vpmoe.stages.examine_teacher import subject_of
from vpmoe.stages.noise import _floor, _inputs, _Student, measure_noise
from vpmoe.teachers.local import LocalTeacherConfig
from vpmoe.teachers.server import ServerTeacherConfig

DEMO_TEACHER = Path(__file__).resolve().parents[2] / "configs" / "demo" / "teacher"


def subject(dtype: str, sequences: int = 4):
    tree = {"path": str(DEMO_TEACHER), "dtype": dtype}
    return subject_of(validate(LocalTeacherConfig, tree, source="t"), sequences=sequences)


@pytest.fixture(scope="module")
def found():
    return measure_noise(subject("float32"))


def test_every_divergence_is_measured_by_every_path(found):
    divergences = {
        kind.model_fields["kind"].default
        for kind in get_args(get_args(OfflineLossConfig)[0])
        if issubclass(kind, DistillationConfig)
    }
    seen = {(f["loss"], f["path"], f["dtype"]) for f in found["floors"]}
    assert len(divergences) >= 5
    for dtype in ("float32", "bfloat16"):
        for path in ("process, top 8", "store, top_k 8", "store, set_coded 8", "states"):
            assert {(loss, path, dtype) for loss in divergences} <= seen
        for path in ("log-probs", "store, log-probs"):
            assert {("k1", path, dtype), ("k3", path, dtype)} <= seen
    assert found["labels"] > 100 and found["teacher"]["name"] == "teacher"


def test_the_floor_is_near_zero_and_higher_in_half_precision(found):
    largest = {"float32": 0.0, "bfloat16": 0.0}
    for floor in found["floors"]:
        if floor["loss"] != "k1":
            largest[floor["dtype"]] = max(largest[floor["dtype"]], abs(floor["nats"]))
    assert largest["float32"] < 1e-5
    assert largest["float32"] < largest["bfloat16"] < 1e-2


def test_same_states_give_exactly_nothing(found):
    same = [f for f in found["floors"] if f["path"] == "states" and f["dtype"] == "float32"]
    assert same and all(abs(f["nats"]) < 1e-6 for f in same)


def test_the_largest_is_a_mean_over_the_tokens_there_are():
    class ByLabel:
        kind = "by_label"

        def build(self):
            return lambda rows, scales: SimpleNamespace(loss_sums=rows.labels.double().sum()[None])

    labels = torch.cat([torch.zeros(64), torch.ones(32)]).long()
    student = _Student(torch.zeros(96, 2), torch.zeros(3, 2), labels)
    floor = _floor(ByLabel(), _inputs(student), "states", "float32")
    assert (floor.nats, floor.largest) == (pytest.approx(1 / 3), 1.0)


def test_a_server_needs_its_checkpoint_here_as_the_student():
    with serve(invented) as server:
        config = validate(
            ServerTeacherConfig, {"urls": [server.url], "model": "teacher"}, source="t"
        )
        with pytest.raises(TeacherError, match="own weights as a student"):
            measure_noise(subject_of(config, sequences=8))


def test_the_verb_writes_what_reports_read(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = tmp_path / "teacher.toml"
    table.write_text(f'kind = "local"\npath = "{DEMO_TEACHER}"\ndtype = "float32"\n')
    assert main.run(["teacher", "noise", str(table), "--sequences", "1"]) == 0
    said = capsys.readouterr().out
    assert "forward_kl, store, set_coded 8" in said and "noise.json" in said
    content = json.loads((tmp_path / "noise.json").read_text())
    assert content["schema"] == "vpmoe_noise_v1" and content["git_sha"]
    assert main.run(["teacher", "noise", str(table)]) == 1
    assert "already there" in capsys.readouterr().err
    floors = read_noise(tmp_path, {})
    assert isinstance(floors, NoiseFloors)
    expected = max(abs(f["nats"]) for f in content["floors"] if f["loss"] == "reverse_kl")
    assert floors.of("reverse_kl") == expected
    assert floors.of("cross_entropy") is None
    beside = read_noise(tmp_path / "run", {"targets": {"path": str(tmp_path)}})
    assert beside == floors
    assert read_noise(tmp_path / "run", {}) is None
