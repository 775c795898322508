import numpy as np
import pytest
import torch
import torch.distributed as dist

from vpmoe.errors import CheckpointError
from vpmoe.storage.checkpoints import (
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_model_tensors,
    read_checkpoint_manifest,
    read_shapes,
    remove_unfinished,
    save_checkpoint,
)
from vpmoe.storage.sharded import sharded


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def tensors():
    return {"weight": torch.arange(6.0).reshape(2, 3), "scalar": torch.tensor(7, dtype=torch.int64)}


def state_of(content):
    return {"model": {name: sharded(f"model.{name}", t) for name, t in content.items()}}


def save(run, step, **options):
    extra = {"seen": 5, "curve": np.array([1.5, 2.5]), "blob": b"\x00\x01", "nested": [{"a": None}]}
    return save_checkpoint(
        run, step, state_of(tensors()), extra=extra, manifest={"step": step}, **options
    )


def test_tensors_and_extras_come_back_exactly(tmp_path, one_rank):
    path = save(tmp_path, 3)
    assert path == tmp_path / "step-000003" == latest_checkpoint(tmp_path)
    blank = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
    state, extra = load_checkpoint(path, state_of(blank))
    for name, tensor in tensors().items():
        assert torch.equal(state["model"][name], tensor)
    assert extra["seen"] == 5
    assert extra["curve"].tolist() == [1.5, 2.5]
    assert extra["blob"] == b"\x00\x01"
    assert extra["nested"] == [{"a": None}]
    assert read_checkpoint_manifest(path)["step"] == 3


def test_model_is_read_without_a_process_group(tmp_path, one_rank):
    path = save(tmp_path, 3)
    dist.destroy_process_group()
    try:
        blank = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
        load_model_tensors(path, blank)
        assert torch.equal(blank["weight"], tensors()["weight"])
        assert read_shapes(path, "model.")["model.weight"] == ((2, 3), torch.float32)
    finally:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def test_another_model_is_refused(tmp_path, one_rank):
    path = save(tmp_path, 3)
    with pytest.raises(CheckpointError, match=r"weight is \(2, 3\), the model wants \(2, 4\)"):
        load_model_tensors(path, {"weight": torch.zeros(2, 4), "scalar": torch.tensor(0)})
    with pytest.raises(CheckpointError, match="1 tensors that the model lacks, first scalar"):
        load_model_tensors(path, {"weight": torch.zeros(2, 3)})
    with pytest.raises(CheckpointError, match="absent"):
        load_model_tensors(path, {"other": torch.zeros(2, 3)})
    with pytest.raises(CheckpointError, match="cannot load"):
        load_checkpoint(path, state_of({"missing": torch.zeros(1)}))


def test_only_complete_checkpoints_count(tmp_path, one_rank):
    first = save(tmp_path, 1)
    (tmp_path / "step-000002").mkdir()
    half = tmp_path / ".unfinished-step-000003"
    half.mkdir()
    (half / "__0_0.distcp").write_bytes(b"half")
    assert list_checkpoints(tmp_path) == [first]
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        read_checkpoint_manifest(tmp_path / "step-000002")
    remove_unfinished(tmp_path)
    assert not half.exists()


def test_a_cut_file_is_named(tmp_path, one_rank):
    path = save(tmp_path, 1)
    file = path / "__0_0.distcp"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[: size // 2])
    with pytest.raises(CheckpointError, match=f"{size // 2} bytes, it was written with {size}"):
        load_checkpoint(path, state_of(tensors()))


def test_the_last_ones_are_kept(tmp_path, one_rank):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-000003", "step-000004"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000003", "step-000004"]


def test_a_step_is_never_overwritten(tmp_path, one_rank):
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="already there"):
        save(tmp_path, 1)
